"""OpenAI's wire: chat completions, completions, models.

Decides how a job's events become OpenAI's objects and chunks, how long a stream's head waits, and that a call whose client
leaves is given up. Leaves the job to service.py and the queue. A stream either ends with [DONE] or with an error object, never otherwise.

A call with an Idempotency-Key is not given up when its client leaves: the key says that the caller may come back, and a repeat
attaches to the same job from its first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

from aiohttp import web

from mixtral_client.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    DoneEvent,
    ErrorDetail,
    ErrorEvent,
    JobSpec,
    ModelCard,
    ModelList,
    RewindEvent,
    TokenEvent,
    Usage,
)
from mixtral_server import sse
from mixtral_server.auth import Caller
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import JobCancelled, JobExpired, JobFailed, ServiceError, Unavailable
from mixtral_server.relay import Followed
from mixtral_server.routes.body import fingerprint, read_model
from mixtral_server.routes.following import Following
from mixtral_server.routes.service import Route, Service
from mixtral_server.routes.specs import chat_spec, completion_spec
from mixtral_server.routes.stream import EventStream


async def chat_completions(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    wanted = await read_model(
        request, ChatRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s
    )
    endpoint = service.endpoint(wanted.model, caller)
    spec = chat_spec(wanted, endpoint, service.new_seed())
    return await _call(service, request, caller, endpoint, spec, wanted, ChatForm)


async def completions(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    wanted = await read_model(
        request, CompletionRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s
    )
    endpoint = service.endpoint(wanted.model, caller)
    spec = completion_spec(wanted, endpoint, service.new_seed())
    return await _call(service, request, caller, endpoint, spec, wanted, CompletionForm)


async def list_models(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    cards = [_card(endpoint) for endpoint in service.endpoints.values() if caller.may_use(endpoint.name)]
    return web.json_response(body=ModelList(data=cards).model_dump_json().encode())


async def one_model(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    endpoint = service.endpoint(request.match_info["model"], caller)
    return web.json_response(body=_card(endpoint).model_dump_json().encode())


def _card(endpoint: EndpointConfig) -> ModelCard:
    return ModelCard(id=endpoint.name, created=endpoint.created)


# ---------------------------------------------------------------------------------------------- forms


OpenAIFinish: TypeAlias = Literal["stop", "length"]


class Form(Protocol):
    """How one job looks on one of the two routes. Chunks are plain dicts: one is built for every token."""

    def __init__(self, job_id: str, model: str, created: int) -> None: ...

    def token(self, text: str) -> dict[str, Any]: ...

    def last(self, finish: OpenAIFinish) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]: ...

    def whole(self, text: str, finish: OpenAIFinish, usage: Usage) -> bytes: ...


class ChatForm:
    def __init__(self, job_id: str, model: str, created: int) -> None:
        self._head = {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": created, "model": model}
        self._is_first = True

    def token(self, text: str) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if self._is_first else {"content": text}
        self._is_first = False
        return self._chunk(delta, None)

    def last(self, finish: OpenAIFinish) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""} if self._is_first else {}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def whole(self, text: str, finish: OpenAIFinish, usage: Usage) -> bytes:
        choice = ChatChoice(message=ChatMessage(role="assistant", content=text), finish_reason=finish)
        head = self._head | {"object": "chat.completion"}
        return ChatCompletion(**head, choices=[choice], usage=usage).model_dump_json().encode()

    def _chunk(self, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}


class CompletionForm:
    def __init__(self, job_id: str, model: str, created: int) -> None:
        self._head = {"id": f"cmpl-{job_id}", "object": "text_completion", "created": created, "model": model}

    def token(self, text: str) -> dict[str, Any]:
        return self._chunk(text, None)

    def last(self, finish: OpenAIFinish) -> dict[str, Any]:
        return self._chunk("", finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def whole(self, text: str, finish: OpenAIFinish, usage: Usage) -> bytes:
        choice = CompletionChoice(text=text, finish_reason=finish)
        return Completion(**self._head, choices=[choice], usage=usage).model_dump_json().encode()

    def _chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]}


# ---------------------------------------------------------------------------------------------- calls


async def _call(
    service: Service,
    request: web.Request,
    caller: Caller,
    endpoint: EndpointConfig,
    spec: JobSpec,
    wanted: ChatRequest | CompletionRequest,
    form_of: type[Form],
) -> web.StreamResponse:
    put = await service.put(request, caller, endpoint, spec, fingerprint(request.path, wanted))
    form = form_of(put.job_id, endpoint.name, int(service.now_s()))
    following = service.follow(put.job_id, is_resumable=False)
    try:
        async with following:
            if not wanted.stream:
                return await _whole(service, following, form)
            wants_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return await _Streaming(service, request, endpoint, following, form, wants_usage).run()
    finally:
        if not following.is_over and "Idempotency-Key" not in request.headers:
            service.abandon(put.job_id)


async def _whole(service: Service, following: Following, form: Form) -> web.StreamResponse:
    """Wait for the end of the job, however long it takes."""
    texts: list[str] = []
    while True:
        for followed in await following.batch(service.settings.ping_s):
            event = followed.event
            if isinstance(event, TokenEvent):
                texts.append(event.text)
            elif isinstance(event, RewindEvent):
                del texts[event.to :]  # one text per offset
            elif (failure := failure_of(followed)) is not None:
                raise failure
            elif isinstance(event, DoneEvent):
                return web.json_response(body=form.whole("".join(texts), cast(OpenAIFinish, event.finish), event.usage))
        if following.is_stopped:
            raise stopping()


class _Streaming:
    """One streamed call: hold the head, then a chunk for every token, then the end."""

    def __init__(
        self, service: Service, request: web.Request, endpoint: EndpointConfig, following: Following, form: Form, wants_usage: bool
    ) -> None:
        self._service = service
        self._request = request
        self._endpoint = endpoint
        self._following = following
        self._form = form
        self._wants_usage = wants_usage

    async def run(self) -> web.StreamResponse:
        first = await self._until_first_token()
        failures = (failure_of(one) for one in first)
        if (failure := next(filter(None, failures), None)) is not None and not any(isinstance(one.event, TokenEvent) for one in first):
            raise failure  # nothing was sent yet: it can be an HTTP status
        async with EventStream(self._service, self._request, "openai") as stream:
            try:
                await self._send(stream, first)
                while not self._following.is_over:
                    batch = await self._gathered()
                    if not batch and self._following.is_stopped:
                        raise stopping()
                    await (self._send(stream, batch) if batch else stream.write(sse.PING))
            except ServiceError as error:
                await stream.write(sse.chunk(error.body().model_dump()))
        return stream.response

    async def _until_first_token(self) -> list[Followed]:
        """Events up to the first token or the end, or none after head_hold_s. Raises Unavailable when the server stops meanwhile."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while (left_s := began + self._service.settings.head_hold_s - clock()) > 0:
            batch = await self._following.batch(left_s)
            if any(isinstance(one.event, TokenEvent) for one in batch):
                self._service.metrics.first_token_seconds.labels(self._endpoint.name).observe(clock() - began)
                return batch
            if self._following.is_over:
                return batch
            if self._following.is_stopped:
                raise stopping()
        return []

    async def _gathered(self) -> list[Followed]:
        """The next events; with coalesce_ms, also those that come within it."""
        batch = await self._following.batch(self._service.settings.ping_s)
        if batch and self._endpoint.coalesce_ms and not self._following.is_over:
            await asyncio.sleep(self._endpoint.coalesce_ms / 1000)
            batch += await self._following.batch(0)
        return merged(batch) if self._endpoint.coalesce_ms else batch

    async def _send(self, stream: EventStream, batch: Sequence[Followed]) -> None:
        """Raises the failure that the batch ends in, once what came before it is sent."""
        out: list[bytes] = []
        tokens = 0
        failure = None
        for followed in batch:
            event = followed.event
            if isinstance(event, TokenEvent):
                tokens += len(followed.ids)
                out.append(sse.chunk(self._form.token(event.text), followed.id))
            elif (failure := failure_of(followed)) is not None:
                break
            elif isinstance(event, DoneEvent):
                out.append(sse.chunk(self._form.last(cast(OpenAIFinish, event.finish))))
                if self._wants_usage:
                    out.append(sse.chunk(self._form.usage(event.usage)))
                out.append(sse.DONE)
        if out:
            await stream.write(b"".join(out), tokens)
        if failure is not None:
            raise failure


def failure_of(followed: Followed) -> ServiceError | None:
    """The error that an event means for an OpenAI call: whatever is not a token, a pause, or an end by stop or length."""
    event = followed.event
    if isinstance(event, ErrorEvent):
        return JobFailed(event.error)
    if isinstance(event, RewindEvent):
        return Unavailable(f"the queue lost this answer after token {event.to}, and OpenAI's stream cannot take tokens back; ask again")
    if isinstance(event, DoneEvent) and event.finish == "cancelled":
        return JobCancelled("the job was cancelled before its answer was whole")
    if isinstance(event, DoneEvent) and event.finish == "expired":
        return JobExpired("no worker began this job within its queue time; see that a worker runs, then ask again", retry_after_s=10)
    if isinstance(event, DoneEvent) and event.finish == "error":
        return JobFailed(ErrorDetail(message="the job failed", type="server_error", code="internal_error"))
    return None


def stopping() -> Unavailable:
    return Unavailable("this server is stopping before the answer is whole; ask again and another one answers", retry_after_s=2)


def merged(batch: Sequence[Followed]) -> list[Followed]:
    """Neighbouring tokens as one, with the id of the last."""
    out: list[Followed] = []
    for one in batch:
        before = out[-1] if out else None
        if before is not None and isinstance(one.event, TokenEvent) and isinstance(before.event, TokenEvent):
            event = TokenEvent(offset=one.event.offset, text=before.event.text + one.event.text)
            out[-1] = Followed(event, one.id, (*before.ids, *one.ids))
        else:
            out.append(one)
    return out


ROUTES = (
    Route("POST", "/v1/chat/completions", "client", chat_completions),
    Route("POST", "/v1/completions", "client", completions),
    Route("GET", "/v1/models", "client", list_models),
    Route("GET", "/v1/models/{model}", "client", one_model),
)
