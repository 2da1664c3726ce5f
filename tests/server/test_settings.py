"""Where a setting comes from, what is refused and in which words, and that documents name every one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from mixtral_server.endpoints import EndpointConfig
from mixtral_server.settings import SettingError, Settings, knobs, load_settings, read_env_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
ENV_EXAMPLE = (ROOT / ".env.example").read_text()


def test_flag_wins_over_environment_over_env_file_over_default(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("MIXTRAL_PORT=1001\nMIXTRAL_HOST=file\nMIXTRAL_LOG_LEVEL=error\n")
    settings = load_settings({"port": "1003"}, {"MIXTRAL_PORT": "1002", "MIXTRAL_HOST": "environment"}, env_file)
    assert (settings.port, settings.host, settings.log_level, settings.ping_s) == (1003, "environment", "error", 12.0)


def test_missing_env_file_is_no_error(tmp_path: Path) -> None:
    assert load_settings({}, {}, tmp_path / ".env") == Settings()


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("port", "70000", "--port must be 0 to 65,535; got 70000"),
        ("port", "http", "--port must be a whole number, 0 to 65,535; got 'http'"),
        ("ping_s", "nan", "--ping_s must be 0.05 to 60 s; got nan"),
        ("ping_s", "-1", "--ping_s must be 0.05 to 60 s; got -1"),
        ("log_level", "loud", "--log_level must be debug, info, warning or error; got 'loud'"),
        ("public_page", "maybe", "--public_page must be true or false; got 'maybe'"),
        ("database_url", "mysql://x", "--database_url must begin with sqlite+aiosqlite: or postgresql+asyncpg:; got 'mysql'"),
        ("redis_url", "redis://h:0", "--redis_url has port 0: 1 to 65,535; the right form is redis://user:password@host:6379/0"),
        (
            "trusted_proxies",
            "10.0.0.0/8, proxy",
            "--trusted_proxies must be addresses or networks such as 10.0.0.0/8, comma-separated; got 'proxy'",
        ),
    ],
)
def test_wrong_value_is_refused_with_flag_limit_and_what_was_given(name: str, given: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        load_settings({name: given}, {})


def test_wrong_value_names_the_variable_or_file_it_stands_in(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^MIXTRAL_PORT must be"):
        load_settings({}, {"MIXTRAL_PORT": "x"})
    env_file = tmp_path / ".env"
    env_file.write_text("MIXTRAL_PORT=x")
    with pytest.raises(SettingError, match=rf"^MIXTRAL_PORT in {re.escape(str(env_file))} must be"):
        load_settings({}, {}, env_file)


def test_env_file_takes_comments_quotes_and_export_and_refuses_other_lines(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("# a comment\n\nexport A='1 2'\nB=\"x=y\"\nC = 3\n")
    assert read_env_file(env_file) == {"A": "1 2", "B": "x=y", "C": "3"}
    env_file.write_text("A=1\njust words\n")
    with pytest.raises(SettingError, match=r"line 2 must be NAME=value; got 'just words'"):
        read_env_file(env_file)


def test_every_default_keeps_its_own_limits() -> None:
    for name in knobs():
        default = getattr(Settings(), name)
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert load_settings({name: text}, {}) == Settings(), name


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_page_is_public_on_loopback_when_said_once(host: str) -> None:
    assert replace(Settings(), host=host, public_page=True).is_page_public


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "chat.example.org"])
def test_page_on_public_host_is_public_only_when_said_twice(host: str) -> None:
    assert not replace(Settings(), host=host, public_page=True).is_page_public
    assert replace(Settings(), host=host, public_page=True, public_page_on_public_host=True).is_page_public
    assert not replace(Settings(), host=host, public_page_on_public_host=True).is_page_public


def rows_of(section: str) -> dict[str, list[str]]:
    """Rows of the tables under a heading of docs/configuration.md, by the name in their first cell."""
    text = CONFIGURATION.split(f"## {section}")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_configuration_page_lists_every_setting_with_its_default_and_limits() -> None:
    rows = rows_of("Settings")
    assert list(rows) == list(knobs())
    for name, knob in knobs().items():
        default = getattr(Settings(), name)
        shown = {"True": "true", "False": "false", "": "empty"}.get(str(default), str(default))
        assert rows[name] == [f"`{shown}`" if shown != "empty" else "empty", knob.unit, knob.limits, knob.sentence], name


def test_configuration_page_lists_every_field_of_endpoint_files_with_its_default() -> None:
    rows = rows_of("Endpoint files")
    assert list(rows) == list(EndpointConfig.model_fields)
    for name, field in EndpointConfig.model_fields.items():
        assert field.description is not None
        assert rows[name][-1].startswith(field.description), name
        is_empty = field.default in ("", (), {}) or isinstance(field.default, BaseModel)
        default = "required" if field.is_required() else "empty" if is_empty else f"`{field.default}`"
        assert rows[name][0] == default, name


def test_env_example_sets_nothing_and_names_only_settings() -> None:
    named = re.findall(r"^# ?(MIXTRAL_\w+)=", ENV_EXAMPLE, re.M)
    assert named
    assert [name for name in named if name.removeprefix("MIXTRAL_").lower() not in knobs()] == []
    assert all(line.startswith("#") or not line.strip() for line in ENV_EXAMPLE.splitlines())
