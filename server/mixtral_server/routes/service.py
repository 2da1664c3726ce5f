"""What every route may use, and what a route is.

Decides how a job is put and given up, and what the stages of stopping are. Leaves wires to the files beside it, and starting and
stopping to app.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from aiohttp import web

from mixtral_server.aime_queue import AimeQueue
from mixtral_server.apikeys import Scope
from mixtral_server.auth import Auth, Caller
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import (
    JobNotFound,
    LimitReached,
    ModelNotFound,
    NotAllowed,
    RedisUnavailable,
    RequestRefused,
    Unavailable,
)
from mixtral_server.metrics import Metrics
from mixtral_server.offences import Offences
from mixtral_server.queue import JobQueue
from mixtral_server.rates import Allowance
from mixtral_server.records import JobContent, Put
from mixtral_server.relay import Relay
from mixtral_server.routes.aime_jobs import needs_native
from mixtral_server.routes.operation import Operation
from mixtral_server.settings import Settings
from mixtral_server.siblings import Siblings

log = logging.getLogger(__name__)

MAX_IDEMPOTENCY_KEY = 255

REQUEST_ID = web.RequestKey("request_id", str)
JOB_ID = web.RequestKey("job_id", str)  # for the access log
ALLOWANCES: web.RequestKey[tuple[Allowance, ...]] = web.RequestKey("allowances", tuple)  # what the caller's rates still hold
IS_PREPARED = web.RequestKey("is_prepared", bool)  # the answer's head is out


@dataclass(frozen=True)
class Stages:
    """Stopping, in order. leaving: /readyz says 503, all else goes on. draining: no new jobs, native streams end at an event, to be resumed
    elsewhere. closing: whatever is left ends now."""

    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Service:
    """The parts of one server. group owns what outlives a request."""

    settings: Settings
    endpoints: Mapping[str, EndpointConfig]
    queue: JobQueue
    aime_queue: AimeQueue
    relay: Relay
    offences: Offences
    auth: Auth
    metrics: Metrics
    group: asyncio.TaskGroup
    new_seed: Callable[[], int]
    now_s: Callable[[], float]
    stages: Stages = field(default_factory=Stages)
    siblings: Siblings | None = None
    requests: set[asyncio.Task[object]] = field(default_factory=set)
    """The handlers at work; the stores they use are closed after the last of them."""

    @property
    def chats(self) -> list[EndpointConfig]:
        """The endpoints that every wire serves; the others are AIME's alone."""
        return [one for one in self.endpoints.values() if one.is_chat]

    def endpoint(self, model: str, caller: Caller) -> EndpointConfig:
        """A chat by its name. Raises ModelNotFound for a name that is none, NotAllowed for one that the caller's key is not for."""
        endpoint = self.endpoints.get(model) or next((one for one in self.chats if model in one.aliases), None)
        if endpoint is None:
            names = ", ".join(sorted(one.name for one in self.chats if caller.may_use(one.name)))
            raise ModelNotFound(f"there is no model {model[:100]!r} here; this server has {names}", param="model")
        if not endpoint.is_chat:
            takes = ", ".join(endpoint.inputs)
            raise ModelNotFound(f"{model} is no chat: it takes {takes}, by AIME's routes (docs/aime.md)", param="model")
        if not caller.may_use(endpoint.name):
            raise NotAllowed(f"this key is for {', '.join(sorted(caller.endpoints))}; the request named {model}", param="model")
        return endpoint

    async def put(
        self,
        request: web.Request,
        caller: Caller,
        endpoint: EndpointConfig,
        specs: JobContent | Sequence[JobContent],
        body_hash: str,
        *,
        priority: int | None = None,
        queue_timeout_s: float | None = None,
        job_ids: Sequence[str] = (),
    ) -> Put:
        """Queue a job for the caller, or several: all or none. A caller that leaves while Redis is being asked leaves no job behind.

        priority: None takes the best that the caller may have. Raises what JobQueue.put raises, NotAllowed for a better one, Unavailable
        while the server is stopping.
        """
        self.refuse_while_draining()
        key = idempotency_key(request)
        best = caller.limits.priority
        if priority is not None and priority < best:
            raise NotAllowed(f"jobs of this key may have priority {best} to 9; got {priority}", param="priority")
        jobs = specs if isinstance(specs, Sequence) else [specs]
        running = endpoint.max_running if caller.limits.max_running is None else caller.limits.max_running
        ids = job_ids or [self.queue.new_id(endpoint.name) for _ in jobs]
        try:
            put = await self.queue.put(
                endpoint.name,
                caller.owner,
                *jobs,
                needs_native=any(needs_native(one, endpoint) for one in jobs),
                priority=best if priority is None else priority,
                weight=caller.weight,
                rates=self.auth.rates(request, caller, endpoint),
                key_id=caller.key_id or caller.owner,
                max_running=running or None,
                idempotency_key=key,
                body_hash=body_hash,
                queue_timeout_s=endpoint.queue_timeout_s if queue_timeout_s is None else queue_timeout_s,
                job_ids=ids,
            )
        except asyncio.CancelledError:
            if key is None:
                for job_id in ids:  # Redis may have it, or get it yet: what was written to it is not taken back
                    self.abandon(job_id)
            raise
        except LimitReached as error:
            request[ALLOWANCES] = error.allowances
            raise
        request[JOB_ID] = put.job_id
        request[ALLOWANCES] = put.allowances
        if put.created:
            self.metrics.jobs_put.labels(endpoint.name).inc(len(put.job_ids))
        return put

    def refuse_while_draining(self) -> None:
        if self.stages.draining.is_set():
            raise Unavailable("this server is stopping; ask again and another one answers, or this one when it is back", retry_after_s=2)

    def abandon(self, job_id: str, *, at_once: bool = False) -> None:
        """The client of an OpenAI call is gone, or its call has failed: cancel its job after the grace, at once when the server stops."""
        self.group.create_task(self._cancel_after(0.0 if at_once else self.settings.client_grace_s, job_id))

    async def _cancel_after(self, grace_s: float, job_id: str) -> None:
        await is_set_within(self.stages.draining, grace_s)
        while True:
            try:
                state = await self.queue.cancel(job_id)
            except JobNotFound:
                return  # it ended, and so long ago that its result is gone
            except RedisUnavailable:
                if await is_set_within(self.stages.closing, 1.0):
                    log.warning("job=%s event=not_cancelled why=redis_unavailable", job_id)
                    return
            else:
                if state == "cancelled":
                    self.metrics.jobs_abandoned.inc()
                    log.info("job=%s event=cancelled why=client_gone grace_s=%g", job_id, grace_s)
                return

    def stop_followers(self, *, resumable_only: bool) -> None:
        for follower in self.relay.followers:
            if follower.is_resumable or not resumable_only:
                follower.stop()


Answer: TypeAlias = Callable[[Service, web.Request, Caller], Awaitable[web.StreamResponse]]
PublicAnswer: TypeAlias = Callable[[Service, web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """One route for the holder of a key with this scope; a visitor's cookie has scope client. operation: its entry in openapi.json."""

    method: str
    path: str
    scope: Scope
    answer: Answer
    operation: Operation | None = None


@dataclass(frozen=True)
class PublicRoute:
    """One route that asks nobody who they are."""

    method: str
    path: str
    answer: PublicAnswer
    operation: Operation | None = None


async def is_set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set (True) or the time is over (False)."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def idempotency_key(request: web.Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
        raise RequestRefused(
            f"the Idempotency-Key header must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters; got {len(key)}",
            param="Idempotency-Key",
        )
    return key
