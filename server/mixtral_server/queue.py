"""JobQueue: which job runs next, who holds it, and what it has produced, in Redis.

Decides states, leases, the fence, fair share, deadlines, poison, results and their end. Every step is one Lua script (lua/), so
each is atomic across replicas, takes time from Redis alone, and may be repeated. Leaves to relay.py how tokens reach readers, to
routes who may ask and how long a turn waits, to history.py what becomes of the usage outbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.asyncio import Redis

from mixtral_client.protocol import (
    ErrorDetail,
    Finish,
    JobSpec,
    JobState,
    SessionAnswer,
    SessionRequest,
    Timings,
    TurnAnswer,
    TurnRequest,
    Usage,
)

FORMAT = 1
"""Number of the layout of keys and scripts in Redis. A server refuses a newer one; the same number may run side by side."""


@dataclass(frozen=True)
class QueueLimits:
    """What one endpoint's queue holds at most, and for how long."""

    max_waiting: int = 10_000
    max_waiting_per_user: int = 1_000
    lease_s: float = 10.0
    report_interval_ms: int = 20
    result_ttl_s: float = 3600.0
    max_sessions_per_key: int = 64
    max_unsaved_usage: int = 1_000_000
    max_dead_letters: int = 1_000


@dataclass(frozen=True)
class Put:
    """A queued job, or the one that the idempotency key named already (created is False then)."""

    job_id: str
    state: JobState
    created: bool
    position: int | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a waiting job stands: 1 = next. eta_s is position / measured finish rate, None while none is measured."""

    position: int
    eta_s: float | None


@dataclass(frozen=True)
class Entry:
    """Tokens of one log entry; offset of ids[0] is first. texts has one text per id."""

    first: int
    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """A job's record and its log entries after an offset, read in one step.

    The first entry may begin at or before the offset asked for: entries are never cut.
    """

    job_id: str
    endpoint: str
    owner: str
    title: str
    state: JobState
    priority: int
    created: float  # unix seconds, Redis's clock
    attempt: int  # leases so far
    n: int  # tokens in the log
    entries: tuple[Entry, ...]
    finish: Finish | None = None
    error: ErrorDetail | None = None  # of failed and dead jobs
    usage: Usage | None = None  # once terminal
    timings: Timings | None = None  # once terminal

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def text(self) -> str:
        return "".join(text for entry in self.entries for text in entry.texts)

    @property
    def ids(self) -> list[int]:
        return [token for entry in self.entries for token in entry.ids]


TERMINAL_STATES = ("done", "failed", "cancelled", "expired", "dead")


@dataclass(frozen=True)
class Reaped:
    """What one round of reap did; `more` asks for another round at once (each is bounded)."""

    lapsed_sessions: int
    requeued: int
    dead: int
    expired: int
    shifted_s: float = 0.0  # by how much leases and deadlines moved because nobody had reaped
    more: bool = False


@dataclass(frozen=True)
class FinishedJob:
    """One row of the usage outbox: a job that ended, whatever its end. entry_id acknowledges it; job_id is unique."""

    entry_id: str
    job_id: str
    endpoint: str
    owner: str
    title: str
    state: JobState
    finish: Finish
    error_code: str | None
    prompt_tokens: int
    completion_tokens: int
    attempts: int
    created: float  # unix seconds, Redis's clock
    ended: float
    timings: Timings


@dataclass(frozen=True)
class DeadLetter:
    """A job that was given up because every worker that held it died."""

    job_id: str
    owner: str
    reason: str
    worker: str
    at: float


@dataclass(frozen=True)
class Depth:
    """Numbers of one endpoint for /metrics."""

    waiting: int
    running: int
    sessions: int
    users_waiting: int
    unsaved_usage: int
    dead_letters: int
    finish_rate: float | None  # jobs/s that left a slot, about the last minute
    ended: Mapping[str, int]  # terminal state → jobs since the endpoint's first day
    waiting_by_priority: Mapping[int, int]
    tokens: int  # appended since the endpoint's first day


@dataclass(frozen=True)
class LiveWorker:
    """One worker session that holds a lease."""

    session: str
    endpoint: str
    key_id: str
    name: str
    model: str
    device: str
    version: str
    max_slots: int
    max_seq_len: int
    running: int  # jobs held
    room: int  # as its last turn said
    opened: float
    lease_left_s: float
    drain: bool
    telemetry: Mapping[str, Any]


class JobQueue:
    """The queue and log of every endpoint. One per server process; holds no state of its own but script hashes."""

    def __init__(self, redis: Redis, endpoints: Mapping[str, QueueLimits]) -> None:
        """redis: as redis_server.connect() makes it (decoded answers, deadlines on every call)."""

    async def start(self) -> None:
        """Write or check the format number, load the scripts. Raises Unavailable when Redis holds a newer format."""
        raise NotImplementedError

    async def ping(self) -> None:
        """Raises RedisUnavailable unless Redis answers."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ clients

    async def put(
        self,
        endpoint: str,
        owner: str,
        spec: JobSpec,
        *,
        priority: int = 0,
        weight: float = 1.0,
        idempotency_key: str | None = None,
        body_hash: str = "",
        queue_timeout_s: float | None = None,
        title: str = "",
    ) -> Put:
        """Queue a job of owner. weight is the owner's share against other users'.

        Raises ModelNotFound, QueueFull, IdempotencyConflict (same key, other body_hash), Unavailable (outbox full), RedisUnavailable.
        """
        raise NotImplementedError

    async def read(self, job_id: str, after: int = 0) -> Snapshot:
        """Record and log entries that reach beyond offset after, in one step. Raises JobNotFound, RedisUnavailable."""
        raise NotImplementedError

    async def place(self, job_id: str) -> Place | None:
        """Where a waiting job stands under fair share; None when it does not wait. Raises RedisUnavailable."""
        raise NotImplementedError

    async def position(self, job_id: str) -> int | None:
        """1 = next; None when the job does not wait."""
        place = await self.place(job_id)
        return place.position if place else None

    async def cancel(self, job_id: str) -> JobState:
        """End the job at once, whatever it does; no-op when it has ended. Returns its state afterwards. Raises JobNotFound."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ workers

    async def open_session(self, request: SessionRequest, key_id: str) -> SessionAnswer:
        """Log a worker in. The caller has checked key and protocol number. Raises ModelNotFound, TooManySessions."""
        raise NotImplementedError

    async def turn(self, request: TurnRequest, key_id: str) -> TurnAnswer:
        """Append frames, renew the lease, lease up to room jobs. Never waits for work. Raises SessionLapsed.

        The same turn number may be sent again and again: while nothing was leased under it, each call may lease (so a parked
        turn calls this every few seconds); once something was, every call leases the same jobs and no others.
        """
        raise NotImplementedError

    async def close_session(self, session: str, key_id: str) -> int:
        """Log out: every job held goes back to its place in the queue at once. Returns how many; 0 for an unknown session."""
        raise NotImplementedError

    async def drain_session(self, session: str) -> bool:
        """Ask a worker to take no new work and to leave when done. False when there is no such session."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ upkeep

    async def reap(self, endpoint: str) -> Reaped:
        """Return the jobs of lapsed sessions, expire jobs past their deadline. Any replica, every second."""
        raise NotImplementedError

    async def usage_batch(self, endpoint: str, limit: int = 500) -> list[FinishedJob]:
        """The oldest jobs of the outbox. Several replicas may get the same rows: job_id tells them apart."""
        raise NotImplementedError

    async def usage_ack(self, endpoint: str, entry_ids: Sequence[str]) -> None:
        """Forget rows of the outbox that are saved."""
        raise NotImplementedError

    async def dead_letters(self, endpoint: str, limit: int = 100) -> list[DeadLetter]:
        """The latest jobs given up, newest first."""
        raise NotImplementedError

    async def depth(self, endpoint: str) -> Depth:
        """Counts for /metrics."""
        raise NotImplementedError

    async def sessions(self, endpoint: str) -> list[LiveWorker]:
        """The workers that hold a lease now."""
        raise NotImplementedError


WakeTicket = int
EndKind = Literal["done", "error"]
