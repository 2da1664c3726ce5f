"""FakeServer: the service of these clients for tests of programs that use it. No Redis, no worker, no model: answers are scripted.

    with FakeServer("Hello there.") as server:          # or `async with`
        client = SyncClient(server.url, server.api_key)

Decides what a job answers, step by step, and what goes wrong on the way. It speaks HTTP on a free port of 127.0.0.1, so any client of the
native routes meets it as it would meet the service. Leaves out OpenAI's and AIME's routes, workers, queues and limits.

A script is a list of steps, each played once, whoever reads; a reader that comes back goes on after its Last-Event-ID:

    "text"                    one token                     {"moved": 2}       another worker goes on, attempt 2
    {"hold": True}            wait for release() or cancel  {"rewind": 1}      the log lost all after token 1
    {"cut": "close"}          break this connection: close, abort (RST), end (a clean end) or silence
    {"error": {"code": "out_of_memory", "message": "…"}}    the job fails
    {"done": {"finish": "length"}}                          it ends, not by "stop" as after the last step
    {"comment": "…"}, {"event": "…", …}                     sent as they are
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from aiohttp import web
from pydantic import ValidationError

from mixtral_client.protocol import ErrorBody, ErrorDetail, JobRequest, event_id, ids_crc, parse_event_id
from mixtral_client.sync import LoopThread

Step: TypeAlias = str | Mapping[str, Any]
Script: TypeAlias = str | Sequence[Step]
"""Steps; a bare string is an answer of one token for each word."""

Call: TypeAlias = Literal["submit", "events", "job", "cancel", "models"]
How: TypeAlias = Literal["close", "abort", "end", "silence"]

STORY = ("Once", " upon", " a", " time")
STEPS = ("cut", "hold", "moved", "rewind", "error", "done", "comment", "event")
CUTS = ("close", "abort", "end", "silence")
PROMPT_TOKENS = 3
TIMINGS = {"queue_s": 0.1, "first_token_s": 0.2, "total_s": 0.5}
NOTED_HEADERS = ("Authorization", "Idempotency-Key", "Last-Event-ID")


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the server was sent."""

    call: str
    path: str
    headers: Mapping[str, str]
    """Of Authorization, Idempotency-Key and Last-Event-ID those that it had."""
    body: Any


@dataclass(frozen=True, slots=True)
class Fault:
    """What one request meets instead of its answer. lose: it is carried out, and its answer lost; hold: its answer waits for release()."""

    on: Call
    status: int = 503
    code: str | None = "unavailable"
    message: str = "the service is away; try again"
    retry_after: str | None = "0"
    lose: bool = False
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """How an events connection ends that has sent so many bytes."""

    at: int
    how: How = "close"


@dataclass
class FakeJob:
    """One job: what its log holds, and the steps to come."""

    id: str
    request: dict[str, Any]
    steps: list[Step]
    texts: list[str] = field(default_factory=list)
    attempt: int = 1
    state: str = "waiting"
    end: dict[str, Any] = field(default_factory=dict)  # the terminal event
    sent: list[bytes] = field(default_factory=list)  # what readers were told live
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return bool(self.end)

    def view(self) -> dict[str, Any]:
        ended = {name: self.end[name] for name in ("finish", "usage", "timings", "error") if name in self.end}
        known = {"id": self.id, "model": self.request["model"], "state": self.state, "created": 1.5, "attempt": self.attempt}
        return known | {"tokens": len(self.texts), "text": "".join(self.texts)} | ended

    def cancel(self) -> None:
        if not self.is_over:
            self.finish("cancelled", {"finish": "cancelled"})
        self.wake.set()

    def finish(self, state: str, fields: Mapping[str, Any]) -> None:
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(self.texts), "total_tokens": PROMPT_TOKENS + len(self.texts)}
        self.state = state
        self.end = {"event": "done", "finish": "stop", "usage": usage, "timings": TIMINGS} | dict(fields)

    def play(self) -> How | None:
        """Carry out the next step, and forget it; a hold must be over. Gives how the reader's connection ends, if it does."""
        if not self.steps:
            self.finish("done", {})
            return None
        step = self.steps.pop(0)
        if isinstance(step, str):
            self.state = "streaming"
            self.texts.append(step)
            self.sent.append(self.token(len(self.texts)))
        elif "moved" in step:
            self.attempt = step["moved"]
            self.sent.append(_sse({"event": "moved", "attempt": self.attempt}))
        elif "rewind" in step:
            del self.texts[step["rewind"] :]
            self.sent.append(self.rewind())
        elif "error" in step:
            self.state, self.end = "failed", {"event": "error", "error": {"type": "server_error", "param": None} | dict(step["error"])}
        elif "done" in step:
            self.finish("done", step["done"])
        elif "comment" in step:
            self.sent.append(f": {step['comment']}\n\n".encode())
        elif "event" in step:
            self.sent.append(_sse(step))
        elif "cut" in step:
            how: How = step["cut"]
            return how
        return None

    def play_unread(self) -> None:
        """Run on as jobs do whoever reads, up to the next hold."""
        while not self.is_over:
            if self.steps and _is_hold(self.steps[0]):
                if not self.wake.is_set():
                    return
                self.steps.pop(0)
            else:
                self.play()

    def token(self, offset: int) -> bytes:
        return _sse({"event": "token", "offset": offset, "text": self.texts[offset - 1]}, self.id_at(offset))

    def rewind(self) -> bytes:
        return _sse({"event": "rewind", "to": len(self.texts)}, self.id_at(len(self.texts)))

    def id_at(self, offset: int) -> str:
        return event_id(offset, ids_crc(zlib.crc32(text.encode()) & 0x7FFFFFFF for text in self.texts[:offset]))


class FakeServer:
    """Jobs answered by scripts: the k-th new job by the k-th script, further ones by the last. `requests` is what was asked."""

    def __init__(
        self,
        *scripts: Script,
        api_key: str = "test-key",
        faults: Sequence[Fault] = (),
        cuts: Sequence[Cut] = (),
        write_bytes: int = 1 << 16,
        preamble: str = "",
    ) -> None:
        self.api_key = api_key
        self.url = ""
        self.requests: list[Request] = []
        self.jobs: dict[str, FakeJob] = {}
        self.connections = 0
        """Events connections so far."""
        self._scripts = [_steps(script) for script in scripts or (STORY,)]
        self._faults = list(faults)
        self._cuts = list(cuts)  # of the k-th events connection
        self._write_bytes = write_bytes
        self._preamble = preamble
        self._by_key: dict[str, tuple[str, dict[str, Any]]] = {}
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._thread: LoopThread | None = None

    # ------------------------------------------------------------------------------------------ for the test

    def answer(self, *scripts: Script) -> None:
        """The scripts of the next jobs, in place of those that are left."""
        self._scripts = [_steps(script) for script in scripts]

    def fail(
        self,
        on: Call,
        status: int = 503,
        code: str | None = "unavailable",
        message: str = "the service is away; try again",
        *,
        retry_after: str | None = "0",
        times: int = 1,
    ) -> None:
        """Refuse the next requests of a kind. code None: in a proxy's HTML; retry_after: the header, seconds or an HTTP date."""
        self._faults += [Fault(on, status, code, message, retry_after)] * times

    def lose_answer(self, on: Call, *, times: int = 1) -> None:
        """Carry out the next requests of a kind, and break the connection instead of answering."""
        self._faults += [Fault(on, lose=True)] * times

    def release(self) -> None:
        """End all holds, those to come included."""
        if self._thread is not None:
            self._thread.run(self._release())
        else:
            self._let_go()

    async def _release(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._released.set()
        for job in self.jobs.values():
            job.wake.set()

    def asked(self, call: Call) -> list[Request]:
        return [request for request in self.requests if request.call == call]

    @property
    def states(self) -> list[str]:
        """Of the jobs, in order of their making."""
        return [job.state for job in self.jobs.values()]

    # ------------------------------------------------------------------------------------------ start and end

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._let_go()
        if self._runner is not None:
            await self._runner.cleanup()

    def __enter__(self) -> Self:
        self._thread = LoopThread()
        return self._thread.run(self.__aenter__())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.run(self.__aexit__(kind, error, trace))
            self._thread.close()

    # ------------------------------------------------------------------------------------------ the wire

    async def respond(self, request: web.Request, path: str) -> web.StreamResponse:
        """The answer to a request; path is its path below the address that clients were given."""
        routes: list[tuple[str, str, Call, Callable[[web.Request, str], Awaitable[web.StreamResponse]]]] = [
            ("POST", "/v1/jobs", "submit", self._submit),
            ("GET", "/v1/jobs/(.+)/events", "events", self._events),
            ("GET", "/v1/jobs/(.+)", "job", self._job),
            ("DELETE", "/v1/jobs/(.+)", "cancel", self._cancel),
            ("GET", "/v1/models", "models", self._models),
        ]
        for method, pattern, call, serve in routes:
            if request.method == method and (match := re.fullmatch(pattern, path)):
                return await self._answered(request, path, call, partial(serve, request, (*match.groups(), "")[0]))
        return self._error(404, "route_not_found", f"this fake has no route {request.method} {path}; it has the native job routes")

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        return await self.respond(request, request.path)

    async def _answered(
        self, request: web.Request, path: str, call: Call, serve: Callable[[], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in NOTED_HEADERS if name in request.headers}
        raw = await request.read()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            return self._error(400, "invalid_request", f"the body must be JSON; got {raw[:80]!r}")
        self.requests.append(Request(call, path, headers, body))
        if headers.get("Authorization") != f"Bearer {self.api_key}":
            return self._error(401, "invalid_api_key", "this key is not known here; ask for one", "authentication_error")
        fault = next((fault for fault in self._faults if fault.on == call), None)
        if fault is None:
            return await serve()
        self._faults.remove(fault)
        if not (fault.lose or fault.hold):
            return self._refused(fault)
        answer = await serve()
        if fault.hold:
            await self._released.wait()
        if fault.lose and request.transport:
            request.transport.close()
        return answer

    async def _submit(self, request: web.Request, _: str) -> web.StreamResponse:
        body = self.requests[-1].body
        try:
            JobRequest.model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            return self._error(400, "invalid_request", f"{where or 'the request'}: {first['msg']}", param=where or None)
        key = request.headers.get("Idempotency-Key", f"key {len(self.requests)}")
        known, known_body = self._by_key.get(key, ("", body))
        if known_body != body:
            return self._error(422, "idempotency_conflict", "this Idempotency-Key was used with another body; use a new one")
        job = self.jobs.get(known) or FakeJob(f"mixtral_chat.0-{len(self.jobs) + 1}", body, self._next_script())
        if self._released.is_set():
            job.wake.set()
        self.jobs[job.id] = job
        self._by_key[key] = (job.id, body)
        accepted = {"id": job.id, "model": body["model"], "state": job.state, "position": 1}
        return web.json_response(accepted, status=200 if known else 202)

    def _next_script(self) -> list[Step]:
        return list(self._scripts[0] if len(self._scripts) == 1 else self._scripts.pop(0))

    async def _job(self, _: web.Request, job_id: str) -> web.StreamResponse:
        if (job := self.jobs.get(job_id)) is None:
            return self._no_job(job_id)
        job.play_unread()
        return web.json_response(job.view())

    async def _cancel(self, _: web.Request, job_id: str) -> web.StreamResponse:
        if (job := self.jobs.get(job_id)) is None:
            return self._no_job(job_id)
        job.cancel()
        return web.json_response(job.view())

    async def _models(self, request: web.Request, _: str) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": "mixtral_chat", "object": "model", "created": 1, "owned_by": "us"}]})

    async def _events(self, request: web.Request, job_id: str) -> web.StreamResponse:
        if (job := self.jobs.get(job_id)) is None:
            return self._no_job(job_id)
        after = request.headers.get("Last-Event-ID", request.query.get("after", "")) or "0"
        self.connections += 1
        cut = self._cuts[self.connections - 1] if self.connections <= len(self._cuts) else None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"} | self._request_id())
        with contextlib.suppress(ConnectionError):  # the client left
            await response.prepare(request)
            await self._write(request, response, job, self._stream(job, after), cut)
        return response

    async def _stream(self, job: FakeJob, after: str) -> AsyncIterator[bytes | How]:
        """What one connection sends; a How ends it there."""
        live = len(job.sent)
        offset, crc = parse_event_id(after)
        yield self._preamble.encode() + _sse({"event": "queued", "position": 1, "eta_s": 0.5})
        if offset > len(job.texts):
            offset = len(job.texts)
            yield job.rewind()
        elif crc is not None and job.id_at(offset) != event_id(offset, crc):
            offset = 0
            yield _sse({"event": "rewind", "to": 0}, event_id(0, 0))
        if job.attempt > 1:
            yield _sse({"event": "moved", "attempt": job.attempt})
        for missed in range(offset + 1, len(job.texts) + 1):
            yield job.token(missed)
        while True:
            for piece in job.sent[live:]:
                live += 1
                yield piece
            if job.is_over:
                yield _sse(job.end)
                return
            if job.steps and _is_hold(job.steps[0]):
                hold = job.steps[0]
                await job.wake.wait()
                if job.steps and job.steps[0] is hold:
                    job.steps.pop(0)
            elif how := job.play():
                yield how

    async def _write(
        self, request: web.Request, response: web.StreamResponse, job: FakeJob, pieces: AsyncIterator[bytes | How], cut: Cut | None
    ) -> None:
        left = cut.at if cut else 1 << 60
        async for piece in pieces:
            if isinstance(piece, str):
                return await _end(request, piece, job)
            part = piece[:left]
            for start in range(0, len(part), self._write_bytes):
                await response.write(part[start : start + self._write_bytes])
            left -= len(part)
            if cut is not None and left <= 0:
                return await _end(request, cut.how, job)
        return None

    # ------------------------------------------------------------------------------------------ refusals

    def _no_job(self, job_id: str) -> web.Response:
        return self._error(404, "job_not_found", f"there is no job {job_id}; finished jobs are kept for an hour")

    def _refused(self, fault: Fault) -> web.Response:
        headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
        if fault.code is None:
            return web.Response(status=fault.status, text=fault.message, content_type="text/html", headers=headers)
        return self._error(fault.status, fault.code, fault.message, "server_error", headers=headers)

    def _error(
        self,
        status: int,
        code: str,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump_json()
        said = self._request_id() | dict(headers or {})
        return web.Response(status=status, body=body, content_type="application/json", headers=said)

    def _request_id(self) -> dict[str, str]:
        return {"x-request-id": f"req-{len(self.requests)}"}


async def _end(request: web.Request, how: How, job: FakeJob) -> None:
    assert request.transport is not None
    if how == "close":
        request.transport.close()
    elif how == "abort":
        request.transport.abort()
    elif how == "silence":
        await job.wake.wait()


def _is_hold(step: Step) -> bool:
    return not isinstance(step, str) and "hold" in step


def _steps(script: Script) -> list[Step]:
    if isinstance(script, str):
        return list(re.findall(r"\s*\S+(?:\s+$)?", script))
    for step in script:
        if not isinstance(step, str) and not any(name in step for name in STEPS):
            raise ValueError(f"a step is a token's text or has one of {', '.join(STEPS)}; got {step!r}")
        if not isinstance(step, str) and step.get("cut", "close") not in CUTS:
            raise ValueError(f"a cut is one of {', '.join(CUTS)}; got {step['cut']!r}")
    return list(script)


def _sse(event: Mapping[str, Any], event_id: str | None = None) -> bytes:
    fields = {name: value for name, value in event.items() if name != "event"}
    lines = [f"event: {event['event']}", *([] if event_id is None else [f"id: {event_id}"]), f"data: {json.dumps(fields)}"]
    return ("\n".join(lines) + "\n\n").encode()
