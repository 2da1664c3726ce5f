"""The server processes of one machine that share a port: each tells the others its numbers, so that any of them can answer a scrape.

Decides where they are asked and for how long. Leaves what the numbers are to metrics.py, and the processes to supervisor.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

ANSWER_S = 1.0
"""A process that has not told its numbers by then is shown as down: a scrape waits for no process that hangs."""
MAX_BYTES = 16 * 2**20


class Siblings:
    """Process `index` of `count`. folder: private to them, its path short enough for a socket's."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._folder = folder

    @asynccontextmanager
    async def telling(self, numbers: Callable[[], bytes]) -> AsyncIterator[None]:
        """Whoever connects is told what numbers says then."""

        async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.write(numbers())
                await writer.drain()
            except ConnectionError:
                pass  # it gave up waiting
            finally:
                writer.close()

        path = self._path(self.index)
        path.unlink(missing_ok=True)  # of a process before this one that was killed
        server = await asyncio.start_unix_server(tell, path)
        try:
            yield
        finally:
            server.close()

    async def ask(self) -> dict[int, bytes | None]:
        """What each of the others says; None for one that does not answer."""
        others = [index for index in range(self.count) if index != self.index]
        return dict(zip(others, await asyncio.gather(*map(self._ask, others)), strict=True))

    async def _ask(self, index: int) -> bytes | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._path(index), limit=MAX_BYTES)
                try:
                    return await reader.read(-1) or None
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.sock"
