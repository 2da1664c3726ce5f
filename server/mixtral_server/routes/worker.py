"""The worker wire: log in, turn, log out.

Decides which protocol numbers are taken and how long a turn waits for work. Leaves leases, fences and offsets to the queue.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from mixtral_client.protocol import PROTOCOL_VERSION, Released, SessionAnswer, SessionRequest, TurnAnswer, TurnRequest
from mixtral_server.auth import Caller
from mixtral_server.errors import ModelNotFound, RedisUnavailable, RequestRefused, SessionLapsed, TooManySessions
from mixtral_server.keys import shard_of
from mixtral_server.records import Turned
from mixtral_server.routes.body import read_body, read_model
from mixtral_server.routes.operation import Answer, Operation
from mixtral_server.routes.quick import QuickReader
from mixtral_server.routes.service import Route, Service

OLDEST_PROTOCOL = 2  # an older worker would ignore what a job asks for beyond temperature, top_p and top_k
TURN = QuickReader(TurnRequest)


async def open_session(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    wanted = await read_model(
        request, SessionRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s
    )
    if wanted.protocol < OLDEST_PROTOCOL:
        raise RequestRefused(
            f"this server speaks worker protocol {OLDEST_PROTOCOL} to {PROTOCOL_VERSION}; the worker speaks {wanted.protocol}: update it",
            param="protocol",
        )
    service.endpoint(wanted.endpoint, caller)
    answer = await service.queue.open_session(wanted, key_of(caller))
    return web.json_response(body=answer.model_dump_json().encode(), status=201)


async def turn(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Answers at once when there is anything to report or to tell; else waits for work, claiming anew now and then."""
    raw = await read_body(request, limit_bytes=service.settings.worker_body_limit_bytes, timeout_s=service.settings.body_timeout_s)
    try:
        wanted = TURN.read(raw)
    except RequestRefused:
        await service.offences.unreadable(raw, key_of(caller))
        raise
    shard = shard_of(wanted.session)
    if shard is None or shard.endpoint not in service.endpoints:
        raise SessionLapsed(f"there is no session {wanted.session[:100]!r}; log in anew")
    loop = asyncio.get_running_loop()
    until = loop.time() + service.settings.worker_poll_s
    while True:
        seen = service.relay.wakes(shard.endpoint)
        loop.call_soon(service.relay.expect, wanted.frames)  # that is, once the queue has asked Redis
        try:
            answer = await service.queue.turn(wanted, key_of(caller), service.relay.asker(shard.endpoint))
        except (asyncio.CancelledError, RedisUnavailable):  # what became of its frames is in the log
            service.relay.tell((frame.job, None) for frame in wanted.frames)
            raise
        service.relay.tell(answer.news)
        await service.offences.judge(wanted, answer, len(raw), key_of(caller))
        left_s = until - loop.time()
        if has_news(wanted, answer) or left_s <= 0 or service.stages.closing.is_set():
            return web.json_response(body=answer.body())
        await _work_or_closing(service, shard.endpoint, min(left_s, service.settings.worker_claim_s, answer.again_s or left_s), seen)
        await service.auth.caller(request, "worker")  # a key revoked while the turn waited gets no more jobs


def has_news(wanted: TurnRequest, answer: Turned) -> bool:
    """Whether worker or server has something to say, so that the turn must not wait."""
    return bool(wanted.frames or wanted.holding or answer.jobs or answer.drops or answer.expect or answer.drain)


async def close_session(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Every job held goes back to its place in the queue. Closing a session twice changes nothing."""
    released = await service.queue.close_session(request.match_info["session"], key_of(caller))
    return web.json_response(body=Released(released=released).model_dump_json().encode())


ROUTES = (
    Route(
        "POST",
        "/v1/worker/sessions",
        "worker",
        open_session,
        Operation(
            "Worker",
            "a worker logs in to one endpoint",
            {201: Answer("its session", SessionAnswer)},
            takes=SessionRequest,
            errors=(ModelNotFound, TooManySessions, RedisUnavailable),
        ),
    ),
    Route(
        "POST",
        "/v1/worker/turn",
        "worker",
        turn,
        Operation(
            "Worker",
            "report tokens, take jobs",
            {200: Answer("jobs, drops and the offsets that the log expects", TurnAnswer)},
            takes=TurnRequest,
            errors=(SessionLapsed, RedisUnavailable),
        ),
    ),
    Route(
        "DELETE",
        "/v1/worker/sessions/{session}",
        "worker",
        close_session,
        Operation(
            "Worker",
            "log out; jobs held go back to their place in the queue",
            {200: Answer("how many", Released)},
            errors=(RedisUnavailable,),
        ),
    ),
)


def key_of(caller: Caller) -> str:
    assert caller.key_id is not None  # a visitor has no scope worker
    return caller.key_id


async def _work_or_closing(service: Service, endpoint: str, timeout_s: float, seen: int) -> None:
    work = asyncio.create_task(service.relay.work(endpoint, timeout_s, seen))
    closing = asyncio.create_task(service.stages.closing.wait())
    try:
        await asyncio.wait((work, closing), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, closing):
            task.cancel()
        await asyncio.wait((work, closing))
    if not work.cancelled():
        work.result()
