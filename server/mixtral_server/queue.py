"""JobQueue: which job runs next, who holds it, and what it has produced, in Redis.

Decides states, leases, the fence, fair share, deadlines, poison, results and their end. Every step is one Lua script (lua/), so
each is atomic across replicas, takes time from Redis alone, and may be repeated. Leaves to relay.py how tokens reach readers, to
routes who may ask and how long a turn waits, to history.py what becomes of the usage outbox.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from mixtral_client.protocol import Drop, Expect, JobState, SessionAnswer, SessionRequest, TurnRequest
from mixtral_server.errors import (
    IdempotencyConflict,
    JobNotFound,
    LimitReached,
    ModelNotFound,
    QueueFull,
    SessionLapsed,
    TooManySessions,
    Unavailable,
)
from mixtral_server.keys import Shard, shard_of
from mixtral_server.rates import Allowance, Rate
from mixtral_server.records import (
    TERMINAL_STATES,
    Depth,
    FinishedJob,
    JobContent,
    LiveWorker,
    Place,
    Put,
    Reaped,
    Snapshot,
    Turned,
    allowance_of,
    estimate_of,
    eta_errors_of,
    finished_job_of,
    leased_job_of,
    live_worker_of,
    news_of_turn,
    packed,
    pairs_of,
    place_of,
    snapshot_of,
    telemetry_json,
)
from mixtral_server.redis_client import RedisClient, redis_answers
from mixtral_server.redis_nodes import AnyRedis
from mixtral_server.scripts import LIFE, Scripts

FORMAT = 3
"""Number of the layout of keys and scripts in Redis. A server refuses a newer one; the same number may run side by side."""

PRIORITIES = range(10)
NEVER_US = 2**49
"""Nearly 18 years: the ageing of an endpoint whose jobs do not age. Nine of them and a time in µs still are a whole number to Lua."""

MAX_JOBS_PER_TURN = 256
USAGE_BATCH = 500
"""Finished jobs that are carried to the ledger in one transaction."""
MAX_TITLE_CHARS = 200

_SCRIPTS = {
    "put": ("common", "share", "line", "rates", "pace", "place", "put"),
    "read": ("common", "read"),
    "position": ("common", "share", "pace", "place", "position"),
    "cancel": (*LIFE, "cancel"),
    "open": ("common", "open"),
    "turn": (*LIFE, "append", "claim", "turn"),
    "close": (*LIFE, "close"),
    "drain": ("common", "drain"),
    "reap": (*LIFE, "reap"),
    "depth": ("common", "pace", "depth"),
    "sessions": ("common", "sessions"),
}
"""Script → the files in lua/ that make it up, in this order."""


@dataclass(frozen=True)
class QueueLimits:
    """What one endpoint's queue holds at most, for how long, and who is served when."""

    max_waiting: int = 10_000
    max_waiting_per_user: int = 1_000
    max_waiting_tokens: int = 50_000_000  # estimated: prompt and longest answer
    max_waiting_tokens_per_user: int = 5_000_000
    ageing_s: float = 60.0  # a job that has waited so long is served as one of the next better priority; 0: never
    batch_wait_ms: int = 50
    lease_s: float = 10.0
    report_interval_ms: int = 20
    result_ttl_s: float = 3600.0
    max_sessions_per_key: int = 64
    max_unsaved_usage: int = 1_000_000
    max_dead_letters: int = 1_000
    dead_ttl_s: float = 604_800.0


class JobQueue:
    """The queue and log of every endpoint. One per server process; holds no state of its own but script hashes."""

    def __init__(self, redis: AnyRedis, endpoints: Mapping[str, QueueLimits]) -> None:
        self._redis = redis
        self._endpoints = dict(endpoints)
        self._scripts = Scripts(redis, _SCRIPTS)

    @property
    def endpoints(self) -> Mapping[str, QueueLimits]:
        return self._endpoints

    async def start(self) -> None:
        """Write or check the format number, load the scripts. Raises Unavailable when Redis holds another format."""
        with redis_answers():
            for endpoint in self._endpoints:
                key, redis = Shard(endpoint).key("format"), self._at(Shard(endpoint))
                await redis.set(key, FORMAT, nx=True)
                found = int(await redis.get(key) or FORMAT)
                if found != FORMAT:
                    newer = found > FORMAT
                    raise Unavailable(
                        f"endpoint {endpoint} in Redis is kept in format {found}; this server reads and writes format {FORMAT}; "
                        + ("start the newer server" if newer else "finish its jobs with the older server, then delete its keys")
                    )
                await self._scripts.load(Shard(endpoint))

    # ------------------------------------------------------------------------------------------ clients

    def new_id(self, endpoint: str) -> str:
        """Of a job that is not yet put. Raises ModelNotFound."""
        return self._shard(endpoint).new_id()

    async def put(
        self,
        endpoint: str,
        owner: str,
        spec: JobContent,
        *others: JobContent,
        needs_native: bool = False,
        priority: int = 0,
        weight: float = 1.0,
        idempotency_key: str | None = None,
        body_hash: str = "",
        queue_timeout_s: float | None = None,
        title: str = "",
        key_id: str = "",
        max_running: int | None = None,
        rates: Sequence[Rate] = (),
        job_ids: Sequence[str] = (),
    ) -> Put:
        """Queue a job of owner, or several: all of them or none. weight is the owner's share against other users'. Each of rates must
        allow them, or none is charged. job_ids: a new_id() for each, so that jobs can be followed before they are put.

        priority: 0 (served first) to 9. max_running: so many jobs of key_id at most run at a time on this endpoint, 1 or more; those
        above it wait, and none is refused for it. None: as many as come. The latest put of a key says the number for all its jobs.
        needs_native: no AIME worker can do what spec asks for.

        Raises ModelNotFound, LimitReached, QueueFull, IdempotencyConflict (same key, other body_hash), Unavailable (outbox full),
        RedisUnavailable.
        """
        shard, limits = self._shard(endpoint), self._limits(endpoint)
        if priority not in PRIORITIES or (max_running is not None and (max_running < 1 or not key_id)):
            raise ValueError(
                f"priority is 0 to 9, max_running 1 or more and of a key_id; got {priority}, {max_running} and key_id {key_id!r}"
            )
        specs = (spec, *others)
        prompts, answers = zip(*map(estimate_of, specs), strict=True)
        prompt_tokens, answer_tokens = sum(prompts), sum(answers)
        first_id, *other_ids = job_ids or [shard.new_id() for _ in specs]
        held, reply = await self._run(
            "put",
            shard,
            first_id,
            owner,
            priority,
            weight,
            *_job_args(spec),
            title[:MAX_TITLE_CHARS],
            _ms(limits.result_ttl_s),
            "" if queue_timeout_s is None else _ms(queue_timeout_s),
            "" if idempotency_key is None else hashlib.sha256(idempotency_key.encode()).hexdigest()[:32],
            body_hash,
            limits.max_waiting,
            limits.max_waiting_per_user,
            limits.max_waiting_tokens,
            limits.max_waiting_tokens_per_user,
            limits.max_unsaved_usage,
            orjson.dumps([(rate.bucket, rate.requests_per_minute, rate.tokens_per_minute) for rate in rates]).decode() if rates else "",
            "" if max_running is None else key_id,
            "" if max_running is None else max_running,
            math.ceil(limits.ageing_s * 1e6) or NEVER_US,
            int(needs_native),
            *(part for job_id, one in zip(other_ids, others, strict=True) for part in (job_id, *_job_args(one))),
        )
        allowances = tuple(allowance_of(rate, *left) for rate, left in zip(rates, held, strict=True))
        if reply[0] in ("created", "known"):
            outcome, job_id, state, *place, beside = reply
            return Put(job_id, state, outcome == "created", place_of(place), allowances, tuple(beside))
        if reply[0] == "limited":
            refusing = allowances[reply[1]]
            raise LimitReached(
                refusing.refusal(endpoint, prompt_tokens, answer_tokens, len(specs)),
                retry_after_s=refusing.wait_s(prompt_tokens + answer_tokens, len(specs)),
                allowances=allowances,
            )
        raise _refusal(endpoint, limits, reply, allowances, len(specs))

    async def read(self, job_id: str, after: int = 0) -> Snapshot:
        """Record and log entries that reach beyond offset after, in one step. Raises JobNotFound, RedisUnavailable."""
        shard = self._shard_of_job(job_id)
        reply = await self._run("read", shard, job_id, after)
        if reply is None:
            raise _job_not_found(job_id)
        return snapshot_of(job_id, shard.endpoint, *reply)

    async def place(self, job_id: str) -> Place | None:
        """Where a waiting job stands under fair share; None when it does not wait. Raises JobNotFound, RedisUnavailable."""
        reply = await self._run("position", self._shard_of_job(job_id), job_id)
        if reply is None:
            raise _job_not_found(job_id)
        return place_of(reply)

    async def position(self, job_id: str) -> int | None:
        """1 = next; None when the job does not wait."""
        place = await self.place(job_id)
        return place.position if place else None

    async def cancel(self, job_id: str) -> JobState:
        """End the job at once, whatever it does; no-op when it has ended. Returns its state afterwards. Raises JobNotFound."""
        state: JobState | None = await self._run("cancel", self._shard_of_job(job_id), job_id)
        if state is None:
            raise _job_not_found(job_id)
        return state

    # ------------------------------------------------------------------------------------------ workers

    async def open_session(self, request: SessionRequest, key_id: str) -> SessionAnswer:
        """Log a worker in. The caller has checked key and protocol number. Raises ModelNotFound, TooManySessions."""
        shard, limits = self._shard(request.endpoint), self._limits(request.endpoint)
        session = shard.new_id()
        facts = request.model_dump(
            include={"name", "model", "device", "version", "max_slots", "max_seq_len", "static_batch"}, exclude_none=True
        )
        flat = [part for pair in facts.items() for part in pair]
        if not await self._run("open", shard, session, key_id, _ms(limits.lease_s), limits.max_sessions_per_key, *flat):
            raise TooManySessions(
                f"this worker key has {limits.max_sessions_per_key} sessions open on {request.endpoint}, the most it may have; "
                f"close one, or wait {limits.lease_s:g} s for those of dead workers to lapse",
                retry_after_s=limits.lease_s,
            )
        return SessionAnswer(session=session, lease_s=limits.lease_s, report_interval_ms=limits.report_interval_ms)

    async def turn(self, request: TurnRequest, key_id: str, asker: str = "") -> Turned:
        """Append frames, renew the lease, lease up to room jobs. Never waits for work. Raises SessionLapsed.

        asker: the name of this process where it listens to the live channel: it hears nothing there of this turn, and gives the news of the
        answer to its followers.

        The same turn number may be sent again and again: while nothing was leased under it, each call may lease (so a parked
        turn calls this every few seconds); once something was, every call answers with the same jobs and no others.
        """
        shard = self._shard_of_session(request.session)
        reply = await self._run(
            "turn",
            shard,
            request.session,
            key_id,
            request.turn,
            request.room,
            _ms(self._limits(shard.endpoint).lease_s),
            MAX_JOBS_PER_TURN,
            telemetry_json(request.telemetry),
            self._limits(shard.endpoint).batch_wait_ms,
            asker,
            orjson.dumps([part for pair in request.holding for part in pair]),
            packed(request.frames),
        )
        if reply[0] == "lapsed":
            raise _session_lapsed(request.session)
        if reply[0] == "stale":
            return Turned(turn=request.turn)
        _, jobs, drops, expects, drain, fill_ms, marks, others = reply
        return Turned(
            turn=request.turn,
            jobs=[leased_job_of(*job) for job in jobs],
            drops=[Drop(job=job, attempt=int(attempt)) for job, attempt in drops],
            expect=[Expect(job=job, offset=offset) for job, offset in expects],
            drain=bool(drain),
            again_s=fill_ms / 1000 if fill_ms else None,
            news=news_of_turn(request.frames, marks, others),
        )

    async def close_session(self, session: str, key_id: str) -> int:
        """Log out: every job held goes back to its place in the queue at once. Returns how many; 0 for an unknown session."""
        shard = self._known(shard_of(session))
        return int(await self._run("close", shard, session, key_id)) if shard else 0

    async def drain_session(self, session: str) -> bool:
        """Ask a worker to take no new work and to leave when done. False when there is no such session."""
        shard = self._known(shard_of(session))
        return bool(shard and await self._run("drain", shard, session))

    # ------------------------------------------------------------------------------------------ upkeep

    async def reap(self, endpoint: str) -> Reaped:
        """Return the jobs of lapsed sessions, expire jobs past their deadline. Any replica, every second."""
        limits = self._limits(endpoint)
        reply = await self._run("reap", self._shard(endpoint), limits.max_dead_letters, _ms(limits.dead_ttl_s))
        lapsed, requeued, dead, expired, gap_ms, more = reply
        return Reaped(lapsed, requeued, dead, expired, gap_ms / 1000, bool(more))

    async def usage_batch(self, endpoint: str, limit: int = USAGE_BATCH) -> dict[str, FinishedJob]:
        """The oldest jobs of the outbox by the id that acknowledges them. Several replicas may get the same."""
        with redis_answers():
            rows: Any = await self._at(self._shard(endpoint)).xrange(self._shard(endpoint).key("usage"), count=limit)
        return {entry_id: finished_job_of(endpoint, row) for entry_id, row in rows}

    async def usage_ack(self, endpoint: str, entry_ids: Collection[str]) -> None:
        """Forget rows of the outbox that are saved."""
        if entry_ids:
            with redis_answers():
                await self._at(self._shard(endpoint)).xdel(self._shard(endpoint).key("usage"), *entry_ids)

    async def depth(self, endpoint: str) -> Depth:
        """Counts for /metrics."""
        reply = await self._run("depth", self._shard(endpoint))
        waiting, tokens, users, running, sessions, unsaved, dead, rate, totals, etas = reply
        by_priority = {int(priority): int(count) for priority, count in pairs_of(waiting)}
        total = {name: int(count) for name, count in pairs_of(totals)}
        return Depth(
            waiting=sum(by_priority.values()),
            waiting_tokens=int(tokens),
            running=running,
            sessions=sessions,
            users_waiting=users,
            unsaved_usage=unsaved,
            dead_letters=dead,
            finish_rate=float(rate) if rate else None,
            ended={state: total.get(state, 0) for state in TERMINAL_STATES},
            waiting_by_priority=by_priority,
            tokens=total.get("tokens", 0),
            eta_errors=eta_errors_of(etas),
        )

    async def sessions(self, endpoint: str) -> list[LiveWorker]:
        """The workers that hold a lease now."""
        return [live_worker_of(endpoint, *row) for row in await self._run("sessions", self._shard(endpoint))]

    # ------------------------------------------------------------------------------------------ inside

    async def _run(self, script: str, shard: Shard, *args: str | bytes | int | float) -> Any:
        return await self._scripts.run(script, shard, *args)

    def _at(self, shard: Shard) -> RedisClient:
        return self._redis.at(shard.tag)

    def _limits(self, endpoint: str) -> QueueLimits:
        return self._endpoints[endpoint]

    def _shard(self, endpoint: str) -> Shard:
        if endpoint not in self._endpoints:
            known = ", ".join(sorted(self._endpoints))
            raise ModelNotFound(f"there is no endpoint {endpoint[:100]!r}; known are: {known}", param="model")
        return Shard(endpoint)

    def _known(self, shard: Shard | None) -> Shard | None:
        return shard if shard and shard.endpoint in self._endpoints else None

    def _shard_of_job(self, job_id: str) -> Shard:
        shard = self._known(shard_of(job_id))
        if shard is None:
            raise _job_not_found(job_id)
        return shard

    def _shard_of_session(self, session: str) -> Shard:
        shard = self._known(shard_of(session))
        if shard is None:
            raise _session_lapsed(session)
        return shard


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _job_args(spec: JobContent) -> tuple[int, int, str]:
    """Estimate, max tokens and request, as put.lua reads them."""
    return sum(estimate_of(spec)), spec.max_tokens, spec.model_dump_json(exclude_defaults=True)


def _refusal(endpoint: str, limits: QueueLimits, reply: Sequence[Any], allowances: Sequence[Allowance], jobs: int) -> Exception:
    why = reply[0]
    if why == "conflict":
        return IdempotencyConflict("this Idempotency-Key came before with another body; send the same body again, or a new key")
    if why == "unsaved":
        return Unavailable(
            f"{reply[1]:,} finished jobs of {endpoint} are not yet in the ledger, {limits.max_unsaved_usage:,} at most; "
            "new jobs are taken when the database has caught up",
            retry_after_s=30.0,
        )
    _, waiting, tokens, of_user, tokens_of_user, users, rate = reply
    # a slot for anybody frees a place; for this user, one in as many as there are users
    slots = users if why.startswith("user") else 1
    retry_after_s = min(60.0, max(1.0, slots / float(rate))) if rate else 5.0
    share = f"; the {users} users who wait share that equally, and you have"
    match why:
        case "user_jobs":
            sentence = f"you have {of_user:,} jobs waiting for {endpoint}, {limits.max_waiting_per_user:,} at most"
        case "user_tokens":
            most = limits.max_waiting_tokens_per_user
            sentence = f"your jobs waiting for {endpoint} come to {tokens_of_user:,} tokens as estimated, {most:,} at most"
        case "jobs":
            sentence = f"{waiting:,} jobs wait for {endpoint}, {limits.max_waiting:,} at most{share} {of_user:,}"
        case _:
            most = limits.max_waiting_tokens
            sentence = f"the jobs waiting for {endpoint} come to {tokens:,} tokens as estimated, {most:,} at most{share} {tokens_of_user:,}"
    fewer = f"; this request asks for {jobs} answers: ask for fewer, or" if jobs > 1 else ";"
    return QueueFull(f"{sentence}{fewer} try again in {math.ceil(retry_after_s)} s", retry_after_s=retry_after_s, allowances=allowances)


def _job_not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id[:150]!r}; finished jobs are forgotten after a while")


def _session_lapsed(session: str) -> SessionLapsed:
    return SessionLapsed(f"session {session[:150]!r} has ended or lapsed and its jobs are with others; drop them and log in anew")
