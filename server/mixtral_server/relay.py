"""Relay: new tokens from Redis to whoever follows a job in this process, and a wake-up for parked turns.

Decides how gaps are repaired: the live channel may lose messages, so a follower listens before it reads the log, and reads the log
again on every gap, every few seconds and after every reconnect. Leaves to routes what an event looks like on a wire, and to
queue.py all that is true: nothing leaves here that is not in the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any

import orjson
from redis import exceptions as redis_errors
from redis.asyncio.client import PubSub

from mixtral_client.protocol import Frame
from mixtral_server.cursor import Cursor
from mixtral_server.follower import Follower
from mixtral_server.keys import Shard
from mixtral_server.queue import JobQueue
from mixtral_server.records import Ending, News, news_of
from mixtral_server.redis_client import RedisClient
from mixtral_server.redis_nodes import AnyRedis
from mixtral_server.tasks import end

LOG = logging.getLogger(__name__)

MAX_READS = 32
"""Reads of the log at once: after a reconnect every follower wants one."""
PING_AFTER_S = 10.0
"""Silence on the live channel after which Redis must answer a ping, within the same time again."""
MAX_RECONNECT_PAUSE_S = 2.0


class Following:
    """`with` it: the follower, told all news meanwhile."""

    __slots__ = ("_all", "_follower")

    def __init__(self, follower: Follower, of_every_job: dict[str, set[Follower]]) -> None:
        self._follower = follower
        self._all = of_every_job

    def __enter__(self) -> Follower:
        self._all.setdefault(self._follower.job_id, set()).add(self._follower)
        return self._follower

    def __exit__(self, *_: object) -> None:
        self._follower.let_go()
        of_job = self._all[self._follower.job_id]
        of_job.discard(self._follower)
        if not of_job:
            del self._all[self._follower.job_id]


class Relay:
    """`async with Relay(redis, queue) as relay:` once per process; it needs no subscription per follower."""

    def __init__(self, redis: AnyRedis, queue: JobQueue) -> None:
        self._redis = redis
        self._queue = queue
        self._reads = asyncio.Semaphore(MAX_READS)
        self._followers: dict[str, set[Follower]] = {}
        self._live = {Shard(endpoint).live: endpoint for endpoint in queue.endpoints}
        self._wake = {Shard(endpoint).wake: endpoint for endpoint in queue.endpoints}
        self._wakes = dict.fromkeys(queue.endpoints, 0)
        self._work = {endpoint: asyncio.Event() for endpoint in queue.endpoints}
        self._listeners: list[asyncio.Task[None]] = []
        self._name = secrets.token_hex(8)
        self._own = f'["{self._name}",'
        self._heard: set[str] = set()  # endpoints whose live channel we are subscribed to, as far as we know

    async def __aenter__(self) -> Relay:
        homes: dict[RedisClient, list[str]] = {}  # in a Cluster messages are heard where they are made: they pass no other node
        for channel in (*self._live, *self._wake):
            homes.setdefault(self._redis.at(channel), []).append(channel)
        self._listeners = [asyncio.create_task(self._listen(*home), name="relay") for home in homes.items()]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await end(self._listeners)
        for listener in self._listeners:
            if not listener.cancelled():
                listener.result()  # it ends by cancelling only: anything else is a mistake to be seen

    # ------------------------------------------------------------------------------------------ readers

    @property
    def followers(self) -> list[Follower]:
        """Readers in this process."""
        return [follower for of_job in self._followers.values() for follower in of_job]

    def follow(
        self,
        job_id: str,
        after: int = 0,
        crc: int | None = None,
        *,
        is_resumable: bool = True,
        asks_place: bool = True,
        is_new: bool = False,
    ) -> Following:
        """A reader of the job's events after offset `after`; crc names the ids that it has so far. is_new: the job is not yet put."""
        follower = Follower(
            self._queue,
            self._reads,
            job_id,
            Cursor(after, crc, is_new=is_new),
            is_resumable=is_resumable,
            asks_place=asks_place,
            is_new=is_new,
        )
        return Following(follower, self._followers)

    # ------------------------------------------------------------------------------------------ news

    def asker(self, endpoint: str) -> str:
        """For JobQueue.turn(): this process's name, or "" while it hears nothing."""
        return self._name if endpoint in self._heard else ""

    def expect(self, frames: Iterable[Frame]) -> None:
        """A turn that this process has sent to Redis; what becomes of it is told next."""
        for frame in frames:
            for follower in self._followers.get(frame.job, ()):
                follower.expect(frame)

    def tell(self, news: Iterable[News]) -> None:
        """What this process knows first, of a turn that it has made itself."""
        for job_id, what in news:
            for follower in self._followers.get(job_id, ()):
                match what:
                    case None:
                        follower.look()
                    case Ending():
                        follower.hear_end(what)
                    case _:
                        follower.hear(what)

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
                self._heard.difference_update(self._live.get(channel, "") for channel in channels)
                LOG.warning("live_channel_lost next_try_s=%.1f: %s", pause_s, error)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(MAX_RECONNECT_PAUSE_S, 2 * pause_s + 0.1)

    def _hear(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        if message["type"] == "subscribe":
            self._subscribed(channel)
        elif message["type"] == "message" and channel in self._wake:
            self._has_work(self._wake[channel])
        elif message["type"] == "message" and not message["data"].startswith(self._own):
            _, *rows = orjson.loads(message["data"])
            self.tell(map(news_of, rows))

    def _subscribed(self, channel: str) -> None:
        """For the first time or, by a client that reconnects by itself, again: what was said meanwhile is lost."""
        if channel in self._wake:
            self._has_work(self._wake[channel])
            return
        self._heard.add(self._live[channel])
        for job_id, of_job in self._followers.items():
            if job_id.startswith(f"{self._live[channel]}."):
                for follower in of_job:
                    follower.look(start_over=True)


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
