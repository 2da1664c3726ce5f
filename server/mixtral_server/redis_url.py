"""What --redis_url may say: one Redis, one behind Sentinels, or a Cluster; plain or over TLS.

Decides the forms, and what is refused in one sentence that never repeats a secret. Leaves connecting to redis_client.py. Pure: it opens
no file and no connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

FORMS: Mapping[str, str] = {
    "unix": "unix:///run/redis/redis.sock?db=0",
    "redis": "redis://user:password@host:6379/0",
    "rediss": "rediss://user:password@host:6379/0?ssl_ca_certs=/etc/redis/ca.crt",
    "redis+sentinel": "redis+sentinel://user:password@host1:26379,host2:26379,host3:26379/mymaster/0",
    "rediss+sentinel": "rediss+sentinel://user:password@host1:26379,host2:26379,host3:26379/mymaster/0?ssl_ca_certs=/etc/redis/ca.crt",
    "redis+cluster": "redis+cluster://user:password@host1:6379,host2:6379,host3:6379",
    "rediss+cluster": "rediss+cluster://user:password@host1:6379,host2:6379,host3:6379?ssl_ca_certs=/etc/redis/ca.crt",
}
"""Scheme → its right form, as it is shown to who got it wrong. User, password, port and database may be left out."""

TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
REDIS_PORT, SENTINEL_PORT = 6379, 26379
MAX_DATABASE_DIGITS = 6


class RedisUrlError(ValueError):
    """A URL that cannot be used; the message is a sentence with the right form and without any secret."""


@dataclass(frozen=True)
class TlsFiles:
    """How a rediss:// connection is made sure of. Without ca_file the system's own authorities are asked."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    verify: bool = True
    check_hostname: bool = True


@dataclass(frozen=True)
class Login:
    """Empty: none. A password without a user is the default user's."""

    user: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True)
class RedisUrl:
    """A URL taken apart. hosts: of the Redis, the Sentinels or some of the Cluster's nodes; empty for a unix socket."""

    kind: Literal["socket", "one", "sentinel", "cluster"]
    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    database: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()
    tls: TlsFiles | None = None

    @property
    def shown(self) -> str:
        """For logs and people: no user, no password, no options."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        rest = self.path or (f"/{self.master}" if self.master else "")
        return f"{self.scheme}://{hosts}{rest}"


def parse_redis_url(text: str) -> RedisUrl:
    """Raises RedisUrlError."""
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme not in FORMS:
        raise RedisUrlError(
            f"--redis_url must begin with {', '.join(f'{one}://' for one in list(FORMS)[:-1])} or {list(FORMS)[-1]}://; "
            + (f"got {scheme[:20]}://" if scheme else "what was given has no such beginning")
        )
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise _wrong(scheme, "cannot be read: a [ without its ]") from error
    if parts.fragment:
        raise _wrong(scheme, "has a # in it; write it as %23 in a user or password")
    login = _login(parts)
    options = _options(scheme, parts)
    tls = _tls(scheme, options)
    if scheme == "unix":
        if not parts.path or parts.netloc.rpartition("@")[2]:
            raise _wrong(scheme, "needs the whole path of a socket after its three slashes")
        return RedisUrl("socket", scheme, path=unquote(parts.path), database=_database(scheme, options.get("db", "0")), login=login)
    port = SENTINEL_PORT if scheme.endswith("sentinel") else REDIS_PORT
    hosts = tuple(_host(scheme, one, port) for one in parts.netloc.rpartition("@")[2].split(","))
    words = [unquote(word) for word in parts.path.strip("/").split("/")] if parts.path.strip("/") else []
    if scheme.endswith("cluster"):
        if words not in ([], ["0"]):
            raise _wrong(scheme, "names a database, and a Cluster has none but 0")
        return RedisUrl("cluster", scheme, hosts, login=login, tls=tls)
    if scheme.endswith("sentinel"):
        if len(words) not in (1, 2):
            raise _wrong(scheme, "must name the master after the hosts")
        sentinel_login = Login(options.get("sentinel_username", ""), options.get("sentinel_password", ""))
        database = _database(scheme, words[1] if len(words) == 2 else options.get("db", "0"))
        return RedisUrl("sentinel", scheme, hosts, "", words[0], database, login, sentinel_login, tls)
    if len(hosts) > 1:
        raise _wrong(scheme, f"names {len(hosts)} hosts; several go with {scheme}+sentinel:// or {scheme}+cluster://")
    if len(words) > 1:
        raise _wrong(scheme, "has more than the number of a database after its host")
    return RedisUrl("one", scheme, hosts, database=_database(scheme, words[0] if words else options.get("db", "0")), login=login, tls=tls)


def _wrong(scheme: str, what: str) -> RedisUrlError:
    return RedisUrlError(f"--redis_url {what}; the right form is {FORMS[scheme]}")


def _login(parts: SplitResult) -> Login:
    userinfo = parts.netloc.rpartition("@")[0]
    user, _, password = userinfo.partition(":")
    return Login(unquote(user), unquote(password))


def _host(scheme: str, text: str, port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, given = parts.hostname, parts.port
    except ValueError:
        raise _wrong(scheme, "has a port that is none: 1 to 65,535") from None
    if not host or given == 0:
        raise _wrong(scheme, "has an empty host" if not host else "has port 0: 1 to 65,535")
    return host, given or port


def _options(scheme: str, parts: SplitResult) -> dict[str, str]:
    known = [*(TLS_OPTIONS if scheme.startswith("rediss") else ()), *(SENTINEL_OPTIONS if scheme.endswith("sentinel") else ())]
    known += [] if scheme.endswith("cluster") else ["db"]
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in known:
            # Not named: it may be the rest of a password that has a ? in it.
            raise _wrong(scheme, f"has an option that {scheme}:// does not take, known are {', '.join(known) or 'none'}")
    return options


def _tls(scheme: str, options: Mapping[str, str]) -> TlsFiles | None:
    if not scheme.startswith("rediss"):
        return None
    cert, key = options.get("ssl_certfile", ""), options.get("ssl_keyfile", "")
    if bool(cert) != bool(key):
        raise _wrong(scheme, "has one of ssl_certfile and ssl_keyfile; a client's certificate needs both")
    verify = _word(scheme, options, "ssl_cert_reqs", {"required": True, "none": False})
    check = _word(scheme, options, "ssl_check_hostname", {"true": True, "false": False})
    return TlsFiles(options.get("ssl_ca_certs", ""), cert, key, verify, verify and check)


def _word(scheme: str, options: Mapping[str, str], name: str, words: Mapping[str, bool]) -> bool:
    """The first word is the default."""
    given = options.get(name, next(iter(words)))
    if given not in words:
        raise _wrong(scheme, f"has another {name} than {' or '.join(words)}")
    return words[given]


def _database(scheme: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DATABASE_DIGITS):
        raise _wrong(scheme, "has something other than the number of a database at its end")
    return int(text)
