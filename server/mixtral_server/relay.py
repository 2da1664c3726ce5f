"""Relay: new tokens from Redis to whoever follows a job in this process, and a wake-up for parked turns.

Decides how gaps are repaired: the live channel may lose messages, so a follower listens before it reads the log, and reads the log
again on every gap, every 5 s and after every reconnect. Leaves to routes what an event looks like on a wire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType

from redis.asyncio import Redis

from mixtral_client.protocol import JobEvent
from mixtral_server.queue import JobQueue


@dataclass(frozen=True)
class Followed:
    """One event of a job. id is the SSE id that resumes after it (None: keep the last one); ids are its token ids."""

    event: JobEvent
    id: str | None = None
    ids: tuple[int, ...] = ()


class Relay:
    """`async with Relay(redis, queue) as relay:` once per process; it needs no subscription per follower."""

    def __init__(self, redis: Redis, queue: JobQueue) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Relay:
        raise NotImplementedError

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        raise NotImplementedError

    def follow(self, job_id: str, after: int = 0, crc: int | None = None) -> AsyncIterator[Followed]:
        """Events after offset `after`, then exactly one terminal event.

        Holds on while Redis is away (no event comes: the caller sends comments meanwhile). To wait with a timeout, keep one task of
        anext() and use asyncio.wait: cancelling anext() ends the iterator. Raises JobNotFound and RedisUnavailable at the start only.
        """
        raise NotImplementedError

    def wakes(self, endpoint: str) -> int:
        """A ticket: taken before a turn and given to work(), it makes work() return at once if a job came in between."""
        raise NotImplementedError

    async def work(self, endpoint: str, timeout_s: float, since: int | None = None) -> bool:
        """Wait until the endpoint has new work (True) or the time is over (False)."""
        raise NotImplementedError
