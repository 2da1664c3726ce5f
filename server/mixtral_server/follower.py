"""Follower: one reader of one job, from its first token to its one terminal event.

Decides when the log is looked at: first of all, on every gap, every few seconds, and after the live channel was away. Leaves the channel to
relay.py, what is new to cursor.py, and what an event looks like on a wire to the routes.

Tokens come by one of two ways. While the reader waits in batch(), nothing is on its way to it: then a frame goes straight to its `sink`,
without waking it, made ready while Redis still appends it. Whatever the sink does not take, and whatever comes while the reader is at work,
the next batch() hands out.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeAlias

from mixtral_client.protocol import DoneEvent, ErrorEvent, QueuedEvent, Usage
from mixtral_server.cursor import Cursor, Followed, Notice, Tokens
from mixtral_server.errors import JobNotFound, RedisUnavailable
from mixtral_server.queue import JobQueue
from mixtral_server.records import Appended, Ending, Snapshot

LOOK_EVERY_S = 5.0
"""A follower reads the log this often without news: a lost last message must not hang a reader."""
MAX_KEPT_TOKENS = 1024
"""News kept for one follower that lags; beyond that it reads the log instead."""
MIN_PLACE_EVERY_S = 1.0
MAX_PLACE_EVERY_S = 10.0
PLACE_EVERY_S = 0.05
"""A waiting reader hears of its place this often per place ahead of it, within the two bounds above."""


_Ready: TypeAlias = tuple[Appended, Tokens, Callable[[], bool]]
"""A frame, what of it is new to a reader, and what lets that go."""


class Follower:
    """`with relay.follow(…) as follower:` then `batch(timeout_s)` until `is_over`."""

    def __init__(
        self,
        queue: JobQueue,
        reads: asyncio.Semaphore,
        job_id: str,
        cursor: Cursor,
        *,
        is_resumable: bool,
        asks_place: bool,
        is_new: bool = False,
    ) -> None:
        """reads: bounds the looks at once in this process; is_resumable: the reader can go on at another server;
        asks_place: it wants `queued` events; is_new: the job is not yet put, so that all there is of it will be news."""
        self.job_id = job_id
        self.is_resumable = is_resumable
        self.is_stopped = False
        self.is_over = False
        """The terminal event was handed out."""
        self.sink: Callable[[Tokens], Callable[[], bool]] | None = None
        """Makes a frame's tokens ready to go; what it returns lets them go at once, or says False: then batch() hands them out."""
        self._asks_place = asks_place
        self._queue = queue
        self._reads = reads
        self._cursor = cursor
        self._clock = asyncio.get_running_loop().time
        self._parked: asyncio.Future[None] | None = None  # while the reader waits for news
        self._limit: asyncio.Timeout | None = None  # of the question to Redis under way
        self._told_at = 0.0
        self._ready: _Ready | None = None
        self._refused: Tokens | None = None  # by the sink
        self._news: list[Appended | Ending] = []
        self._news_tokens = 0
        self._has_begun = is_new
        self._must_look = self._must_start_over = not is_new
        self._look_at = self._clock() + LOOK_EVERY_S if is_new else 0.0
        self._is_waiting = False
        self._position: int | None = None
        self._ask_at = 0.0
        self._end: Notice | None = None

    # ------------------------------------------------------------------------------------------ what the relay tells

    def expect(self, entry: Appended) -> None:
        """These tokens are on their way into the log. While Redis is at work, what will be sent of them is made."""
        if self.sink is not None and self._parked is not None and not self._must_look:
            tokens = self._cursor.new_of(entry)
            self._ready = (entry, tokens, self.sink(tokens)) if tokens is not None and tokens.ids else None

    def hear(self, entry: Appended) -> None:
        """Tokens were appended."""
        ready, self._ready = self._ready, None
        if self._must_look:
            return  # the log has them
        if self._parked is None or self.sink is None:
            self._news.append(entry)
            self._news_tokens += len(entry.ids)
            if self._news_tokens > MAX_KEPT_TOKENS:
                self.look()
            self._wake()
        elif ready is not None and ready[0] is entry and ready[1].offset == self._cursor.offset + 1:
            _, new, send = ready
            self._send(new, send)
        elif (tokens := self._cursor.new_of(entry)) is None:
            self.look()
        elif tokens:
            self._send(tokens, self.sink(tokens))

    def let_go(self) -> None:
        """Its reader leaves: they know one another, and would wait for the garbage collector."""
        self.sink = self._ready = None

    def _send(self, tokens: Tokens, send: Callable[[], bool]) -> None:
        self._cursor.take(tokens)
        self._is_waiting = False
        self._told_at = self._clock()
        if not send():
            self._refused = tokens
            self._wake()

    def hear_end(self, ending: Ending) -> None:
        """The job is done."""
        if not self._must_look:
            self._news.append(ending)
            self._wake()

    def look(self, *, start_over: bool = False) -> None:
        """There are news in the log. start_over: the channel was away, and with it perhaps a part of the log."""
        self._must_look = True
        self._must_start_over |= start_over
        self._news = []
        self._news_tokens = 0
        self._wake()

    def stop(self) -> None:
        """The server is stopping: batch() hands out what is at hand, then nothing more."""
        self.is_stopped = True
        self._wake()
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._clock())

    def _wake(self) -> None:
        if self._parked is not None:
            if not self._parked.done():
                self._parked.set_result(None)
            self._parked = None

    # ------------------------------------------------------------------------------------------ what the reader asks

    async def batch(self, timeout_s: float) -> list[Followed]:
        """All events at hand, at least one; none when for so long nothing came, to the sink neither, or the follower was stopped.

        Nothing comes while Redis is away. Only the first look raises JobNotFound and RedisUnavailable.
        """
        self._told_at = self._clock()
        while True:
            events = self._at_hand()
            until = self._told_at + timeout_s  # moves on while the sink is given something
            if events or self._end is not None or self.is_stopped or self._clock() >= until:
                return self._handed_out(events)
            if events := await self._look_or_wait(until):
                return self._handed_out(events)

    def _handed_out(self, events: list[Followed]) -> list[Followed]:
        if self._end is None:
            return events
        self.is_over = True
        return [*events, self._end]

    def _at_hand(self) -> list[Followed]:
        events: list[Followed] = []
        if self._refused is not None:
            events.append(self._refused)
            self._refused = None
        news, self._news, self._news_tokens = self._news, [], 0
        for entry in news:
            if isinstance(entry, Ending):
                if entry.n == self._cursor.offset:
                    self._end = Notice(DoneEvent(finish=entry.finish, usage=entry.usage, timings=entry.timings))
                else:
                    self.look()
                break
            tokens = self._cursor.add(entry)
            if tokens is None:
                self.look()
                break
            if tokens:
                self._is_waiting = False
                events.append(tokens)
        return events

    async def _look_or_wait(self, until: float) -> list[Followed]:
        """What is new after a look at the log, a question for the job's place, or a wait; perhaps nothing."""
        now = self._clock()
        if self._must_look or now >= self._look_at:
            return await self._cut_off(until, self._look)
        if self._asks_place and self._is_waiting and now >= self._ask_at:
            return await self._cut_off(until, self._ask_place)
        ask_at = self._ask_at if self._asks_place and self._is_waiting else math.inf
        loop = asyncio.get_running_loop()
        self._parked = loop.create_future()
        timer = loop.call_at(min(until, self._look_at, ask_at), self._wake)
        try:
            await self._parked
        finally:
            self._parked = None
            timer.cancel()
        return []

    async def _cut_off(self, until: float, ask: Callable[[], Awaitable[list[Followed]]]) -> list[Followed]:
        try:
            async with asyncio.timeout_at(until) as self._limit:
                return await ask()
        except TimeoutError:
            return []
        finally:
            self._limit = None

    # ------------------------------------------------------------------------------------------ the log

    async def _look(self) -> list[Followed]:
        start_over = self._must_start_over
        self._must_look = self._must_start_over = False  # what comes from now on is news again
        self._ready = None  # the reader may be sent back
        try:
            events = None if start_over else self._noted(await self._read(self._cursor.offset), self._cursor.catch_up)
            if events is None:
                events = self._noted(await self._read(0), self._cursor.start_over)
        except (RedisUnavailable, JobNotFound) as error:
            if not self._has_begun:
                raise
            if isinstance(error, JobNotFound):
                self._end = Notice(ErrorEvent(error=error.detail()))
                return []
            self.look(start_over=True)
            await asyncio.sleep(random.uniform(0.2, 1.0))
            return []
        except asyncio.CancelledError:  # the time of this batch() is over: the next one looks again
            self.look(start_over=start_over)
            raise
        self._has_begun = True
        return events or []

    async def _read(self, after: int) -> Snapshot:
        async with self._reads:
            return await self._queue.read(self.job_id, after)

    def _noted(self, snapshot: Snapshot, events_of: Callable[[Snapshot], list[Followed] | None]) -> list[Followed] | None:
        events = events_of(snapshot)
        if events is None:
            return None
        self._look_at = self._clock() + LOOK_EVERY_S
        is_waiting = snapshot.state == "waiting"
        if is_waiting and not self._is_waiting:
            self._position, self._ask_at = None, 0.0
        self._is_waiting = is_waiting
        if snapshot.terminal:
            self._end = _terminal(snapshot)
        return events

    async def _ask_place(self) -> list[Followed]:
        """The job's place if it has changed; asked at most once a second, and less often far back in the queue."""
        self._ask_at = self._clock() + MIN_PLACE_EVERY_S
        try:
            place = await self._queue.place(self.job_id)
        except (RedisUnavailable, JobNotFound):
            return []  # the next look at the log deals with it
        if place is None:
            self._is_waiting = False
            return []
        self._ask_at = self._clock() + min(MAX_PLACE_EVERY_S, max(MIN_PLACE_EVERY_S, place.position * PLACE_EVERY_S))
        if place.position == self._position:
            return []
        self._position = place.position
        return [Notice(QueuedEvent(**asdict(place)))]


def _terminal(snapshot: Snapshot) -> Notice:
    if snapshot.error is not None:
        return Notice(ErrorEvent(error=snapshot.error))
    return Notice(DoneEvent(finish=snapshot.finish or "error", usage=snapshot.usage or Usage(), timings=snapshot.timings))
