"""MixtralClient: chats over the native job routes, so that a broken connection costs a pause and never a token.

Decides when to ask again, at which replica, and when a job is cancelled. Leaves shapes to protocol.py, bytes to sse.py, what is new
and how long to try to resume.py, which error an answer is to errors.py, and scripts that are not asynchronous to sync.py.

Every request may be repeated safely: reads by nature, a cancel because it is final, a submit by its Idempotency-Key. So each is
tried again after 429, 502, 503, 504 and lost connections, as long as Retry allows.

Leaving is not cancelling: a job runs on when a reader breaks off, fails or dies. It is cancelled by `cancel`, by the cancellation of the
task that reads it (which is how asyncio says that nobody wants the outcome any more), and by the caller's own Timeouts.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import logging
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import ValidationError

from mixtral_client.errors import (
    PASSING,
    BadAnswer,
    ConnectionLost,
    JobFailed,
    JobStopped,
    MixtralError,
    NotAuthenticated,
    RequestRefused,
    TimedOut,
    refusal,
)
from mixtral_client.protocol import (
    ChatMessage,
    DoneEvent,
    Finish,
    JobAccepted,
    JobEvent,
    JobRequest,
    JobView,
    ModelCard,
    ModelList,
    QueuedEvent,
    ResponseFormat,
    RewindEvent,
    Timings,
    TokenEvent,
    TokenLogprobs,
    Truncate,
    Usage,
    Wire,
)
from mixtral_client.resume import LogPosition, Patience, Retry, Timeouts
from mixtral_client.sse import SseDecoder

DEFAULT_MODEL = "mixtral_chat"
KEY_VARIABLE = "MIXTRAL_CLIENT_KEY"
MAX_ANSWER_BYTES = 64 << 20
GOODBYE_S = 5.0

log = logging.getLogger(__name__)

Messages = str | Sequence[ChatMessage | Mapping[str, Any]]
"""A chat; a bare string is one message of the user's."""

Prompt = str | Sequence[int]
"""A text to continue, or its token ids."""

Answered = TypeVar("Answered", bound=Wire)


class JobOptions(TypedDict, total=False):
    """What may be said about a job besides its text; one left out takes the endpoint's default. Ranges: docs/api.md, Sampling."""

    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    response_format: ResponseFormat | Mapping[str, Any]
    logprobs: bool
    top_logprobs: int
    truncate: Truncate
    priority: int
    queue_timeout_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    job_id: str
    text: str
    finish: Literal["stop", "length"]
    usage: Usage
    timings: Timings | None
    logprobs: list[TokenLogprobs]
    """One for each token, if the job asked for them."""


@dataclass
class _Shared:
    """What a client has in common with those that with_options made of it."""

    at: int = 0  # which server is asked next
    http: aiohttp.ClientSession | None = None
    goodbyes: set[asyncio.Task[None]] = field(default_factory=set)


class MixtralClient:
    """A service, at one address or at several replicas. Use as `async with`; may run any number of chats at once, on one event loop."""

    def __init__(
        self,
        api_server: str | Sequence[str],
        api_key: str | None = None,
        *,
        retry: Retry | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        servers = [api_server] if isinstance(api_server, str) else list(api_server)
        self._servers = [_base_url(server) for server in servers]
        if not self._servers:
            raise ValueError("api_server must name at least one server, such as http://127.0.0.1:7777; got an empty list")
        self._key = (api_key or os.environ.get(KEY_VARIABLE, "")).strip()
        if not self._key:
            raise NotAuthenticated(f"no key was given; pass api_key or set {KEY_VARIABLE}", code="no_api_key")
        self.retry = retry or Retry()
        self.timeouts = timeouts or Timeouts()
        self._shared = _Shared()

    def with_options(self, *, retry: Retry | None = None, timeouts: Timeouts | None = None) -> Self:
        """This client with other patience, for one call or many. It has the same connections: close the first one alone."""
        other = copy.copy(self)
        other.retry = retry or self.retry
        other.timeouts = timeouts or self.timeouts
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections, once the cancels under way are answered, or a few seconds later. Jobs run on."""
        await asyncio.gather(*self._shared.goodbyes)
        if self._shared.http is not None:
            await self._shared.http.close()

    # ------------------------------------------------------------------------------------------ whole answers

    async def chat(self, messages: Messages, **options: Unpack[JobOptions]) -> Answer:
        """The whole answer to a chat. Raises JobStopped if somebody cancels the job, JobFailed if it fails."""
        return await self.stream(messages, **options).answer()

    async def complete(self, prompt: Prompt, **options: Unpack[JobOptions]) -> Answer:
        """The whole continuation of a text, without a chat's form. Raises as chat does."""
        return await self.stream(prompt=prompt, **options).answer()

    # ------------------------------------------------------------------------------------------ streams and jobs

    def stream(
        self,
        messages: Messages | None = None,
        *,
        prompt: Prompt | None = None,
        detach: bool = False,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> JobStream:
        """Queue a chat (or a text to continue) and read its events as they come. Leaving the loop leaves the job running, for `events`
        or `job` to fetch; cancelling the task that reads cancels the job too, unless detach."""
        order = _Order(_job_request(messages, prompt, options), idempotency_key or _new_key())
        return JobStream(self, LogPosition(""), order, detach=detach)

    def events(self, job_id: str, after: str | int = "") -> JobStream:
        """The events of a job after the one named by `after` (JobStream.last_id, or an offset). Never cancels it by itself."""
        return JobStream(self, LogPosition(job_id, after), None, detach=True)

    async def submit(
        self,
        messages: Messages | None = None,
        *,
        prompt: Prompt | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> JobAccepted:
        """Queue a job and come back at once. Repeats with one idempotency_key make one job, also from another process."""
        return await self._submit(_job_request(messages, prompt, options), idempotency_key or _new_key())

    async def job(self, job_id: str) -> JobView:
        """A job as it stands: state, place in the queue, text so far. Raises NotFound."""
        return _parse(JobView, await self._ask("GET", _job_path(job_id)))

    async def cancel(self, job_id: str) -> JobView:
        """Stop a job, waiting or running; a finished one stays as it is. Gives it as it stands afterwards. Raises NotFound."""
        return _parse(JobView, await self._ask("DELETE", _job_path(job_id)))

    async def models(self) -> list[ModelCard]:
        """What this service serves."""
        return _parse(ModelList, await self._ask("GET", "/v1/models")).data

    async def _submit(self, request: JobRequest, key: str) -> JobAccepted:
        body = request.model_dump_json(exclude_unset=True, exclude_none=True).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return _parse(JobAccepted, await self._ask("POST", "/v1/jobs", body=body, headers=headers))

    # ------------------------------------------------------------------------------------------ following a job

    async def _order_and_follow(self, position: LogPosition, order: _Order, *, detach: bool) -> AsyncGenerator[JobEvent]:
        submitting = asyncio.create_task(self._submit(order.request, order.key))
        try:
            position.job_id = (await asyncio.shield(submitting)).id
        except asyncio.CancelledError:
            # The request is on its way and may make a job yet: wait for its id, or that job would run for nobody.
            self._keep(self._goodbye(submitting, cancels=not detach))
            raise
        async with contextlib.aclosing(self._follow(position)) as events:
            async for event in events:
                yield event

    async def _follow(self, position: LogPosition) -> AsyncGenerator[JobEvent]:
        patience = Patience(self.retry, self.retry.resume_for_s)
        while True:
            at = self._shared.at
            try:
                async with contextlib.aclosing(self._connection(position, patience)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, DoneEvent):
                            return
                raise ConnectionLost(f"the stream of job {position.job_id} ended before the job did")
            except PASSING as error:
                self._turn_from(at)
                await _pause(patience, error)

    async def _connection(self, position: LogPosition, patience: Patience) -> AsyncGenerator[JobEvent]:
        """One connection's new events; ends with the connection."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if position.id:
            headers["Last-Event-ID"] = position.id
        decoder = SseDecoder()
        async with (
            self._answer("GET", f"{_job_path(position.job_id)}/events", headers=headers) as response,
            contextlib.aclosing(_chunks(response, self.timeouts.silence_s)) as chunks,
        ):
            async for chunk in chunks:
                for raw in decoder.feed(chunk):
                    try:
                        event = position.take(raw)
                    except JobFailed as error:
                        error.request_id = response.headers.get("x-request-id")
                        raise
                    if event is None:
                        continue
                    if not isinstance(event, QueuedEvent):  # every connection begins with one: it is no progress
                        patience.reset()
                    yield event
                if decoder.retry_ms is not None:
                    patience.first_wait_s = decoder.retry_ms / 1000

    def _keep(self, goodbye: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(goodbye)
        self._shared.goodbyes.add(task)
        task.add_done_callback(self._shared.goodbyes.discard)
        return task

    async def _goodbye(self, job: str | asyncio.Task[JobAccepted], *, cancels: bool = True) -> None:
        """Cancel for a reader that is gone, so a failure goes to the log; the job then runs to its end."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                job_id = job if isinstance(job, str) else (await job).id
                if cancels:
                    await self.cancel(job_id)
        except (MixtralError, TimeoutError) as error:
            name = job if isinstance(job, str) else "unknown"
            log.warning('job=%s event=cancel_failed reason="%s"', name, error or f"no answer within {GOODBYE_S:g} s")

    # ------------------------------------------------------------------------------------------ requests

    async def _ask(self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
        """Ask until answered, as long as the patience for plain requests lasts."""
        patience = Patience(self.retry, self.retry.give_up_after_s)
        while True:
            at = self._shared.at
            try:
                async with self._answer(method, path, body=body, headers=headers) as response:
                    return await _body(response, self.timeouts.answer_s)
            except PASSING as error:
                self._turn_from(at)
                await _pause(patience, error)

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One try at one server: the answer with its body unread. Raises the error for everything but a 2xx."""
        url = self._servers[self._shared.at % len(self._servers)] + path
        asked = f"{method} {url}"
        sent = io.BytesIO(body) if body else None  # sent in pieces: a large chat must not hold up the other streams
        headers = {"Authorization": f"Bearer {self._key}", **(headers or {})}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect_s)
        try:
            async with asyncio.timeout(self.timeouts.answer_s):
                response = await self._http().request(method, url, data=sent, headers=headers, allow_redirects=False, timeout=limits)
        except aiohttp.ConnectionTimeoutError as error:
            limit = f"connect_s, {self.timeouts.connect_s:g} s"
            raise ConnectionLost(f"{asked}: no connection within {limit}; is the server there?", code="connect_timeout") from error
        except TimeoutError as error:
            raise ConnectionLost(f"{asked} got no answer within answer_s, {self.timeouts.answer_s:g} s", code="answer_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"{asked} got no answer: {error or type(error).__name__}; is the server running there?") from error
        async with response:
            if not 200 <= response.status < 300:
                raise refusal(asked, response.status, response.headers, await _body(response, self.timeouts.answer_s))
            yield response

    def _http(self) -> aiohttp.ClientSession:
        if self._shared.http is None:
            # Each stream is a connection, and a limit here would hang the 101st: how many there are is the caller's choice.
            self._shared.http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers={"User-Agent": f"mixtral-client {aiohttp.http.SERVER_SOFTWARE}"}
            )
        return self._shared.http

    def _turn_from(self, at: int) -> None:
        """Turn to the next server, unless another request has done so already."""
        if self._shared.at == at:
            self._shared.at += 1


@dataclass(frozen=True, slots=True)
class _Order:
    request: JobRequest
    key: str


class JobStream(AsyncIterator[JobEvent]):
    """The events of one job to its end: each token once and in order, over as many connections as it takes.

    Ends after `done`; raises JobFailed at an `error` event, ConnectionLost when nobody can be reached for Retry.resume_for_s, TimedOut.
    job_id is known from the first event on; text is what was read so far, each rewind taken back; last_id is where `events` goes on.
    Use `async with` where a cancelled task must have cancelled the job, and its connection must be closed, by the next line.
    """

    def __init__(self, client: MixtralClient, position: LogPosition, order: _Order | None, *, detach: bool) -> None:
        self._client = client
        self._position = position
        self._detach = detach
        self._first_offset = position.offset
        self._pieces: list[str] = []  # of tokens after the first offset
        self._logprobs: list[TokenLogprobs] = []
        self._done: DoneEvent | None = None
        self._since: float | None = None
        self._events = client._follow(position) if order is None else client._order_and_follow(position, order, detach=detach)

    @property
    def job_id(self) -> str:
        return self._position.job_id

    @property
    def last_id(self) -> str:
        return self._position.id

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def finish(self) -> Finish | None:
        """Why the job ended; None before its end."""
        return None if self._done is None else self._done.finish

    async def answer(self) -> Answer:
        """Read to the end and give the whole, what this stream has given already included. Raises as the events do, and JobStopped."""
        async with self:
            async for _ in self:
                pass
        done = self._done
        assert done is not None, "a stream ends after done, or raises"
        if done.finish != "stop" and done.finish != "length":
            raise JobStopped(self.job_id, done.finish, self.text)
        return Answer(self.job_id, self.text, done.finish, done.usage, done.timings, self._logprobs)

    async def cancel(self) -> None:
        """Stop the job; what was on its way comes yet, then `done` with finish "cancelled". A finished job stays as it is."""
        if self.job_id:
            await self._client.cancel(self.job_id)

    async def aclose(self) -> None:
        await self._events.aclose()

    async def __anext__(self) -> JobEvent:
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        limit, limit_s = self._next_limit()
        try:
            async with asyncio.timeout_at(None if limit_s is None else self._since + limit_s) as clock:
                event = await anext(self._events)
        except TimeoutError as error:
            if not clock.expired() or limit is None or limit_s is None:
                raise
            await self._abandon()
            raise TimedOut(limit, limit_s, self.job_id) from error
        except asyncio.CancelledError:
            await self._abandon()
            raise
        self._note(event)
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            await self._abandon()
        await self.aclose()

    def _next_limit(self) -> tuple[Literal["first_token", "total"] | None, float | None]:
        """The limit that passes first."""
        limits = self._client.timeouts
        first_s = None if self._pieces else limits.first_token_s
        if first_s is not None and (limits.total_s is None or first_s < limits.total_s):
            return "first_token", first_s
        return ("total", limits.total_s) if limits.total_s is not None else (None, None)

    def _note(self, event: JobEvent) -> None:
        if isinstance(event, TokenEvent):
            self._pieces.append(event.text)
            if event.logprobs is not None:
                self._logprobs.append(event.logprobs)
        elif isinstance(event, RewindEvent):
            del self._pieces[max(0, event.to - self._first_offset) :]
            del self._logprobs[max(0, event.to - self._first_offset) :]
            self._first_offset = min(self._first_offset, event.to)
        elif isinstance(event, DoneEvent):
            self._done = event

    async def _abandon(self) -> None:
        """Nobody wants the outcome any more: cancel the job, unless it is over or not ours to end."""
        if self._detach or self._done is not None or not self.job_id:
            return
        self._detach = True
        await asyncio.shield(self._client._keep(self._client._goodbye(self.job_id)))


async def _pause(patience: Patience, error: MixtralError) -> None:
    """Wait for the next try. Raises the error if there is to be none."""
    wait_s = patience.wait_s(error)
    log.info('event=try_again wait_s=%.2f code=%s reason="%s"', wait_s, error.code, error)
    await asyncio.sleep(wait_s)


async def _chunks(response: aiohttp.ClientResponse, silence_s: float | None) -> AsyncGenerator[bytes]:
    """A body's bytes as they come."""
    while True:
        try:
            async with asyncio.timeout(silence_s):
                chunk = await response.content.readany()
        except TimeoutError as error:
            raise ConnectionLost(f"{response.url} was silent for {silence_s:g} s", code="silence_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"the connection to {response.url} broke: {error or type(error).__name__}") from error
        if not chunk:
            return
        yield chunk


async def _body(response: aiohttp.ClientResponse, silence_s: float | None) -> bytes:
    body = bytearray()
    async with contextlib.aclosing(_chunks(response, silence_s)) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise BadAnswer(f"the answer of {response.url} is larger than {MAX_ANSWER_BYTES:,} bytes, the most this client reads")
    return bytes(body)


def _parse(model: type[Answered], body: bytes) -> Answered:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        said = body[:200].decode(errors="replace")
        raise BadAnswer(f"the answer should be a {model.__name__}; got {said!r}; does the address belong to this service?") from error


def _job_request(messages: Messages | None, prompt: Prompt | None, options: JobOptions) -> JobRequest:
    """Raises RequestRefused for what the server would refuse by its shape, TypeError for an option that does not exist."""
    if unknown := options.keys() - JobOptions.__annotations__.keys():
        raise TypeError(f"a job has no option {sorted(unknown)[0]!r}; it has {', '.join(JobOptions.__annotations__)}")
    given: dict[str, Any] = {"model": DEFAULT_MODEL, **options}
    if messages is not None:
        given["messages"] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if prompt is not None:
        given["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    try:
        return JobRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestRefused(f"{where or 'the request'}: {first['msg']}", code="invalid_request", param=where or None) from error


def _base_url(server: str) -> str:
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"api_server must be an address such as http://127.0.0.1:7777; got {server!r}")
    return server.rstrip("/")


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _new_key() -> str:
    return uuid.uuid4().hex
