"""A TCP proxy that breaks connections: the k-th one that carries an event stream is cut after so many bytes of the answer."""

from __future__ import annotations

import asyncio
from types import TracebackType
from urllib.parse import urlsplit


class CuttingProxy:
    """`async with CuttingProxy(url, cut_after=[300, 500]) as proxy:` then proxy.url; streams beyond the list pass whole."""

    def __init__(self, url: str, *, cut_after: list[int]) -> None:
        self._target = (urlsplit(url).hostname, urlsplit(url).port)
        self._cut_after = cut_after
        self.url = ""
        self.cuts = 0

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        left: list[int] = []  # bytes until the cut, once this connection carries a stream that is to be cut

        async def up() -> None:
            while asked := await reader.read(65536):
                if b"/events" in asked and self._cut_after:
                    left.append(self._cut_after.pop(0))
                up_writer.write(asked)
                await up_writer.drain()

        async def down() -> None:
            while answered := await up_reader.read(65536):
                if left and len(answered) >= left[-1]:
                    writer.write(answered[: left[-1]])
                    self.cuts += 1
                    return
                if left:
                    left[-1] -= len(answered)
                writer.write(answered)
                await writer.drain()

        directions = [asyncio.create_task(up()), asyncio.create_task(down())]
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for one in directions:
            one.cancel()
        outcomes = await asyncio.gather(*directions, return_exceptions=True)
        writer.close()
        up_writer.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, ConnectionError):
                raise outcome
