"""When chats are sent: a closed loop (so many at once) or an open one (so many a second), and what became of each.

Decides the moment of every send, the deadline of every chat and the code word of a failure that never reached a wire. Leaves
the talking to wires.py and the figures to measure.py.

A closed loop sends a chat when one before it ended, so a slow server is asked less. An open loop sends by its plan whatever the
server does; a late send counts from the moment planned (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import aiohttp

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.prompts import Ask
from mixtral_benchmark.wires import ChatFailed, Wire
from mixtral_client.errors import MixtralError


class Clock(Protocol):
    def now(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None: ...


class MonotonicClock:
    """The machine's own; tests bring another."""

    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now()))


class Watcher(Protocol):
    """Who looks on while the load runs. Called from the event loop; must not block."""

    def sent(self, chat: Chat) -> None: ...

    def arrived(self, chat: Chat, tokens: int) -> None: ...

    def ended(self, chat: Chat) -> None: ...


@dataclass(frozen=True)
class Plan:
    """concurrency None: no cap (open loop only). rate_per_s None: closed loop."""

    asks: Sequence[Ask]
    concurrency: int | None
    rate_per_s: float | None
    arrival_seed: int
    timeout_s: float


def poisson_arrivals_s(count: int, rate_per_s: float, seed: int) -> list[float]:
    """Moments of a Poisson process of this rate, the first at 0. The same seed gives the same moments."""
    gaps = random.Random(seed)
    return list(accumulate((gaps.expovariate(rate_per_s) for _ in range(count - 1)), initial=0.0))


class Load:
    """One run of a plan. chats fills up while it runs and stays readable when run() is cancelled."""

    def __init__(self, plan: Plan, wire: Wire, clock: Clock, watcher: Watcher) -> None:
        self._plan, self._wire, self._clock, self._watcher = plan, wire, clock, watcher
        self.chats: list[Chat] = []
        self.started_s = self.ended_s = clock.now()

    async def run(self) -> None:
        self.started_s = self._clock.now()
        try:
            await (self._closed_loop() if self._plan.rate_per_s is None else self._open_loop(self._plan.rate_per_s))
        finally:
            self.ended_s = self._clock.now()

    async def _closed_loop(self) -> None:
        asks = iter(enumerate(self._plan.asks))
        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(self._plan.concurrency or len(self._plan.asks), len(self._plan.asks))):
                lanes.create_task(self._lane(asks))

    async def _lane(self, asks: Iterator[tuple[int, Ask]]) -> None:
        for index, ask in asks:
            await self._have(index, ask, scheduled_s=self._clock.now())

    async def _open_loop(self, rate_per_s: float) -> None:
        places = asyncio.Semaphore(self._plan.concurrency or len(self._plan.asks))
        moments_s = poisson_arrivals_s(len(self._plan.asks), rate_per_s, self._plan.arrival_seed)
        async with asyncio.TaskGroup() as running:
            for index, (ask, moment_s) in enumerate(zip(self._plan.asks, moments_s, strict=True)):
                scheduled_s = self.started_s + moment_s
                await self._clock.sleep_until(scheduled_s)
                running.create_task(self._have_in_place(places, index, ask, scheduled_s))

    async def _have_in_place(self, places: asyncio.Semaphore, index: int, ask: Ask, scheduled_s: float) -> None:
        async with places:
            await self._have(index, ask, scheduled_s)

    async def _have(self, index: int, ask: Ask, scheduled_s: float) -> None:
        chat = Chat(index, scheduled_s, sent_s=self._clock.now())
        self.chats.append(chat)
        self._watcher.sent(chat)
        chat.failure = await self._failure_of(ask, chat)
        if chat.ended_s is None:
            chat.ended_s = self._clock.now()
        self._watcher.ended(chat)

    async def _failure_of(self, ask: Ask, chat: Chat) -> Failure | None:
        """Have the chat; None if it completed."""
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await self._wire.have(ask, chat)
        except ChatFailed as failed:
            return failed.failure
        except MixtralError as refused:
            return Failure(refused.code, refused.message)
        except TimeoutError:
            return Failure(
                "timeout", f"not finished {self._plan.timeout_s:g} s after it was sent, with {chat.tokens} tokens; see --timeout_s"
            )
        except aiohttp.ClientConnectorError as unreached:
            return Failure("connection_refused", str(unreached))
        except aiohttp.ClientError as lost:
            return Failure("connection_lost", f"after {chat.tokens} tokens: {type(lost).__name__}: {lost}")
        except ValueError as unreadable:
            return Failure("unreadable_stream", " ".join(str(unreadable).split())[:200])
        return None
