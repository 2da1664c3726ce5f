"""Relay: new tokens from Redis to whoever follows a job in this process, and a wake-up for parked turns.

Decides how gaps are repaired: the live channel may lose messages, so a follower listens before it reads the log, and reads the log
again on every gap, every few seconds and after every reconnect. Leaves to routes what an event looks like on a wire, and to
queue.py all that is true: nothing leaves here that is not in the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
from array import array
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import orjson
from redis import exceptions as redis_errors
from redis.asyncio.client import PubSub

from mixtral_client.protocol import (
    DoneEvent,
    ErrorEvent,
    JobEvent,
    MovedEvent,
    QueuedEvent,
    RewindEvent,
    TokenEvent,
    Usage,
    event_id,
    ids_crc,
)
from mixtral_server.errors import JobNotFound, RedisUnavailable
from mixtral_server.keys import Shard
from mixtral_server.queue import JobQueue
from mixtral_server.records import Entry, Snapshot
from mixtral_server.redis_client import RedisClient
from mixtral_server.redis_nodes import AnyRedis

LOG = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""A follower reads the log this often without news: a lost last message must not hang a reader."""
MAX_KEPT_TOKENS = 1024
"""News kept for one follower that lags; beyond that it reads the log instead."""
MAX_READS = 32
"""Reads of the log at once: after a reconnect every follower wants one."""
PING_AFTER_S = 10.0
"""Silence on the live channel after which Redis must answer a ping, within the same time again."""
MAX_RECONNECT_PAUSE_S = 2.0
MIN_PLACE_EVERY_S = 1.0
MAX_PLACE_EVERY_S = 10.0
PLACE_EVERY_S = 0.05
"""A waiting reader hears of its place this often per place ahead of it, within the two bounds above."""


@dataclass(frozen=True)
class Followed:
    """One event of a job. id is the SSE id that resumes after it (None: keep the last one); ids are its token ids."""

    event: JobEvent
    id: str | None = None
    ids: tuple[int, ...] = ()


class Cursor:
    """How far one reader is, and what it must be told next. Pure: it is shown log and news, and answers with events.

    It keeps the ids that were sent, so that after a Redis that lost a suffix it knows how much of them still holds.
    """

    def __init__(self, after: int = 0, crc: int | None = None) -> None:
        self._resume: tuple[int, int | None] | None = (after, crc)
        self._ids = array("I")
        self._crc = 0
        self._moves: int | None = None

    @property
    def offset(self) -> int:
        return len(self._ids)

    def start_over(self, snapshot: Snapshot) -> list[Followed]:
        """snapshot: the whole log, read after offset 0. The first look must be this one."""
        events = self._align(snapshot.ids)
        return events + (self.catch_up(snapshot) or [])

    def catch_up(self, snapshot: Snapshot) -> list[Followed] | None:
        """snapshot: the log after this cursor's offset. None when it does not continue what was sent: then start over."""
        if snapshot.n < self.offset:
            return None
        texts = tuple(text for entry in snapshot.entries for text in entry.texts)
        events = self.add(Entry(snapshot.entries[0].first, tuple(snapshot.ids), texts)) if snapshot.entries else []
        if events is None:
            return None
        moves = snapshot.attempt - (snapshot.state in ("leased", "streaming"))
        if self._moves is not None and moves > self._moves and not snapshot.terminal:
            events.append(Followed(MovedEvent(attempt=moves + 1)))
        self._moves = moves
        return events

    def add(self, entry: Entry) -> list[Followed] | None:
        """Tokens of the entry that are new to the reader. None when some before them are missing, or those sent were others."""
        known = self.offset - entry.first + 1
        sent = self._ids[entry.first - 1 : entry.first - 1 + len(entry.ids)]
        if known < 0 or sent != array("I", entry.ids[:known]):
            return None
        return [self._token(*token) for token in zip(entry.ids[known:], entry.texts[known:], strict=True)]

    def _token(self, token: int, text: str) -> Followed:
        self._ids.append(token)
        self._crc = ids_crc((token,), self._crc)
        return Followed(TokenEvent(offset=self.offset, text=text), event_id(self.offset, self._crc), (token,))

    def _align(self, log: Sequence[int]) -> list[Followed]:
        """Keep as much of what was sent as the log holds, and say so if that is not all."""
        if self._resume is not None:
            (after, crc), self._resume = self._resume, None
            is_prefix = after <= len(log) and crc in (None, ids_crc(log[:after]))
            return self._keep(log[:after]) if is_prefix else self._rewind([])
        sent = self._ids
        same = next((i for i, (a, b) in enumerate(zip(sent, log, strict=False)) if a != b), min(len(sent), len(log)))
        return self._rewind(log[:same]) if same < len(sent) else []

    def _keep(self, ids: Sequence[int]) -> list[Followed]:
        self._ids = array("I", ids)
        self._crc = ids_crc(ids)
        return []

    def _rewind(self, ids: Sequence[int]) -> list[Followed]:
        self._keep(ids)
        return [Followed(RewindEvent(to=self.offset), event_id(self.offset, self._crc))]


class _News:
    """What the live channel brought for one follower since it last looked."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._tokens = 0
        self._event = asyncio.Event()
        self.must_look = False  # news came that are not kept here
        self.must_start_over = False  # the channel was away, and with it perhaps a part of the log

    def add(self, entry: Entry) -> None:
        self._event.set()
        if self.must_look:
            return
        self._entries.append(entry)
        self._tokens += len(entry.ids)
        if self._tokens > MAX_KEPT_TOKENS:
            self.look()

    def look(self, *, start_over: bool = False) -> None:
        self.must_look = True
        self.must_start_over |= start_over
        self._forget()
        self._event.set()

    def looked(self) -> None:
        """Call before reading the log: what comes from now on is news again."""
        self.must_look = self.must_start_over = False
        self._forget()

    def take(self) -> Entry | None:
        if not self._entries:
            return None
        entry = self._entries.popleft()
        self._tokens -= len(entry.ids)
        return entry

    async def wait(self, timeout_s: float) -> None:
        """Return when there is news or the time is over."""
        if self._entries or self.must_look:
            return
        self._event.clear()
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._event.wait()
        except TimeoutError:
            pass

    def _forget(self) -> None:
        self._entries.clear()
        self._tokens = 0


class Relay:
    """`async with Relay(redis, queue) as relay:` once per process; it needs no subscription per follower."""

    def __init__(self, redis: AnyRedis, queue: JobQueue) -> None:
        self._redis = redis
        self._queue = queue
        self._reads = asyncio.Semaphore(MAX_READS)
        self._followers: dict[str, set[_News]] = {}
        self._live = {Shard(endpoint).live: endpoint for endpoint in queue.endpoints}
        self._wake = {Shard(endpoint).wake: endpoint for endpoint in queue.endpoints}
        self._wakes = dict.fromkeys(queue.endpoints, 0)
        self._work = {endpoint: asyncio.Event() for endpoint in queue.endpoints}
        self._listeners: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Relay:
        homes: dict[RedisClient, list[str]] = {}  # in a Cluster messages are heard where they are made: they pass no other node
        for channel in (*self._live, *self._wake):
            homes.setdefault(self._redis.at(channel), []).append(channel)
        self._listeners = [asyncio.create_task(self._listen(*home), name="relay") for home in homes.items()]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for listener in self._listeners:
            listener.cancel()
        await asyncio.wait(self._listeners)
        for listener in self._listeners:
            if not listener.cancelled():
                listener.result()  # it ends by cancelling only: anything else is a mistake to be seen

    # ------------------------------------------------------------------------------------------ readers

    @property
    def followers(self) -> int:
        """Readers in this process, for /metrics."""
        return sum(map(len, self._followers.values()))

    async def follow(self, job_id: str, after: int = 0, crc: int | None = None) -> AsyncIterator[Followed]:
        """Events after offset `after`, then exactly one terminal event.

        Holds on while Redis is away (no event comes: the caller sends comments meanwhile). To wait with a timeout, keep one task of
        anext() and use asyncio.wait: cancelling anext() ends the iterator. Close it (contextlib.aclosing) when leaving early.
        Raises JobNotFound and RedisUnavailable at the start only.
        """
        news = _News()
        self._followers.setdefault(job_id, set()).add(news)
        try:
            reader = _Reader(self._queue, self._reads, job_id, news, Cursor(after, crc))
            for followed in await reader.begin():
                yield followed
            while reader.end is None:
                for followed in await reader.go_on():
                    yield followed
            yield reader.end
        finally:
            self._forget(job_id, news)

    def _forget(self, job_id: str, news: _News) -> None:
        of_job = self._followers[job_id]
        of_job.discard(news)
        if not of_job:
            del self._followers[job_id]

    # ------------------------------------------------------------------------------------------ parked turns

    def wakes(self, endpoint: str) -> int:
        """A ticket: taken before a turn and given to work(), it makes work() return at once if a job came in between."""
        return self._wakes[endpoint]

    async def work(self, endpoint: str, timeout_s: float, since: int | None = None) -> bool:
        """Wait until the endpoint has new work (True) or the time is over (False)."""
        if since is not None and since != self._wakes[endpoint]:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._work[endpoint].wait()
        except TimeoutError:
            return False
        return True

    def _has_work(self, endpoint: str) -> None:
        self._wakes[endpoint] += 1
        self._work[endpoint].set()
        self._work[endpoint] = asyncio.Event()

    # ------------------------------------------------------------------------------------------ the live channel

    async def _listen(self, redis: RedisClient, channels: Sequence[str]) -> None:
        """Subscribed for as long as the process lives."""
        pause_s = 0.0
        while True:
            try:
                async with redis.pubsub() as channel:
                    await channel.subscribe(*channels)
                    async for message in _messages(channel):
                        pause_s = 0.0
                        self._hear(message)
            except (redis_errors.RedisError, OSError) as error:
                LOG.warning("live_channel_lost next_try_s=%.1f: %s", pause_s, error)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(MAX_RECONNECT_PAUSE_S, 2 * pause_s + 0.1)

    def _hear(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        if message["type"] == "subscribe":
            self._subscribed(channel)
        elif message["type"] == "message" and channel in self._wake:
            self._has_work(self._wake[channel])
        elif message["type"] == "message":
            for job_id, *tokens in orjson.loads(message["data"]):
                self._tell(job_id, tokens)

    def _subscribed(self, channel: str) -> None:
        """For the first time or, by a client that reconnects by itself, again: what was said meanwhile is lost."""
        if channel in self._wake:
            self._has_work(self._wake[channel])
            return
        for job_id, of_job in self._followers.items():
            if job_id.startswith(f"{self._live[channel]}."):
                for news in of_job:
                    news.look(start_over=True)

    def _tell(self, job_id: str, tokens: Sequence[Any]) -> None:
        of_job = self._followers.get(job_id)
        if not of_job:
            return
        entry = Entry(tokens[0], tuple(tokens[1]), tuple(tokens[2])) if tokens else None
        for news in of_job:
            if entry:
                news.add(entry)
            else:
                news.look()


async def _messages(channel: PubSub) -> AsyncIterator[dict[str, Any]]:
    """All that arrives, subscriptions included. Raises ConnectionError when Redis is silent even to a ping."""
    is_asked = False
    while True:
        message = await channel.get_message(timeout=PING_AFTER_S)
        if message is not None:
            is_asked = False
            yield message
        elif is_asked:
            raise redis_errors.ConnectionError(f"no answer to a ping for {PING_AFTER_S:g} s")
        else:
            is_asked = True
            await channel.ping()


class _Reader:
    """One follower of one job: looks at the log when it must, and takes what the live channel brings when it may."""

    def __init__(self, queue: JobQueue, reads: asyncio.Semaphore, job_id: str, news: _News, cursor: Cursor) -> None:
        self._queue = queue
        self._reads = reads
        self._job_id = job_id
        self._news = news
        self._cursor = cursor
        self._clock = asyncio.get_running_loop().time
        self._look_at = 0.0
        self._is_waiting = False
        self._position: int | None = None
        self._ask_at = 0.0
        self.end: Followed | None = None
        """The terminal event, once the log has it; it comes after all tokens."""

    async def begin(self) -> list[Followed]:
        """The first look. Raises JobNotFound, RedisUnavailable."""
        snapshot = await self._read(0)
        self._note(snapshot)
        return self._cursor.start_over(snapshot)

    async def go_on(self) -> list[Followed]:
        """What is new, after waiting for it a while; perhaps nothing."""
        if self._is_waiting and self._clock() >= self._ask_at and (queued := await self._queued()):
            return [queued]
        until = min(self._look_at, self._ask_at) if self._is_waiting else self._look_at
        await self._news.wait(until - self._clock())
        if entry := self._news.take():
            self._is_waiting = False
            events = self._cursor.add(entry)
            if events is not None:
                return events
        elif not self._news.must_look and self._clock() < self._look_at:
            return []
        return await self._look()

    async def _look(self) -> list[Followed]:
        start_over = self._news.must_start_over
        self._news.looked()
        try:
            if not start_over:
                snapshot = await self._read(self._cursor.offset)
                events = self._cursor.catch_up(snapshot)
                if events is not None:
                    self._note(snapshot)
                    return events
            snapshot = await self._read(0)
        except RedisUnavailable:
            self._news.look(start_over=True)
            await asyncio.sleep(random.uniform(0.2, 1.0))
            return []
        except JobNotFound as error:
            self.end = Followed(ErrorEvent(error=error.detail()))
            return []
        self._note(snapshot)
        return self._cursor.start_over(snapshot)

    async def _read(self, after: int) -> Snapshot:
        async with self._reads:
            return await self._queue.read(self._job_id, after)

    def _note(self, snapshot: Snapshot) -> None:
        self._look_at = self._clock() + LOOK_EVERY_S
        is_waiting = snapshot.state == "waiting"
        if is_waiting and not self._is_waiting:
            self._position, self._ask_at = None, 0.0
        self._is_waiting = is_waiting
        if snapshot.terminal:
            self.end = _terminal(snapshot)

    async def _queued(self) -> Followed | None:
        """The job's place if it has changed; asked at most once a second, and less often far back in the queue."""
        self._ask_at = self._clock() + MIN_PLACE_EVERY_S
        try:
            place = await self._queue.place(self._job_id)
        except (RedisUnavailable, JobNotFound):
            return None  # the next look at the log deals with it
        if place is None:
            self._is_waiting = False
            return None
        self._ask_at = self._clock() + min(MAX_PLACE_EVERY_S, max(MIN_PLACE_EVERY_S, place.position * PLACE_EVERY_S))
        if place.position == self._position:
            return None
        self._position = place.position
        return Followed(QueuedEvent(position=place.position, eta_s=place.eta_s))


def _terminal(snapshot: Snapshot) -> Followed:
    if snapshot.error is not None:
        return Followed(ErrorEvent(error=snapshot.error))
    return Followed(DoneEvent(finish=snapshot.finish or "error", usage=snapshot.usage or Usage(), timings=snapshot.timings))
