"""A job API that speaks the wire and goes wrong exactly as a script says: cut connections, refusals, lost answers, lost logs.

POST /scripts with a Script answers {"base": "/s/1"}: a world of its own with its own jobs, reached by a client whose address ends in
that base. GET <base>/history tells what was asked there and what became of its jobs. So tests in any language share one server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixtral_client.protocol import ErrorBody, ErrorDetail, JobRequest, event_id, ids_crc, parse_event_id

KEY = "test-key"
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
DONE = {"event": "done", "finish": "stop", "usage": USAGE, "timings": {"queue_s": 0.1, "first_token_s": 0.2, "total_s": 0.5}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cut(Strict):
    """How one events connection ends: after so many bytes, by FIN, by RST, by a clean end of the body, or by saying nothing more."""

    at: int
    how: Literal["close", "abort", "end", "silence"] = "close"


class Fault(Strict):
    """What the next request of this kind meets instead of an answer. lose: it is carried out, and its answer is lost;
    hold: it is carried out, and its answer waits for World.release."""

    on: Literal["POST", "GET", "DELETE", "EVENTS"]
    status: int = 503
    code: str | None = "unavailable"  # None: not our error body, but a proxy's page
    message: str = "the service is away; try again"
    headers: dict[str, str] = {"Retry-After": "0"}
    lose: bool = False
    hold: bool = False


class Script(Strict):
    """logs: what the k-th events connection finds (the last one stays). An entry is a token's text, an event, {"comment": …},
    {"hold": true} (wait there until the job is cancelled) or {"cut": how} (end the connection there)."""

    logs: list[list[str | dict[str, Any]]] = [["Once", " upon", " a", " time"]]
    end: dict[str, Any] = DONE
    cuts: list[Cut] = Field(default_factory=list)
    faults: list[Fault] = Field(default_factory=list)
    write_bytes: int = 1 << 16
    preamble: str = ""


@dataclass
class Job:
    id: str
    model: str
    request: dict[str, Any]
    is_cancelled: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def view(self) -> dict[str, Any]:
        return {"id": self.id, "model": self.model, "state": "cancelled" if self.is_cancelled else "streaming", "created": 1.5}


def sse(event: dict[str, Any], event_id: str | None = None) -> bytes:
    lines = [f"event: {event['event']}"] + ([f"id: {event_id}"] if event_id is not None else [])
    fields = {name: value for name, value in event.items() if name != "event"}
    return ("\n".join([*lines, f"data: {json.dumps(fields)}"]) + "\n\n").encode()


def id_of(text: str) -> int:
    """The token id of a text: any number that differs where texts differ."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


class Refusal(Exception):
    def __init__(self, response: web.Response) -> None:
        super().__init__(f"answered {response.status}")
        self.response = response


@web.middleware
async def _answer_refusals(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        return refusal.response


class World:
    """The jobs and the history of one script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: dict[str, Job] = {}
        self.by_key: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.release = asyncio.Event()
        self.url = ""

    def history(self) -> dict[str, Any]:
        states = {job.id: job.view()["state"] for job in self.jobs.values()}
        return {"requests": self.requests, "jobs": states, "connections": self.connections}

    def note(self, kind: str, request: web.Request, body: Any = None) -> None:
        names = ("Authorization", "Idempotency-Key", "Last-Event-ID")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        self.requests.append(
            {"kind": kind, "path": request.path.removeprefix(f"/s/{request.match_info['world']}")} | headers | {"body": body}
        )

    def fault(self, kind: str) -> Fault | None:
        for number, fault in enumerate(self.script.faults):
            if fault.on == kind:
                return self.script.faults.pop(number)
        return None

    def submit(self, key: str, body: dict[str, Any]) -> Job:
        if key in self.by_key:
            return self.jobs[self.by_key[key]]
        job = Job(f"mixtral_chat.0-{len(self.jobs) + 1}", body["model"], body)
        self.jobs[job.id] = job
        self.by_key[key] = job.id
        return job

    async def body(self, job: Job, last_event_id: str) -> AsyncIterator[bytes | Cut]:
        """What an events connection that resumes after last_event_id sends, until a cut if the log says so."""
        log = self.script.logs[min(self.connections, len(self.script.logs)) - 1]
        ids = [id_of(entry) for entry in log if isinstance(entry, str)]
        after, crc = parse_event_id(last_event_id or "0")
        yield self.script.preamble.encode() + sse({"event": "queued", "position": 1, "eta_s": 0.5})
        if after > len(ids):
            after = len(ids)
            yield sse({"event": "rewind", "to": after}, event_id(after, ids_crc(ids)))
        elif crc is not None and crc != ids_crc(ids[:after]):
            after = 0
            yield sse({"event": "rewind", "to": 0}, event_id(0, 0))
        offset = 0
        for entry in log:
            if isinstance(entry, str):
                offset += 1
                if offset > after:
                    yield sse({"event": "token", "offset": offset, "text": entry}, event_id(offset, ids_crc(ids[:offset])))
            elif "comment" in entry:
                yield f": {entry['comment']}\n\n".encode()
            elif "cut" in entry:
                yield Cut(at=0, how=entry["cut"])
            elif "hold" in entry:
                await job.ended.wait()
            else:
                yield sse(entry)
        yield sse(self.script.end | {"finish": "cancelled"} if job.is_cancelled else self.script.end)


class ScriptedApi:
    """The server: `async with ScriptedApi() as api: world = api.script(cuts=[Cut(at=100)])`."""

    def __init__(self) -> None:
        self.worlds: dict[str, World] = {}
        self.url = ""
        app = web.Application(middlewares=[_answer_refusals], client_max_size=16 << 20)
        app.router.add_post("/scripts", self._new_script)
        app.router.add_get("/s/{world}/history", self._history)
        app.router.add_post("/s/{world}/v1/jobs", self._submit)
        app.router.add_get("/s/{world}/v1/jobs/{job}", self._job)
        app.router.add_delete("/s/{world}/v1/jobs/{job}", self._cancel)
        app.router.add_get("/s/{world}/v1/jobs/{job}/events", self._events)
        app.router.add_get("/s/{world}/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def __aenter__(self) -> ScriptedApi:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def script(self, **fields: Any) -> World:
        return self._add(Script(**fields))

    def _add(self, script: Script) -> World:
        world = World(script)
        name = str(len(self.worlds) + 1)
        world.url = f"{self.url}/s/{name}"
        self.worlds[name] = world
        return world

    async def _new_script(self, request: web.Request) -> web.Response:
        try:
            world = self._add(Script.model_validate_json(await request.read()))
        except ValidationError as error:
            return web.Response(status=400, text=str(error))
        return web.json_response({"base": world.url.removeprefix(self.url)})

    async def _history(self, request: web.Request) -> web.Response:
        return web.json_response(self.worlds[request.match_info["world"]].history())

    def _enter(self, request: web.Request, kind: str, body: Any = None) -> tuple[World, Fault | None]:
        """Note the request and say which fault it meets. Raises the 401 of a wrong key."""
        world = self.worlds[request.match_info["world"]]
        world.note(kind, request, body)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            raise Refusal(_error(401, "invalid_api_key", "this key is not known here; ask for one", "authentication_error"))
        fault = world.fault(kind)
        if fault and not (fault.lose or fault.hold):
            raise Refusal(_fault_answer(fault))
        return world, fault

    def _known(self, world: World, request: web.Request) -> Job:
        if job := world.jobs.get(request.match_info["job"]):
            return job
        raise Refusal(_error(404, "job_not_found", "no such job; finished jobs are kept for an hour"))

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        world, fault = self._enter(request, "POST", body)
        try:
            JobRequest.model_validate(body)
        except ValidationError as error:
            raise Refusal(_error(400, "invalid_request", str(error))) from error
        job = world.submit(request.headers["Idempotency-Key"], body)
        if fault and fault.hold:
            await world.release.wait()
        if fault and fault.lose and request.transport:
            request.transport.close()
        return web.json_response({"id": job.id, "model": job.model, "state": "waiting", "position": 1}, status=202)

    async def _job(self, request: web.Request) -> web.StreamResponse:
        world, _ = self._enter(request, "GET")
        job = self._known(world, request)
        texts = [entry for entry in world.script.logs[-1] if isinstance(entry, str)]
        return web.json_response(job.view() | {"tokens": len(texts), "text": "".join(texts)})

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        world, _ = self._enter(request, "DELETE")
        job = self._known(world, request)
        job.is_cancelled = True
        job.ended.set()
        return web.json_response(job.view())

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._enter(request, "GET")
        return web.json_response({"object": "list", "data": [{"id": "mixtral_chat", "object": "model", "created": 1, "owned_by": "us"}]})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        world, _ = self._enter(request, "EVENTS")
        job = self._known(world, request)
        world.connections += 1
        cut = world.script.cuts[world.connections - 1] if world.connections <= len(world.script.cuts) else None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the client left
            await self._write(request, response, world, job, cut)
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, world: World, job: Job, cut: Cut | None) -> None:
        left = cut.at if cut else None
        async for piece in world.body(job, request.headers.get("Last-Event-ID", "")):
            if isinstance(piece, Cut):
                await _end(request, piece, job)
                return
            part = piece if left is None else piece[:left]
            for start in range(0, len(part), world.script.write_bytes):
                await response.write(part[start : start + world.script.write_bytes])
            if left is not None and cut is not None:
                left -= len(part)
                if left <= 0:
                    await _end(request, cut, job)
                    return


async def _end(request: web.Request, cut: Cut, job: Job) -> None:
    assert request.transport is not None
    if cut.how == "close":
        request.transport.close()
    elif cut.how == "abort":
        request.transport.abort()
    elif cut.how == "silence":
        await job.ended.wait()


def _error(
    status: int, code: str, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None
) -> web.Response:
    body = ErrorBody(error=ErrorDetail(message=message, type=kind, code=code))
    return web.Response(
        status=status, body=body.model_dump_json(), content_type="application/json", headers={"x-request-id": "req-7"} | (headers or {})
    )


def _fault_answer(fault: Fault) -> web.Response:
    if fault.code is None:
        return web.Response(status=fault.status, text=fault.message, content_type="text/html", headers=fault.headers)
    return _error(fault.status, fault.code, fault.message, "server_error", fault.headers)
