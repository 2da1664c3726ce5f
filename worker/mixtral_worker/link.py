"""The worker's line to its server: the only HTTP here, on rank 0, in a thread of its own.

Decides when a turn goes out, what it carries, what is sent again after a lost answer or a lost session, and when the lease is no longer
worth renewing. Leaves to loop.py what becomes of a job. The step loop never waits for the network: it takes events from a queue and leaves
tokens in a buffer.

Every token of a held job is kept until the job is gone, not only until it is acknowledged: should the server's log lose its end, it asks
for an offset (`expect`), and everything from there on goes out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import ValidationError

from mixtral_client.protocol import (
    ErrorBody,
    Frame,
    FrameError,
    SessionAnswer,
    SessionRequest,
    TurnAnswer,
    TurnRequest,
    WorkerJob,
)
from mixtral_worker.settings import KEY_VARIABLE
from mixtral_worker.telemetry import LOG, Telemetry, line

POLL_TIMEOUT_S = 35.0  # the server parks an idle worker's turn for up to 25 s
CONNECT_TIMEOUT_S = 10.0
LOGOUT_TIMEOUT_S = 2.0
LOOK_AGAIN_S = 0.5
IDLE_TURNS_APART_S = 0.25
MAX_PAUSE_S = 5.0
MAX_RETRY_AFTER_S = 30.0
REMIND_EVERY_S = 30.0
MAX_TURN_TOKENS = 16_384  # keeps the body of the turn after a long outage at some 300 KB
MAX_UNSENT_TOKENS = 65_536
TOKEN_BYTES = 18  # of a plain token in a turn's body
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class LinkRefused(Exception):
    """The server will not have this worker, and asking again would not change that. The message is one sentence for a person."""


class _SessionLost(Exception):
    """The session is gone or of no use; its jobs are no longer ours."""


class _Unanswered(Exception):
    """No usable answer; the same call again may get one."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _Refused(Exception):
    """A status that says: not like this."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


End: TypeAlias = Literal["stop", "length"] | FrameError
"""How a job ended in this worker."""


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one job: its next token, or its end, or both. text is "" while a character or a stop string is incomplete."""

    job: str
    attempt: int
    prompt_tokens: int = 0
    id: int | None = None
    text: str = ""
    end: End | None = None
    logprobs: str | None = None  # of the token, where the job asked for them: a TokenLogprobs as JSON
    dropped_messages: int = 0  # left out of the prompt


@dataclass(frozen=True, slots=True)
class JobTaken:
    job: WorkerJob


@dataclass(frozen=True, slots=True)
class JobDropped:
    """Stop this job; nobody waits for its tokens any more."""

    job: str
    attempt: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The server wants this worker to finish what runs and log out."""


@dataclass(frozen=True, slots=True)
class LinkEnded:
    """The thread has ended by itself; the step loop raises the error."""

    error: Exception


Event: TypeAlias = JobTaken | JobDropped | DrainAsked | LinkEnded


@dataclass
class _Held:
    """One leased job: every token since its lease, and how many of them the log has."""

    job: str
    attempt: int
    first_offset: int
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[str] = field(default_factory=list)  # as many as ids, or none
    acknowledged: int = 0
    prompt_tokens: int = 0
    dropped_messages: int = 0
    end: End | Literal["release"] | None = None

    @property
    def unsent(self) -> int:
        return len(self.ids) - self.acknowledged

    @property
    def weight(self) -> int:
        """How many plain tokens one of this job's is as long as, in a turn's body."""
        return 1 + len(self.logprobs[-1]) // TOKEN_BYTES if self.logprobs else 1

    def frame(self, max_ids: int) -> Frame | None:
        """What the log lacks, at most max_ids tokens of it; the end goes with the last of them. None when there is no news."""
        start = self.acknowledged
        stop = min(len(self.ids), start + max_ids)
        end = self.end if stop == len(self.ids) else None
        if start == stop and end is None:
            return None
        says_prompt = start == 0 or end is not None
        return Frame(
            job=self.job,
            attempt=self.attempt,
            offset=self.first_offset + start,
            ids=self.ids[start:stop],
            texts=self.texts[start:stop],
            logprobs=self.logprobs[start:stop] if self.logprobs else None,
            finish=end if end == "stop" or end == "length" else None,
            error=end if isinstance(end, FrameError) else None,
            release=end == "release",
            prompt_tokens=self.prompt_tokens or None if says_prompt else None,
            dropped_messages=self.dropped_messages or None if says_prompt else None,
        )

    def acknowledge(self, frame: Frame) -> bool:
        """The log has this frame. True when nothing is left to say about the job."""
        self.acknowledged = max(self.acknowledged, frame.offset + len(frame.ids) - self.first_offset)
        return frame.finish is not None or frame.error is not None or frame.release

    def rewind(self, offset: int) -> bool:
        """Go on at the offset that the log expects. False if those tokens were made by an earlier holder and are not here."""
        if offset >= self.first_offset:
            self.acknowledged = min(offset - self.first_offset, len(self.ids))
            return True
        self.first_offset, self.ids, self.texts, self.logprobs, self.acknowledged, self.end = offset, [], [], [], 0, "release"
        return False


def _read_answer(content: bytes) -> tuple[TurnAnswer, list[_Held]]:
    """The answer, and its jobs that this version of the wire cannot read: each fails alone. Raises ValidationError for no answer at all."""
    try:
        return TurnAnswer.model_validate_json(content), []
    except ValidationError as error:
        if all(problem["loc"][:1] != ("jobs",) for problem in error.errors()):
            raise
    raw = json.loads(content)
    jobs = raw.pop("jobs")
    answer, unreadable = TurnAnswer.model_validate(raw), []
    for job in jobs:
        try:
            answer.jobs.append(WorkerJob.model_validate(job))
        except ValidationError as error:
            unreadable.append(_unreadable(job, error))
    return answer, unreadable


def _unreadable(job: dict[str, Any], error: ValidationError) -> _Held:
    first = error.errors(include_url=False)[0]
    sentence = f"this worker cannot read the job's {'.'.join(map(str, first['loc']))}: {first['msg']}; given {first['input']!r:.100}"
    end = FrameError(code="unreadable_job", message=sentence)
    return _Held(str(job["id"]), int(job["attempt"]), first_offset=len(job.get("produced_ids", ())) + 1, end=end)


class Link:
    """Construct, `start`, then from the step loop's thread: `poll`, `report`, `beat`; at the end `drain` and `close`."""

    def __init__(self, address: str, key: str, login: SessionRequest, max_unsent_tokens: int = MAX_UNSENT_TOKENS) -> None:
        self.address = address
        self.telemetry = Telemetry()
        self._key = key
        self._login = login
        self._max_unsent_tokens = max_unsent_tokens
        self._random = random.Random()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._lock = threading.Lock()  # guards the next three
        self._held: dict[tuple[str, int], _Held] = {}
        self._unsent = 0
        self._urgent = False
        self._last_beat_s = time.monotonic()
        self._close_grace_s = 0.0
        self._loop = asyncio.new_event_loop()
        # The thread's own:
        self._news = asyncio.Event()
        self._draining = asyncio.Event()
        self._closing = asyncio.Event()
        self._session: SessionAnswer | None = None
        self._last_turn_s = 0.0
        self._idle_gap_s = 0.0
        self._failures = 0  # calls in a row without an answer
        self._lost_since_s = 0.0
        self._reminded_s = 0.0

    # ------------------------------------------------------------------ for the step loop

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        """The step loop moves, or has nothing to do. Without a beat for lease_s no turn goes out, so that a hung engine loses its jobs."""
        self._last_beat_s = time.monotonic()

    def poll(self, wait_s: float) -> list[Event]:
        """What happened since the last call; waits up to wait_s for the first."""
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait())
            while True:
                events.append(self._events.get_nowait())
        return events

    def report(self, pieces: Iterable[Piece]) -> None:
        """Leave a step's news for the next turn. News of a job that was dropped meanwhile is forgotten."""
        with self._lock:
            had_news = self._unsent > 0 or self._urgent
            for piece in pieces:
                self._add(piece)
            wake = self._urgent or (self._unsent > 0 and not had_news)
        if wake:
            self._call(self._news.set)

    @property
    def is_full(self) -> bool:
        """The server has been away for so long that the step loop must pause."""
        return self._unsent >= self._max_unsent_tokens

    def drain(self) -> None:
        """Claim no more jobs; those that arrive all the same go back at once."""
        self._call(self._draining.set)

    def close(self, grace_s: float) -> None:
        """Send what is left, log out (which releases every job still held) and end the thread; give up after grace_s."""
        self._close_grace_s = grace_s
        self._call(self._draining.set)
        self._call(self._closing.set)
        self._thread.join(grace_s + 2 * LOGOUT_TIMEOUT_S)

    def _add(self, piece: Piece) -> None:
        held = self._held.get((piece.job, piece.attempt))
        if held is None or held.end is not None:
            return
        held.prompt_tokens, held.dropped_messages = piece.prompt_tokens, piece.dropped_messages
        if piece.id is not None:
            self._urgent |= not held.ids  # a first token is what a person waits for
            held.ids.append(piece.id)
            held.texts.append(piece.text)
            if piece.logprobs is not None:
                held.logprobs.append(piece.logprobs)
            self._unsent += 1
        if piece.end is not None:
            held.end = piece.end
            self._urgent = True  # the slot is free for the next job

    def _call(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the thread has ended by itself and closed its loop
            self._loop.call_soon_threadsafe(callback)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:  # noqa: BLE001 - whatever it is, the step loop raises it
            self._events.put(LinkEnded(error))
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/json",
            "User-Agent": f"mixtral-worker/{self._login.version}",
        }
        is_local = urlsplit(self.address).hostname in LOOPBACK  # no proxy of the environment's leads back to this machine
        async with aiohttp.ClientSession(headers=headers, trust_env=not is_local) as http:
            sessions = asyncio.create_task(self._sessions(http))
            closing = asyncio.create_task(self._closing.wait())
            try:
                await asyncio.wait({sessions, closing}, return_when=asyncio.FIRST_COMPLETED)
                if self._closing.is_set() and self._has_news():
                    await asyncio.wait({sessions}, timeout=self._close_grace_s)
                if sessions.done():
                    sessions.result()
            finally:
                for task in (sessions, closing):
                    task.cancel()
                await asyncio.gather(sessions, closing, return_exceptions=True)
                await self._log_out(http)

    async def _sessions(self, http: aiohttp.ClientSession) -> None:
        while not self._closing.is_set():
            session = await self._log_in(http)
            try:
                await self._turns(http, session)
            except _SessionLost as lost:
                jobs = self._drop_all()
                LOG.warning(line("session_lost", session=session.session, jobs_dropped=jobs, reason=lost))

    async def _log_in(self, http: aiohttp.ClientSession) -> SessionAnswer:
        body = self._login.model_dump_json().encode()
        while True:
            await self._pause(0.0)
            try:
                session = SessionAnswer.model_validate_json(await self._post(http, "/v1/worker/sessions", body, CONNECT_TIMEOUT_S))
            except _Refused as refused:
                raise LinkRefused(self._refusal(refused)) from refused
            except (_Unanswered, ValidationError) as lost:
                self._note_failure(lost)
                continue
            self._note_success()
            self._session = session
            LOG.info(line("session_opened", session=session.session, server=self.address, endpoint=self._login.endpoint))
            return session

    async def _turns(self, http: aiohttp.ClientSession, session: SessionAnswer) -> None:
        """One turn after another until the session is lost or there is no more to say."""
        number = 0
        while True:
            await self._until_due(session)
            if self._closing.is_set() and not self._has_news():
                return
            number += 1
            request = self._next_turn(session, number)
            self._absorb(request, *await self._answer_to(http, request, session))

    async def _until_due(self, session: SessionAnswer) -> None:
        while not self._closing.is_set():
            self._news.clear()
            now_s = time.monotonic()
            due_s = self._due_s(session, now_s)
            if due_s <= now_s:
                return
            await self._news_until(min(due_s, now_s + LOOK_AGAIN_S))

    def _due_s(self, session: SessionAnswer, now_s: float) -> float:
        """When the next turn should go out, if nothing happens until then."""
        if now_s - self._last_beat_s > session.lease_s:
            return math.inf  # the step loop hangs: let the lease lapse
        if not self._held:  # the server holds an idle worker's turn until there is work
            return math.inf if self._draining.is_set() else self._last_turn_s + self._idle_gap_s
        if self._urgent:
            return now_s
        renew_s = session.lease_s / 3
        return self._last_turn_s + (min(session.report_interval_ms / 1000, renew_s) if self._has_news() else renew_s)

    async def _news_until(self, due_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due_s - time.monotonic()):
                await self._news.wait()

    def _has_news(self) -> bool:
        with self._lock:
            return any(held.unsent or held.end is not None for held in self._held.values())

    def _next_turn(self, session: SessionAnswer, number: int) -> TurnRequest:
        self._last_turn_s = time.monotonic()
        budget = MAX_TURN_TOKENS
        frames = []
        with self._lock:
            self._urgent = False
            for held in self._held.values():
                frame = held.frame(budget // held.weight)
                if frame is not None:
                    frames.append(frame)
                    budget -= len(frame.ids) * held.weight
            running = sum(held.end is None for held in self._held.values())
            holding = list(self._held)
        room = 0 if self._draining.is_set() or self.is_full else max(0, self._login.max_slots - running)
        telemetry = self.telemetry.as_fields()
        return TurnRequest(session=session.session, turn=number, holding=holding, frames=frames, room=room, telemetry=telemetry)

    async def _answer_to(self, http: aiohttp.ClientSession, request: TurnRequest, session: SessionAnswer) -> tuple[TurnAnswer, list[_Held]]:
        """Send the turn, and the same bytes again until they are answered."""
        body = request.model_dump_json(exclude_none=True).encode()
        timeout_s = max(1.0, session.lease_s / 2) if request.holding else POLL_TIMEOUT_S
        while True:
            try:
                answer = _read_answer(await self._post(http, "/v1/worker/turn", body, timeout_s))
            except _Refused as refused:
                if refused.status in (401, 403):
                    raise LinkRefused(self._refusal(refused)) from refused
                if refused.status != 410:
                    LOG.error(line("turn_refused", session=session.session, turn=request.turn, status=refused.status, reason=refused))
                    self._failures += 1  # the same may happen in the next session: no hot circle
                raise _SessionLost(str(refused)) from refused
            except (_Unanswered, ValidationError) as lost:
                self._note_failure(lost)
                await self._pause(getattr(lost, "retry_after_s", 0.0), at_most_s=session.lease_s / 4)
                continue
            self._note_success()
            return answer

    def _absorb(self, request: TurnRequest, answer: TurnAnswer, unreadable: list[_Held]) -> None:
        """Forget what the log has, go back where it asks, drop what is no longer ours, take what is new."""
        expected = {expect.job: expect.offset for expect in answer.expect}
        with self._lock:
            for frame in request.frames:
                held = self._held.get((frame.job, frame.attempt))
                if held is None:
                    continue
                if frame.job in expected:
                    if not held.rewind(expected[frame.job]):
                        self._events.put(JobDropped(frame.job, frame.attempt))
                    LOG.warning(line("log_rewound", job=frame.job, sent_offset=frame.offset, expected_offset=expected[frame.job]))
                elif held.acknowledge(frame):
                    del self._held[frame.job, frame.attempt]
            for drop in answer.drops:
                if self._held.pop((drop.job, drop.attempt), None) is not None:
                    self._events.put(JobDropped(drop.job, drop.attempt))
            for job in answer.jobs:
                self._take(job)
            for held in unreadable:
                self._held.setdefault((held.job, held.attempt), held)
            self._unsent = sum(held.unsent for held in self._held.values())
        came_in_vain = not request.holding and not answer.jobs
        self._idle_gap_s = IDLE_TURNS_APART_S if came_in_vain else 0.0  # a server that shuts down holds no turn
        if answer.drain and not self._draining.is_set():
            self._draining.set()
            self._events.put(DrainAsked())

    def _take(self, job: WorkerJob) -> None:
        if (job.id, job.attempt) in self._held:
            return
        held = _Held(job.id, job.attempt, first_offset=len(job.produced_ids) + 1)
        self._held[job.id, job.attempt] = held
        if self._draining.is_set():
            held.end = "release"
        else:
            self._events.put(JobTaken(job))

    def _drop_all(self) -> int:
        with self._lock:
            for job, attempt in self._held:
                self._events.put(JobDropped(job, attempt))
            dropped = len(self._held)
            self._held.clear()
            self._unsent, self._urgent, self._session = 0, False, None
        return dropped

    async def _log_out(self, http: aiohttp.ClientSession) -> None:
        if self._session is None:
            return
        path = f"/v1/worker/sessions/{quote(self._session.session, safe='')}"
        try:
            async with http.delete(self.address + path, timeout=aiohttp.ClientTimeout(total=LOGOUT_TIMEOUT_S)) as answer:
                LOG.info(line("session_closed", session=self._session.session, status=answer.status))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            LOG.warning(line("session_left_to_lapse", session=self._session.session, reason=_why(error)))

    # ------------------------------------------------------------------ one call, and the pause before the next

    async def _post(self, http: aiohttp.ClientSession, path: str, body: bytes, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with http.post(self.address + path, data=body, timeout=timeout, allow_redirects=False) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Unanswered(_why(error)) from error
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise _Unanswered(f"status {answer.status}: {_message(content)}", _seconds(answer.headers.get("Retry-After")))
        if 300 <= answer.status < 400:
            raise _Refused(answer.status, f"it redirects to {answer.headers.get('Location')}; give that address as --api_server")
        if answer.status >= 400:
            raise _Refused(answer.status, _message(content))
        return content

    def _refusal(self, refused: _Refused) -> str:
        hint = {401: f"; set {KEY_VARIABLE} to the worker key in the server's keys.env", 404: "; check --api_server and --endpoint_name"}
        return f"{self.address} refused this worker with status {refused.status}: {refused}{hint.get(refused.status, '')}"

    async def _pause(self, at_least_s: float, at_most_s: float = math.inf) -> None:
        """Nothing after a success; after failures a growing, jittered while, so that workers do not return in step.

        at_most_s goes before all: a lease that ran out in a pause would cost every chat of the batch a move.
        """
        if self._failures:
            longest_s = min(MAX_PAUSE_S, at_most_s, 0.1 * 2 ** min(self._failures, 10))
            await asyncio.sleep(max(min(at_least_s, at_most_s), longest_s * self._random.uniform(0.5, 1.0)))

    def _note_failure(self, error: Exception) -> None:
        now_s = time.monotonic()
        if not self._failures:
            self._lost_since_s = now_s
        if not self._failures or now_s - self._reminded_s > REMIND_EVERY_S:
            self._reminded_s = now_s
            LOG.warning(line("link_lost", server=self.address, for_s=now_s - self._lost_since_s, reason=error, then="trying again"))
        self._failures += 1

    def _note_success(self) -> None:
        if self._failures:
            LOG.info(line("link_back", server=self.address, after_s=time.monotonic() - self._lost_since_s, failures=self._failures))
        self._failures = 0


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _message(content: bytes) -> str:
    """The sentence of an error body, or the start of whatever a proxy wrote."""
    try:
        return ErrorBody.model_validate_json(content).error.message
    except ValidationError:
        return content[:200].decode(errors="replace").strip() or "no reason given"


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 0), 0.0), MAX_RETRY_AFTER_S)
    except ValueError:  # a date, which some proxies send
        return 0.0
