"""Sending: a closed loop (so many talks at once) or an open one (each at its moment), and what became of each chat.

Decides when the next chat goes out, the deadline of every chat and the code word of a failure that never reached a wire. Leaves
the moments to arrivals.py, what is said to prompts.py, the talking to wires.py and the figures to measure.py.

A closed loop begins a talk when one before it ended, so a slow server is asked less. An open loop sends by its plan whatever the
server does; a late send counts from the moment planned (no coordinated omission). Later turns of a talk follow its answers in both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import aiohttp

from mixtral_benchmark.measure import Chat, Failure
from mixtral_benchmark.prompts import Ask, Talk
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
    """concurrency None: no cap (open loop only). moments_s, one per talk from the start of the run on; None: closed loop."""

    talks: Sequence[Talk]
    concurrency: int | None
    moments_s: Sequence[float] | None
    timeout_s: float


class Load:
    """One run of a plan. chats fills up while it runs and stays readable when run() is cancelled."""

    def __init__(self, plan: Plan, wire: Wire, clock: Clock, watcher: Watcher) -> None:
        self._plan, self._wire, self._clock, self._watcher = plan, wire, clock, watcher
        self.chats: list[Chat] = []
        self.started_s = self.ended_s = clock.now()

    async def run(self) -> None:
        self.started_s = self._clock.now()
        try:
            await (self._closed_loop() if self._plan.moments_s is None else self._open_loop(self._plan.moments_s))
        finally:
            self.ended_s = self._clock.now()

    @property
    def unsent(self) -> int:
        """Chats of the plan that were never sent: turns behind a failed one, and those that an interruption came before."""
        return sum(len(talk.turns) for talk in self._plan.talks) - len(self.chats)

    async def _closed_loop(self) -> None:
        talks = self._numbered()
        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(self._plan.concurrency or len(self._plan.talks), len(self._plan.talks))):
                lanes.create_task(self._lane(talks))

    def _numbered(self) -> Iterator[tuple[int, Talk]]:
        """Every talk with the index of its first chat."""
        firsts = accumulate((len(talk.turns) for talk in self._plan.talks), initial=0)
        return zip(firsts, self._plan.talks, strict=False)

    async def _lane(self, talks: Iterator[tuple[int, Talk]]) -> None:
        for first, talk in talks:
            await self._talk(first, talk, self._clock.now())

    async def _open_loop(self, moments_s: Sequence[float]) -> None:
        places = asyncio.Semaphore(self._plan.concurrency or len(self._plan.talks))
        async with asyncio.TaskGroup() as running:
            for (first, talk), moment_s in zip(self._numbered(), moments_s, strict=True):
                scheduled_s = self.started_s + moment_s
                await self._clock.sleep_until(scheduled_s)
                running.create_task(self._talk_in_place(places, first, talk, scheduled_s))

    async def _talk_in_place(self, places: asyncio.Semaphore, first: int, talk: Talk, scheduled_s: float) -> None:
        async with places:
            await self._talk(first, talk, scheduled_s)

    async def _talk(self, first: int, talk: Talk, scheduled_s: float) -> None:
        """One turn after another, until one fails: nobody goes on with a talk that has no answer."""
        answers: list[str] = []
        for turn in range(len(talk.turns)):
            if turn:
                scheduled_s = self._clock.now() + talk.think_s
                await self._clock.sleep_until(scheduled_s)
            is_last = turn == len(talk.turns) - 1
            chat = Chat(first + turn, scheduled_s, sent_s=self._clock.now(), turn=turn, texts=None if is_last else [])
            await self._have(talk.ask(turn, answers), chat)
            if chat.failure:
                return
            answers.append("".join(chat.texts or ()))

    async def _have(self, ask: Ask, chat: Chat) -> None:
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
