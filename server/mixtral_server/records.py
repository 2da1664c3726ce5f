"""What the queue's scripts are told and what they answer: records of Python, flat lists of Redis.

Decides names, types and units of what the queue says of a job, a worker or itself, and what of a frame a script reads. Leaves what the
scripts do to lua/ and when they run to queue.py. Pure: no I/O, no clock.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import orjson
from pydantic import BaseModel

from mixtral_client.protocol import (
    CALLER_ERRORS,
    MAX_COUNT,
    Drop,
    ErrorDetail,
    Expect,
    Finish,
    Frame,
    FrameError,
    JobSpec,
    JobState,
    Timings,
    Usage,
)
from mixtral_server.rates import Allowance, Rate

TERMINAL_STATES = ("done", "failed", "cancelled", "expired", "dead")

ETA_BOUNDS_MS = (100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000)
"""Of the histogram of ETA errors; lua/claim.lua writes them a second time."""

MAX_TELEMETRY_BYTES = 4096
MAX_FRAME_TEXT_BYTES = 4096
MAX_TOKEN_TEXT_BYTES = 256
"""A frame's texts hold at most the first plus as many of the second as it has ids; a stop string held back comes all at once."""


_HEAD = struct.Struct(">HIIIIiiBIIII")
_ENDINGS = {None: 0, "stop": 1, "length": 2, "error": 3, "release": 4}
"""As lua/append.lua reads them."""


class Parameters(BaseModel):
    """What a job asks for at an endpoint that is no chat: its inputs by name.

    max_tokens: most offsets of its log; likely_tokens: what it is taken to cost before that is known.
    """

    parameters: dict[str, Any]
    max_tokens: int
    likely_tokens: int


JobContent: TypeAlias = JobSpec | Parameters


@dataclass(frozen=True)
class Place:
    """Where a waiting job stands: 1 = next. It starts within eta_s as likely as not, within eta_p90_s nine times of ten; both are None
    while no finish is measured."""

    position: int
    eta_s: float | None
    eta_p90_s: float | None


@dataclass(frozen=True)
class Put:
    """A queued job, or the one that the idempotency key named already (created is False then). allowances: what its rates still hold."""

    job_id: str
    state: JobState
    created: bool
    place: Place | None = None  # while it waits
    allowances: tuple[Allowance, ...] = ()
    others: tuple[str, ...] = ()  # ids of the jobs queued with it

    @property
    def job_ids(self) -> tuple[str, ...]:
        return (self.job_id, *self.others)


class Entry(NamedTuple):
    """Tokens of one log entry; offset is that of ids[0]. texts has one text per id, so has logprobs where the job asked for them."""

    offset: int
    ids: Sequence[int]
    texts: Sequence[str]
    logprobs: Sequence[str] | None = None


class Ending(NamedTuple):
    """A job is done: finish, and what it took. Times in ms of Redis's clock."""

    finish: Finish
    n: int  # tokens in the log
    prompt_tokens: int
    dropped_messages: int
    created_ms: int
    started_ms: int | None
    first_ms: int | None
    ended_ms: int

    @property
    def usage(self) -> Usage:
        return _usage(self.prompt_tokens, self.n, self.dropped_messages)

    @property
    def timings(self) -> Timings:
        return _timings(self.created_ms, self.started_ms, self.first_ms, self.ended_ms)


Appended: TypeAlias = Entry | Frame
"""What went into a log. A frame that was appended as it is says of it what an entry does."""
News: TypeAlias = tuple[str, Appended | Ending | None]
"""Of a job: what was appended, that it is done, or that its log has something new."""


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
    anew: int = 0  # times that its log began anew
    by_text: bool = False  # an AIME worker has it, or had it last

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def text(self) -> str:
        return "".join(text for entry in self.entries for text in entry.texts)

    @property
    def ids(self) -> list[int]:
        return [token for entry in self.entries for token in entry.ids]


@dataclass(frozen=True)
class LeasedJob:
    """The protocol's WorkerJob, its request as JSON, the way it was put: nothing here asks what is in it."""

    id: str
    attempt: int
    spec_json: str
    produced_ids: Sequence[int]
    sent_bytes: int
    suspect: bool
    priority: int

    @property
    def spec(self) -> JobSpec:
        return JobSpec.model_validate_json(self.spec_json)

    def wire(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "spec_json"}
        return facts | {"spec": orjson.Fragment(self.spec_json)}


@dataclass(frozen=True)
class Turned:
    """The protocol's TurnAnswer, and what is not for the worker: again_s, where a whole batch is filling and the turn is to be asked again
    after so long; and news for followers."""

    turn: int
    jobs: Sequence[LeasedJob] = ()
    drops: Sequence[Drop] = ()
    expect: Sequence[Expect] = ()
    drain: bool = False
    again_s: float | None = None
    news: Sequence[News] = ()

    def body(self) -> bytes:
        return orjson.dumps(
            {
                "turn": self.turn,
                "jobs": [one.wire() for one in self.jobs],
                "drops": [one.model_dump() for one in self.drops],
                "expect": [one.model_dump() for one in self.expect],
                "drain": self.drain,
            }
        )


@dataclass(frozen=True)
class Reaped:
    """What one round of reap did; `more` asks for another round at once (each is bounded)."""

    lapsed_sessions: int
    requeued: int
    dead: int
    expired: int
    shifted_s: float = 0.0  # by how much leases and deadlines moved because nobody had reaped
    more: bool = False


class FinishedJob(NamedTuple):
    """A job that ended, whatever its end: metadata alone. Times in unix seconds by Redis's clock; queue_s and first_token_s count from
    created_s. id is unique: a job that was brought back from the dead and ended again has another."""

    id: str
    endpoint: str
    owner: str
    state: str
    finish: str | None
    error_code: str | None
    prompt_tokens: int
    completion_tokens: int
    attempts: int
    created_s: float
    finished_s: float
    queue_s: float | None = None
    first_token_s: float | None = None


@dataclass(frozen=True)
class EtaErrors:
    """How far off the ETAs were that jobs were told when they were put, of all that have started since the endpoint's first day."""

    within: Mapping[float, int] = field(default_factory=dict)  # bound in seconds → starts off by so much at most, ascending, the last inf
    sum_s: float = 0.0
    late: int = 0  # starts after the 90th percentile that was told


@dataclass(frozen=True)
class Depth:
    """Numbers of one endpoint for /metrics."""

    waiting: int
    waiting_tokens: int  # as estimated
    running: int
    sessions: int
    users_waiting: int
    unsaved_usage: int
    dead_letters: int
    finish_rate: float | None  # jobs/s that left a slot, about the last minute
    ended: Mapping[str, int]  # terminal state → jobs since the endpoint's first day
    waiting_by_priority: Mapping[int, int]
    tokens: int  # appended since the endpoint's first day
    eta_errors: EtaErrors


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
    about: Mapping[str, Any] = field(default_factory=dict)  # what an AIME worker said of itself beside that; a native one has none


def seconds_of(ms: str) -> float:
    return int(ms) / 1000


def pairs_of(flat: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(flat[::2], flat[1::2], strict=True)


def estimate_of(spec: JobContent) -> tuple[int, int]:
    """Tokens of prompt and answer. The server has no tokenizer: four bytes of UTF-8 make a token, and each message costs a few for its
    frame."""
    if isinstance(spec, Parameters):
        return len(orjson.dumps(spec.parameters)) // 4, spec.likely_tokens
    return _prompt_tokens(spec), spec.max_tokens


def content_of(text: str) -> JobContent:
    """What was put, from how it is kept."""
    return Parameters.model_validate_json(text) if text.startswith('{"parameters":') else JobSpec.model_validate_json(text)


def _prompt_tokens(spec: JobSpec) -> int:
    if spec.messages is not None:
        return sum(len(message.content.encode()) // 4 + 8 for message in spec.messages)
    prompt = spec.prompt or ""
    return len(prompt.encode()) // 4 + 1 if isinstance(prompt, str) else len(prompt)


def allowance_of(rate: Rate, requests: str, tokens: str) -> Allowance:
    return Allowance(rate, float(requests) if requests else None, float(tokens) if tokens else None)


def place_of(reply: Sequence[Any]) -> Place | None:
    position, p50_ms, p90_ms = reply
    if position is None:
        return None
    return Place(position, None if p50_ms is None else p50_ms / 1000, None if p90_ms is None else p90_ms / 1000)


def eta_errors_of(flat: Sequence[str]) -> EtaErrors:
    counts = {name: int(count) for name, count in pairs_of(flat)}
    within, so_far = {}, 0
    for bound in (*ETA_BOUNDS_MS, "more"):
        so_far += counts.get(str(bound), 0)
        within[math.inf if bound == "more" else int(bound) / 1000] = so_far
    return EtaErrors(within, counts.get("sum", 0) / 1000, counts.get("late", 0))


def snapshot_of(job_id: str, endpoint: str, record: Sequence[str | None], log: Sequence[Any]) -> Snapshot:
    state, owner, title, priority, created, attempt, n, finish, error, prompt_tokens, started, first, ended, dropped, anew, text = record
    terminal = state in TERMINAL_STATES
    return Snapshot(
        job_id=job_id,
        endpoint=endpoint,
        owner=owner or "",
        title=title or "",
        state=state,  # type: ignore[arg-type]
        priority=int(priority or 0),
        created=seconds_of(created or "0"),
        attempt=int(attempt or 0),
        n=int(n or 0),
        entries=tuple(entry for entry in (_entry(*row) for row in log) if entry.ids),
        finish=finish or None,  # type: ignore[arg-type]
        error=ErrorDetail.model_validate_json(error) if error else None,
        usage=_usage(prompt_tokens, n, dropped) if terminal else None,
        timings=_timings(created, started, first, ended) if terminal else None,
        anew=int(anew or 0),
        by_text=text is not None,
    )


def _entry(entry_id: str, fields: Sequence[str]) -> Entry:
    values = dict(pairs_of(fields))
    ids = tuple(orjson.loads(values.get("ids", "[]")))
    texts, logprobs = tuple(orjson.loads(values.get("texts", "[]"))), values.get("logprobs")
    return Entry(int(entry_id.partition("-")[0]) - len(ids) + 1, ids, texts, logprobs and tuple(orjson.loads(logprobs)))


def news_of(row: Sequence[Any]) -> News:
    """row: as lua/common.lua writes it."""
    job_id, *facts = row
    if not facts:
        return job_id, None
    return job_id, Entry(*facts) if facts[0] else Ending(*facts[1:])


def news_of_turn(frames: Sequence[Frame], marks: str, others: str) -> list[News]:
    """marks: of each frame; others: JSON."""
    news: list[News] = [(frame.job, frame if mark == "a" else None) for frame, mark in zip(frames, marks, strict=True) if mark != "-"]
    if others != "[]":
        news += map(news_of, orjson.loads(others))
    return news


def _usage(prompt_tokens: str | int | None, n: str | int | None, dropped: str | int | None) -> Usage:
    prompt, completion = int(prompt_tokens or 0), int(n or 0)
    dropped_messages = int(dropped or 0)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion, dropped_messages=dropped_messages)


def _timings(created: str | int | None, started: str | int | None, first: str | int | None, ended: str | int | None) -> Timings:
    queue_s, first_token_s, total_s = _spans(created, started, first, ended)
    return Timings(queue_s=queue_s, first_token_s=first_token_s, total_s=total_s)


def _spans(created: str | int | None, *times: str | int | None) -> list[float | None]:
    since = int(created or 0)
    return [(int(at) - since) / 1000 if at else None for at in times]


def finished_job_of(endpoint: str, row: Mapping[str, str]) -> FinishedJob:
    queue_s, first_token_s, _ = _spans(row["created"], row["started"], row["first"], None)
    return FinishedJob(
        id=row["job"],
        endpoint=endpoint,
        owner=row["owner"],
        state=row["state"],
        finish=row["finish"],
        error_code=row["error"] or None,
        prompt_tokens=int(row["prompt_tokens"]),
        completion_tokens=int(row["n"]),
        attempts=int(row["attempt"]),
        created_s=seconds_of(row["created"]),
        finished_s=seconds_of(row["ended"]),
        queue_s=queue_s,
        first_token_s=first_token_s,
    )


def live_worker_of(endpoint: str, session: str, lease_left_ms: int, running: int, record: Sequence[str]) -> LiveWorker:
    facts = dict(pairs_of(record))
    return LiveWorker(
        session=session,
        endpoint=endpoint,
        key_id=facts["key"],
        name=facts["name"],
        model=facts["model"],
        device=facts["device"],
        version=facts["version"],
        max_slots=int(facts["max_slots"]),
        max_seq_len=int(facts["max_seq_len"]),
        running=running,
        room=int(facts["room"]),
        opened=seconds_of(facts["opened"]),
        lease_left_s=lease_left_ms / 1000,
        drain="drain" in facts,
        telemetry=orjson.loads(facts.get("telemetry", "{}")),
        about=orjson.loads(facts.get("about", "{}")),
    )


def leased_job_of(job_id: str, attempt: int, spec: str, deaths: int, sent_bytes: int, level: int, produced: Sequence[str]) -> LeasedJob:
    return LeasedJob(
        id=job_id,
        attempt=attempt,
        spec_json=spec,
        produced_ids=[token for ids in produced for token in orjson.loads(ids)],
        sent_bytes=sent_bytes,
        suspect=deaths >= 2,
        priority=level,
    )


def telemetry_json(telemetry: Mapping[str, Any]) -> str:
    """ "" keeps what the last turn said: telemetry that is too long or cannot be written is not worth refusing tokens for."""
    try:
        text = orjson.dumps(telemetry).decode()
    except orjson.JSONEncodeError:
        return ""
    return text if telemetry and len(text) <= MAX_TELEMETRY_BYTES else ""


def packed(frames: Sequence[Frame]) -> bytes:
    """What turn.lua reads of frames, one behind the other: a head of numbers, then what is stored as it is: ids, texts, logprobs, error."""
    parts: list[bytes] = []
    for frame in frames:
        size = len("".join(frame.texts).encode())
        if size > MAX_FRAME_TEXT_BYTES + MAX_TOKEN_TEXT_BYTES * len(frame.ids):
            frame, size = _failed_by(frame, size), 0
        job, ids, texts = frame.job.encode(), orjson.dumps(frame.ids), orjson.dumps(frame.texts)
        logprobs = orjson.dumps(frame.logprobs) if frame.logprobs else b""
        error = _error_detail(frame.error).model_dump_json(exclude_none=True).encode() if frame.error else b""
        head = _HEAD.pack(
            len(job),
            frame.attempt,
            frame.offset,
            len(frame.ids),
            size,
            -1 if frame.prompt_tokens is None else frame.prompt_tokens,
            -1 if frame.dropped_messages is None else min(frame.dropped_messages, MAX_COUNT),
            _ENDINGS["error" if error else "release" if frame.release else frame.finish],
            len(ids),
            len(texts),
            len(logprobs),
            len(error),
        )
        parts += (head, job, ids, texts, logprobs, error)
    return b"".join(parts)


def _failed_by(frame: Frame, size: int) -> Frame:
    most = MAX_FRAME_TEXT_BYTES + MAX_TOKEN_TEXT_BYTES * len(frame.ids)
    message = f"the worker sent {size:,} bytes of text for {len(frame.ids):,} tokens; {most:,} at most"
    error = FrameError(code="worker_text_too_long", message=message)
    return Frame(job=frame.job, attempt=frame.attempt, offset=frame.offset, error=error)


def _error_detail(error: FrameError) -> ErrorDetail:
    kind = "invalid_request_error" if error.code in CALLER_ERRORS else "server_error"
    return ErrorDetail(message=error.message, type=kind, code=error.code)
