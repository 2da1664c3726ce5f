"""Every knob of the server in one table: name, default, unit, limits, one sentence.

Decides what may be set and where a value comes from: flag, then MIXTRAL_* in the environment, then the .env file of the
working directory, then the default. Flag, field and variable are one word: --client_grace_s, client_grace_s,
MIXTRAL_CLIENT_GRACE_S. Leaves to cli.py what is done with them and to endpoints.py what holds for one queue alone.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from mixtral_server.redis_url import RedisUrlError, parse_redis_url

ENVIRONMENT_PREFIX = "MIXTRAL_"
_CHECKOUT = Path(__file__).resolve().parents[2]
_INSTALLED = Path(sys.prefix) / "share" / "mixtral-chat"


class SettingError(ValueError):
    """A setting that cannot be used; the message names where it stood, its limit, what was given and what to do."""


@dataclass(frozen=True)
class Knob:
    """What the table says of one setting beside its name, type and default."""

    sentence: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()

    @property
    def limits(self) -> str:
        if self.one_of:
            return ", ".join(self.one_of[:-1]) + f" or {self.one_of[-1]}"
        if self.least is not None and self.most is not None:
            return f"{self.least:,} to {self.most:,}"
        return f"{self.least:,} or more" if self.least is not None else ""


def knob(
    default: Any,
    sentence: str,
    *,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
) -> Any:
    return field(default=default, metadata={"knob": Knob(sentence, unit, least, most, one_of)})


@dataclass(frozen=True)
class Settings:
    # where it listens and what it stands on
    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 or :: is every interface of this machine")
    port: int = knob(7777, "TCP port to listen on; 0 takes a free one", least=0, most=65_535)
    processes: int = knob(1, "server processes on this machine that share the port, each with one event loop", least=1, most=64)
    data_dir: str = knob("data", "folder for keys.env, SQLite and the embedded Redis; made when missing")
    redis_url: str = knob(
        "", "Redis 6.2 or newer: unix://, redis://, redis+sentinel:// or redis+cluster://, rediss for TLS; empty: start our own in data_dir"
    )
    durability: str = knob(
        "standard",
        "how often our own Redis writes to disk; docs/operations.md says what survives what",
        one_of=("memory", "standard", "strict"),
    )
    database_url: str = knob("", "SQLAlchemy URL, sqlite+aiosqlite: or postgresql+asyncpg:; empty: SQLite in data_dir")
    endpoint_dir: str = knob("", "folder of endpoint files (*.toml); empty: the shipped one")
    frontend_dir: str = knob("", "folder of the page (index.html and its files); empty: the shipped one")
    javascript_dir: str = knob("", "folder of the JavaScript client that the page uses; empty: the shipped one")
    log_level: str = knob("info", "least level that is logged", one_of=("debug", "info", "warning", "error"))

    # who may come in
    public_page: bool = knob(False, "let visitors of the page chat without a key, on a loopback host")
    public_page_on_public_host: bool = knob(False, "say it twice: public_page on a host that is not loopback as well")
    visitor_requests_per_minute: int = knob(20, "chats one visitor of the page may start", unit="1/min", least=1, most=100_000)
    address_requests_per_minute: int = knob(120, "chats all visitors from one address may start", unit="1/min", least=1, most=1_000_000)
    trusted_proxies: str = knob("", "addresses or networks, comma-separated, whose X-Forwarded-For is believed")
    key_refresh_s: float = knob(
        2.0, "how often keys are read anew; a revoked key is refused after twice this at most", unit="s", least=0.1, most=2.5
    )
    key_stale_s: float = knob(300.0, "how long keys stay good while the database is away", unit="s", least=5, most=86_400)

    # what it takes from a connection
    body_limit_bytes: int = knob(4 * 2**20, "largest body of a client's request", unit="bytes", least=1024, most=2**30)
    worker_body_limit_bytes: int = knob(32 * 2**20, "largest body of a worker's request", unit="bytes", least=1024, most=2**30)
    header_timeout_s: float = knob(10.0, "a new connection must have sent a whole request head by then", unit="s", least=0.1, most=600)
    body_timeout_s: float = knob(20.0, "a body must have arrived by then", unit="s", least=0.1, most=3600)
    write_timeout_s: float = knob(
        30.0, "a reader that takes nothing for so long is dropped; its job is kept", unit="s", least=0.1, most=3600
    )
    keepalive_s: float = knob(75.0, "an idle connection is closed after this", unit="s", least=1, most=3600)
    max_connections: int = knob(10_000, "open connections in all; one more is closed at once", least=1, most=1_000_000)
    max_connections_per_address: int = knob(2_000, "open connections of one address; one more is closed at once", least=1, most=1_000_000)

    # how it answers
    client_grace_s: float = knob(
        15.0, "how long the job of an OpenAI call outlives its client; 0 cancels at once", unit="s", least=0, most=86_400
    )
    head_hold_s: float = knob(
        10.0, "how long a stream's head waits for its first token, so that early errors are HTTP statuses", unit="s", least=0, most=60
    )
    ping_s: float = knob(12.0, "a stream with nothing to say sends a comment this often", unit="s", least=0.05, most=60)
    worker_poll_s: float = knob(25.0, "how long an idle worker's turn waits for work", unit="s", least=0, most=60)
    worker_claim_s: float = knob(5.0, "how often a waiting turn claims anew, which renews the lease", unit="s", least=0.05, most=5)
    worker_offences: int = knob(
        10, "with so many offences within ten minutes of each other a worker's session is cut; docs/operations.md", least=1, most=1_000_000
    )
    ready_delay_s: float = knob(1.0, "after SIGTERM, how long /readyz says 503 before the port closes", unit="s", least=0, most=60)
    shutdown_grace_s: float = knob(20.0, "after SIGTERM, how long OpenAI calls may finish", unit="s", least=0, most=3600)
    history_days: int = knob(365, "how long finished jobs stay in the database; 0 keeps them for ever", unit="days", least=0, most=36_500)

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser().absolute()

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_path / 'mixtral.sqlite3'}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_page_public(self) -> bool:
        return self.public_page and (self.is_loopback or self.public_page_on_public_host)


def shipped(checkout_path: str, installed_name: str) -> Path:
    """A folder that comes with the project: beside the source in a checkout, under share/mixtral-chat of an installation."""
    beside = _CHECKOUT / checkout_path
    return beside if beside.is_dir() else _INSTALLED / installed_name


def knobs() -> dict[str, Knob]:
    """The table by name, in its order."""
    return {one.name: one.metadata["knob"] for one in fields(Settings)}


def load_settings(flags: Mapping[str, str], environment: Mapping[str, str], env_file: Path | None = None) -> Settings:
    """Settings from flags (name → text as typed), then environment, then env_file. Raises SettingError with one sentence."""
    from_file = read_env_file(env_file) if env_file is not None and env_file.is_file() else {}
    values = {}
    for name in knobs():
        variable = ENVIRONMENT_PREFIX + name.upper()
        for text, origin in (
            (flags.get(name), f"--{name}"),
            (environment.get(variable), variable),
            (from_file.get(variable), f"{variable} in {env_file}"),
        ):
            if text is not None:
                values[name] = parse(name, text, origin)
                break
    settings = Settings(**values)
    _check_together(settings)
    return settings


def parse(name: str, text: str, origin: str) -> Any:
    """One value from its text. Raises SettingError naming origin, limit and what was given."""
    rule, kind = knobs()[name], get_type_hints(Settings)[name]
    if kind is bool:
        return _parse_bool(text, origin)
    if kind is str:
        if rule.one_of and text not in rule.one_of:
            raise SettingError(f"{origin} must be {rule.limits}; got {text!r}")
        return text
    unit = f" {rule.unit}" if rule.unit else ""
    try:
        value = kind(text.replace("_", ""))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise SettingError(f"{origin} must be {what}, {rule.limits}{unit}; got {text!r}") from None
    # written so that NaN fails too
    if not ((rule.least is None or value >= rule.least) and (rule.most is None or value <= rule.most)):
        raise SettingError(f"{origin} must be {rule.limits}{unit}; got {text}")
    return value


def _parse_bool(text: str, origin: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0", ""):
        return False
    raise SettingError(f"{origin} must be true or false; got {text!r}")


def _check_together(settings: Settings) -> None:
    """What one knob alone cannot tell."""
    url = settings.database_url
    if url and not url.startswith(("sqlite+aiosqlite:", "postgresql+asyncpg:")):
        scheme = url.partition(":")[0]
        raise SettingError(f"--database_url must begin with sqlite+aiosqlite: or postgresql+asyncpg:; got {scheme!r}")
    if settings.redis_url:
        try:
            parse_redis_url(settings.redis_url)
        except RedisUrlError as error:
            raise SettingError(str(error)) from None
    for text in filter(None, (part.strip() for part in settings.trusted_proxies.split(","))):
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise SettingError(
                f"--trusted_proxies must be addresses or networks such as 10.0.0.0/8, comma-separated; got {text!r}"
            ) from None


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=value lines; # begins a comment line, an `export ` before the name and quotes around the value are taken off."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").partition("=")
        if not equals or not name.strip():
            raise SettingError(f"{path} line {number} must be NAME=value; got {line[:40]!r}")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name.strip()] = value
    return found
