"""A TCP proxy that does to connections what networks do: late, cut, half closed, silent, or with an answer lost on its way.

`async with FaultProxy(url, other_url) as proxy:` then proxy.url. A new connection goes to the first server that takes it; with
asks_ready, to the first whose /readyz says 200, as a load balancer's does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from urllib.parse import urlsplit

CONNECT_S = 2.0


class FaultProxy:
    def __init__(self, *urls: str, asks_ready: bool = False, latency_s: float = 0.0, lose_every: int = 0) -> None:
        self._targets = [(parts.hostname or "", parts.port or 0) for parts in map(urlsplit, urls)]
        self._asks_ready = asks_ready
        self.latency_s = latency_s
        self.lose_every = lose_every  # every so many answers one is lost: the server has sent it, and the connection breaks
        self.answers = 0
        self.lost = 0
        self.held = 0
        self.url = ""
        self._may_ask, self._may_answer = asyncio.Event(), asyncio.Event()
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._half_closed: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> FaultProxy:
        self.heal()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        await self.reset()

    # ------------------------------------------------------------------------------------------ faults

    def heal(self) -> None:
        self._may_ask.set()
        self._may_answer.set()

    def black_hole(self) -> None:
        """Nothing passes any more, and nobody is told: connections stay open, new ones are taken."""
        self._may_ask.clear()
        self._may_answer.clear()

    def hold_answers(self) -> None:
        """Requests arrive; what is answered stays here, counted in `held`."""
        self.held = 0
        self._may_answer.clear()

    async def reset(self) -> None:
        """Every open connection breaks at once, on both sides."""
        carrying = list(self._open)
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    def half_close(self) -> None:
        """Callers hear that no more answers come, while the servers still take what they ask."""
        for caller, *_ in self._open.values():
            with contextlib.suppress(OSError):
                caller.write_eof()
                self._half_closed.add(caller)

    # ------------------------------------------------------------------------------------------ carrying

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._open[task] = [writer]
        try:
            upstream = await self._connect()
            if upstream is not None:
                writers.append(upstream[1])
                await self._carry(reader, writer, *upstream)
        except asyncio.CancelledError:
            pass  # reset: the connection is all there is to this task
        finally:
            del self._open[task]
            self._half_closed.discard(writer)
            for one in writers:
                _break(one)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        """Until either side ends."""
        directions = [asyncio.create_task(self._ask(reader, up_writer)), asyncio.create_task(self._answer(up_reader, writer))]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in directions:
                one.cancel()
            outcomes = await asyncio.gather(*directions, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, OSError):
                raise outcome

    async def _ask(self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            await asyncio.sleep(self.latency_s)
            await self._may_ask.wait()
            up_writer.write(asked)
            await up_writer.drain()

    async def _answer(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answered := await up_reader.read(65536):
            self.answers += 1
            if self.lose_every and self.answers % self.lose_every == 0:
                self.lost += 1
                return
            await asyncio.sleep(self.latency_s)
            self.held += 1
            await self._may_answer.wait()
            if writer not in self._half_closed:
                writer.write(answered)
                await writer.drain()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for host, port in self._targets:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    if not self._asks_ready or await _is_ready(host, port):
                        return await asyncio.open_connection(host, port)
        return None


async def _is_ready(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n")
        return (await reader.readline()).split()[1:2] == [b"200"]
    finally:
        _break(writer)


def _break(writer: asyncio.StreamWriter) -> None:
    """Reset, not an orderly end."""
    own = writer.get_extra_info("socket")
    if own is not None and not writer.transport.is_closing():
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
