"""Connections: how many are taken, how long a silent one is kept, what is said to a caller that does not speak HTTP.

Decides these by a subclass of aiohttp's own connection. Leaves requests to aiohttp and answers.py.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from mixtral_server.answers import error_response, word
from mixtral_server.auth import network_of
from mixtral_server.errors import RequestRefused, ServiceError
from mixtral_server.metrics import Metrics
from mixtral_server.open_files import allow_open_files
from mixtral_server.settings import Settings

log = logging.getLogger(__name__)


BACKLOG = 1024
ACCEPTED_AT_ONCE = 16
"""asyncio accepts so many in a row before the first of them can be refused, and fails, loudly, where they are more than there are files."""
OTHER_FILES = 256
"""Open files that are no connection let in: Redis, SQL, files on their way in or out, connections about to be refused."""
SEND_BUFFER_BYTES = 128 * 1024


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """is_shared: beside other processes of this user that say so too. Raises OSError."""
    listening = socket.create_server(
        (host, port), family=_family(host, port), backlog=BACKLOG, dualstack_ipv6=_is_dual(host), reuse_port=is_shared
    )
    # Every connection takes it over: what the kernel keeps for a reader that takes nothing would else grow to 4 MiB each.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return listening


def hold(host: str, port: int) -> socket.socket:
    """Keep a shared port without taking connections. Raises OSError."""
    held = socket.socket(_family(host, port))
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if held.family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not _is_dual(host))
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


def _is_dual(host: str) -> bool:
    return host == "::" and socket.has_dualstack_ipv6()


def connection_options(settings: Settings) -> dict[str, Any]:
    return {"keepalive_timeout": settings.keepalive_s, "auto_decompress": False, "lingering_time": 2.0}


def most_connections(wanted: int) -> int:
    """As many, or as the system lets this process hold: one more than that is closed by us, and not left to hang by the kernel."""
    allowed = allow_open_files(wanted + OTHER_FILES)
    most = min(wanted, allowed - min(OTHER_FILES, allowed // 2))
    if most < wanted:
        log.warning(
            "event=few_open_files max_connections=%d taken=%d: this process may have %d open files, and each connection is one; "
            "raise the hard limit (ulimit -Hn, or LimitNOFILE= of systemd) to %d, or set max_connections to %d",
            *(wanted, most, allowed, wanted + OTHER_FILES, most),
        )
    return most


class Door:
    """Counts open connections, in all and by address."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self._most = most_connections(settings.max_connections)
        self._metrics = metrics
        self._by_address: Counter[str] = Counter()
        self._total = 0

    def enter(self, address: str) -> bool:
        """Whether one more may come in."""
        if self._total >= self._most:
            self._metrics.connections_refused.labels("max_connections").inc()
            return False
        if self._by_address[address] >= self.settings.max_connections_per_address:
            self._metrics.connections_refused.labels("max_connections_per_address").inc()
            return False
        self._by_address[address] += 1
        self._total += 1
        self._metrics.connections.set(self._total)
        return True

    def leave(self, address: str) -> None:
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
        self._metrics.connections.set(self._total)


class Connection(RequestHandler):
    """aiohttp's connection behind a door, with a deadline for its first request's head."""

    def __init__(self, door: Door, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, access_log=cast(logging.Logger, None), **connection_options(door.settings))
        self._door = door
        self._address: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        address = network_of(peer[0]) if isinstance(peer, tuple) else "local"
        if not self._door.enter(address):
            cast(asyncio.Transport, transport).abort()
            return
        self._address = address
        super().connection_made(transport)
        self._timer = self._loop.call_later(self._door.settings.header_timeout_s, self._close_if_silent)

    def data_received(self, data: bytes) -> None:
        if self._address is not None:
            super().data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        if self._address is None:
            return
        self._door.leave(self._address)
        self._address = None
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(error)

    async def start(self) -> None:
        if not self._close:
            await super().start()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """The server ends. aiohttp closes idle connections first, and then waits the whole timeout for one that came after that and is
        idle as well; here it is closed like the others."""
        self.close()
        await super().shutdown(timeout)

    def _close_if_silent(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What cannot be read as HTTP is answered in the same shape as everything else."""
        if status >= 500:
            log.error("event=internal_error path=%s", request.path, exc_info=exc)
            error = ServiceError("the server failed at this request; its log has the trace")
        else:
            log.info("event=bad_http address=%s error=%s", request.remote, word(str(exc)))
            error = RequestRefused("the request is not HTTP as this server reads it; check address, port and headers")
        if request.writer.output_size > 0:
            raise ConnectionResetError("answer broken off") from exc
        response = error_response(error)
        response.force_close()
        return response


async def open_door(settings: Settings, metrics: Metrics, server: web.Server, listening: socket.socket) -> asyncio.Server:
    """Take connections from now on."""
    loop = asyncio.get_running_loop()
    door = Door(settings, metrics)
    opened = await loop.create_server(lambda: Connection(door, server, loop), sock=listening, backlog=ACCEPTED_AT_ONCE)
    listening.listen(BACKLOG)  # asyncio has no other word for both; so many may wait to be accepted
    return opened
