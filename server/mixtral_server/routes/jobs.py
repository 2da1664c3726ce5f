"""The native job routes: put, look, follow, cancel.

Decides who sees a job (its owner alone) and how a stream of events is resumed. Leaves the job to the queue and
what comes next to the relay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from aiohttp import web

from mixtral_client.protocol import JobAccepted, JobEvent, JobRequest, JobView, parse_event_id
from mixtral_server import sse
from mixtral_server.auth import Caller
from mixtral_server.cursor import Followed, Tokens
from mixtral_server.errors import JobNotFound, RedisUnavailable, RequestRefused
from mixtral_server.records import Place, Snapshot
from mixtral_server.routes.body import fingerprint, read_model
from mixtral_server.routes.operation import IDEMPOTENCY_KEY, PUT_ERRORS, Answer, Operation, Parameter
from mixtral_server.routes.service import Route, Service
from mixtral_server.routes.specs import job_spec
from mixtral_server.routes.stream import EventStream

RETRY_MS = 1000
NOTHING_AFTER = 2**31  # an offset that no log reaches: the record alone is read


async def put_job(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    """202 for a new job, 200 for the one that the Idempotency-Key named already."""
    wanted = await read_model(request, JobRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s)
    endpoint = service.endpoint(wanted.model, caller)
    spec = job_spec(wanted, endpoint, service.new_seed())
    put = await service.put(
        request,
        caller,
        endpoint,
        spec,
        fingerprint(request.path, wanted),
        priority=wanted.priority if "priority" in wanted.model_fields_set else None,
        queue_timeout_s=wanted.queue_timeout_s,
    )
    accepted = JobAccepted(id=put.job_id, model=endpoint.name, state=put.state, **told(put.place))
    return web.json_response(
        body=accepted.model_dump_json().encode(), status=202 if put.created else 200, headers={"Location": f"/v1/jobs/{put.job_id}"}
    )


async def get_job(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    job = await owned_job(service, request, caller)
    place = None if job.terminal else await service.queue.place(job.job_id)
    view = JobView(
        id=job.job_id,
        model=job.endpoint,
        state=job.state,
        created=job.created,
        attempt=job.attempt,
        tokens=job.n,
        text=job.text,
        finish=job.finish,
        error=job.error,
        usage=job.usage,
        timings=job.timings,
        **told(place),
    )
    return web.json_response(body=view.model_dump_json().encode())


async def follow_job(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Every event after the one that Last-Event-ID or ?after= names, then the terminal one."""
    after, crc = resume_point(request)
    job = await owned_job(service, request, caller, after=NOTHING_AFTER)
    service.refuse_while_draining()
    with service.relay.follow(job.job_id, after, crc) as follower:
        async with EventStream(service, request, "native") as stream:
            await stream.write(sse.retry(RETRY_MS))
            follower.sink = lambda tokens: stream.sending(sse.native_token_events(tokens.rows(), tokens.logprobs), len(tokens))
            while not follower.is_over:
                batch = await follower.batch(service.settings.ping_s)
                if not batch and follower.is_stopped:
                    break  # at an event's boundary and without a terminal event: the reader resumes at another server
                await stream.write(encoded(batch) or sse.PING, sum(len(one) for one in batch if isinstance(one, Tokens)))
    return stream.response


async def cancel_job(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    """The job as it stands afterwards; cancelling one that has ended changes nothing."""
    job = await owned_job(service, request, caller, after=NOTHING_AFTER)
    await service.queue.cancel(job.job_id)
    return await get_job(service, request, caller)


OF_A_JOB = (JobNotFound, RedisUnavailable)

ROUTES = (
    Route(
        "POST",
        "/v1/jobs",
        "client",
        put_job,
        Operation(
            "Jobs",
            "queue a chat or a text to continue; answers at once",
            {202: Answer("the job waits", JobAccepted), 200: Answer("the job that the Idempotency-Key named already", JobAccepted)},
            takes=JobRequest,
            parameters=(IDEMPOTENCY_KEY,),
            errors=(*PUT_ERRORS, RedisUnavailable),
            is_job_put=True,
        ),
    ),
    Route(
        "GET",
        "/v1/jobs/{id}",
        "client",
        get_job,
        Operation("Jobs", "the job as it stands: state, place, text so far", {200: Answer("the job", JobView)}, errors=OF_A_JOB),
    ),
    Route(
        "GET",
        "/v1/jobs/{id}/events",
        "client",
        follow_job,
        Operation(
            "Jobs",
            "its events from the start, or after one the reader has",
            {200: Answer("events, each with its name and, where one resumes after it, its id", events=get_args(JobEvent))},
            parameters=(
                Parameter("Last-Event-ID", "header", "the id of the last event that the reader has"),
                Parameter("after", "query", "the same, for who cannot send the header"),
            ),
            errors=(RequestRefused, *OF_A_JOB),
        ),
    ),
    Route(
        "DELETE",
        "/v1/jobs/{id}",
        "client",
        cancel_job,
        Operation("Jobs", "cancel it; text that is there stays", {200: Answer("the job afterwards", JobView)}, errors=OF_A_JOB),
    ),
)


def told(place: Place | None) -> dict[str, Any]:
    """The fields of a body that say where a waiting job stands."""
    return asdict(place) if place else {}


async def owned_job(service: Service, request: web.Request, caller: Caller, after: int = 0) -> Snapshot:
    """The job with its log after that offset.

    Raises JobNotFound for a job that is not, is no more, or is another's: the three look alike.
    """
    job_id = request.match_info["id"]
    not_found = JobNotFound(
        f"there is no job {job_id[:100]!r}; its result may have been kept for too short a time, or it is another user's"
    )
    try:
        job = await service.queue.read(job_id, after)
    except JobNotFound as error:
        raise not_found from error
    if job.owner != caller.owner:
        raise not_found
    return job


def resume_point(request: web.Request) -> tuple[int, int | None]:
    """(offset, crc or None) of the last event the reader has; (0, None) for a first reading."""
    given = request.headers.get("Last-Event-ID") or request.query.get("after") or ""
    if not given:
        return 0, None
    try:
        return parse_event_id(given)
    except ValueError as error:
        raise RequestRefused(str(error), param="Last-Event-ID" if "Last-Event-ID" in request.headers else "after") from error


def encoded(batch: Sequence[Followed]) -> bytes:
    return b"".join(
        sse.native_token_events(one.rows(), one.logprobs) if isinstance(one, Tokens) else sse.encode(one.event, one.id) for one in batch
    )
