"""The server's side of the worker wire in one file: a real aiohttp server over a queue and logs in plain dicts.

It follows the wire to the letter (fence, attempt, offset, holding, repeats of a turn, leases), so that a worker cannot tell it from the
real one, and it can be told to misbehave: lose answers, go away, let sessions lapse, forget the end of a log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from mixtral_client.protocol import (
    PROTOCOL_VERSION,
    ChatMessage,
    Drop,
    ErrorBody,
    ErrorDetail,
    Expect,
    Frame,
    FrameError,
    JobSpec,
    Sampling,
    SessionAnswer,
    SessionRequest,
    TokenLogprobs,
    TurnAnswer,
    TurnRequest,
    WorkerJob,
)

KEY = "mx-worker-test"
ENDPOINT = "mixtral_chat"
HANG_S = 120.0


@dataclass
class Job:
    id: str
    spec: JobSpec
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    attempt: int = 0
    session: str | None = None
    finish: str | None = None
    error: FrameError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    dropped_messages: list[int] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    first_times: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass
class Session:
    id: str
    login: SessionRequest
    ends_s: float
    last_turn: int = 0
    last_answer: bytes = b""


class FakeServer:
    def __init__(self, lease_s: float = 10.0, report_interval_ms: int = 20) -> None:
        self.lease_s, self.report_interval_ms = lease_s, report_interval_ms
        self.jobs: dict[str, Job] = {}
        self.waiting: list[Job] = []
        self.sessions: dict[str, Session] = {}
        self.logins: list[SessionRequest] = []
        self.logouts: list[str] = []
        self.turns: list[TurnRequest] = []  # repeats included
        self.answers_to_lose = 0
        self.answers_to_refuse: list[int] = []  # statuses, before anything is done
        self.retry_after_s = 0  # said with each of them
        self.spoil_job: Callable[[dict[str, Any]], None] | None = None
        self.drain = False
        self.port = 0
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    # ------------------------------------------------------------------ for the test

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/worker/sessions", self._log_in)
        app.router.add_post("/v1/worker/turn", self._turn)
        app.router.add_delete("/v1/worker/sessions/{session}", self._log_out)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Away: the port is closed, what is stored stays. `start` comes back on the same port; no lease lapses meanwhile."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for session in self.sessions.values():
            session.ends_s = float("inf")

    async def put(self, **spec: Any) -> Job:
        """Queue a job: messages as (role, content) pairs or prompt, and any field of JobSpec or Sampling."""
        given = dict(spec)
        if "messages" in spec:
            spec["messages"] = [ChatMessage(role=role, content=content) for role, content in spec["messages"]]
        sampling = Sampling(**{name: spec.pop(name) for name in Sampling.model_fields if name in spec})
        produced = spec.pop("ids", []), spec.pop("texts", [])
        job = Job(f"job-{len(self.jobs) + 1}", JobSpec(sampling=sampling, **{"seed": 1, "max_tokens": 16, **spec}), *map(list, produced))
        job.given = {name: value for name, value in given.items() if name not in ("ids", "texts")}
        self.jobs[job.id] = job
        self.waiting.append(job)
        await self._notify()
        return job

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S), self._changed:
            await self._changed.wait_for(what)

    async def finished(self, *jobs: Job) -> None:
        await self.until(lambda: all(job.is_over for job in jobs))

    async def cancel(self, job: Job) -> None:
        job.finish, job.session = "cancelled", None

    async def lapse(self) -> None:
        """Every session is gone; its jobs are first in the queue."""
        for session in list(self.sessions):
            self._end_session(session)
        await self._notify()

    def forget_log_after(self, job: Job, tokens: int) -> None:
        """What a failover of the store does: the log loses its end."""
        del job.ids[tokens:], job.texts[tokens:]

    # ------------------------------------------------------------------ the wire

    async def _log_in(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        login = SessionRequest.model_validate_json(await request.read())
        if login.endpoint != ENDPOINT:
            return _error(404, "model_not_found", f"no endpoint {login.endpoint}; this server has {ENDPOINT}")
        if login.protocol < PROTOCOL_VERSION:
            return _error(400, "protocol_too_old", f"worker speaks protocol {login.protocol}; this server needs {PROTOCOL_VERSION}")
        self.logins.append(login)
        session = Session(f"session-{len(self.logins)}", login, time.monotonic() + self.lease_s)
        self.sessions[session.id] = session
        await self._notify()
        answer = SessionAnswer(session=session.id, lease_s=self.lease_s, report_interval_ms=self.report_interval_ms)
        return web.Response(status=201, body=answer.model_dump_json(), content_type="application/json")

    async def _log_out(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        self.logouts.append(request.match_info["session"])
        self._end_session(request.match_info["session"])
        await self._notify()
        return web.Response(status=204)

    async def _turn(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        turn = TurnRequest.model_validate_json(await request.read())
        self.turns.append(turn)
        await self._notify()
        self._reap()
        session = self.sessions.get(turn.session)
        if session is None:
            return _error(410, "session_lapsed", f"session {turn.session} has lapsed; log in anew")
        if turn.turn < session.last_turn:
            return _error(400, "invalid_request", f"turn {turn.turn} is over; the last was {session.last_turn}")
        if turn.turn > session.last_turn:
            session.last_turn, session.last_answer = turn.turn, await self._answer(session, turn)
        await self._notify()
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            assert request.transport is not None
            request.transport.close()
        return web.Response(body=session.last_answer, content_type="application/json")

    async def _answer(self, session: Session, turn: TurnRequest) -> bytes:
        answer = TurnAnswer(turn=turn.turn, drain=self.drain)
        for frame in turn.frames:
            self._append(session, frame, answer)
        for job, attempt in turn.holding:
            if not self._holds(session, job, attempt) and not any(frame.job == job for frame in turn.frames):
                answer.drops.append(Drop(job=job, attempt=attempt))
        answer.jobs = self._claim(session, turn)
        if not answer.jobs and not turn.holding and turn.room and not self.drain:
            await self._park(session)
            answer.jobs = self._claim(session, turn)
        session.ends_s = time.monotonic() + self.lease_s
        body = answer.model_dump(mode="json")
        if self.spoil_job is not None:
            for raw in body["jobs"]:
                self.spoil_job(raw)
        return web.json_response(body).body  # type: ignore[return-value]

    def _append(self, session: Session, frame: Frame, answer: TurnAnswer) -> None:
        job = self.jobs[frame.job]
        if not self._holds(session, frame.job, frame.attempt):
            answer.drops.append(Drop(job=frame.job, attempt=frame.attempt))
            return
        if frame.offset > len(job.ids) + 1:
            answer.expect.append(Expect(job=job.id, offset=len(job.ids) + 1))
            return
        repeated = len(job.ids) + 1 - frame.offset
        job.ids += frame.ids[repeated:]
        job.texts += frame.texts[repeated:]
        job.logprobs += [TokenLogprobs.model_validate_json(text) for text in (frame.logprobs or ())[repeated:]]
        if frame.prompt_tokens is not None:
            job.prompt_tokens.append(frame.prompt_tokens)
        if frame.dropped_messages is not None:
            job.dropped_messages.append(frame.dropped_messages)
        if frame.finish or frame.error:
            job.finish, job.error, job.session = frame.finish, frame.error, None
        elif frame.release:
            self._return(job)

    def _claim(self, session: Session, turn: TurnRequest) -> list[WorkerJob]:
        lost = [job for job in self.jobs.values() if job.session == session.id and (job.id, job.attempt) not in turn.holding]
        while len(lost) < turn.room and self.waiting and not self.drain:
            job = self.waiting.pop(0)
            job.session, job.attempt = session.id, job.attempt + 1
            lost.append(job)
        return [
            WorkerJob(
                id=job.id, attempt=job.attempt, spec=job.spec, produced_ids=list(job.ids), sent_bytes=len(job.text.encode())
            )
            for job in lost[: turn.room]
        ]  # fmt: skip

    async def _park(self, session: Session) -> None:
        """Wait for work, which renews the lease."""
        session.ends_s = float("inf")
        try:
            async with asyncio.timeout(25), self._changed:
                await self._changed.wait_for(lambda: bool(self.waiting) or session.id not in self.sessions)
        except TimeoutError:
            pass

    def _holds(self, session: Session, job_id: str, attempt: int) -> bool:
        job = self.jobs.get(job_id)
        return job is not None and job.session == session.id and job.attempt == attempt

    def _return(self, job: Job) -> None:
        job.session = None
        self.waiting.insert(0, job)

    def _end_session(self, session: str) -> None:
        self.sessions.pop(session, None)
        for job in self.jobs.values():
            if job.session == session:
                self._return(job)

    def _reap(self) -> None:
        for session in [session for session in self.sessions.values() if session.ends_s < time.monotonic()]:
            self._end_session(session.id)

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return _error(401, "invalid_api_key", "this key opens nothing here")
        if self.answers_to_refuse:
            refusal = _error(self.answers_to_refuse.pop(0), "unavailable", "not now")
            if self.retry_after_s:
                refusal.headers["Retry-After"] = str(self.retry_after_s)
            return refusal
        return None

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _error(status: int, code: str, message: str) -> web.Response:
    body = ErrorBody(error=ErrorDetail(message=message, type="invalid_request_error", code=code))
    return web.Response(status=status, body=body.model_dump_json(), content_type="application/json")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[FakeServer]:
    server = FakeServer(**options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
