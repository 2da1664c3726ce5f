"""The queue against a plain Python model of it: any order of clients, workers, lost answers, deaths and outages.

The model says what each job's record and log must be, who is refused, which jobs their key's bound holds back, and what each turn must
answer. Of the order of jobs it says what does not depend on how fair share is reckoned: the best level first, each user's first due
first, nothing left waiting beside free room unless a batch is filling. Fair share has a property of its own below: no user with waiting
jobs falls behind another by more than one job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from mixtral_client.protocol import Frame, FrameError, JobSpec, SessionRequest, TurnRequest
from mixtral_server.errors import QueueFull, SessionLapsed
from mixtral_server.keys import Shard, key_kind
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.records import TERMINAL_STATES, Turned
from support.queue_bench import ENDPOINT
from support.redis import RedisProcess, connect

T = TypeVar("T")
SHARD = Shard(ENDPOINT)
AGEING_S = 1000
LIMITS = QueueLimits(
    max_sessions_per_key=1000,
    max_waiting=6,
    max_waiting_per_user=7,
    max_waiting_tokens=50,
    max_waiting_tokens_per_user=60,
    ageing_s=AGEING_S,
    batch_wait_ms=3_600_000,
)
LETTERS = 'añb€c/d"e\\'


@dataclass
class Job:
    id: str
    owner: str
    priority: int
    max_tokens: int
    due: float  # as Redis reckoned it: arrival + priority x ageing
    put_at: int  # seconds of the model's clock
    key: str | None = None  # of those whose running jobs are bounded
    level: int = 0  # at which it was leased
    state: str = "waiting"
    attempt: int = 0
    deaths: int = 0
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    has_deadline: bool = False

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= 2

    @property
    def has_ended(self) -> bool:
        return self.state in TERMINAL_STATES

    def end(self, state: str, finish: str) -> None:
        self.state, self.finish, self.has_deadline = state, finish, False


@dataclass
class Session:
    id: str
    slots: int
    batch: int | None = None
    held: dict[str, int] = field(default_factory=dict)  # what the server leased to it
    knows: dict[str, int] = field(default_factory=dict)  # what the worker has heard of
    turn: int = 0
    sent: list[str] = field(default_factory=list)  # jobs of the last answer
    last: TurnRequest | None = None


class QueueMachine(RuleBasedStateMachine):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.redis = connect(url)
        self.run(self.redis.flushall())
        self.queue = JobQueue(self.redis, {ENDPOINT: LIMITS})
        self.run(self.queue.reap(ENDPOINT))
        self.jobs: dict[str, Job] = {}
        self.sessions: list[Session] = []
        self.ghosts: list[Session] = []  # lapsed or closed
        self.keys: dict[str, str] = {}  # idempotency key → job
        self.most: dict[str, int] = {}  # key → bound on its running jobs
        self.waited_s = 0  # the model's clock
        self.filling: str | None = None  # a batch: "fresh", or "due" once its linger is over

    @initialize(jobs=st.integers(0, 6), workers=st.integers(0, 3))
    def begin(self, jobs: int, workers: int) -> None:
        for number in range(jobs):
            self.put(("ann", "bob")[number % 2], 0, 4 + number, 1.0, number == 3, None, None)
        for number in range(workers):
            self.open_session(4 - number, 2 if number == 2 else None)

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(step)

    # -------------------------------------------------------------------------------------------- clients

    @rule(
        owner=st.sampled_from(["ann", "bob", "cyd"]),
        priority=st.sampled_from([0, 0, 3, 9]),
        max_tokens=st.integers(1, 12),
        weight=st.sampled_from([1.0, 1.0, 0.5, 3.0]),
        has_deadline=st.booleans(),
        key=st.none() | st.sampled_from(["k1", "k2"]),
        most=st.none() | st.integers(1, 3),
    )
    def put(self, owner: str, priority: int, max_tokens: int, weight: float, has_deadline: bool, key: str | None, most: int | None) -> None:
        known = self.keys.get(f"{owner} {key}")
        is_refused = known is None and self.refuses(owner)
        try:
            put = self.run(
                self.queue.put(
                    ENDPOINT,
                    owner,
                    JobSpec(prompt=[1], max_tokens=max_tokens, seed=1),
                    needs_native=max_tokens % 3 == 0,
                    priority=priority,
                    weight=weight,
                    idempotency_key=key,
                    queue_timeout_s=1000 if has_deadline else None,
                    key_id=f"key of {owner}",
                    max_running=most,
                )
            )
        except QueueFull:
            assert is_refused
            return
        assert not is_refused
        assert put.created == (known is None)
        if known is not None:
            assert (put.job_id, put.state) == (known, self.jobs[known].state)
            return
        due = float(self.run(self.redis.hget(SHARD.key(f"job:{put.job_id}"), "due")) or 0)
        job = Job(put.job_id, owner, priority, max_tokens, due, self.waited_s, has_deadline=has_deadline)
        if most is not None:
            job.key = f"key of {owner}"
            self.most[job.key] = most
        self.jobs[job.id] = job
        if key:
            self.keys[f"{owner} {key}"] = job.id
        self.check(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(list(self.jobs.values())))
        state = self.run(self.queue.cancel(job.id))
        if not job.has_ended:
            job.end("cancelled", "cancelled")
            self.unhold(job)
        assert state == job.state
        self.check(job)

    # -------------------------------------------------------------------------------------------- workers

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(slots=st.integers(1, 4), batch=st.sampled_from([None, None, 1, 3]))
    def open_session(self, slots: int, batch: int | None) -> None:
        login = SessionRequest(
            endpoint=ENDPOINT,
            name="w",
            protocol=1,
            version="1",
            model="m",
            device="d",
            max_slots=slots,
            max_seq_len=9,
            static_batch=batch,
        )
        self.sessions.append(Session(self.run(self.queue.open_session(login, "key")).session, slots, batch))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), room=st.integers(0, 5), is_lost=st.booleans())
    def turn(self, data: st.DataObject, room: int, is_lost: bool) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        frames = [frame for job_id, attempt in session.knows.items() for frame in self.draw_frames(data, job_id, attempt)]
        request = TurnRequest(session=session.id, turn=session.turn + 1, holding=list(session.knows.items()), frames=frames, room=room)
        self.exchange(session, request, is_lost)

    @precondition(lambda self: any(session.last for session in self.sessions))
    @rule(data=st.data(), is_lost=st.booleans())
    def repeat_turn(self, data: st.DataObject, is_lost: bool) -> None:
        """The answer was lost, or the server asks again for a turn that waits for work."""
        session = data.draw(st.sampled_from([session for session in self.sessions if session.last]))
        assert session.last
        self.exchange(session, session.last, is_lost)

    @precondition(lambda self: any(session.turn > 1 for session in self.sessions))
    @rule(data=st.data())
    def overtaken_turn(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from([session for session in self.sessions if session.turn > 1]))
        frames = [self.tokens(job, attempt, 1, 3, finish="stop") for job, attempt in session.held.items()]
        late = TurnRequest(session=session.id, turn=session.turn - 1, frames=frames, room=9)
        answer = self.run(self.queue.turn(late, "key"))
        assert answer == Turned(turn=late.turn)
        for job_id in session.held:
            self.check(self.jobs[job_id])

    @precondition(lambda self: self.sessions and self.ghosts)
    @rule(data=st.data())
    def zombie(self, data: st.DataObject) -> None:
        """A worker that was gone for too long reports, under its old session and then under a new one."""
        ghost, session = data.draw(st.sampled_from(self.ghosts)), data.draw(st.sampled_from(self.sessions))
        frames = [self.tokens(job_id, attempt, len(self.jobs[job_id].ids) + 1, 2, finish="stop") for job_id, attempt in ghost.knows.items()]
        try:
            self.run(self.queue.turn(TurnRequest(session=ghost.id, turn=ghost.turn + 1, frames=frames, room=3), "key"))
        except SessionLapsed:
            pass
        else:
            raise AssertionError("a lapsed session was answered")
        stale = [frame for frame in frames if session.held.get(frame.job) != frame.attempt]
        request = TurnRequest(session=session.id, turn=session.turn + 1, holding=list(session.knows.items()), frames=stale)
        self.exchange(session, request, is_lost=False)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        assert self.run(self.queue.close_session(session.id, "key")) == len(session.held)
        for job_id in list(session.held):
            self.requeue(session, self.jobs[job_id])
        self.bury(session)

    # -------------------------------------------------------------------------------------------- time and trouble

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def lapse(self, data: st.DataObject) -> None:
        sessions = data.draw(st.lists(st.sampled_from(self.sessions), unique_by=id))
        self.run(self.queue.reap(ENDPOINT))
        for session in sessions:
            self.run(self.redis.zadd(SHARD.key("sessions"), {session.id: 1}))
        reaped = self.run(self.queue.reap(ENDPOINT))
        held = [self.jobs[job_id] for session in sessions for job_id in session.held]
        dead = [job for job in held if job.is_suspect]
        assert (reaped.lapsed_sessions, reaped.requeued, reaped.dead) == (len(sessions), len(held) - len(dead), len(dead))
        for session in sessions:
            for job in [self.jobs[job_id] for job_id in session.held]:
                if job.is_suspect:
                    job.end("dead", "error")
                else:
                    self.requeue(session, job)
                job.deaths += 1
                self.check(job)
            self.bury(session)

    @precondition(lambda self: any(job.has_deadline for job in self.jobs.values()))
    @rule(data=st.data(), is_reaped=st.booleans())
    def pass_deadline(self, data: st.DataObject, is_reaped: bool) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs.values() if job.has_deadline]))
        assert self.run(self.redis.zadd(SHARD.key("deadlines"), {job.id: 1}, xx=True, ch=True)) == 1
        if is_reaped:
            assert self.run(self.queue.reap(ENDPOINT)).expired == 1
        job.end("expired", "expired")
        if not is_reaped:  # a worker comes first, and must not be given it
            self.open_session(4, None)
            session = self.sessions[-1]
            self.exchange(session, TurnRequest(session=session.id, turn=1, room=4), is_lost=False)
            self.run(self.queue.reap(ENDPOINT))
        self.check(job)

    @rule(gap_s=st.sampled_from([-4000, -5, 5, 4000]))
    def outage(self, gap_s: int) -> None:
        """Nobody watched for so long, or Redis's clock jumped: nothing lapses and nothing expires."""
        self.run(self.redis.incrby(SHARD.key("tick"), -gap_s * 1000))
        self.run(self.redis.hincrby(SHARD.key("clock"), "away", -gap_s * 1_000_000))
        for key in ("sessions", "deadlines"):
            for member in self.run(self.redis.zrange(SHARD.key(key), 0, -1)):
                self.run(self.redis.zincrby(SHARD.key(key), -gap_s * 1000, member))
        reaped = self.run(self.queue.reap(ENDPOINT))
        assert (reaped.lapsed_sessions, reaped.expired) == (0, 0)

    # No sum of few of these is whole spans of ageing: at such an edge the milliseconds of the test's own time would decide, of which an
    # outage takes some off.
    @rule(seconds=st.sampled_from([401, 1001, 2501, 9001]))
    def wait(self, seconds: int) -> None:
        """All that waits has waited so much longer."""
        self.waited_s += seconds
        self.run(self.redis.hincrby(SHARD.key("clock"), "away", -seconds * 1_000_000))
        self.run(self.queue.reap(ENDPOINT))

    @precondition(lambda self: self.filling)
    @rule()
    def linger_ends(self) -> None:
        self.filling = "due"
        self.run(self.redis.incrby(SHARD.key("filling"), -LIMITS.batch_wait_ms))

    @rule()
    def flush_scripts(self) -> None:
        self.run(self.redis.script_flush())

    # -------------------------------------------------------------------------------------------- what must be true

    def check(self, job: Job) -> None:
        snapshot = self.run(self.queue.read(job.id))
        assert (snapshot.state, snapshot.attempt, snapshot.owner, snapshot.finish) == (job.state, job.attempt, job.owner, job.finish)
        assert snapshot.ids == job.ids
        assert snapshot.text == "".join(map(text_of, job.ids))
        offset = 1
        for entry in snapshot.entries:
            assert entry.offset == offset
            offset += len(entry.ids)

    def teardown(self) -> None:
        try:
            self.check_all()
        finally:
            self.run(self.redis.aclose())
            self.loop.close()

    def members(self, pattern: str) -> set[str]:
        """Of all sorted sets with such a name."""
        return {
            job
            for key in self.run(self.redis.keys(f"*:{pattern}"))
            if self.run(self.redis.type(key)) == "zset"
            for job in self.run(self.redis.zrange(key, 0, -1))
        }

    def check_all(self) -> None:
        for job in self.jobs.values():
            self.check(job)
        depth = self.run(self.queue.depth(ENDPOINT))
        assert depth.waiting == sum(job.state == "waiting" for job in self.jobs.values())
        assert depth.waiting_tokens == sum(job.max_tokens + 1 for job in self.jobs.values() if job.state == "waiting")
        assert depth.running == sum(len(session.held) for session in self.sessions)
        assert depth.sessions == len(self.sessions)
        assert depth.tokens == sum(len(job.ids) for job in self.jobs.values())
        for job in self.jobs.values():
            position = self.run(self.queue.position(job.id))
            assert position in range(1, depth.waiting + 1) if job.state == "waiting" else position is None
        assert self.members("native*") == {
            job for job in self.members("wait*") | self.members("suspects") if self.jobs[job].max_tokens % 3 == 0 or self.jobs[job].ids
        }
        closed = self.run(self.redis.hget(SHARD.key("closed"), "jobs"))
        assert int(closed or 0) == len(self.members("native*"))
        for session in list(self.sessions):
            self.run(self.queue.close_session(session.id, "key"))
        for job in self.jobs.values():
            self.run(self.queue.cancel(job.id))
        rows = self.run(self.queue.usage_batch(ENDPOINT))
        assert sorted(row.id for row in rows.values()) == sorted(self.jobs)
        for key in self.run(self.redis.keys()):
            kind = key_kind(key)
            assert kind is not None
            is_one = kind.pattern in (":tick", ":clock", ":rate", ":totals", ":usage", ":dead", ":parked", ":filling", ":eta", ":idle")
            assert is_one or self.run(self.redis.ttl(key)) > 0, key
        assert self.run(self.redis.get(SHARD.key("parked"))) in (None, "0")

    # -------------------------------------------------------------------------------------------- the model

    def draw_frames(self, data: st.DataObject, job_id: str, attempt: int) -> list[Frame]:
        """What a worker may say of a job it knows: nothing, news, news again, too much, an end."""
        n = len(self.jobs[job_id].ids)
        kind = data.draw(st.sampled_from(["nothing", "news", "news", "overlap", "beyond", "two", "end", "bare end", "error", "release"]))
        count = data.draw(st.integers(1, 4))
        match kind:
            case "nothing":
                return []
            case "news":
                return [self.tokens(job_id, attempt, n + 1, count)]
            case "overlap":
                return [self.tokens(job_id, attempt, data.draw(st.integers(1, n + 1)), count)]
            case "beyond":
                return [self.tokens(job_id, attempt, n + 1 + count, count, finish="stop")]
            case "two":
                return [self.tokens(job_id, attempt, n + 1, count), self.tokens(job_id, attempt, n + 1 + count, 1)]
            case "end":
                return [self.tokens(job_id, attempt, n + 1, count, finish="length")]
            case "bare end":
                return [self.tokens(job_id, attempt, data.draw(st.integers(1, n + 2)), 0, finish="stop")]
            case "error":
                return [self.tokens(job_id, attempt, n + 1, 0, error=FrameError(code="worker_error", message="no"))]
            case _:
                return [self.tokens(job_id, attempt, n + 1, count, release=True)]

    def tokens(self, job_id: str, attempt: int, offset: int, count: int, **ending: Any) -> Frame:
        """Deterministic as a worker's sampling is: the id depends on job and offset alone."""
        ids = [id_at(job_id, at) for at in range(offset, offset + count)]
        return Frame(job=job_id, attempt=attempt, offset=offset, ids=ids, texts=[text_of(token) for token in ids], **ending)

    def exchange(self, session: Session, request: TurnRequest, is_lost: bool) -> None:
        answer = self.run(self.queue.turn(request, "key"))
        released = any(frame.release and session.held.get(frame.job) == frame.attempt for frame in request.frames)
        drops, expects = set(), []
        for frame in request.frames:
            if session.held.get(frame.job) != frame.attempt:
                drops.add((frame.job, frame.attempt))
            elif (offset := self.append(session, frame)) is not None:
                expects.append((frame.job, offset))
        drops |= {pair for pair in request.holding if session.held.get(pair[0]) != pair[1]}
        assert {(drop.job, drop.attempt) for drop in answer.drops} == drops
        assert [(expect.job, expect.offset) for expect in answer.expect] == expects
        self.check_jobs(session, request, answer, released)
        for job in answer.jobs:
            record = self.jobs[job.id]
            assert (job.attempt, job.produced_ids, job.suspect) == (record.attempt, record.ids, record.is_suspect)
            assert job.priority == record.level
            assert job.sent_bytes == len("".join(map(text_of, record.ids)).encode())
        session.turn, session.last, session.sent = request.turn, request, [job.id for job in answer.jobs]
        if not is_lost:
            session.knows |= {job.id: job.attempt for job in answer.jobs}
            for pair in drops:
                if session.knows.get(pair[0]) == pair[1]:
                    del session.knows[pair[0]]
        for job_id in {frame.job for frame in request.frames} | {job.id for job in answer.jobs}:
            self.check(self.jobs[job_id])

    def append(self, session: Session, frame: Frame) -> int | None:
        """Apply a frame that has passed the fence; the offset expected where the log wants another."""
        job = self.jobs[frame.job]
        n, last = len(job.ids), frame.offset + len(frame.ids) - 1
        if frame.offset <= n + 1:
            job.ids += frame.ids[n + 1 - frame.offset :][: job.max_tokens - n]
            if len(job.ids) > n:
                job.state = "streaming"
        if frame.error:
            self.finish(session, job, "failed", "error")
        elif frame.release:
            self.requeue(session, job)
        elif len(job.ids) == job.max_tokens and last > job.max_tokens:
            self.finish(session, job, "done", "length")
        elif frame.offset > n + 1:
            return n + 1
        elif frame.finish and last != len(job.ids):
            return len(job.ids) + 1
        elif frame.finish:
            self.finish(session, job, "done", frame.finish)
        return None

    def check_jobs(self, session: Session, request: TurnRequest, answer: Turned, released: bool) -> None:
        given = [job.id for job in answer.jobs]
        if request.turn == session.turn and session.sent:
            assert given == [job_id for job_id in session.sent if job_id in session.held]
            return
        lacks = sorted(job_id for job_id, attempt in session.held.items() if (job_id, attempt) not in request.holding)
        again, homeless = lacks[: request.room], lacks[request.room :]
        assert given[: len(again)] == again
        for job_id in homeless:
            self.requeue(session, self.jobs[job_id])
            released = True
        free = 0 if released else min(request.room - len(again), session.slots - len(session.held))
        if session.batch is not None and free > 0:
            free = min(free, session.batch)
            in_line = sum(job.state == "waiting" and not self.is_parked(job) for job in self.jobs.values())
            self.filling = None if in_line in (0, *range(free, in_line + 1)) or self.filling == "due" else "fresh"
            assert (answer.again_s is not None) == (self.filling is not None)
            free = 0 if self.filling else free
        for job_id in given[len(again) :]:
            free -= 1
            self.lease(session, self.jobs[job_id])
        assert free >= 0 or len(given) == len(again)
        if free > 0:
            assert self.claimable(session) == []

    def claimable(self, session: Session) -> list[Job]:
        has_suspect = any(self.jobs[job_id].is_suspect for job_id in session.held)
        waiting = [job for job in self.jobs.values() if job.state == "waiting"]
        return [job for job in waiting if not (has_suspect and job.is_suspect) and not self.is_parked(job)]

    def is_parked(self, job: Job) -> bool:
        """Of a key's jobs so many are not as may run beside those that do: those first due."""
        if job.key is None:
            return False
        of_key = [other for other in self.jobs.values() if other.key == job.key and not other.has_ended]
        running = sum(other.state != "waiting" for other in of_key)
        before = sum(other.state == "waiting" and other.due < job.due for other in of_key)
        return running + before >= self.most[job.key]

    def level_of(self, job: Job) -> int:
        return max(0, job.priority - (self.waited_s - job.put_at) // AGEING_S)

    def refuses(self, owner: str) -> bool:
        waiting = [job for job in self.jobs.values() if job.state == "waiting"]
        mine = [job for job in waiting if job.owner == owner]
        users = len({job.owner for job in waiting} | {owner})

        def tokens(jobs: list[Job]) -> int:
            return sum(job.max_tokens + 1 for job in jobs)

        if len(mine) >= LIMITS.max_waiting_per_user or tokens(mine) >= LIMITS.max_waiting_tokens_per_user:
            return True
        fill = max(len(waiting) / LIMITS.max_waiting, tokens(waiting) / LIMITS.max_waiting_tokens)
        share = max(len(mine) / LIMITS.max_waiting, tokens(mine) / LIMITS.max_waiting_tokens) * users
        return fill >= 1 and not (share < 1 and fill < 2) and not (not mine and fill < 3)

    def lease(self, session: Session, job: Job) -> None:
        """Whatever fair share says: nobody of a better level waits, no suspect before it, none of its user's that is due before it."""
        rivals = self.claimable(session)
        assert job in rivals
        job.level = self.level_of(job)
        assert job.level == min(map(self.level_of, rivals))
        assert job.is_suspect or not any(rival.is_suspect for rival in rivals if self.level_of(rival) == job.level)
        same = [rival for rival in rivals if rival.is_suspect == job.is_suspect]
        assert job.due == min(rival.due for rival in same if job.is_suspect or rival.owner == job.owner)
        job.state, job.has_deadline = "leased", False
        job.attempt += 1
        session.held[job.id] = job.attempt

    def finish(self, session: Session, job: Job, state: str, finish: str) -> None:
        job.end(state, finish)
        del session.held[job.id]

    def requeue(self, session: Session, job: Job) -> None:
        job.state = "waiting"
        del session.held[job.id]

    def unhold(self, job: Job) -> None:
        for session in self.sessions:
            session.held.pop(job.id, None)

    def bury(self, session: Session) -> None:
        self.sessions.remove(session)
        self.ghosts.append(session)


def id_at(job_id: str, offset: int) -> int:
    return (int(job_id[-4:], 16) + 7 * offset) % 1000


def text_of(token: int) -> str:
    return LETTERS[token % len(LETTERS)] * (token % 3)


def test_the_queue_does_what_a_plain_model_of_it_does(redis_process: RedisProcess) -> None:
    run_state_machine_as_test(
        lambda: QueueMachine(redis_process.url),
        settings=settings(
            max_examples=100,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


costs = st.lists(st.integers(1, 200), min_size=12, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(costs, st.sampled_from([0.5, 1.0, 2.0])), min_size=2, max_size=4))
def test_no_waiting_user_falls_behind_another_by_more_than_one_job(
    redis_process: RedisProcess, users: list[tuple[list[int], float]]
) -> None:
    """Start-time fair queueing: while two users both wait, their shares per weight differ by at most one job of each."""
    asyncio.run(share_of_backlogged_users(redis_process.url, users))


async def share_of_backlogged_users(url: str, users: list[tuple[list[int], float]]) -> None:
    redis = connect(url)
    await redis.flushall()
    queue = JobQueue(redis, {ENDPOINT: QueueLimits()})
    owner_of: dict[str, int] = {}
    left = [len(tokens) for tokens, _ in users]
    for turn in range(12):
        for number, (tokens, weight) in enumerate(users):
            spec = JobSpec(prompt=[], max_tokens=tokens[turn], seed=1)
            owner_of[(await queue.put(ENDPOINT, f"user{number}", spec, weight=weight)).job_id] = number
    login = SessionRequest(endpoint=ENDPOINT, name="w", protocol=1, version="1", model="m", device="d", max_slots=1000, max_seq_len=9)
    session = (await queue.open_session(login, "key")).session
    served = [0.0] * len(users)
    holding: list[tuple[str, int]] = []
    most = [max(tokens) / weight + 1 for tokens, weight in users]
    while all(left):
        turn = TurnRequest(session=session, turn=len(holding) + 1, holding=holding, room=1)
        [job] = (await queue.turn(turn, "key")).jobs
        holding.append((job.id, 1))
        user = owner_of[job.id]
        served[user] += job.spec.max_tokens / users[user][1]
        left[user] -= 1
        for one in range(len(users)):
            for other in range(len(users)):
                slack = 12 * len(users)  # units are rounded up to whole ones, job by job
                assert served[one] - served[other] <= most[one] + slack
    await redis.aclose()
