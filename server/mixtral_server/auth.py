"""Who is calling: a key's holder or a visitor of the page, and whether they may.

Decides scopes, the keys held in memory, the visitor's cookie, where a visitor's writes may come from, whose rates a
request is held to. Leaves the table of keys to accounts.py, what is asked of whom to routes/ and the rates' buckets to the queue.

Keys live in memory as one snapshot of the table, read anew every key_refresh_s: a wrong key never reaches SQL, a revoked one is refused
everywhere within two rounds, and while the database is away the last snapshot holds for key_stale_s.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from mixtral_server.apikeys import NO_LIMITS, ApiKey, KeyLimits, Scope, hash_of
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import NotAllowed, NotAuthenticated, Unavailable
from mixtral_server.rates import Rate
from mixtral_server.settings import Settings

log = logging.getLogger(__name__)

COOKIE = "mixtral_visitor"
SHORTEST_LOOK_S = 0.1
COOKIE_LIFE_S = 30 * 86_400
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_KEY_HINT = "send `Authorization: Bearer <key>`; keys are made with `mixtral-server keys create`"


@dataclass(frozen=True)
class Caller:
    """Who a request is from. owner is whose jobs they see; key_id is None for a visitor."""

    owner: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    endpoints: frozenset[str] = frozenset()
    weight: float = 1.0
    limits: KeyLimits = NO_LIMITS

    @property
    def is_visitor(self) -> bool:
        return self.key_id is None

    def may_use(self, endpoint: str) -> bool:
        return not self.endpoints or endpoint in self.endpoints


class KeyRing:
    """The live keys in memory, read anew by `keep_fresh`."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Sequence[ApiKey]]],
        settings: Settings,
        clock: Callable[[], float],
        away: tuple[type[Exception], ...],
    ) -> None:
        """read: the live keys from SQL; clock: monotonic seconds; away: what read raises while the database is away."""
        self._read = read
        self._settings = settings
        self._clock = clock
        self._away = away
        self._by_hash: dict[str, ApiKey] = {}
        self._known: dict[str, ApiKey] = {}  # by the secret itself: those of this snapshot that were asked for
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._next_look_at = clock()

    @property
    def age_s(self) -> float | None:
        """Seconds since the table was last read; None before the first time."""
        return None if self._read_at is None else self._clock() - self._read_at

    async def refresh(self) -> None:
        """Raises what the database raises."""
        asked_at = self._clock()
        self._by_hash = {key.sha256: key for key in await self._read()}
        self._known = {}
        self._read_at = asked_at

    async def keep_fresh(self) -> None:
        """Runs until cancelled."""
        was_away = False
        while True:
            await asyncio.sleep(self._settings.key_refresh_s)
            try:
                await self.refresh()
            except self._away as error:
                if not was_away:
                    log.warning(
                        "event=database_away keys_age_s=%.0f stale_after_s=%.0f error=%r",
                        self.age_s or 0,
                        self._settings.key_stale_s,
                        error,
                    )
                was_away = True
            else:
                if was_away:
                    log.info("event=database_back")
                was_away = False

    async def find(self, secret: str) -> ApiKey | None:
        """The live key with this secret. Raises Unavailable when the snapshot is too old to go by."""
        if secret not in self._known:
            wanted = hash_of(secret)
            if wanted not in self._by_hash:
                await self._look_again()  # it may have been made a moment ago
            if (key := self._by_hash.get(wanted)) is not None:
                self._known[secret] = key
        if self.age_s is None or self.age_s > self._settings.key_stale_s:
            raise Unavailable(
                f"the database with the keys has been away for more than {self._settings.key_stale_s:.0f} s; try again when it is back",
                retry_after_s=5,
            )
        return self._known.get(secret)

    async def _look_again(self) -> None:
        """A snapshot that began after this call. Guessing costs the database ten reads a second, however many guess."""
        asked_at = self._clock()
        async with self._reading:
            if self._read_at is None or self._read_at < asked_at:
                await asyncio.sleep(max(0.0, self._next_look_at - self._clock()))
                self._next_look_at = self._clock() + SHORTEST_LOOK_S
                try:
                    await self.refresh()
                except self._away as error:
                    log.debug("event=database_away error=%r", error)  # keep_fresh says it aloud, once


class Auth:
    def __init__(self, ring: KeyRing, cookie_secret: bytes, settings: Settings, wall_clock: Callable[[], float]) -> None:
        """cookie_secret: 256 bits that all replicas share; wall_clock: unix seconds."""
        self._ring = ring
        self._secret = cookie_secret
        self._settings = settings
        self._wall_clock = wall_clock
        self._trusted = [ipaddress.ip_network(part.strip(), strict=False) for part in settings.trusted_proxies.split(",") if part.strip()]

    async def caller(self, request: web.Request, scope: Scope) -> Caller:
        """Who asks, when they may do what needs scope. Raises NotAuthenticated, NotAllowed, Unavailable."""
        header = request.headers.get("Authorization")
        if header is not None:
            caller = await self._key_holder(header)
        elif self._settings.is_page_public and COOKIE in request.cookies:
            caller = self._visitor(request)
        else:
            raise NotAuthenticated(f"no API key was given; {_KEY_HINT}")
        if scope not in caller.scopes:
            has = " and ".join(sorted(caller.scopes)) or "no"
            raise NotAllowed(f"this route needs a key with scope {scope}; the one given has scope {has}")
        return caller

    async def _key_holder(self, header: str) -> Caller:
        kind, _, secret = header.strip().partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise NotAuthenticated(f"the Authorization header must be `Bearer <key>`; {_KEY_HINT}")
        key = await self._ring.find(secret.strip())
        if key is None:
            raise NotAuthenticated(f"this API key is unknown or revoked; {_KEY_HINT}")
        return Caller(key.user_id, key.scopes, key.id, key.endpoints, key.weight, key.limits)

    # ---- visitors of the page

    def new_cookie(self) -> str:
        """`<visitor>.<issued>.<signature>`"""
        unsigned = f"v{secrets.token_hex(8)}.{int(self._wall_clock())}"
        return f"{unsigned}.{self._sign(unsigned)}"

    def visitor_of(self, request: web.Request) -> str | None:
        """The visitor that the cookie names; None when there is no cookie, or it is forged or too old."""
        unsigned, _, signature = request.cookies.get(COOKIE, "").rpartition(".")
        visitor, _, issued = unsigned.partition(".")
        # signed before anything of it is believed
        if not hmac.compare_digest(self._sign(unsigned).encode(), signature.encode("utf-8", "surrogateescape")):
            return None
        return visitor if self._wall_clock() - int(issued) < COOKIE_LIFE_S else None

    def _visitor(self, request: web.Request) -> Caller:
        visitor = self.visitor_of(request)
        if visitor is None:
            raise NotAuthenticated("the page's cookie is too old or was not made here; reload the page")
        if request.method not in _SAFE_METHODS:
            check_same_origin(request)
        if self._settings.is_loopback and not self._settings.public_page_on_public_host:
            check_local_name(request, self._settings.host)
        return Caller(visitor, frozenset({"client"}))

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    def rates(self, request: web.Request, caller: Caller, endpoint: EndpointConfig) -> tuple[Rate, ...]:
        """The rates that a new job of the caller's counts against, the caller's own last."""
        if caller.key_id is None:
            address = network_of(self.address_of(request))
            return (
                Rate("address", address, self._settings.address_requests_per_minute),
                Rate("visitor", caller.owner, self._settings.visitor_requests_per_minute, endpoint.tokens_per_minute),
            )
        of_key = caller.limits
        requests = endpoint.requests_per_minute if of_key.requests_per_minute is None else of_key.requests_per_minute
        tokens = endpoint.tokens_per_minute if of_key.tokens_per_minute is None else of_key.tokens_per_minute
        return (Rate("key", caller.key_id, requests, tokens),) if requests or tokens else ()

    def address_of(self, request: web.Request) -> str:
        """The client's address: the peer's, or the nearest one in X-Forwarded-For that is not a trusted proxy."""
        hops = [hop.strip() for value in request.headers.getall("X-Forwarded-For", []) for hop in value.split(",")]
        address = request.remote or "unknown"
        while hops and self._is_trusted(address):
            address = hops.pop()
        return address

    def _is_trusted(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._trusted)


def network_of(address: str) -> str:
    """What one household or machine holds: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def check_same_origin(request: web.Request) -> None:
    """A write with the cookie must come from our own page, by what the browser says of it. Raises NotAllowed."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    if origin is not None:
        if urlsplit(origin).netloc.lower() == request.host.lower():
            return
    elif site == "same-origin":
        return
    came_from = (origin or site or "no Origin header")[:100]
    raise NotAllowed(
        f"a visitor's chats must be started by this server's own page, http(s)://{request.host[:100]}; this request came from {came_from}"
    )


def check_local_name(request: web.Request, host: str) -> None:
    """On a loopback host, the page answers to local names only: another site must not reach it by a name of its own (DNS rebinding)."""
    try:
        name = urlsplit(f"//{request.host}").hostname or ""
    except ValueError:
        name = ""
    if name not in ("localhost", "127.0.0.1", "::1", host):
        raise NotAllowed(f"without a key this server answers to localhost, 127.0.0.1 and [::1] only; the request named {name[:100]!r}")
