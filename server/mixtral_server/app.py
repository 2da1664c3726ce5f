"""The server: its parts put together, requests led to routes, errors turned into answers, and an orderly end.

Decides the order of starting and stopping, what stands around every route (request id, error body, security headers, access log),
how many connections are taken, and which work goes on beside the requests. Leaves what is answered to routes/.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, cast

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler

from mixtral_server.accounts import Accounts
from mixtral_server.apikeys import Scope
from mixtral_server.auth import Auth, KeyRing, network_of
from mixtral_server.database import Database, DatabaseError
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    MethodNotAllowed,
    NotAuthenticated,
    RequestRefused,
    RouteNotFound,
    ServiceError,
)
from mixtral_server.history import FinishedJob, History
from mixtral_server.limiter import Limiter
from mixtral_server.metrics import Metrics
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.redis_server import Durability, open_redis
from mixtral_server.relay import Relay
from mixtral_server.routes import jobs, openai, pages, status, worker
from mixtral_server.routes.body import too_large
from mixtral_server.routes.service import PublicRoute, Route, Service, Stages, is_set_within
from mixtral_server.settings import Settings

log = logging.getLogger(__name__)
access_log = logging.getLogger("mixtral_server.access")

ROUTES: tuple[Route | PublicRoute, ...] = (*openai.ROUTES, *jobs.ROUTES, *worker.ROUTES, *status.ROUTES, *pages.ROUTES)

LONGEST_STALL_S = 0.1
LAST_CUT_S = 3.0  # after the stage `closing`, handlers still running are cancelled
HEADERS = {
    "Server": "mixtral-server",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


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


async def serve(settings: Settings, endpoints: Mapping[str, EndpointConfig], stages: Stages, on_started: Callable[[Started], None]) -> None:
    """Run a server until stages.leaving is set, then end it in order. Raises StartError, ServiceError, SchemaError."""
    async with AsyncExitStack() as stack:
        listening = stack.enter_context(listen(settings.host, settings.port))
        make_data_dir(settings.data_path)
        database = Database(settings.sql_url)
        stack.push_async_callback(database.close)
        accounts, history = Accounts(database), History(database)
        await database.make_ready()
        first_keys = await accounts.create_first_keys(time.time())
        cookie_secret = await accounts.shared_secret("visitor_cookie")

        redis = await stack.enter_async_context(
            open_redis(settings.redis_url, settings.data_path, durability=cast(Durability, settings.durability))
        )
        queue = JobQueue(redis, {endpoint.name: limits_of(endpoint) for endpoint in endpoints.values()})
        await queue.start()
        relay = await stack.enter_async_context(Relay(redis, queue))
        ring = KeyRing(accounts.keys, settings, time.monotonic, DatabaseError)
        await ring.refresh()

        group = await stack.enter_async_context(asyncio.TaskGroup())
        service = Service(
            settings=settings,
            endpoints=endpoints,
            queue=queue,
            relay=relay,
            auth=Auth(ring, cookie_secret, Limiter(redis), settings, time.time),
            metrics=Metrics(),
            group=group,
            new_seed=lambda: secrets.randbits(63),
            now_s=time.time,
            stages=stages,
        )
        upkeep = [group.create_task(work) for work in upkeep_of(service, history, ring)]
        try:
            await _answer_until_the_end(service, listening, first_keys, on_started)
        finally:
            for stage in (stages.leaving, stages.draining, stages.closing):
                stage.set()
            for task in upkeep:
                task.cancel()


async def _answer_until_the_end(
    service: Service, listening: socket.socket, first_keys: Mapping[Scope, str] | None, on_started: Callable[[Started], None]
) -> None:
    runner = web.AppRunner(
        build_app(service), handler_cancellation=True, access_log=None, shutdown_timeout=LAST_CUT_S, **connection_options(service.settings)
    )
    await runner.setup()
    try:
        listener = await open_door(service, runner, listening)
        host, port = listening.getsockname()[:2]
        on_started(Started(host, port, first_keys))
        await service.stages.leaving.wait()
        await _wind_down(service)
        listener.close()
    finally:
        await runner.cleanup()


async def _wind_down(service: Service) -> None:
    """Readiness first, then what can go on elsewhere, then what must be finished here, within its grace; then the rest."""
    settings, stages = service.settings, service.stages
    log.info("event=leaving ready_delay_s=%g", settings.ready_delay_s)
    await is_set_within(stages.draining, settings.ready_delay_s)
    stages.draining.set()
    service.stop_followings(resumable_only=True)
    log.info("event=draining open=%d grace_s=%g", len(service.followings), settings.shutdown_grace_s)
    until = time.monotonic() + settings.shutdown_grace_s
    while service.followings and time.monotonic() < until:
        if await is_set_within(stages.closing, 0.05):
            break
    stages.closing.set()
    service.stop_followings(resumable_only=False)
    log.info("event=closing open=%d", len(service.followings))


def limits_of(endpoint: EndpointConfig) -> QueueLimits:
    return QueueLimits(
        max_waiting=endpoint.max_waiting,
        max_waiting_per_user=endpoint.max_waiting_per_user,
        lease_s=endpoint.lease_s,
        report_interval_ms=endpoint.report_interval_ms,
        result_ttl_s=endpoint.keep_s,
        max_sessions_per_key=endpoint.sessions_per_key,
    )


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else is started. Raises StartError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        is_dual = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_dual)
    except OSError as error:
        raise StartError(
            f"port {port} on {host} cannot be used: {error.strerror}; end what holds it, or give another --port or --host"
        ) from error


def make_data_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"data_dir {path} cannot be made: {error.strerror}; give another --data_dir") from error


# ---------------------------------------------------------------------------------------------- around every route


def build_app(service: Service) -> web.Application:
    """Every route of ROUTES behind its check of who asks, and around all of them what `_around` adds."""
    app = web.Application(middlewares=[_around(service)], client_max_size=2**62)  # bodies are read by routes/body.py alone
    for route in ROUTES:
        answer = _public(service, route) if isinstance(route, PublicRoute) else _guarded(service, route)
        add = partial(app.router.add_get, allow_head=True) if route.method == "GET" else partial(app.router.add_route, route.method)
        add(route.path, answer, expect_handler=partial(_expect, service))
    app.on_response_prepare.append(_add_headers)
    return app


def _public(service: Service, route: PublicRoute) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await route.answer(service, request)

    return answer


def _guarded(service: Service, route: Route) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await route.answer(service, request, await service.auth.caller(request, route.scope))

    return answer


def _around(service: Service) -> Middleware:
    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        request["id"] = request_id_of(request)
        began = time.monotonic()
        status = 499  # the client left before there was an answer
        try:
            try:
                response = await handler(request)
            except (asyncio.CancelledError, ConnectionError):
                raise
            except Exception as error:  # noqa: BLE001 - every error becomes an answer, unknown ones are logged with their trace
                response = _answer_to(request, error)
            if service.stages.draining.is_set() and not response.prepared:
                response.force_close()  # the next request goes to a server that stays
            status = response.status
            return response
        finally:
            _note(service.metrics, request, status, time.monotonic() - began)

    return around


def _answer_to(request: web.Request, error: Exception) -> web.StreamResponse:
    known = as_service_error(request, error)
    if known.status >= 500 and not isinstance(error, ServiceError):
        log.error("event=internal_error request=%s method=%s path=%s", request["id"], request.method, request.path, exc_info=error)
    if request.get("is_prepared"):
        # The head is out: a second one would be read as part of the body. Break off, which no reader takes for a clean end.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("answer broken off") from error
    return error_response(known)


def as_service_error(request: web.Request, error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, web.HTTPNotFound):
        return RouteNotFound(f"there is no {request.path[:100]} here; docs/api.md lists every route")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.path[:100]} takes {allowed}; got {request.method[:20]}")
    if isinstance(error, web.HTTPException) and error.status < 500:
        return RequestRefused(f"the request cannot be read: {error.reason}")
    return ServiceError(f"the server failed at this request; its log has the trace under request id {request['id']}")


def error_response(error: ServiceError) -> web.Response:
    response = web.json_response(body=error.body().model_dump_json().encode(), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, NotAuthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        response.force_close()  # the rest of the body is not read
    return response


async def _expect(service: Service, request: web.Request) -> web.Response | None:
    """Answer `Expect: 100-continue`: a body that is too large is refused before the client sends it."""
    limit_bytes = max(service.settings.body_limit_bytes, service.settings.worker_body_limit_bytes)
    if request.content_length is not None and request.content_length > limit_bytes:
        return error_response(too_large(limit_bytes, f"{request.content_length:,}"))
    if request.version >= HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    return None


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    request["is_prepared"] = True
    if "id" in request:
        response.headers["x-request-id"] = request["id"]
    for name, value in HEADERS.items():
        response.headers[name] = value
    response.headers.setdefault("Cache-Control", "no-store")


def request_id_of(request: web.Request) -> str:
    """The caller's own id when it is a plain word, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else f"req-{secrets.token_hex(8)}"


def _note(metrics: Metrics, request: web.Request, status: int, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unmatched"
    method = request.method if request.method in ("GET", "HEAD", "POST", "DELETE") else "other"
    metrics.requests.labels(method, route, str(status)).inc()
    metrics.request_seconds.labels(route).observe(seconds)
    job = request.get("job") or request.match_info.get("id")
    level = logging.DEBUG if route == "/v1/worker/turn" and status == 200 else logging.INFO
    access_log.log(
        level,
        "%smethod=%s path=%s status=%d ms=%.0f request=%s address=%s",
        f"job={_word(job)} " if job else "",
        method,
        _word(request.path),
        status,
        seconds * 1000,
        request["id"],
        request.remote,
    )


def _word(text: str) -> str:
    """Text of a caller's as one word of a log line: what could end the line or the word is escaped."""
    short = text[:120]
    return short if short.isascii() and short.isprintable() and not set(short) & set(' "=') else orjson.dumps(short, default=repr).decode()


# ---------------------------------------------------------------------------------------------- connections


def connection_options(settings: Settings) -> dict[str, Any]:
    return {"keepalive_timeout": settings.keepalive_s, "auto_decompress": False, "lingering_time": 2.0}


class Door:
    """Counts open connections, in all and by address."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._by_address: Counter[str] = Counter()
        self._total = 0

    def enter(self, address: str) -> bool:
        """Whether one more may come in."""
        if self._total >= self.settings.max_connections:
            self._metrics.connections_refused.labels("max_connections").inc()
            return False
        if self._by_address[address] >= self.settings.max_connections_per_address:
            self._metrics.connections_refused.labels("max_connections_per_address").inc()
            return False
        self._by_address[address] += 1
        self._total += 1
        self._metrics.connections.set(self._total)
        return True

    def leave(self, address: str) -> None:
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
        self._metrics.connections.set(self._total)


class Connection(RequestHandler):
    """aiohttp's connection behind a door, with a deadline for its first request's head."""

    def __init__(self, door: Door, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop=loop, access_log=cast(logging.Logger, None), **connection_options(door.settings))
        self._door = door
        self._address: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        address = network_of(peer[0]) if isinstance(peer, tuple) else "local"
        if not self._door.enter(address):
            cast(asyncio.Transport, transport).abort()
            return
        self._address = address
        super().connection_made(transport)
        self._timer = self._loop.call_later(self._door.settings.header_timeout_s, self._close_if_silent)

    def data_received(self, data: bytes) -> None:
        if self._address is not None:
            super().data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        if self._address is None:
            return
        self._door.leave(self._address)
        self._address = None
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(error)

    def _close_if_silent(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What cannot be read as HTTP is answered in the same shape as everything else."""
        if status >= 500:
            log.error("event=internal_error path=%s", request.path, exc_info=exc)
            error = ServiceError("the server failed at this request; its log has the trace")
        else:
            log.info("event=bad_http address=%s error=%s", request.remote, _word(str(exc)))
            error = RequestRefused("the request is not HTTP as this server reads it; check address, port and headers")
        if request.writer.output_size > 0:
            raise ConnectionResetError("answer broken off") from exc
        response = error_response(error)
        response.force_close()
        return response


async def open_door(service: Service, runner: web.AppRunner, listening: socket.socket) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    server = runner.server
    assert server is not None  # setup() was awaited
    door = Door(service.settings, service.metrics)
    return await loop.create_server(lambda: Connection(door, server, loop), sock=listening, backlog=1024)


# ---------------------------------------------------------------------------------------------- beside the requests


def upkeep_of(service: Service, history: History, ring: KeyRing) -> list[Coroutine[Any, Any, None]]:
    """The work that goes on as long as the server does."""
    days = service.settings.history_days

    async def forget() -> None:
        if days:
            await history.forget_before(service.now_s() - days * 86_400)

    return [
        ring.keep_fresh(),
        watch_loop(service.metrics),
        every(1.0, "reap", partial(reap, service), service.metrics),
        every(1.0, "save_history", partial(save_history, service, history), service.metrics),
        every(3600.0, "forget_history", forget, service.metrics),
    ]


async def every(period_s: float, name: str, work: Callable[[], Awaitable[None]], metrics: Metrics) -> None:
    """Do work again and again. A store that is away is said once when it goes and once when it is back."""
    is_away = False
    while True:
        try:
            await work()
        except (ServiceError, *DatabaseError) as error:
            metrics.upkeep_failures.labels(name).inc()
            if not is_away:
                log.warning("event=upkeep_failed task=%s error=%s", name, _word(str(error) or type(error).__name__))
            is_away = True
        else:
            if is_away:
                log.info("event=upkeep_back task=%s", name)
            is_away = False
        await asyncio.sleep(period_s)


async def reap(service: Service) -> None:
    for endpoint in service.endpoints:
        more = True
        while more:
            reaped = await service.queue.reap(endpoint)
            more = reaped.more
            if reaped.lapsed_sessions or reaped.dead or reaped.shifted_s:
                log.warning(
                    "event=reaped endpoint=%s lapsed_sessions=%d requeued=%d dead=%d expired=%d shifted_s=%.1f",
                    endpoint,
                    reaped.lapsed_sessions,
                    reaped.requeued,
                    reaped.dead,
                    reaped.expired,
                    reaped.shifted_s,
                )


async def save_history(service: Service, history: History) -> None:
    """Carry finished jobs from the queue's outbox to the database, and only then take them out of the outbox."""
    for endpoint in service.endpoints:
        while rows := await service.queue.usage_batch(endpoint):
            saved = await history.save(
                [
                    FinishedJob(
                        id=row.job_id,
                        endpoint=row.endpoint,
                        owner=row.owner,
                        state=row.state,
                        finish=row.finish,
                        error_code=row.error_code,
                        prompt_tokens=row.prompt_tokens,
                        completion_tokens=row.completion_tokens,
                        attempts=row.attempts,
                        created_s=row.created,
                        finished_s=row.ended,
                        queue_s=row.timings.queue_s,
                        first_token_s=row.timings.first_token_s,
                    )
                    for row in rows
                ]
            )
            await service.queue.usage_ack(endpoint, [row.entry_id for row in rows])
            service.metrics.ledger_saved.inc(saved)


async def watch_loop(metrics: Metrics) -> None:
    """Notice when the event loop stands still: every stream of this server stands still with it."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + 0.1
        await asyncio.sleep(0.1)
        late_s = max(0.0, clock() - due)
        metrics.loop_lag_seconds.set(late_s)
        if late_s > LONGEST_STALL_S:
            metrics.loop_blocked.inc()
            log.warning("event=loop_blocked ms=%.0f", late_s * 1000)
