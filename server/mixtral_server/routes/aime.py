"""AIME's client wire: submit and wait, or submit and poll; login, keys, endpoints. AIME's own JavaScript and Python clients speak it.

Decides who is let in by a key in the request, which refusal has which status and shape there, and what a blocking call does. Leaves
parameters to aime_inputs.py, what a job looks like to aime_views.py, ids and session keys to aime_tickets.py, and the job to service.py and
the queue.

Better than AIME's own server where its clients take it: results can be fetched again, only job ids given out here open a job, a blocking
call waits as long as its job takes, and no answer shows a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import orjson
from aiohttp import web
from pydantic import RootModel

from mixtral_server.auth import Caller
from mixtral_server.descriptions import InputsRefused, values_of
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import JobNotFound, QueueFull, RequestRefused, ServiceError, Unavailable
from mixtral_server.keys import shard_of
from mixtral_server.records import Snapshot
from mixtral_server.routes import aime_keys
from mixtral_server.routes.aime_inputs import CREDENTIALS, IMPLICIT, WAIT, content_of_values, from_query, inputs_of
from mixtral_server.routes.aime_operations import OPERATIONS
from mixtral_server.routes.aime_tickets import Tickets
from mixtral_server.routes.aime_views import Texts, Workers, details_of, progress_of, result_of
from mixtral_server.routes.body import fingerprint, read_model
from mixtral_server.routes.service import JOB_ID, PublicAnswer, PublicRoute, Service

KEY_NOT_VALID = "Key not valid"
DEFAULT_EP_VERSION = 2  # of an answer that is of no endpoint
NOT_REGISTERED = [
    "API Key missing and client session authentication key not registered in API Server",
    "Client session authentication key not registered in API Server",  # Python's client and AIME's page look for exactly this
]


@dataclass(frozen=True)
class Desk:
    """What the routes share in one process; none of it is needed by another."""

    tickets: Tickets
    texts: Texts
    workers: Workers


DESK = web.AppKey("aime_desk", Desk)


class CrossOriginRoute(PublicRoute):
    """A route for pages of any origin, by GET and POST alike: it knows callers by the key in the request, never by a cookie."""


class Params(RootModel[dict[str, Any]]):
    """A body of parameters; which there are depends on the endpoint."""


class Refused(Exception):
    """A refusal in AIME's words; error is one sentence or a list of them."""

    def __init__(self, status: int, error: str | list[str], retry_after_s: float | None = None, **more: object) -> None:
        super().__init__(error)
        self.status = status
        self.retry_after_s = retry_after_s
        self._error = error
        self._more = more

    def body(self, ep_version: int) -> dict[str, object]:
        return {"success": False, "error": self._error, "ep_version": ep_version, **self._more}


# ---------------------------------------------------------------------------------------------- jobs


async def submit(service: Service, request: web.Request) -> web.StreamResponse:
    """A job's id at once, or its result when it is there."""
    desk, endpoint = request.app[DESK], _endpoint(service, request)
    inputs = inputs_of(endpoint)
    given = from_query(request.query, inputs) if request.method == "GET" else await _body(service, request)
    caller = await _client(service, request, endpoint, given)
    try:
        values = values_of(given, inputs)
        content = content_of_values(values, endpoint, service.new_seed())
    except InputsRefused as error:
        raise Refused(400, error.errors) from error
    meaning = Params({name: value for name, value in values.items() if name not in IMPLICIT})
    try:
        put = await service.put(request, caller, endpoint, content, fingerprint(request.path, meaning))
    except QueueFull as error:
        raise Refused(400, f"Job queue reached max length {endpoint.max_waiting}! {error.message}", error.retry_after_s) from error
    ticket = desk.tickets.of_job(put.job_id)
    if not values[WAIT]:
        return _json({"success": True, "job_id": ticket, "ep_version": endpoint.version})
    return await _when_it_ends(service, request, desk, endpoint, put.job_id, ticket)


async def _when_it_ends(
    service: Service, request: web.Request, desk: Desk, endpoint: EndpointConfig, job_id: str, ticket: str
) -> web.StreamResponse:
    """Wait for the end of the job, however long it takes. A client that leaves cannot ask for it again: its job is given up."""
    with service.relay.follow(job_id, is_resumable=False, asks_place=False) as follower:
        follower.sink = lambda tokens: lambda: True  # the text is read when it is whole
        try:
            while not follower.is_over:
                batch = await follower.batch(service.settings.ping_s)
                if not batch and follower.is_stopped:
                    raise Unavailable(
                        "this server is stopping before the answer is whole; ask again and another one answers", retry_after_s=2
                    )
        finally:
            if not follower.is_over and "Idempotency-Key" not in request.headers:
                service.abandon(job_id)
    job, text = await desk.texts.look(job_id)
    if job.state == "expired":
        raise await _lapsed(desk, endpoint, job, text, ticket)
    return _json(await _result(service, desk, endpoint, job, text, ticket))


async def _result(service: Service, desk: Desk, endpoint: EndpointConfig, job: Snapshot, text: str, ticket: str) -> dict[str, Any]:
    _, said = await service.aime_queue.said(job.job_id, endpoint.name) if job.by_text else ({}, {})
    return result_of(job, endpoint, text, ticket, await desk.workers.of(endpoint.name), said)


async def progress(service: Service, request: web.Request) -> web.StreamResponse:
    """The job as it stands, its whole text so far; once it ended its result, as often as it is asked for."""
    desk, endpoint = request.app[DESK], _endpoint(service, request)
    ticket = (request.query if request.method == "GET" else await _body(service, request)).get("job_id")
    if not ticket:
        raise Refused(402, ["No job_id given"])
    unknown = Refused(402, [f"Client has no active request with this job id {str(ticket)[:200]}"])
    job_id = desk.tickets.job_of(ticket) if isinstance(ticket, str) else None
    shard = shard_of(job_id) if job_id else None
    if job_id is None or shard is None or shard.endpoint != endpoint.name:
        raise unknown
    request[JOB_ID] = job_id
    try:
        job, text = await desk.texts.look(job_id)
        place = await service.queue.place(job_id) if job.state == "waiting" else None
    except JobNotFound as error:
        raise unknown from error
    if job.state == "expired":
        raise await _lapsed(desk, endpoint, job, text, ticket)
    head = {"success": True, "job_id": ticket, "ep_version": endpoint.version}
    if job.terminal:
        return _json({**head, "job_state": "done", "job_result": await _result(service, desk, endpoint, job, text, ticket)})
    workers = await desk.workers.of(endpoint.name)
    said, _ = await service.aime_queue.said(job.job_id, endpoint.name) if job.by_text else ({}, {})
    state = "queued" if job.state == "waiting" else "processing"
    return _json({**head, "job_state": state, "progress": progress_of(job, endpoint, text, place, len(workers), said)})


async def _lapsed(desk: Desk, endpoint: EndpointConfig, job: Snapshot, text: str, ticket: str) -> Refused:
    """No worker began it within its queue time."""
    last = progress_of(job, endpoint, text, None, len(await desk.workers.of(endpoint.name)))
    return Refused(400, f"Job {ticket} on {endpoint.name} lapsed!", job_state="lapsed", progress=last)


# ---------------------------------------------------------------------------------------------- keys


async def login(service: Service, request: web.Request) -> web.StreamResponse:
    """A session key for an API key, good at any replica for as long as the API key is. The query is read, also of a POST."""
    key = request.query.get("key", "")
    if await aime_keys.client(service, request, key) is None:
        return _json({"success": False, "error": KEY_NOT_VALID})
    session_key = request.app[DESK].tickets.session_key(key)
    return _json({"success": True, "ep_version": _endpoint(service, request).version, "client_session_auth_key": session_key})


async def validate_key(service: Service, request: web.Request) -> web.StreamResponse:
    is_valid = await aime_keys.client(service, request, request.query.get("key", "")) is not None
    return _json({"success": is_valid, "error": None if is_valid else KEY_NOT_VALID})


async def _client(service: Service, request: web.Request, endpoint: EndpointConfig, given: Mapping[str, Any]) -> Caller:
    """Who submits, by API key or by the session key of a login. Raises Refused."""
    key, session_key = (given.get(name) for name in CREDENTIALS)
    if key:
        caller = await aime_keys.client(service, request, key)
        if caller is None:
            raise Refused(401, [KEY_NOT_VALID])
    else:
        key = request.app[DESK].tickets.key_of(session_key) if isinstance(session_key, str) else None
        caller = await aime_keys.client(service, request, key)
        if caller is None:
            raise Refused(401, NOT_REGISTERED)
    if not caller.may_use(endpoint.name):
        raise Refused(402, [f"Client not authorized for endpoint {endpoint.name}!"])
    return caller


# ---------------------------------------------------------------------------------------------- endpoints


async def list_endpoints(service: Service, request: web.Request) -> web.StreamResponse:
    """All names, or with a key those that it may use."""
    key = request.query.get("key")
    if not key:
        return _json({"endpoints": list(service.endpoints)})
    caller = await aime_keys.client(service, request, key)
    if caller is None:
        return _json({"error": KEY_NOT_VALID}, 401)
    return _json({"endpoints": [name for name in service.endpoints if caller.may_use(name)]})


async def one_endpoint(service: Service, request: web.Request) -> web.StreamResponse:
    endpoint = _endpoint(service, request)
    depth = await service.queue.depth(endpoint.name)
    return _json(details_of(endpoint, depth, await request.app[DESK].workers.of(endpoint.name)))


# ---------------------------------------------------------------------------------------------- bodies


def across_origins(answer: PublicAnswer) -> PublicAnswer:
    """Any page may ask and read the answer; what is refused is refused in AIME's shape."""

    async def around(service: Service, request: web.Request) -> web.StreamResponse:
        response = _preflight() if request.method == "OPTIONS" else await _answered(service, request, answer)
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    return around


async def _answered(service: Service, request: web.Request, answer: PublicAnswer) -> web.StreamResponse:
    try:
        return await answer(service, request)
    except Refused as error:
        refused = error
    except ServiceError as error:
        refused = Refused(error.status, [error.message], error.retry_after_s)
    endpoint = service.endpoints.get(request.match_info.get("endpoint", ""))
    response = _json(refused.body(endpoint.version if endpoint else DEFAULT_EP_VERSION), refused.status)
    if refused.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, ceil(refused.retry_after_s)))
    return response


def _preflight() -> web.Response:
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": "Content-Type",
        "Access-Control-Max-Age": "600",
    }
    return web.Response(status=204, headers=headers)


async def _body(service: Service, request: web.Request) -> dict[str, Any]:
    if not request.can_read_body:
        raise RequestRefused("the parameters of a POST must be its body, a JSON object; this one has no body")
    limit_bytes, timeout_s = service.settings.body_limit_bytes, service.settings.body_timeout_s
    return (await read_model(request, Params, limit_bytes=limit_bytes, timeout_s=timeout_s)).root


def _endpoint(service: Service, request: web.Request) -> EndpointConfig:
    return service.endpoints[request.match_info["endpoint"]]  # the route takes known names only


def _json(body: object, status: int = 200) -> web.Response:
    return web.json_response(body=orjson.dumps(body), status=status)


ROUTES = tuple(
    CrossOriginRoute("GET, POST", path, across_origins(answer), OPERATIONS.get(path))
    for path, answer in (
        ("/api/validate_key", validate_key),
        ("/api/endpoints", list_endpoints),
        ("/api/endpoints/{endpoint}", one_endpoint),
        ("/api/{endpoint}", one_endpoint),
        ("/{endpoint}", submit),
        ("/{endpoint}/login", login),
        ("/{endpoint}/progress", progress),
    )
)
