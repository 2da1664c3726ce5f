"""OpenAI's wire: chat completions, completions, models.

Decides how a job's events become OpenAI's objects and chunks, how long a stream's head waits, and that a call whose client
leaves is given up. Leaves the job to service.py and the queue. A stream either ends with [DONE] or with an error object, never otherwise.

A call with an Idempotency-Key is not given up when its client leaves: the key says that the caller may come back, and a repeat
attaches to the same job from its first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Protocol, TypeAlias, cast

import orjson
from aiohttp import web

from mixtral_client.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    DoneEvent,
    ErrorDetail,
    ErrorEvent,
    JobSpec,
    ModelCard,
    ModelList,
    RewindEvent,
    Usage,
    event_id,
)
from mixtral_server import sse
from mixtral_server.auth import Caller
from mixtral_server.cursor import Followed, Notice, TokenRow, Tokens
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import JobCancelled, JobExpired, JobFailed, ServiceError, Unavailable
from mixtral_server.follower import Follower
from mixtral_server.routes.body import fingerprint, read_model
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
    """How one job looks on one of the two routes."""

    def __init__(self, job_id: str, model: str, created: int) -> None: ...

    def tokens(self, rows: Iterable[TokenRow], *, is_first: bool) -> bytes: ...

    def tokens_and_logprobs(self, rows: Iterable[TokenRow], logprobs: Sequence[str]) -> bytes: ...

    def last(self, finish: OpenAIFinish, tokens: int) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]: ...

    def whole(self, texts: Sequence[str], finish: OpenAIFinish, usage: Usage, logprobs: Sequence[str] | None) -> bytes: ...


class ChatForm:
    def __init__(self, job_id: str, model: str, created: int) -> None:
        self._head = {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": created, "model": model}

    def tokens(self, rows: Iterable[TokenRow], *, is_first: bool) -> bytes:
        if not is_first:
            return sse.token_events(self._pattern, rows)
        first, *others = rows
        opening = sse.token_pattern(self._chunk({"role": "assistant", "content": sse.HOLE}, None))
        return sse.token_events(opening, [first]) + sse.token_events(self._pattern, others)

    def tokens_and_logprobs(self, rows: Iterable[TokenRow], logprobs: Sequence[str]) -> bytes:
        out = []
        for (offset, crc, text), one in zip(rows, logprobs, strict=True):
            delta = {"role": "assistant", "content": text} if offset == 1 else {"content": text}
            out.append(sse.chunk(self._chunk(delta, None, chat_logprobs([one])), event_id(offset, crc)))
        return b"".join(out)

    @cached_property
    def _pattern(self) -> bytes:
        return sse.token_pattern(self._chunk({"content": sse.HOLE}, None))

    def last(self, finish: OpenAIFinish, tokens: int) -> dict[str, Any]:
        return self._chunk({} if tokens else {"role": "assistant", "content": ""}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def whole(self, texts: Sequence[str], finish: OpenAIFinish, usage: Usage, logprobs: Sequence[str] | None) -> bytes:
        message = ChatMessage(role="assistant", content="".join(texts))
        chances = None if logprobs is None else ChatLogprobs.model_validate(chat_logprobs(logprobs))
        choice = ChatChoice(message=message, finish_reason=finish, logprobs=chances)
        head = self._head | {"object": "chat.completion"}
        return ChatCompletion(**head, choices=[choice], usage=usage).model_dump_json().encode()

    def _chunk(self, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}]}


class CompletionForm:
    def __init__(self, job_id: str, model: str, created: int) -> None:
        self._head = {"id": f"cmpl-{job_id}", "object": "text_completion", "created": created, "model": model}
        self._chars = 0  # of the text so far; counted where logprobs are asked for

    def tokens(self, rows: Iterable[TokenRow], *, is_first: bool) -> bytes:
        return sse.token_events(self._pattern, rows)

    def tokens_and_logprobs(self, rows: Iterable[TokenRow], logprobs: Sequence[str]) -> bytes:
        out = []
        for (offset, crc, text), one in zip(rows, logprobs, strict=True):
            chances = completion_logprobs([text], [one], self._chars)
            self._chars += len(text)
            out.append(sse.chunk(self._chunk(text, None, chances), event_id(offset, crc)))
        return b"".join(out)

    @cached_property
    def _pattern(self) -> bytes:
        return sse.token_pattern(self._chunk(sse.HOLE, None))

    def last(self, finish: OpenAIFinish, tokens: int) -> dict[str, Any]:
        return self._chunk("", finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def whole(self, texts: Sequence[str], finish: OpenAIFinish, usage: Usage, logprobs: Sequence[str] | None) -> bytes:
        chances = None if logprobs is None else CompletionLogprobs.model_validate(completion_logprobs(texts, logprobs))
        choice = CompletionChoice(text="".join(texts), finish_reason=finish, logprobs=chances)
        return Completion(**self._head, choices=[choice], usage=usage).model_dump_json().encode()

    def _chunk(self, text: str, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}]}


def chat_logprobs(logprobs: Sequence[str]) -> dict[str, Any]:
    """OpenAI's form of TokenLogprobs, each as JSON. Their bytes are null for a token without a text."""
    tokens = [orjson.loads(one) for one in logprobs]
    return {"content": [_chance(one) | {"top_logprobs": [_chance(top) for top in one["top"]]} for one in tokens], "refusal": None}


def _chance(one: dict[str, Any]) -> dict[str, Any]:
    return {"token": one["text"], "logprob": one["logprob"], "bytes": list(bytes.fromhex(one["bytes"])) or None}


def completion_logprobs(texts: Sequence[str], logprobs: Sequence[str], chars_before: int = 0) -> dict[str, Any]:
    """OpenAI's older form. Of alternatives that read alike, as bytes of one character do, the likeliest stays."""
    tokens = [orjson.loads(one) for one in logprobs]
    return {
        "tokens": [one["text"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [{top["text"]: top["logprob"] for top in reversed(one["top"])} for one in tokens],
        "text_offset": list(accumulate((len(text) for text in texts[:-1]), initial=chars_before))[: len(tokens)],
    }


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
    with service.relay.follow(put.job_id, is_resumable=False, asks_place=False) as follower:
        try:
            if not wanted.stream:
                return await _whole(service, follower, form)
            wants_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return await _Streaming(service, request, endpoint, follower, form, wants_usage, spec.top_logprobs is not None).run()
        finally:
            if not follower.is_over and "Idempotency-Key" not in request.headers:
                service.abandon(put.job_id)


async def _whole(service: Service, follower: Follower, form: Form) -> web.StreamResponse:
    """Wait for the end of the job, however long it takes."""
    texts: list[str] = []
    logprobs: list[str] = []  # one per text, where the job asked for them

    def take(tokens: Tokens) -> bool:
        texts.extend(tokens.texts)
        logprobs.extend(tokens.logprobs or ())
        return True

    follower.sink = take
    while True:
        for one in await follower.batch(service.settings.ping_s):
            if isinstance(one, Tokens):
                take(one)
            elif isinstance(one.event, RewindEvent):
                del texts[one.event.to :], logprobs[one.event.to :]  # one text per offset
            elif (failure := failure_of(one)) is not None:
                raise failure
            elif isinstance(one.event, DoneEvent):
                finish, chances = cast(OpenAIFinish, one.event.finish), logprobs if logprobs and len(logprobs) == len(texts) else None
                return web.json_response(body=form.whole(texts, finish, one.event.usage, chances))
        if follower.is_stopped:
            raise stopping()


class _Streaming:
    """One streamed call: hold the head, then a chunk for every token, then the end."""

    def __init__(
        self,
        service: Service,
        request: web.Request,
        endpoint: EndpointConfig,
        follower: Follower,
        form: Form,
        wants_usage: bool,
        wants_logprobs: bool,
    ) -> None:
        self._service = service
        self._request = request
        self._endpoint = endpoint
        self._follower = follower
        self._form = form
        self._wants_usage, self._wants_logprobs = wants_usage, wants_logprobs

    async def run(self) -> web.StreamResponse:
        first = await self._until_first_token()
        failures = (failure_of(one) for one in first if isinstance(one, Notice))
        if (failure := next(filter(None, failures), None)) is not None and not any(isinstance(one, Tokens) for one in first):
            raise failure  # nothing was sent yet: it can be an HTTP status
        async with EventStream(self._service, self._request, "openai") as stream:
            try:
                await self._send(stream, first)
                if not self._endpoint.coalesce_ms and not self._wants_logprobs:
                    self._follower.sink = lambda tokens: stream.write_now(
                        self._form.tokens(tokens.rows(), is_first=tokens.offset == 1), len(tokens)
                    )
                while not self._follower.is_over:
                    batch = await self._gathered()
                    if not batch and self._follower.is_stopped:
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
            batch = await self._follower.batch(left_s)
            if any(isinstance(one, Tokens) for one in batch):
                self._service.metrics.first_token_seconds.labels(self._endpoint.name).observe(clock() - began)
                return batch
            if self._follower.is_over:
                return batch
            if self._follower.is_stopped:
                raise stopping()
        return []

    async def _gathered(self) -> list[Followed]:
        """The next events; with coalesce_ms, also those that come within it."""
        batch = await self._follower.batch(self._service.settings.ping_s)
        if batch and self._endpoint.coalesce_ms and not self._follower.is_over:
            await asyncio.sleep(self._endpoint.coalesce_ms / 1000)
            batch += await self._follower.batch(0)
        return batch

    async def _send(self, stream: EventStream, batch: Sequence[Followed]) -> None:
        """Raises the failure that the batch ends in, once what came before it is sent."""
        out: list[bytes] = []
        rows: list[TokenRow] = []
        logprobs: list[str] = []
        tokens = 0
        failure = None
        for one in batch:
            if isinstance(one, Tokens):
                tokens += len(one)
                rows += one.rows()
                logprobs += one.logprobs or ()
            elif (failure := failure_of(one)) is not None:
                break
            elif isinstance(one.event, DoneEvent):
                out.append(sse.chunk(self._form.last(cast(OpenAIFinish, one.event.finish), one.event.usage.completion_tokens)))
                if self._wants_usage:
                    out.append(sse.chunk(self._form.usage(one.event.usage)))
                out.append(sse.DONE)
        if rows:
            if logprobs and len(logprobs) == len(rows):  # each token in a chunk of its own, with its logprobs
                out.insert(0, self._form.tokens_and_logprobs(rows, logprobs))
            else:
                shown = merged(rows) if self._endpoint.coalesce_ms else rows
                out.insert(0, self._form.tokens(shown, is_first=rows[0][0] == 1))
        if out:
            await stream.write(b"".join(out), tokens)
        if failure is not None:
            raise failure


def failure_of(notice: Notice) -> ServiceError | None:
    """The error that an event means for an OpenAI call: whatever is not a pause, or an end by stop or length."""
    event = notice.event
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


def merged(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """All in one, with the id of the last."""
    offset, crc, _ = rows[-1]
    return [(offset, crc, "".join(text for _, _, text in rows))]


ROUTES = (
    Route("POST", "/v1/chat/completions", "client", chat_completions),
    Route("POST", "/v1/completions", "client", completions),
    Route("GET", "/v1/models", "client", list_models),
    Route("GET", "/v1/models/{model}", "client", one_model),
)
