"""AimeQueue: leases of workers that speak AIME's wire, and what they send without token ids, in Redis.

Decides how such a worker is known again (by its key and its name) and how long it may be silent. Leaves the lines, leases and ends to the
scripts of queue.py, whose jobs these are, and the wire to routes/aime_workers.py.

A worker's session has the same id at every server, so any of them can serve any of its calls. Its lease lasts twice its request timeout:
AIME's library calls in that often at least. Text goes into the job's log, an entry for each post, without ids; all else that the endpoint
declares is kept beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from mixtral_client.protocol import ErrorDetail
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import TooManySessions
from mixtral_server.keys import Shard
from mixtral_server.queue import JobQueue
from mixtral_server.records import JobContent, content_of, seconds_of
from mixtral_server.redis_client import redis_answers
from mixtral_server.redis_nodes import AnyRedis
from mixtral_server.scripts import LIFE, Scripts

_SCRIPTS = {
    "open": ("common", "open"),
    "ask": (*LIFE, "claim", "aime_claim", "aime_ask"),
    "post": (*LIFE, "aime_post"),
    "return": (*LIFE, "aime_return"),
}

LEASE_TIMEOUTS = 2  # request timeouts without a word, after which a worker is gone
MAX_TOLD = 2**31 - 1


@dataclass(frozen=True)
class AimeSession:
    """One worker at one endpoint. key_id: whose key it has."""

    endpoint: EndpointConfig
    key_id: str
    name: str

    @property
    def id(self) -> str:
        known_by = orjson.dumps([self.key_id, self.name])
        return f"{Shard(self.endpoint.name).name}-{hashlib.sha256(known_by).hexdigest()[:32]}"

    @property
    def lease_ms(self) -> int:
        return math.ceil(LEASE_TIMEOUTS * self.endpoint.worker.request_timeout_s * 1000)


@dataclass(frozen=True)
class AimeJob:
    id: str
    attempt: int
    content: JobContent
    created: float  # unix seconds, Redis's clock


@dataclass(frozen=True)
class Asked:
    """Jobs leased to a worker that asked. again_s: a batch is filling, and to be asked for again after so long; lost: jobs that the worker
    should have and does not know of, now with others."""

    jobs: Sequence[AimeJob]
    now: float  # unix seconds, Redis's clock
    again_s: float | None = None
    lost: int = 0


@dataclass(frozen=True)
class Post:
    """Progress of a job, or its result where ending is given. text: whole so far; None: not told. said: what is kept beside it."""

    job_id: str
    attempt: int
    text: str | None = None
    tokens: int | None = None  # generated so far
    prompt_tokens: int | None = None
    said: Mapping[str, Any] | None = None
    ending: str = ""  # stop or error
    error: ErrorDetail | None = None


@dataclass(frozen=True)
class Taken:
    """What became of a post. is_news: the worker was never told before that the job is not its own any more. state: the job's, if there is
    one."""

    is_taken: bool
    is_news: bool = False
    state: str = ""


class AimeQueue:
    def __init__(self, redis: AnyRedis, queue: JobQueue) -> None:
        self._redis = redis
        self._queue = queue
        self._scripts = Scripts(redis, _SCRIPTS)

    async def open(self, session: AimeSession, facts: Mapping[str, str | int], about: Mapping[str, Any]) -> None:
        """Log a worker in; one that is logged in stays so. Raises TooManySessions, RedisUnavailable."""
        limits = self._queue.endpoints[session.endpoint.name]
        flat = [part for pair in facts.items() for part in pair]
        shard, most = Shard(session.endpoint.name), limits.max_sessions_per_key
        about_text = orjson.dumps(about)
        args = (session.id, session.key_id, session.lease_ms, most, "name", session.name, "about", about_text, *flat)
        if not await self._scripts.run("open", shard, *args):
            raise TooManySessions(
                f"this worker key has {most} sessions open on {session.endpoint.name}, the most it may have; close one, or wait for "
                "those of dead workers to lapse",
                retry_after_s=session.lease_ms / 1000,
            )

    async def ask(self, session: AimeSession, poll: str, room: int, *, is_first: bool) -> Asked | None:
        """Lease up to room jobs. None for a worker that is not logged in, and for a poll that a later one of the same worker has replaced.

        poll: names the call, which may ask again and again while it waits; is_first: it has just come. Raises RedisUnavailable.
        """
        limits = self._queue.endpoints[session.endpoint.name]
        reply = await self._scripts.run(
            "ask",
            Shard(session.endpoint.name),
            session.id,
            session.key_id,
            session.lease_ms,
            poll,
            int(is_first),
            room,
            limits.batch_wait_ms,
            math.ceil(session.endpoint.worker.job_silence_s * 1000),
            limits.max_dead_letters,
            math.ceil(limits.dead_ttl_s * 1000),
        )
        if reply[0] != "ok":
            return None
        _, jobs, fill_ms, now_ms, lost = reply
        leased = [AimeJob(job_id, int(attempt), content_of(spec), seconds_of(created)) for job_id, attempt, spec, created in jobs]
        return Asked(leased, now_ms / 1000, fill_ms / 1000 if fill_ms else None, lost)

    async def give_back(self, session: AimeSession, poll: str, jobs: Sequence[AimeJob] = ()) -> int:
        """The poll's connection is gone: these jobs go back to their places, and a worker that holds no others is logged out."""
        pairs = [part for job in jobs for part in (job.id, job.attempt)]
        return int(await self._scripts.run("return", Shard(session.endpoint.name), session.id, session.key_id, poll, *pairs))

    async def post(self, session: AimeSession, posts: Sequence[Post]) -> list[Taken]:
        """What a worker says of jobs of one endpoint, each judged alone. Raises RedisUnavailable."""
        args = [part for one in posts for part in _post_args(one)]
        replies = await self._scripts.run("post", Shard(session.endpoint.name), session.id, session.key_id, session.lease_ms, *args)
        return [Taken(True) if reply[0] == "ok" else Taken(False, bool(reply[1]), reply[2]) for reply in replies]

    async def is_open(self, session: AimeSession) -> bool:
        """Raises RedisUnavailable."""
        shard = Shard(session.endpoint.name)
        with redis_answers():
            return bool(await self._redis.at(shard.tag).exists(shard.key(f"session:{session.id}")))

    async def said(self, job_id: str, endpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a worker said beside the text: with its latest progress, and with its result. Raises RedisUnavailable."""
        shard = Shard(endpoint)
        with redis_answers():
            kept = await self._redis.at(shard.tag).hmget(shard.key(f"job:{job_id}"), ["progress", "result"])
        progress, result = (orjson.loads(one) if one else {} for one in kept)
        return progress, result


def _post_args(post: Post) -> tuple[str | bytes | int, ...]:
    return (
        post.job_id,
        post.attempt,
        "" if post.text is None else f"={post.text}".encode("utf-8", "replace"),
        "" if post.tokens is None else min(post.tokens, MAX_TOLD),
        "" if post.prompt_tokens is None else min(post.prompt_tokens, MAX_TOLD),
        b"" if post.said is None else orjson.dumps(post.said),
        post.ending,
        "" if post.error is None else post.error.model_dump_json(exclude_none=True),
    )
