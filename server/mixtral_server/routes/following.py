"""Following one job from a request: its events as they come, its pauses, and the end of patience.

Decides how far a reader may lag (then the relay waits for it) and that a pause can be seen without cancelling the relay's iterator. Leaves
what is sent, and when a comment is due, to the route.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType

from mixtral_client.protocol import TERMINAL_EVENTS
from mixtral_server.relay import Followed
from mixtral_server.tasks import end

MOST_AHEAD = 256  # events held for one reader; each is one token


class Following:
    """`async with following:` then `batch(timeout_s)` until `is_over`. One reader."""

    def __init__(self, events: AsyncIterator[Followed], register: set[Following], *, is_resumable: bool) -> None:
        """register: where the following can be found and stopped while it is open; is_resumable: its reader can go on elsewhere."""
        self.is_resumable = is_resumable
        self._events = events
        self._register = register
        self._held: deque[Followed] = deque()
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._error: BaseException | None = None
        self._pump: asyncio.Task[None] | None = None
        self.is_stopped = False
        self.is_over = False
        """The terminal event was handed out."""

    async def __aenter__(self) -> Following:
        self._register.add(self)
        self._pump = asyncio.create_task(self._take_all())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._register.discard(self)
        if self._pump is not None:
            await end([self._pump])

    def stop(self) -> None:
        """The server is stopping: batch() hands out what is held, then nothing more."""
        self.is_stopped = True
        self._changed.set()

    async def batch(self, timeout_s: float) -> list[Followed]:
        """All events at hand, at least one; none when the time is over or the following was stopped. Raises what the relay raised."""
        if not self._held and self._error is None and not self.is_stopped:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return []
        taken = list(self._held)
        self._held.clear()
        self._has_room.set()
        if not taken and self._error is not None:
            raise self._error
        self.is_over = self.is_over or any(one.event.event in TERMINAL_EVENTS for one in taken)
        return taken

    async def _take_all(self) -> None:
        try:
            async for followed in self._events:
                self._held.append(followed)
                self._changed.set()
                while len(self._held) >= MOST_AHEAD:
                    self._has_room.clear()
                    await self._has_room.wait()
        except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
            self._error = error
        finally:
            self._changed.set()
            # the relay's generator owns a place among its followers: give it back now, not when it is collected
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
