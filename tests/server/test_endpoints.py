"""What an endpoint file may hold, and in which words another one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_server.endpoints import BUILT_IN, EndpointConfig, EndpointError, WorkerTerms, read_endpoint, read_endpoints
from mixtral_server.settings import shipped


def written(folder: Path, text: str, name: str = "one.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_shipped_endpoint_is_mixtral_chat_with_the_documented_defaults() -> None:
    endpoints = read_endpoints(shipped("server/endpoints", "endpoints"))
    assert list(endpoints) == ["mixtral_chat"]
    chat = endpoints["mixtral_chat"]
    assert (chat.default_max_tokens, chat.temperature, chat.coalesce_ms) == (512, 0.8, 0)


def test_shipped_file_says_nothing_else_than_the_defaults_of_the_table() -> None:
    chat = read_endpoints(shipped("server/endpoints", "endpoints"))["mixtral_chat"]
    names = {"aliases": ("mixtral-chat",), "worker": WorkerTerms(job_type="mixtral")}  # by which AIME's clients and workers know it
    own = EndpointConfig(name="mixtral_chat", title=chat.title, description=chat.description, **names)  # type: ignore[arg-type]
    assert chat == own


def test_shipped_file_and_what_is_built_in_are_the_same() -> None:
    assert read_endpoints(shipped("server/endpoints", "endpoints")) == {BUILT_IN.name: BUILT_IN}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = 'Chat'", r"name: String should match pattern .* got 'Chat'"),
        ("title = 'x'", r"name: Field required"),
        ("name = 'a'\ntemprature = 1", r"temprature: Extra inputs are not permitted; got 1"),
        ("name = 'a'\ntemperature = 3", r"temperature: Input should be less than or equal to 2; got 3"),
        ("name = 'a'\ntemperature = nan", r"temperature: Input should be a finite number; got nan"),
        ("name = 'a'\nmax_tokens = 100", r"default_max_tokens is 512, above max_tokens 100; lower the one or raise the other"),
        ("name = ", r"is not TOML"),
    ],
)
def test_wrong_endpoint_file_is_refused_with_file_field_and_what_was_given(tmp_path: Path, text: str, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(EndpointError, match=sentence) as refused:
        read_endpoint(path)
    assert str(path) in str(refused.value)


def test_folder_without_endpoint_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="holds no endpoint file"):
        read_endpoints(tmp_path)
    with pytest.raises(EndpointError, match="is not a folder"):
        read_endpoints(tmp_path / "none")


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "name = 'a'")
    written(tmp_path, "name = 'a'", "two.toml")
    with pytest.raises(EndpointError, match=r"two\.toml: the name a is taken"):
        read_endpoints(tmp_path)
    written(tmp_path, "name = 'b'\naliases = ['c', 'a']", "two.toml")
    with pytest.raises(EndpointError, match=r"two\.toml: the name a is taken"):
        read_endpoints(tmp_path)
