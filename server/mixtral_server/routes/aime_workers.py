"""AIME's worker wire: log in, ask for jobs, send progress and results. AIME's own worker library speaks it.

Decides the shape of every answer, which is what keeps that library alive: it exits at some, asks again without a pause at others, and never
sends progress again after a few. Leaves what a job looks like there to aime_jobs.py, and who holds it to aime_queue.py.

A call for jobs waits for nine tenths of the endpoint's request timeout, for at the whole of it the library takes the server for lost; it is
let go when its connection closes. A result is always answered 200: anything else is sent again for ever. While Redis is away a result waits
for it here, for as long as a call for jobs does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson
from aiohttp import web

from mixtral_server.aime_queue import AimeJob, AimeSession, Asked, Post, Taken
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import RedisUnavailable, ServiceError, TooManySessions
from mixtral_server.keys import shard_of
from mixtral_server.routes import aime_keys
from mixtral_server.routes.aime_jobs import job_data_of, outputs_of, progress_outputs_of, progress_post, result_post
from mixtral_server.routes.aime_worker_operations import OPERATIONS
from mixtral_server.routes.service import JOB_ID, PublicRoute, Service
from mixtral_server.tasks import end

log = logging.getLogger(__name__)

SPOKEN_VERSION = "0.9.6"  # of AIME's API server, whose wire this is
ANSWERED_BY = 0.9  # of the request timeout
RETRY_S = 0.5  # while Redis is away
MAX_BATCH = 256
SMALL_BODY_BYTES = 2**20
MOST_LARGE_BODIES = 16  # at once: who sends one is known only when it is read
LARGE_BODIES: web.AppKey[AbstractAsyncContextManager[None, bool | None]] = web.AppKey("aime_large_bodies", AbstractAsyncContextManager)
MAX_NAME_CHARS = 200
WRONG_KEY = "the auth_key is not that of the endpoint's workers; start the worker with a worker key of this server"
WRONG_WORKER = "auth, the worker's name, must be given, and an auth_key that is that of the endpoint's workers"

_ABOUT = (
    *("gpu_name", "num_gpus", "framework", "framework_version", "pytorch_version", "worker_version"),
    *("model_quantization", "model_size", "model_family", "model_type", "model_repo_name"),
)

Body: TypeAlias = Mapping[str, Any]


class Unserved(Exception):
    """Why a worker is not served, in one sentence."""


@dataclass(frozen=True)
class Worker:
    """Who calls, and the endpoints that it may serve: a session at each."""

    name: str
    sessions: Sequence[AimeSession]

    @property
    def poll_s(self) -> float:
        return ANSWERED_BY * min(one.endpoint.worker.request_timeout_s for one in self.sessions)

    def at(self, endpoint: str) -> AimeSession | None:
        return next((one for one in self.sessions if one.endpoint.name == endpoint), None)


# ---------------------------------------------------------------------------------------------- who calls


async def check_server_status(service: Service, request: web.Request) -> web.StreamResponse:
    """The library needs no more than the 200, and says a word less where there is a cmd."""
    body = await _object(service, request) or {}
    endpoints = _endpoints(service, body)
    keys = [await aime_keys.worker_key_id(service, request, body.get("auth_key"), one) for one in endpoints]
    sessions = [AimeSession(one, key, _name(body)) for one, key in zip(endpoints, keys, strict=True) if key is not None]
    try:
        is_open = any([await service.aime_queue.is_open(one) for one in sessions])
    except RedisUnavailable:
        is_open = False
    return _json({"cmd": "ok", "logged_in": is_open, "job_type_present": bool(endpoints), "key_valid": bool(sessions)})


async def login(service: Service, request: web.Request) -> web.StreamResponse:
    body = await _object(service, request) or {}
    told, model = _table(body, "worker_parameters"), _table(body, "model_parameters")
    facts = {**told, **{f"model_{name}": value for name, value in model.items()}, "max_job_batch": told.get("max_batch_size", 1)}
    try:
        worker = await _worker(service, request, facts)
        await _log_in(service, worker, facts)
    except (Unserved, ServiceError) as error:
        return _json({"success": False, "error_msg": str(error)})
    timeout_s = min(one.endpoint.worker.request_timeout_s for one in worker.sessions)
    return _json({"success": True, "request_timeout": timeout_s, "api_server_version": SPOKEN_VERSION})


async def _worker(service: Service, request: web.Request, body: Body) -> Worker:
    """Raises Unserved, Unavailable."""
    name, endpoints = _name(body), _endpoints(service, body)
    if not name:
        raise Unserved("auth, the worker's name, must be a text that is not empty")
    if not endpoints:
        known = ", ".join(sorted({kind for one in service.endpoints.values() for kind in one.job_types}))
        raise Unserved(f"there is no job_type {str(body.get('job_type'))[:100]!r} here; this server has {known}")
    keys = [await aime_keys.worker_key_id(service, request, body.get("auth_key"), one) for one in endpoints]
    sessions = [AimeSession(one, key, name) for one, key in zip(endpoints, keys, strict=True) if key is not None]
    if not sessions:
        raise Unserved(WRONG_KEY)
    return Worker(name, sessions)


async def _log_in(service: Service, worker: Worker, body: Body) -> None:
    """Raises TooManySessions, RedisUnavailable."""
    told = {name: body.get(name) for name in _ABOUT}
    about = {name: str(value)[:MAX_NAME_CHARS] if isinstance(value, str) else value for name, value in told.items() if _is_plain(value)}
    facts: dict[str, str | int] = {
        "model": str(body.get("model_label") or "unknown")[:MAX_NAME_CHARS],
        "device": f"{about.get('num_gpus', 1)}x {about.get('gpu_name', 'unknown')}"[:MAX_NAME_CHARS],
        "version": str(body.get("version") or "unknown")[:50],
        "max_slots": _room(body),
        "max_seq_len": 0,  # nobody says it before a result
    }
    for session in worker.sessions:
        await service.aime_queue.open(session, facts, about)
        log.info("session=%s event=aime_worker_in endpoint=%s name=%r", session.id, session.endpoint.name, worker.name)


def _endpoints(service: Service, body: Body) -> list[EndpointConfig]:
    job_type = body.get("job_type")
    return [one for one in service.endpoints.values() if isinstance(job_type, str) and job_type in one.job_types]


def _table(body: Body, name: str) -> Body:
    found = body.get(name)
    return found if isinstance(found, dict) else {}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _name(body: Body) -> str:
    name = body.get("auth")
    return name[:MAX_NAME_CHARS] if isinstance(name, str) else ""


def _room(body: Body) -> int:
    room = body.get("max_job_batch", 1)
    return min(MAX_BATCH, max(1, room)) if isinstance(room, int) else 1


# ---------------------------------------------------------------------------------------------- jobs


async def job_request(service: Service, request: web.Request) -> web.StreamResponse:
    """Jobs of one endpoint, or none within the time. 503 while Redis is away: the library then asks for the server every second."""
    body = await _object(service, request)
    if body is None:
        return _refusal("the body must be a JSON object in UTF-8")
    try:
        worker = await _worker(service, request, body)
        return await _JobRequest(service, request, worker, body).answer()
    except Unserved as error:
        return _refusal(str(error))
    except TooManySessions as error:
        return _json({"cmd": "warning", "msg": error.message})


class _JobRequest:
    """One call for jobs, from its beginning to its answer or to the end of its connection."""

    def __init__(self, service: Service, request: web.Request, worker: Worker, body: Body) -> None:
        self._service = service
        self._request = request
        self._worker = worker
        self._body = body
        self._poll = secrets.token_hex(8)
        self._asking: dict[str, asyncio.Task[Asked | None]] = {}  # by session

    async def answer(self) -> web.StreamResponse:
        """Whatever was leased while the connection closed goes back at once."""
        try:
            return await self._answer()
        except asyncio.CancelledError:
            for session in self._worker.sessions:
                self._service.group.create_task(self._hang_up(session))
            raise

    async def _answer(self) -> web.StreamResponse:
        clock = asyncio.get_running_loop().time
        until = clock() + self._worker.poll_s
        sessions = list(self._worker.sessions)
        is_first = True
        while True:
            seen = {one.endpoint.name: self._service.relay.wakes(one.endpoint.name) for one in sessions}
            again_s = self._service.settings.worker_claim_s
            for session in sessions:
                asked = await self._ask(session, is_first=is_first)
                if asked is None:  # a later call of this worker is the one that is listened to
                    return _json({"cmd": "no_job"})
                if asked.jobs:
                    return self._jobs(session, asked)
                again_s = min(again_s, asked.again_s or again_s)
            is_first = False
            left_s = until - clock()
            if left_s <= 0 or self._service.stages.closing.is_set():
                return _json({"cmd": "no_job"})
            await self._wait(seen, min(left_s, again_s))
            await _worker(self._service, self._request, self._body)  # a key revoked meanwhile gets no more jobs
            sessions.append(sessions.pop(0))  # endpoints take turns

    async def _ask(self, session: AimeSession, *, is_first: bool) -> Asked | None:
        """Raises Unserved for a worker that is to log in and cannot by this call."""
        asked = await self._ask_once(session, is_first=is_first)
        if asked is None and is_first:
            if "version" not in self._body:
                raise Unserved(f"Worker {self._worker.name} needs to login before being allowed to make job requests")
            await _log_in(self._service, self._worker, self._body)
            asked = await self._ask_once(session, is_first=True)
        if asked is not None and asked.lost:
            log.warning("session=%s event=aime_worker_lost_jobs jobs=%d: it asks as one that has none of them", session.id, asked.lost)
        return asked

    async def _ask_once(self, session: AimeSession, *, is_first: bool) -> Asked | None:
        room = _room(self._body)
        asking = asyncio.create_task(self._service.aime_queue.ask(session, self._poll, room, is_first=is_first))
        self._asking[session.id] = asking
        return await asyncio.shield(asking)

    async def _hang_up(self, session: AimeSession) -> None:
        try:
            asked = await self._asking[session.id] if session.id in self._asking else None
            returned = await self._service.aime_queue.give_back(session, self._poll, asked.jobs if asked is not None else ())
        except ServiceError as error:
            log.warning("session=%s event=aime_poll_not_ended code=%s", session.id, error.code)  # its lease lapses
        else:
            log.info("session=%s event=aime_poll_gone returned=%d", session.id, returned)

    async def _wait(self, seen: Mapping[str, int], timeout_s: float) -> None:
        """Until one of the endpoints has work, the server closes, or the time is over."""
        relay = self._service.relay
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(relay.work(name, timeout_s, wakes)) for name, wakes in seen.items()]
        waits.append(asyncio.create_task(self._service.stages.closing.wait()))
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(waits)

    def _jobs(self, session: AimeSession, asked: Asked) -> web.Response:
        endpoint = session.endpoint
        log.info("session=%s event=aime_jobs_leased endpoint=%s jobs=%d", session.id, endpoint.name, len(asked.jobs))
        return _json(
            {
                "cmd": "job",
                "endpoint_name": endpoint.name,
                "input_descriptions": {name: one.described() for name, one in endpoint.job_inputs.items()},
                "progress_output_descriptions": {name: one.model_dump() for name, one in progress_outputs_of(endpoint).items()},
                "final_output_descriptions": {name: one.model_dump() for name, one in outputs_of(endpoint).items()},
                "job_data": [job_data_of(job, _worker_job_id(job), endpoint, asked.now) for job in asked.jobs],
            }
        )


def _worker_job_id(job: AimeJob) -> str:
    """With the attempt, so that what a worker says of an older one is known by it."""
    return f"{job.id}#{job.attempt}"


def _named(service: Service, item: object) -> tuple[EndpointConfig, str, int] | None:
    """The endpoint, job and attempt that an item of a worker's names; None where it names none."""
    given = item.get("job_id") if isinstance(item, dict) else None
    job_id, _, attempt = given.partition("#") if isinstance(given, str) else ("", "", "")
    shard = shard_of(job_id)
    if shard is None or shard.endpoint not in service.endpoints or not (attempt.isascii() and attempt.isdecimal() and len(attempt) < 10):
        return None
    return service.endpoints[shard.endpoint], job_id, int(attempt)


# ---------------------------------------------------------------------------------------------- progress and results


async def job_progress(service: Service, request: web.Request) -> web.StreamResponse:
    """An object for each item, in their order. `job_id` stands in one only to say that the job is no longer the worker's."""
    parsed = await _parsed(service, request)
    items = parsed if isinstance(parsed, list) else [parsed]
    answers: list[dict[str, Any]] = [{"success": False, "error_msg": "this item names no job of this server's"} for _ in items]
    by_session: dict[str, tuple[AimeSession, list[tuple[int, Post]]]] = {}
    for at, item in enumerate(items):
        named = _named(service, item)
        if named is None:
            continue
        endpoint, job_id, attempt = named
        try:
            session = await _session_of(service, request, item, endpoint)
        except ServiceError as error:
            answers[at] = {"success": False, "error_msg": error.message}
            continue
        if session is None:
            answers[at] = {"success": False, "error_msg": WRONG_WORKER}
        else:
            by_session.setdefault(session.id, (session, []))[1].append((at, progress_post(job_id, attempt, item, endpoint)))
    for session, posts in by_session.values():
        for (at, _), answer in zip(posts, await _progress_taken(service, session, [post for _, post in posts]), strict=True):
            if answer.get("canceled"):
                answer["job_id"] = items[at]["job_id"]
            answers[at] = answer
    return _json(answers)


async def _progress_taken(service: Service, session: AimeSession, posts: Sequence[Post]) -> list[dict[str, Any]]:
    try:
        taken = await service.aime_queue.post(session, posts)
    except ServiceError as error:
        return [{"success": False, "error_msg": error.message} for _ in posts]
    return [{"success": True, "canceled": True} if not one.is_taken and one.is_news else {"success": True} for one in taken]


async def job_result(service: Service, request: web.Request) -> web.StreamResponse:
    item = await _parsed(service, request)
    named = _named(service, item)
    if named is None or not isinstance(item, dict):
        log.warning("event=aime_result_unread request=%s", request.content_length)
        return _json({"cmd": "warning", "msg": "the result names no job of this server's"})
    endpoint, job_id, attempt = named
    request[JOB_ID] = job_id
    try:
        session = await _session_of(service, request, item, endpoint)
        if session is None:
            return _json({"success": False, "error_msg": WRONG_WORKER})
        [taken] = await _until_redis_answers(service, session, [result_post(job_id, attempt, item, endpoint)])
    except ServiceError as error:
        log.warning("job=%s event=aime_result_lost code=%s: the job starts anew", job_id, error.code)
        return _json({"cmd": "warning", "msg": f"Result of job {item['job_id']} could not be kept: {error.message}"})
    if taken.is_taken:
        return _json({"cmd": "ok"})
    return _json({"cmd": "warning", "msg": f"Job with job id {item['job_id']} not found in worker {session.name}!"})


async def _until_redis_answers(service: Service, session: AimeSession, posts: Sequence[Post]) -> list[Taken]:
    """Raises RedisUnavailable when it did not within the worker's patience, or the server ends."""
    clock = asyncio.get_running_loop().time
    until = clock() + ANSWERED_BY * session.endpoint.worker.request_timeout_s
    while True:
        try:
            return await service.aime_queue.post(session, posts)
        except RedisUnavailable:
            if clock() + RETRY_S > until or service.stages.closing.is_set():
                raise
        await asyncio.sleep(RETRY_S)


async def _session_of(service: Service, request: web.Request, item: Body, endpoint: EndpointConfig) -> AimeSession | None:
    """Raises Unavailable."""
    told = item.get("progress_data")
    name = _name(item) or (_name(told) if isinstance(told, dict) else "")  # in a batch the library says it there
    key_id = await aime_keys.worker_key_id(service, request, item.get("auth_key"), endpoint)
    return AimeSession(endpoint, key_id, name) if key_id is not None and name else None


# ---------------------------------------------------------------------------------------------- bodies


async def _object(service: Service, request: web.Request) -> dict[str, Any] | None:
    parsed = await _parsed(service, request)
    return parsed if isinstance(parsed, dict) else None


async def _parsed(service: Service, request: web.Request) -> Any:
    """The body's JSON, whatever its type is said to be; None for what cannot be read. It is read to its end even where it is too large: a
    worker that is cut off while it sends would send it again for ever."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        return None
    raw, size = bytearray(), 0
    try:
        async with AsyncExitStack() as stack, asyncio.timeout(service.settings.body_timeout_s):
            async for part in request.content.iter_any():
                if size <= SMALL_BODY_BYTES < size + len(part):
                    await stack.enter_async_context(request.app[LARGE_BODIES])
                size += len(part)
                if size <= service.settings.worker_body_limit_bytes:
                    raw += part
    except (TimeoutError, web.RequestPayloadError):
        return None
    if size > len(raw):
        log.warning("event=aime_body_too_large bytes=%d most=%d path=%s", size, service.settings.worker_body_limit_bytes, request.path)
        return None
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _mended(bytes(raw))


def _mended(raw: bytes) -> Any:
    """What Python's json makes and JSON does not know: half characters become `?`, numbers that are none become null."""
    try:
        parsed = json.loads(raw, parse_constant=lambda name: None)
        return orjson.loads(json.dumps(parsed, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _refusal(sentence: str) -> web.Response:
    """The library prints it and ends its loop."""
    log.warning("event=aime_worker_refused: %s", sentence)
    return _json({"cmd": "error", "msg": sentence})


def _json(body: object) -> web.Response:
    return web.json_response(body=orjson.dumps(body))


ROUTES = tuple(
    PublicRoute("POST", path, answer, OPERATIONS[path])
    for path, answer in (
        ("/worker_check_server_status", check_server_status),
        ("/worker_login", login),
        ("/worker_job_request", job_request),
        ("/worker_job_progress", job_progress),
        ("/worker_job_result", job_result),
    )
)
