"""One chat over one wire: sends it, stamps what comes back, and fills in a measure.Chat.

Decides what counts as a token's arrival on OpenAI's wire and on the native one, and what names a failure has. Leaves to load.py
when chats are sent, and to measure.py what the times mean. Nothing is retried or resumed: what a plain client would see is
what is measured.

A time is taken once per read of the socket, before anything is decoded.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import aiohttp

from mixtral_benchmark.measure import Arrival, Chat, Failure
from mixtral_benchmark.prompts import Ask
from mixtral_benchmark.verify import Transcript
from mixtral_client.errors import refusal
from mixtral_client.protocol import (
    DoneEvent,
    ErrorEvent,
    JobAccepted,
    JobEvent,
    JobView,
    MovedEvent,
    RewindEvent,
    TokenEvent,
    parse_event_id,
)
from mixtral_client.resume import EVENTS
from mixtral_client.sse import ServerSentEvent, SseDecoder

CONNECT_TIMEOUT_S = 10
GOODBYE_TIMEOUT_S = 2
"""How long an interrupted chat may take to cancel its job at the server."""

CONTENT_FIELDS = ("content", "reasoning_content", "reasoning")
"""Where OpenAI-compatible servers put generated text in a delta."""


class ChatFailed(Exception):
    """The chat did not complete; carries the failure to count."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class Target:
    """Where the load goes. url has no trailing slash and no credentials."""

    url: str
    endpoint: str
    key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def open_http(target: Target) -> aiohttp.ClientSession:
    """As many connections as there are chats: the load decides how many that is, and no pool may delay a send."""
    return aiohttp.ClientSession(
        headers=target.headers | {"Accept-Encoding": "identity"},  # a compressor may hold tokens back
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
    )


class Wire(ABC):
    name: ClassVar[str]

    def __init__(self, http: aiohttp.ClientSession, target: Target, now: Callable[[], float], arrived: Callable[[Chat, int], None]) -> None:
        self._http, self._target, self._now, self._arrived = http, target, now, arrived

    @abstractmethod
    async def have(self, ask: Ask, chat: Chat) -> None:
        """Have one chat and fill in its record up to ended_s. Raises ChatFailed, MixtralError, aiohttp.ClientError or ValueError.

        Streams are read to their end, past the last event, so that the connection serves the next chat.
        """

    def _saw(self, chat: Chat, at_s: float, tokens: int) -> None:
        """Tokens arrived."""
        chat.arrivals.append(Arrival(at_s, tokens))
        self._arrived(chat, tokens)

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, ServerSentEvent]]:
        """Every event with the time of the read that completed it."""
        decoder = SseDecoder()
        async for piece in response.content.iter_any():
            at_s = self._now()
            for event in decoder.feed(piece):
                yield at_s, event


class OpenAIWire(Wire):
    """POST /v1/chat/completions as a stream: this server, or any other that speaks OpenAI's API."""

    name = "openai"

    async def have(self, ask: Ask, chat: Chat) -> None:
        body = ask.body(self._target.endpoint) | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._http.post(f"{self._target.url}/v1/chat/completions", json=body) as response:
            await raise_for_status(response)
            last_s = chat.sent_s
            async for at_s, event in self._events(response):
                if event.data == "[DONE]":
                    chat.ended_s = at_s
                elif chat.ended_s is None:
                    self._chunk(chat, at_s, event, read_json(event.data))
                    last_s = at_s
        if chat.finish is None:
            missing = "[DONE]" if chat.ended_s is None else "a finish_reason"
            raise ChatFailed(Failure("stream_cut", f"the stream ended after {chat.tokens} tokens without {missing}"))
        if chat.ended_s is None:
            chat.ended_s = last_s  # `transformers serve` sends no [DONE]

    def _chunk(self, chat: Chat, at_s: float, event: ServerSentEvent, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise ChatFailed(failure_of(chunk["error"]))
        chat.job = chat.job or chunk.get("id")
        if usage := chunk.get("usage"):
            chat.usage_tokens, chat.prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
        for choice in chunk.get("choices") or []:
            chat.finish = choice.get("finish_reason") or chat.finish
            delta = choice.get("delta") or {}
            if chat.texts is not None:
                chat.texts.append(delta.get("content") or "")
            if tokens := self._new_tokens(chat, event.id, any(delta.get(name) for name in CONTENT_FIELDS)):
                self._saw(chat, at_s, tokens)

    @staticmethod
    def _new_tokens(chat: Chat, event_id: str, has_text: bool) -> int:
        """How many tokens this chunk brings: as far as its offset went on, or one if the server says no offsets and there is text."""
        offset = offset_of(event_id)
        if offset is None:
            return int(has_text)
        before = chat.last_offset or 0
        if offset < before:
            raise ChatFailed(Failure("stream_repeat", f"token {before + 1} was due; the stream sent token {offset}"))
        chat.last_offset = offset
        return offset - before


class NativeWire(Wire):
    """POST /v1/jobs, then its events: offsets and the server's own timings in every chat."""

    name = "native"

    def __init__(
        self,
        http: aiohttp.ClientSession,
        target: Target,
        now: Callable[[], float],
        arrived: Callable[[Chat, int], None],
        *,
        verify: bool = False,
    ) -> None:
        super().__init__(http, target, now, arrived)
        self._verify = verify

    async def have(self, ask: Ask, chat: Chat) -> None:
        chat.job = job = await self._put(ask)
        transcript = Transcript(keep_text=self._verify)
        try:
            await self._follow(job, chat, transcript)
        except BaseException:
            # Also when we are cancelled: a chat that nobody reads must not hold a slot.
            await self._cancel(job)
            raise
        if self._verify:
            await self._compare(job, chat, transcript)

    async def _put(self, ask: Ask) -> str:
        async with self._http.post(f"{self._target.url}/v1/jobs", json=ask.body(self._target.endpoint)) as response:
            await raise_for_status(response)
            return JobAccepted.model_validate_json(await response.read()).id

    async def _follow(self, job: str, chat: Chat, transcript: Transcript) -> None:
        async with self._http.get(f"{self._target.url}/v1/jobs/{job}/events") as response:
            await raise_for_status(response)
            async for at_s, event in self._events(response):
                # An event of a kind that this program does not know is passed over, as every client does.
                if chat.ended_s is None and event.event in EVENTS:
                    self._event(chat, at_s, EVENTS[event.event].model_validate_json(event.data), transcript)
        if chat.ended_s is None:
            raise ChatFailed(Failure("stream_cut", f"the stream ended after {chat.tokens} tokens without done or error"))

    def _event(self, chat: Chat, at_s: float, event: JobEvent, transcript: Transcript) -> None:
        match event:
            case TokenEvent():
                raise_for(transcript.token(event.offset, event.text))
                chat.last_offset = transcript.offset
                if chat.texts is not None:
                    chat.texts.append(event.text)
                self._saw(chat, at_s, 1)
            case RewindEvent():
                raise_for(transcript.rewind(event.to))
                del (chat.texts or [])[event.to :]
                chat.last_offset, chat.rewinds = transcript.offset, chat.rewinds + 1
            case MovedEvent():
                chat.moves += 1
            case ErrorEvent():
                raise ChatFailed(Failure(event.error.code, event.error.message))
            case DoneEvent():
                self._done(chat, at_s, event)

    @staticmethod
    def _done(chat: Chat, at_s: float, done: DoneEvent) -> None:
        chat.ended_s, chat.finish, chat.last_offset = at_s, done.finish, chat.last_offset or 0
        chat.usage_tokens, chat.prompt_tokens = done.usage.completion_tokens, done.usage.prompt_tokens
        if done.timings:
            chat.server_queue_s, chat.server_first_token_s = done.timings.queue_s, done.timings.first_token_s
        if done.finish not in ("stop", "length"):
            raise ChatFailed(Failure(done.finish, f"the server ended the job as {done.finish} after {chat.tokens} tokens"))

    async def _compare(self, job: str, chat: Chat, transcript: Transcript) -> None:
        async with self._http.get(f"{self._target.url}/v1/jobs/{job}") as response:
            await raise_for_status(response)
            raise_for(transcript.compare(JobView.model_validate_json(await response.read()), chat.usage_tokens))

    async def _cancel(self, job: str) -> None:
        try:
            async with asyncio.timeout(GOODBYE_TIMEOUT_S), self._http.delete(f"{self._target.url}/v1/jobs/{job}"):
                pass
        except (aiohttp.ClientError, TimeoutError):
            pass  # The failure that brought us here is the one to report; the server ends the job by its own limits.


@dataclass(frozen=True)
class ServerFacts:
    """What the server says of itself. endpoints are those that this key may use; workers is None where it does not say."""

    endpoints: tuple[str, ...]
    software: str | None
    workers: int | None


async def ask_server(http: aiohttp.ClientSession, target: Target) -> ServerFacts:
    """Raises MixtralError, aiohttp.ClientError, TimeoutError or ValueError, none of them for want of a worker count."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S), http.get(f"{target.url}/v1/models") as response:
        await raise_for_status(response)
        listed = read_json((await response.read()).decode())
        software = response.headers.get("Server")
    return ServerFacts(tuple(_model_ids(listed)), software, await _count_workers(http, target))


def _model_ids(listed: dict[str, Any]) -> list[str]:
    """Of OpenAI's list of models; some servers leave out what else belongs there. Raises ValueError."""
    cards = listed.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards):
        raise ValueError(f"a list of models was due; got {str(listed)[:80]}")
    return [card["id"] for card in cards]


async def _count_workers(http: aiohttp.ClientSession, target: Target) -> int | None:
    """From /readyz, which other servers may lack."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S), http.get(f"{target.url}/readyz") as response:
        if not response.ok:
            return None
        try:
            said = json.loads(await response.read())
        except ValueError:
            return None
        workers = said.get("workers") if isinstance(said, dict) else None
        return workers if isinstance(workers, int) else None


def raise_for(failure: Failure | None) -> None:
    if failure is not None:
        raise ChatFailed(failure)


async def raise_for_status(response: aiohttp.ClientResponse) -> None:
    """Raises MixtralError with the server's own code word where the body has one, else http_<status>."""
    if not response.ok:
        raise refusal(f"{response.method} {response.url}", response.status, response.headers, await response.read())


def failure_of(error: Any) -> Failure:
    """The error of a broken stream, as this server or another words it."""
    code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
    return Failure(str(code or "stream_error"), str(message)[:300])


def read_json(data: str) -> dict[str, Any]:
    """One event's object. Raises ValueError."""
    read = json.loads(data)
    if not isinstance(read, dict):
        raise ValueError(f"an event must carry a JSON object; got {data[:80]!r}")
    return read


def offset_of(event_id: str) -> int | None:
    """The offset in this server's `<offset>.<crc32>`; None for the ids that other servers may send, or none."""
    try:
        offset, crc = parse_event_id(event_id)
    except ValueError:
        return None
    return offset if crc is not None else None
