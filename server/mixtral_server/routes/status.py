"""Whether the server lives, whether it should be sent work, and its numbers. Open to all: nothing here is secret."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from mixtral_client.protocol import Alive, Ready
from mixtral_server.errors import RedisUnavailable, RequestRefused, ServiceError, Unavailable
from mixtral_server.metrics import CONTENT_TYPE, MOST_WORKERS, QueueNumbers, WorkerNumbers
from mixtral_server.records import LiveWorker
from mixtral_server.routes.operation import Answer, Operation, Parameter
from mixtral_server.routes.service import PublicRoute, Service

log = logging.getLogger(__name__)


async def livez(service: Service, request: web.Request) -> web.StreamResponse:
    """The process answers."""
    return web.json_response(body=Alive().model_dump_json().encode())


async def readyz(service: Service, request: web.Request) -> web.StreamResponse:
    """200 while this replica takes work: Redis answers, and it is not stopping. ?workers=N also wants so many workers logged in."""
    if service.stages.leaving.is_set():
        raise Unavailable("this server is stopping; send requests to another one", retry_after_s=2)
    workers = sum(map(len, await _sessions(service)))
    wanted = request.query.get("workers", "0")
    if not (wanted.isdecimal() and len(wanted) < 6):
        raise RequestRefused(f"workers must be a whole number of 0 or more; got {wanted[:40]!r}", param="workers")
    if workers < int(wanted):
        raise Unavailable(f"{workers} workers are logged in and {wanted} were asked for; start one with torchrun worker", retry_after_s=2)
    return web.json_response(body=Ready(workers=workers).model_dump_json().encode())


async def _sessions(service: Service) -> list[list[LiveWorker]]:
    """Of each endpoint whose Redis answers (in a Cluster they have nodes of their own). Raises RedisUnavailable when none does."""
    answers = await asyncio.gather(*map(service.queue.sessions, service.endpoints), return_exceptions=True)
    for error in answers:
        if isinstance(error, BaseException) and not isinstance(error, RedisUnavailable):
            raise error
    found = [one for one in answers if not isinstance(one, BaseException)]
    if not found and answers and isinstance(answers[0], RedisUnavailable):
        raise answers[0]
    return found


async def metrics(service: Service, request: web.Request) -> web.StreamResponse:
    """Numbers of this replica, each of its processes by name, and of the queues as Redis holds them."""
    queues, workers = {}, []
    is_redis_up = True
    for endpoint in service.endpoints:
        try:
            depth = await service.queue.depth(endpoint)
            sessions = sorted(await service.queue.sessions(endpoint), key=lambda one: (one.opened, one.session))
        except ServiceError as error:
            is_redis_up = is_redis_up and not isinstance(error, RedisUnavailable)
            log.warning("event=depth_unread endpoint=%s code=%s", endpoint, error.code)
            continue
        queues[endpoint] = QueueNumbers(
            waiting=depth.waiting,
            waiting_tokens=depth.waiting_tokens,
            running=depth.running,
            workers=depth.sessions,
            users_waiting=depth.users_waiting,
            unsaved_usage=depth.unsaved_usage,
            dead_letters=depth.dead_letters,
            tokens=depth.tokens,
            ended=depth.ended,
            eta_errors_within=depth.eta_errors.within,
            eta_errors_sum_s=depth.eta_errors.sum_s,
            eta_late=depth.eta_errors.late,
        )
        workers += [WorkerNumbers(endpoint, one.name, one.telemetry) for one in sessions[:MOST_WORKERS]]
    service.metrics.redis_up.set(is_redis_up)
    processes = None
    if service.siblings is not None:
        processes = {service.siblings.index: service.metrics.numbers(), **await service.siblings.ask()}
    return web.Response(body=service.metrics.render(queues, workers, processes), headers={"Content-Type": CONTENT_TYPE})


ROUTES = (
    PublicRoute("GET", "/livez", livez, Operation("Status", "the process answers", {200: Answer("it does", Alive)})),
    PublicRoute(
        "GET",
        "/readyz",
        readyz,
        Operation(
            "Status",
            "200 while this server takes work, else 503",
            {200: Answer("it takes work", Ready)},
            parameters=(
                Parameter("workers", "query", "so many must be logged in too", {"type": "integer", "minimum": 0, "maximum": 99_999}),
            ),
            errors=(RequestRefused, Unavailable, RedisUnavailable),
        ),
    ),
    PublicRoute(
        "GET", "/metrics", metrics, Operation("Status", "numbers for Prometheus", {200: Answer("the numbers", media="text/plain")})
    ),
)
