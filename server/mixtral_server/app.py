"""The server: its parts put together, the table of routes, and an orderly end.

Decides the order of starting and stopping. Leaves what is answered to routes/, what stands around every answer to answers.py, connections
to door.py and the work beside the requests to upkeep.py.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler

from mixtral_server.accounts import Accounts
from mixtral_server.aime_queue import AimeQueue
from mixtral_server.answers import add_headers, answering, expect
from mixtral_server.apikeys import Scope
from mixtral_server.auth import Auth, KeyRing
from mixtral_server.database import Database, DatabaseError, first_line
from mixtral_server.door import connection_options, listen, open_door
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.entropy import random_int
from mixtral_server.history import History
from mixtral_server.metrics import Metrics
from mixtral_server.offences import Offences
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.redis_server import Durability, open_redis
from mixtral_server.relay import Relay
from mixtral_server.routes import aime, aime_workers, jobs, openai, openapi, pages, status, worker
from mixtral_server.routes.aime_tickets import Tickets
from mixtral_server.routes.aime_views import Texts, Workers
from mixtral_server.routes.service import PublicRoute, Route, Service, Stages, is_set_within
from mixtral_server.settings import Settings
from mixtral_server.siblings import Siblings
from mixtral_server.tasks import end
from mixtral_server.upkeep import upkeep_of

log = logging.getLogger(__name__)

ROUTES: tuple[Route | PublicRoute, ...] = (
    *openai.ROUTES,
    *jobs.ROUTES,
    *worker.ROUTES,
    *status.ROUTES,
    *pages.ROUTES,
    *openapi.ROUTES,
    *aime_workers.ROUTES,
    *aime.ROUTES,  # last: a name that another route has stays that route's
)

LAST_CUT_S = 3.0  # after the stage `closing`, handlers still running are cancelled


class StartError(Exception):
    """The server cannot start; the message is the one sentence that says why and what to do."""


@dataclass(frozen=True)
class Started:
    """What the operator is told once requests are taken."""

    host: str
    port: int
    first_keys: Mapping[Scope, str] | None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


async def serve(
    settings: Settings,
    endpoints: Mapping[str, EndpointConfig],
    stages: Stages,
    on_started: Callable[[Started], None],
    *,
    listening: socket.socket | None = None,
    siblings: Siblings | None = None,
) -> None:
    """Run a server until stages.leaving is set, then end it in order. Raises StartError, ServiceError, SchemaError.

    listening: where connections come from, when it is not to take the port itself; siblings: the other processes behind that port.
    """
    async with AsyncExitStack() as stack:
        listening = stack.enter_context(listening or take_port(settings.host, settings.port))
        make_data_dir(settings.data_path)
        try:
            database = Database(settings.sql_url)
            stack.push_async_callback(database.close)
            accounts, history = Accounts(database), History(database)
            ring = KeyRing(accounts.keys, settings, time.monotonic, DatabaseError)
            await database.make_ready()
            first_keys = await accounts.create_first_keys(time.time())
            cookie_secret = await accounts.shared_secret("visitor_cookie")
            aime_secret = await accounts.shared_secret("aime_tickets")
            await ring.refresh()
        except DatabaseError as error:
            raise StartError(f"the database cannot be used: {first_line(error)}; see --database_url and --data_dir") from error

        redis = await stack.enter_async_context(
            open_redis(settings.redis_url, settings.data_path, durability=cast(Durability, settings.durability))
        )
        queue = JobQueue(redis, {endpoint.name: limits_of(endpoint) for endpoint in endpoints.values()})
        await queue.start()
        relay = await stack.enter_async_context(Relay(redis, queue))

        group = await stack.enter_async_context(asyncio.TaskGroup())
        metrics = Metrics()
        service = Service(
            settings=settings,
            endpoints=endpoints,
            queue=queue,
            aime_queue=AimeQueue(redis, queue),
            relay=relay,
            offences=Offences(redis, endpoints.keys(), settings.worker_offences, metrics),
            auth=Auth(ring, cookie_secret, settings, time.time),
            metrics=metrics,
            group=group,
            new_seed=partial(random_int, 63),
            now_s=time.time,
            stages=stages,
            siblings=siblings,
        )
        if siblings is not None:
            await stack.enter_async_context(siblings.telling(service.metrics.numbers))
        upkeep = [group.create_task(work) for work in upkeep_of(service, history, ring)]
        try:
            await _answer_until_the_end(service, build_app(service, aime_secret), listening, first_keys, on_started)
        finally:
            for stage in (stages.leaving, stages.draining, stages.closing):
                stage.set()
            await end(upkeep)


async def _answer_until_the_end(
    service: Service,
    app: web.Application,
    listening: socket.socket,
    first_keys: Mapping[Scope, str] | None,
    on_started: Callable[[Started], None],
) -> None:
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_CUT_S, **connection_options(service.settings)
    )
    await runner.setup()
    assert runner.server is not None  # setup() made it
    try:
        listener = await open_door(service.settings, service.metrics, runner.server, listening)
        host, port = listening.getsockname()[:2]
        on_started(Started(host, port, first_keys))
        await service.stages.leaving.wait()
        await _wind_down(service)
        listener.close()
    finally:
        await runner.cleanup()
        await end(service.requests)  # they give back what they hold before the stores are closed


async def _wind_down(service: Service) -> None:
    """Readiness first, then what can go on elsewhere, then what must be finished here, within its grace; then the rest."""
    settings, stages = service.settings, service.stages
    log.info("event=leaving ready_delay_s=%g", settings.ready_delay_s)
    await is_set_within(stages.draining, settings.ready_delay_s)
    stages.draining.set()
    service.stop_followers(resumable_only=True)
    log.info("event=draining open=%d grace_s=%g", len(service.relay.followers), settings.shutdown_grace_s)
    until = time.monotonic() + settings.shutdown_grace_s
    while service.relay.followers and time.monotonic() < until:
        if await is_set_within(stages.closing, 0.05):
            break
    stages.closing.set()
    service.stop_followers(resumable_only=False)
    log.info("event=closing open=%d", len(service.relay.followers))


def limits_of(endpoint: EndpointConfig) -> QueueLimits:
    return QueueLimits(
        max_waiting=endpoint.max_waiting,
        max_waiting_per_user=endpoint.max_waiting_per_user,
        max_waiting_tokens=endpoint.max_waiting_tokens,
        max_waiting_tokens_per_user=endpoint.max_waiting_tokens_per_user,
        ageing_s=endpoint.ageing_s,
        batch_wait_ms=endpoint.batch_wait_ms,
        lease_s=endpoint.lease_s,
        report_interval_ms=endpoint.report_interval_ms,
        result_ttl_s=endpoint.keep_s,
        dead_ttl_s=endpoint.keep_dead_s,
        max_sessions_per_key=endpoint.sessions_per_key,
    )


def take_port(host: str, port: int, take: Callable[[str, int], socket.socket] = listen) -> socket.socket:
    """Before anything else is started. Raises StartError."""
    try:
        return take(host, port)
    except OSError as error:
        sentence = f"port {port} on {host} cannot be used: {error.strerror}; end what holds it, or give another --port or --host"
        raise StartError(sentence) from error


def make_data_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"data_dir {path} cannot be made: {error.strerror}; give another --data_dir") from error


def build_app(service: Service, aime_secret: bytes) -> web.Application:
    """Every route of ROUTES behind its check of who asks."""
    app = web.Application(middlewares=[answering(service)], client_max_size=2**62)  # bodies are read by routes/body.py alone
    app[openai.WORKERS] = Workers(service.queue, time.monotonic)
    app[aime_workers.LARGE_BODIES] = asyncio.Semaphore(aime_workers.MOST_LARGE_BODIES)
    app[aime.DESK] = aime.Desk(Tickets(aime_secret), Texts(service.queue), app[openai.WORKERS])
    openapi.describe(app, ROUTES, service.endpoints)
    names = "|".join(service.endpoints)
    for route in ROUTES:
        answer = _public(service, route) if isinstance(route, PublicRoute) else _guarded(service, route)
        resource = app.router.add_resource(route.path.replace("{endpoint}", f"{{endpoint:{names}}}"))
        for method in methods_of(route):
            resource.add_route(method, answer, expect_handler=partial(expect, service))
    app.on_response_prepare.append(add_headers)
    return app


def methods_of(route: Route | PublicRoute) -> list[str]:
    if isinstance(route, aime.CrossOriginRoute):
        return ["GET", "POST", "OPTIONS"]
    return [route.method, "HEAD"] if isinstance(route, PublicRoute) and route.method == "GET" else [route.method]


def _public(service: Service, route: PublicRoute) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await route.answer(service, request)

    return answer


def _guarded(service: Service, route: Route) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await route.answer(service, request, await service.auth.caller(request, route.scope))

    return answer
