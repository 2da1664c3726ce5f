"""OpenAI's wire: chat completions, completions, models.

Decides how a job's events become OpenAI's objects and chunks, how several answers make one call, how long a stream's head waits, and that
a call whose client leaves is given up. Leaves the jobs to service.py and the queue. A stream either ends with [DONE] or with an error
object, never otherwise.

Each answer of a call (n, or several prompts) is a job of its own. They are queued together or not at all; when one fails, the call fails
and the others are given up.

A call with an Idempotency-Key is not given up when its client leaves: the key says that the caller may come back, and a repeat
attaches to the same jobs from their first tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Literal, Protocol, TypeAlias, cast

import orjson
from aiohttp import web

from mixtral_client.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Completion,
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
from mixtral_server.errors import (
    ContextLengthExceeded,
    JobCancelled,
    JobExpired,
    JobFailed,
    ModelNotFound,
    RedisUnavailable,
    ServiceError,
    Unavailable,
)
from mixtral_server.follower import Follower
from mixtral_server.routes.aime_views import Workers
from mixtral_server.routes.body import fingerprint, read_model
from mixtral_server.routes.operation import IDEMPOTENCY_KEY, PUT_ERRORS, Answer, Operation
from mixtral_server.routes.service import Route, Service
from mixtral_server.routes.specs import chat_specs, completion_specs
from mixtral_server.routes.stream import EventStream
from mixtral_server.tasks import end

MOST_SERVED = 16
"""Names of models that a card shows."""


async def chat_completions(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    wanted = await read_model(
        request, ChatRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s
    )
    endpoint = service.endpoint(wanted.model, caller)
    return await _call(service, request, caller, endpoint, chat_specs(wanted, endpoint, service.new_seed), wanted, ChatForm)


async def completions(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    wanted = await read_model(
        request, CompletionRequest, limit_bytes=service.settings.body_limit_bytes, timeout_s=service.settings.body_timeout_s
    )
    endpoint = service.endpoint(wanted.model, caller)
    return await _call(service, request, caller, endpoint, completion_specs(wanted, endpoint, service.new_seed), wanted, CompletionForm)


async def list_models(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    cards = [await _card(request, endpoint) for endpoint in service.chats if caller.may_use(endpoint.name)]
    return web.json_response(body=ModelList(data=cards).model_dump_json().encode())


async def one_model(service: Service, request: web.Request, caller: Caller) -> web.StreamResponse:
    endpoint = service.endpoint(request.match_info["model"], caller)
    return web.json_response(body=(await _card(request, endpoint)).model_dump_json().encode())


WORKERS = web.AppKey("workers", Workers)


async def _card(request: web.Request, endpoint: EndpointConfig) -> ModelCard:
    card = ModelCard(
        id=endpoint.name,
        created=endpoint.created,
        title=endpoint.title,
        description=endpoint.description,
        default_max_tokens=endpoint.default_max_tokens,
        max_tokens=endpoint.max_tokens,
    )
    try:
        workers = await request.app[WORKERS].of(endpoint.name)
    except RedisUnavailable:
        return card  # what an endpoint is called is known without Redis
    lengths = [one.max_seq_len for one in workers if one.max_seq_len]  # an AIME worker does not say
    least, most = min(lengths, default=None), max(lengths, default=None)
    served = sorted({one.model for one in workers})[:MOST_SERVED]
    told = {"context_length": least, "largest_context_length": most, "max_model_len": least}
    return card.model_copy(update={"workers": len(workers), "served": served, **told})


# ---------------------------------------------------------------------------------------------- forms


OpenAIFinish: TypeAlias = Literal["stop", "length"]


class Form(Protocol):
    """How one answer looks on one of the two routes. call_id names the call: it is the id of the first answer's job."""

    def __init__(self, call_id: str, model: str, created: int, index: int) -> None: ...

    def opening(self) -> bytes:
        """What comes before the tokens of each of several answers, in their order: the openai package wants to see them so."""

    def tokens(self, rows: Sequence[TokenRow], *, is_first: bool) -> bytes: ...

    def tokens_and_logprobs(self, rows: Sequence[TokenRow], logprobs: Sequence[str]) -> bytes: ...

    def last(self, finish: OpenAIFinish, tokens: int) -> dict[str, Any]: ...

    def usage(self, usage: Usage) -> dict[str, Any]: ...

    def choice(self, texts: Sequence[str], finish: OpenAIFinish, logprobs: Sequence[str] | None) -> dict[str, Any]: ...

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes: ...


class ChatForm:
    def __init__(self, call_id: str, model: str, created: int, index: int) -> None:
        self._index = index
        self._is_open = False
        self._head = {"id": f"chatcmpl-{call_id}", "object": "chat.completion.chunk", "created": created, "model": model}

    def opening(self) -> bytes:
        self._is_open = True
        return sse.chunk(self._chunk({"role": "assistant", "content": ""}, None))

    def tokens(self, rows: Sequence[TokenRow], *, is_first: bool) -> bytes:
        if not is_first or self._is_open:
            return sse.token_events(self._pattern, rows)
        first, *others = rows
        opening = sse.token_pattern(self._chunk({"role": "assistant", "content": sse.HOLE}, None))
        return sse.token_events(opening, [first]) + sse.token_events(self._pattern, others)

    def tokens_and_logprobs(self, rows: Sequence[TokenRow], logprobs: Sequence[str]) -> bytes:
        out = []
        for (offset, crc, text), one in zip(rows, logprobs, strict=True):
            delta = {"role": "assistant", "content": text} if offset == 1 and not self._is_open else {"content": text}
            out.append(sse.chunk(self._chunk(delta, None, chat_logprobs([one])), event_id(offset, crc)))
        return b"".join(out)

    @cached_property
    def _pattern(self) -> bytes:
        return sse.token_pattern(self._chunk({"content": sse.HOLE}, None))

    def last(self, finish: OpenAIFinish, tokens: int) -> dict[str, Any]:
        return self._chunk({} if tokens or self._is_open else {"role": "assistant", "content": ""}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def choice(self, texts: Sequence[str], finish: OpenAIFinish, logprobs: Sequence[str] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(texts)}
        chances = None if logprobs is None else chat_logprobs(logprobs)
        return {"index": self._index, "message": message, "finish_reason": finish, "logprobs": chances}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
        return orjson.dumps({**self._head, "object": "chat.completion", "choices": choices, "usage": usage.model_dump()})

    def _chunk(self, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": self._index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}]}


class CompletionForm:
    def __init__(self, call_id: str, model: str, created: int, index: int) -> None:
        self._index = index
        self._head = {"id": f"cmpl-{call_id}", "object": "text_completion", "created": created, "model": model}
        self._chars = 0  # of the text so far; counted where logprobs are asked for

    def opening(self) -> bytes:
        return b""

    def tokens(self, rows: Sequence[TokenRow], *, is_first: bool) -> bytes:
        return sse.token_events(self._pattern, rows)

    def tokens_and_logprobs(self, rows: Sequence[TokenRow], logprobs: Sequence[str]) -> bytes:
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

    def choice(self, texts: Sequence[str], finish: OpenAIFinish, logprobs: Sequence[str] | None) -> dict[str, Any]:
        chances = None if logprobs is None else completion_logprobs(texts, logprobs)
        return {"index": self._index, "text": "".join(texts), "finish_reason": finish, "logprobs": chances}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
        return orjson.dumps({**self._head, "choices": choices, "usage": usage.model_dump()})

    def _chunk(self, text: str, finish: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": self._index, "text": text, "finish_reason": finish, "logprobs": logprobs}]}


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


@dataclass(eq=False)
class Choice:
    """One answer of a call: its job's follower, its form, and how it ended."""

    follower: Follower
    form: Form
    done: DoneEvent | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[str] = field(default_factory=list)  # one per text, where the job asked for them

    def taking(self, tokens: Tokens) -> Callable[[], bool]:
        return partial(self.take, tokens)

    def take(self, tokens: Tokens) -> bool:
        self.texts.extend(tokens.texts)
        self.logprobs.extend(tokens.logprobs or ())
        return True

    def rewind(self, to: int) -> None:
        del self.texts[to:], self.logprobs[to:]  # one text per offset

    def body(self) -> dict[str, Any]:
        assert self.done is not None
        chances = self.logprobs if self.logprobs and len(self.logprobs) == len(self.texts) else None
        return self.form.choice(self.texts, cast(OpenAIFinish, self.done.finish), chances)


News: TypeAlias = list[tuple[Choice, list[Followed]]]


class Call:
    """One call: its answers, read as one. `async with` it; answers_to_a_prompt: so many answers in a row share their prompt."""

    def __init__(self, choices: Sequence[Choice], answers_to_a_prompt: int, read_s: float) -> None:
        """read_s: how long a follower is asked at a time."""
        self.choices = choices
        self._per_prompt = answers_to_a_prompt
        self._read_s = read_s
        self._asked: dict[asyncio.Task[list[Followed]], Choice] = {}

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._asked)

    @property
    def is_over(self) -> bool:
        """The end of every answer was handed out."""
        return not self._asked and all(one.follower.is_over for one in self.choices)

    @property
    def is_stopped(self) -> bool:
        return any(one.follower.is_stopped for one in self.choices)

    async def batch(self, timeout_s: float) -> News:
        """What there is of one answer or of several; nothing when for so long nothing came, or the server is stopping."""
        if len(self.choices) == 1:
            events = await self.choices[0].follower.batch(timeout_s)
            return [(self.choices[0], events)] if events else []
        asked = self._asked.values()
        for one in self.choices:
            if not one.follower.is_over and one not in asked:
                self._asked[asyncio.create_task(one.follower.batch(self._read_s))] = one
        ready, _ = await asyncio.wait(self._asked, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        found = [(self._asked.pop(task), task.result()) for task in ready]
        return [(one, events) for one, events in found if events]

    def usage(self) -> Usage:
        """Of all answers, each prompt counted once."""
        usages = [one.done.usage for one in self.choices if one.done is not None]
        if len(usages) == 1:
            return usages[0]
        prompts = usages[:: self._per_prompt]
        prompt, completion = sum(one.prompt_tokens for one in prompts), sum(one.completion_tokens for one in usages)
        dropped = sum(one.dropped_messages for one in prompts)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion, dropped_messages=dropped)


async def _call(
    service: Service,
    request: web.Request,
    caller: Caller,
    endpoint: EndpointConfig,
    specs: Sequence[JobSpec],
    wanted: ChatRequest | CompletionRequest,
    form_of: type[Form],
) -> web.StreamResponse:
    body_hash = fingerprint(request.path, wanted) if "Idempotency-Key" in request.headers else ""
    ids = [service.queue.new_id(endpoint.name) for _ in specs]
    created = int(service.now_s())
    with ExitStack() as stack:
        followers = [stack.enter_context(service.relay.follow(job_id, is_resumable=False, asks_place=False, is_new=True)) for job_id in ids]
        put = await service.put(request, caller, endpoint, specs, body_hash, job_ids=ids)
        if list(put.job_ids) != ids:  # an Idempotency-Key named others already
            stack.close()
            followers = [stack.enter_context(service.relay.follow(job_id, is_resumable=False, asks_place=False)) for job_id in put.job_ids]
        forms = [form_of(put.job_id, endpoint.name, created, index) for index in range(len(followers))]
        choices = [Choice(follower, form) for follower, form in zip(followers, forms, strict=True)]
        try:
            async with Call(choices, wanted.n or 1, service.settings.ping_s) as call:
                if not wanted.stream:
                    return await _whole(service, call)
                wants_usage = wanted.stream_options is not None and bool(wanted.stream_options.include_usage)
                return await _Streaming(service, request, endpoint, call, wants_usage, specs[0].top_logprobs is not None).run()
        finally:
            if "Idempotency-Key" not in request.headers:
                has_failed = any(one.follower.is_over and one.done is None for one in choices)
                for one in choices:
                    if not one.follower.is_over:
                        service.abandon(one.follower.job_id, at_once=has_failed)


async def _whole(service: Service, call: Call) -> web.StreamResponse:
    """Wait for the end of every job, however long it takes. The first that fails fails the call."""
    for choice in call.choices:
        choice.follower.sink = choice.taking
    while not call.is_over:
        news = await call.batch(service.settings.ping_s)
        for choice, events in news:
            for one in events:
                if isinstance(one, Tokens):
                    choice.take(one)
                elif isinstance(one.event, RewindEvent):
                    choice.rewind(one.event.to)
                elif (failure := failure_of(one)) is not None:
                    raise failure
                elif isinstance(one.event, DoneEvent):
                    choice.done = one.event
        if not news and call.is_stopped:
            raise stopping()
    return web.Response(
        body=call.choices[0].form.whole([one.body() for one in call.choices], call.usage()), content_type="application/json"
    )


class _Streaming:
    """One streamed call: hold the head, then a chunk for every token, then the end."""

    def __init__(
        self, service: Service, request: web.Request, endpoint: EndpointConfig, call: Call, wants_usage: bool, wants_logprobs: bool
    ) -> None:
        self._service = service
        self._request = request
        self._endpoint = endpoint
        self._call = call
        self._wants_usage, self._wants_logprobs = wants_usage, wants_logprobs

    async def run(self) -> web.StreamResponse:
        first = await self._until_first_token()
        events = [one for _, of_choice in first for one in of_choice]
        failures = (failure_of(one) for one in events if isinstance(one, Notice))
        if (failure := next(filter(None, failures), None)) is not None and not any(isinstance(one, Tokens) for one in events):
            raise failure  # nothing was sent yet: it can be an HTTP status
        async with EventStream(self._service, self._request, "openai") as stream:
            try:
                if len(self._call.choices) > 1 and (openings := b"".join(one.form.opening() for one in self._call.choices)):
                    await stream.write(openings)
                await self._send(stream, first)
                if not self._endpoint.coalesce_ms and not self._wants_logprobs:
                    for one in self._call.choices:
                        one.follower.sink = self._sink(stream, one.form)
                while not self._call.is_over:
                    news = await self._gathered()
                    if not news and self._call.is_stopped:
                        raise stopping()
                    await (self._send(stream, news) if news else stream.write(sse.PING))
            except ServiceError as error:
                await stream.write(sse.chunk(error.body().model_dump()))
        return stream.response

    def _sink(self, stream: EventStream, form: Form) -> Callable[[Tokens], Callable[[], bool]]:
        return lambda tokens: stream.sending(form.tokens(tokens.rows(), is_first=tokens.offset == 1), len(tokens))

    async def _until_first_token(self) -> News:
        """What comes up to the first token or the end, or none after head_hold_s. Raises Unavailable when the server stops meanwhile."""
        clock = asyncio.get_running_loop().time
        began = clock()
        news: News = []
        while (left_s := began + self._service.settings.head_hold_s - clock()) > 0:
            batch = await self._call.batch(left_s)
            news += batch
            events = [one for _, of_choice in batch for one in of_choice]
            if any(isinstance(one, Tokens) for one in events):
                self._service.metrics.first_token_seconds.labels(self._endpoint.name).observe(clock() - began)
                return news
            if self._call.is_over or any(failure_of(one) for one in events if isinstance(one, Notice)):
                return news
            if not batch and self._call.is_stopped:
                raise stopping()
        return news

    async def _gathered(self) -> News:
        """What comes next; with coalesce_ms, also what comes within it."""
        news = await self._call.batch(self._service.settings.ping_s)
        if news and self._endpoint.coalesce_ms and not self._call.is_over:
            await asyncio.sleep(self._endpoint.coalesce_ms / 1000)
            news += await self._call.batch(0)
        return news

    async def _send(self, stream: EventStream, news: News) -> None:
        """Raises the failure that the news end in, once what came before it is sent."""
        out: list[bytes] = []
        tokens, failure = 0, None
        of_choice: dict[Choice, list[Followed]] = {}
        for choice, events in news:
            of_choice.setdefault(choice, []).extend(events)
        for choice, events in of_choice.items():
            chunks, count, failed = self._chunks(choice, events)
            out.append(chunks)
            tokens += count
            failure = failure or failed
        if failure is None and all(one.done for one in self._call.choices):
            if self._wants_usage:
                out.append(sse.chunk(self._call.choices[0].form.usage(self._call.usage())))
            out.append(sse.DONE)
        if sent := b"".join(out):
            await stream.write(sent, tokens)
        if failure is not None:
            raise failure

    def _chunks(self, choice: Choice, events: Sequence[Followed]) -> tuple[bytes, int, ServiceError | None]:
        """Bytes of what came of one answer, how many tokens that is, and the failure that it ends in."""
        last = b""
        rows: list[TokenRow] = []
        logprobs: list[str] = []
        failure = None
        for one in events:
            if isinstance(one, Tokens):
                rows += one.rows()
                logprobs += one.logprobs or ()
            elif (failure := failure_of(one)) is not None:
                break
            elif isinstance(one.event, DoneEvent):
                choice.done = one.event
                last = sse.chunk(choice.form.last(cast(OpenAIFinish, one.event.finish), one.event.usage.completion_tokens))
        if not rows:
            return last, 0, failure
        if logprobs and len(logprobs) == len(rows):  # each token in a chunk of its own, with its logprobs
            return choice.form.tokens_and_logprobs(rows, logprobs) + last, len(rows), failure
        shown = merged(rows) if self._endpoint.coalesce_ms else rows
        return choice.form.tokens(shown, is_first=rows[0][0] == 1) + last, len(rows), failure


def failure_of(notice: Notice) -> ServiceError | None:
    """The error that an event means for an OpenAI call: whatever is not a pause, or an end by stop or length."""
    event = notice.event
    if isinstance(event, ErrorEvent):
        return JobFailed(event.error)
    if isinstance(event, RewindEvent):
        return Unavailable(f"this answer begins anew after token {event.to}, and OpenAI's stream cannot take tokens back; ask again")
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


CALL_ERRORS = (*PUT_ERRORS, ContextLengthExceeded, JobCancelled, JobExpired, RedisUnavailable)

ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        "client",
        chat_completions,
        Operation(
            "OpenAI",
            "OpenAI's chat completion, whole or as a stream",
            {200: Answer("the answers, or a stream of chunks that ends with [DONE] or an error", ChatCompletion, (ChatCompletionChunk,))},
            takes=ChatRequest,
            parameters=(IDEMPOTENCY_KEY,),
            errors=CALL_ERRORS,
            is_job_put=True,
        ),
    ),
    Route(
        "POST",
        "/v1/completions",
        "client",
        completions,
        Operation(
            "OpenAI",
            "OpenAI's completion of texts or of token ids",
            {200: Answer("the answers, or a stream of chunks that ends with [DONE] or an error", Completion, (Completion,))},
            takes=CompletionRequest,
            parameters=(IDEMPOTENCY_KEY,),
            errors=CALL_ERRORS,
            is_job_put=True,
        ),
    ),
    Route(
        "GET",
        "/v1/models",
        "client",
        list_models,
        Operation("OpenAI", "the endpoints that the key may use, as OpenAI's models", {200: Answer("the models", ModelList)}),
    ),
    Route(
        "GET",
        "/v1/models/{model}",
        "client",
        one_model,
        Operation("OpenAI", "one of them", {200: Answer("the model", ModelCard)}, errors=(ModelNotFound,)),
    ),
)
