"""What stands around every route: the request's id, errors turned into answers, security headers, the access log.

Decides how any error looks over HTTP and what is noted of a request. Leaves the errors' words to whoever raises them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from math import ceil
from typing import cast

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from mixtral_server.entropy import token_hex
from mixtral_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    MethodNotAllowed,
    NotAuthenticated,
    RequestRefused,
    RouteNotFound,
    ServiceError,
)
from mixtral_server.metrics import Metrics
from mixtral_server.routes.body import IGNORED_FIELDS, shown_fields, too_large
from mixtral_server.routes.service import ALLOWANCES, IS_PREPARED, JOB_ID, REQUEST_ID, Service

log = logging.getLogger(__name__)
access_log = logging.getLogger("mixtral_server.access")

FREQUENT = (
    *("/v1/worker/turn", "/worker_job_request", "/worker_job_progress", "/worker_check_server_status"),
    *("/livez", "/readyz", "/metrics"),
)
"""Routes that programs ask many times a minute: logged only when something is wrong."""

HEADERS = {
    "Server": "mixtral-server",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def answering(service: Service) -> Middleware:
    """Every error becomes an answer, every request is counted and logged."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = request_id_of(request)
        began = time.monotonic()
        status = 499  # the client left before there was an answer
        task = cast("asyncio.Task[object]", asyncio.current_task())
        service.requests.add(task)
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
            service.requests.discard(task)
            _note(service.metrics, request, status, time.monotonic() - began)

    return around


def _answer_to(request: web.Request, error: Exception) -> web.StreamResponse:
    known = as_service_error(request, error)
    if known.status >= 500 and not isinstance(error, ServiceError):
        path = word(request.path)
        log.error("event=internal_error request=%s method=%s path=%s", request[REQUEST_ID], request.method, path, exc_info=error)
    if request.get(IS_PREPARED):
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
        return MethodNotAllowed(f"{request.path[:100]} takes {allowed}; got {request.method[:20]}", allowed)
    if isinstance(error, web.HTTPException) and error.status < 500:
        return RequestRefused(f"the request cannot be read: {error.reason}")
    return ServiceError(f"the server failed at this request; its log has the trace under request id {request[REQUEST_ID]}")


def error_response(error: ServiceError) -> web.Response:
    response = web.json_response(body=error.body().model_dump_json().encode(), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = error.allowed
    if isinstance(error, NotAuthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        response.force_close()  # the rest of the body is not read
    return response


async def expect(service: Service, request: web.Request) -> web.Response | None:
    """Answer `Expect: 100-continue`: a body that is too large is refused before the client sends it."""
    limit_bytes = max(service.settings.body_limit_bytes, service.settings.worker_body_limit_bytes)
    if request.content_length is not None and request.content_length > limit_bytes:
        return error_response(too_large(limit_bytes, f"{request.content_length:,}"))
    if request.version >= HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    return None


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    request[IS_PREPARED] = True
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    if allowances := request.get(ALLOWANCES):
        response.headers.update(allowances[-1].headers())
    if ignored := request.get(IGNORED_FIELDS):
        response.headers["x-ignored-fields"] = shown_fields(ignored)
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def request_id_of(request: web.Request) -> str:
    """The caller's own id when it is a plain word, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if given and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else f"req-{token_hex(8)}"


def _note(metrics: Metrics, request: web.Request, status: int, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unmatched"
    method = request.method if request.method in ("GET", "HEAD", "POST", "DELETE") else "other"
    metrics.answered(method, route, status, seconds)
    level = logging.DEBUG if route in FREQUENT and status == 200 else logging.INFO
    if not access_log.isEnabledFor(level):
        return
    job = request.get(JOB_ID) or request.match_info.get("id")
    access_log.log(
        level,
        "%smethod=%s path=%s status=%d ms=%.0f request=%s address=%s",
        f"job={word(job)} " if job else "",
        method,
        word(request.path),
        status,
        seconds * 1000,
        request[REQUEST_ID],
        request.remote,
    )


def word(text: str) -> str:
    """Text of a caller's as one word of a log line: what could end the line or the word is escaped."""
    short = text[:120]
    return short if short.isascii() and short.isprintable() and not set(short) & set(' "=') else orjson.dumps(short, default=repr).decode()
