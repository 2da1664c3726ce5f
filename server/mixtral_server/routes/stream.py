"""An event stream on its way out: head sent once, every write under a deadline.

Decides when a reader is too slow to be kept. Leaves what is written to the routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from aiohttp import web

from mixtral_server import sse
from mixtral_server.routes.service import Service

MAX_UNSENT_BYTES = 64 * 1024
"""Bytes that wait for a reader's connection; beyond that it is written to under a deadline."""
COUNT_STEP = 256


class EventStream:
    """`async with EventStream(...) as stream` sends the head; then write()."""

    def __init__(self, service: Service, request: web.Request, wire: str, headers: dict[str, str] | None = None) -> None:
        self.response = web.StreamResponse(headers=sse.HEADERS | (headers or {}))
        self._service = service
        self._request = request
        self._open_streams = service.metrics.open_streams.labels(wire)
        self._tokens_sent = service.metrics.tokens_sent.labels(wire)
        self._uncounted = 0

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._request)
        self._transport = self._request.transport
        self._is_chunked = self.response.headers.get("Transfer-Encoding") == "chunked"
        self._open_streams.inc()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open_streams.dec()
        self._tokens_sent.inc(self._uncounted)

    def sending(self, events: bytes, tokens: int) -> Callable[[], bool]:
        """What does what write() does, without waiting. False, and nothing is written, when the reader lags or is gone."""
        return partial(self._write_now, b"%x\r\n%b\r\n" % (len(events), events) if self._is_chunked else events, tokens)

    def _write_now(self, part: bytes, tokens: int) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            return False
        transport.write(part)
        self._count(tokens)
        return True

    async def write(self, events: bytes, tokens: int = 0) -> None:
        """Raises ConnectionResetError when the reader is gone, or has taken nothing for write_timeout_s and is cut off."""
        try:
            async with asyncio.timeout(self._service.settings.write_timeout_s):
                await self.response.write(events)
        except TimeoutError as error:
            self._service.metrics.readers_dropped.inc()
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError(f"reader took nothing for {self._service.settings.write_timeout_s:g} s") from error
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        """In steps: the counter takes as long as the making of an event."""
        self._uncounted += tokens
        if self._uncounted >= COUNT_STEP:
            self._tokens_sent.inc(self._uncounted)
            self._uncounted = 0
