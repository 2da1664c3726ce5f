"""An event stream on its way out: head sent once, every write under a deadline.

Decides when a reader is too slow to be kept. Leaves what is written to the routes.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from mixtral_server import sse
from mixtral_server.routes.service import Service


class EventStream:
    """`async with EventStream(...) as stream` sends the head; then write()."""

    def __init__(self, service: Service, request: web.Request, wire: str, headers: dict[str, str] | None = None) -> None:
        self.response = web.StreamResponse(headers=sse.HEADERS | (headers or {}))
        self._service = service
        self._request = request
        self._open_streams = service.metrics.open_streams.labels(wire)
        self._tokens_sent = service.metrics.tokens_sent.labels(wire)

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._request)
        self._open_streams.inc()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open_streams.dec()

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
        self._tokens_sent.inc(tokens)
