"""Dead letters: jobs that were given up because every worker that held them died; what an operator does with them.

Decides what is shown of such a job and what it takes to bring it back or forget it. Leaves when a job is given up to lua/life.lua, and
what is typed and printed to dead_cli.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import orjson

from mixtral_server.errors import JobNotFound
from mixtral_server.keys import Shard, shard_of
from mixtral_server.records import JobContent, content_of, seconds_of
from mixtral_server.redis_nodes import AnyRedis
from mixtral_server.scripts import LIFE, Scripts

_SCRIPTS = {
    "list": ("common", "dead_list"),
    "show": ("common", "dead_show"),
    "retry": (*LIFE, "dead_letter", "dead_retry"),
    "drop": ("common", "dead_letter", "dead_drop"),
}


@dataclass(frozen=True)
class DeadLetter:
    """age_s is by Redis's clock. tokens: how many its log holds; None when nothing is left of the job."""

    job_id: str
    endpoint: str
    owner: str
    reason: str
    worker: str  # the last that died
    age_s: float
    tokens: int | None


@dataclass(frozen=True)
class Remains:
    """What is left of a job, dead or not. created: unix seconds, Redis's clock."""

    job_id: str
    state: str
    spec: JobContent
    priority: int
    attempts: int
    deaths: int
    created: float
    ids: tuple[int, ...]
    text: str


class DeadLetters:
    def __init__(self, redis: AnyRedis, endpoints: Collection[str]) -> None:
        self._endpoints = endpoints
        self._scripts = Scripts(redis, _SCRIPTS)

    async def list(self, endpoint: str, limit: int = 1_000) -> list[DeadLetter]:
        """Newest first. Raises RedisUnavailable."""
        now, letters = await self._scripts.run("list", Shard(endpoint), limit)
        return [
            DeadLetter(job, endpoint, owner, reason, worker, max(0, now - int(at)) / 1000, int(tokens) if tokens else None)
            for job, owner, reason, worker, at, tokens in letters
        ]

    async def show(self, job_id: str) -> Remains:
        """Raises JobNotFound, RedisUnavailable."""
        reply = await self._scripts.run("show", self._shard(job_id), job_id)
        if reply is None:
            raise _not_found(job_id)
        state, spec, priority, attempts, deaths, created, log = reply
        return Remains(
            job_id=job_id,
            state=state,
            spec=content_of(spec),
            priority=int(priority),
            attempts=int(attempts),
            deaths=int(deaths),
            created=seconds_of(created),
            ids=tuple(token for ids, _ in log for token in orjson.loads(ids)),
            text="".join(text for _, texts in log for text in orjson.loads(texts)),
        )

    async def retry(self, job_id: str) -> str:
        """Let it wait again in its place, no deaths counted, its log kept. Returns the state it had: unless that is dead, nothing was done.
        Raises JobNotFound, RedisUnavailable."""
        state: Any = await self._scripts.run("retry", self._shard(job_id), job_id)
        if state is None:
            raise _not_found(job_id)
        return str(state)

    async def drop(self, job_id: str) -> bool:
        """Forget it, its request and its log. False for one that is not dead. Raises JobNotFound, RedisUnavailable."""
        return bool(await self._scripts.run("drop", self._shard(job_id), job_id))

    def _shard(self, job_id: str) -> Shard:
        shard = shard_of(job_id)
        if shard is None or shard.endpoint not in self._endpoints:
            raise _not_found(job_id)
        return shard


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id[:150]!r} at any endpoint here; `mixtral-server dead list` shows those that were given up")
