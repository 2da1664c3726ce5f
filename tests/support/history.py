"""What readers of chats really received, and whether it is what was promised.

A Reader takes a chat over the raw wire and repeats nothing for itself: what a connection brings is written down as it came. `check` then
asks that offsets run 1, 2, … once each in order (a `rewind` takes some back aloud), that text is the toy model's and the log's to the byte,
and that exactly one terminal event came, last.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeAlias

import aiohttp

from mixtral_client import MixtralClient, Retry
from mixtral_client.errors import JobFailed
from mixtral_client.protocol import (
    TERMINAL_EVENTS,
    DoneEvent,
    ErrorDetail,
    ErrorEvent,
    JobEvent,
    JobView,
    MovedEvent,
    RewindEvent,
    TokenEvent,
    event_id,
    ids_crc,
)
from mixtral_client.resume import EVENTS
from mixtral_client.sse import SseDecoder
from support.http import PATIENCE_S, until
from support.toy_model import ToyAnswer, answer_to

SILENCE_S = 8.0  # of a stream: comments come twice a second
ANSWER = aiohttp.ClientTimeout(total=SILENCE_S)
PASSING = (502, 503, 504)  # the middle one is the service's, the others a balancer's that reaches no replica
RETRY_S = 0.1


Fault: TypeAlias = Literal["lost", "repeated", "reordered", "wrong text", "failed"]


class Broken(AssertionError):
    """A history that was promised not to happen; the message says where, `fault` in one word what."""

    def __init__(self, fault: Fault, sentence: str) -> None:
        super().__init__(sentence)
        self.fault = fault


@dataclass
class Chat:
    """One chat as its reader saw it."""

    content: str
    seed: int
    tokens: int
    model: str
    job_id: str = ""
    events: list[tuple[str, JobEvent]] = field(default_factory=list)  # with the id that came with each
    connections: int = 0
    refusals: list[int] = field(default_factory=list)  # statuses other than 2xx that the reader met
    comments: int = 0
    is_cancelled: bool = False  # its reader asked for its end: it may be shorter than it would have been
    task: asyncio.Task[None] | None = None

    @property
    def body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.content}]
        return {"model": self.model, "messages": messages, "max_tokens": self.tokens, "seed": self.seed}

    @property
    def offset(self) -> int:
        """The last token the reader has."""
        places = [
            one.offset if isinstance(one, TokenEvent) else one.to for _, one in self.events if isinstance(one, TokenEvent | RewindEvent)
        ]
        return places[-1] if places else 0

    @property
    def last_id(self) -> str:
        return next((id for id, one in reversed(self.events) if isinstance(one, TokenEvent | RewindEvent)), "")

    @property
    def is_over(self) -> bool:
        return bool(self.events) and self.events[-1][1].event in TERMINAL_EVENTS

    @property
    def moves(self) -> int:
        return sum(isinstance(one, MovedEvent) for _, one in self.events)

    @property
    def rewinds(self) -> int:
        return sum(isinstance(one, RewindEvent) for _, one in self.events)

    async def reach(self, offset: int) -> None:
        await until(lambda: self.offset >= offset or self.is_over or self._has_failed())

    async def end(self) -> None:
        """Until the reader has the terminal event; raises what ended it early."""
        assert self.task is not None
        async with asyncio.timeout(PATIENCE_S):
            await self.task

    def _has_failed(self) -> bool:
        return self.task is not None and self.task.done()


def check(chat: Chat, view: JobView) -> None:
    """Raises Broken unless the history is the promised one. view: the job as a server shows it afterwards."""
    name = f"job {chat.job_id}"
    ends = [one for _, one in chat.events if one.event in TERMINAL_EVENTS]
    if len(ends) != 1 or chat.events[-1][1] is not ends[0]:
        raise Broken("repeated" if ends else "lost", f"{name} had {len(ends)} terminal events, one at the very end was promised")
    if isinstance(ends[0], ErrorEvent):
        raise Broken("failed", f"{name} failed: {ends[0].error}")
    done = ends[0]
    assert isinstance(done, DoneEvent)
    expected = answer_to(chat.content, chat.seed, chat.tokens)
    texts = _texts(chat, expected, name)
    count, finish = (len(texts), "cancelled") if done.finish == "cancelled" and chat.is_cancelled else (chat.tokens, "length")
    if (done.finish, done.usage.completion_tokens, len(texts)) != (finish, count, count):
        raise Broken("lost", f"{name} ended by {done.finish} with {len(texts)} tokens of {chat.tokens}, usage {done.usage}")
    text = "".join(texts)
    if text != view.text or not (text == expected.text or (finish == "cancelled" and expected.text.startswith(text))):
        raise Broken("wrong text", f"{name} reads {text!r}; its log {view.text!r}; the model says {expected.text!r}")
    if (view.state, view.tokens, view.finish) != ("done" if finish == "length" else finish, count, finish):
        raise Broken("lost", f"{name} ended as {view.state} with {view.tokens} tokens, its reader was told {done}")


def _texts(chat: Chat, expected: ToyAnswer, name: str) -> list[str]:
    """The text of each token that stands at the end. Raises Broken for offsets out of order and ids that are not the model's."""
    texts: list[str] = []
    attempt = 0
    for at, (id, one) in enumerate(chat.events):
        if isinstance(one, TokenEvent):
            if one.offset != len(texts) + 1:
                raise Broken(_disorder(chat, at, len(texts) + 1), f"{name} brought token {one.offset} after token {len(texts)}")
            texts.append(one.text)
        elif isinstance(one, RewindEvent):
            if not 0 <= one.to < len(texts):
                raise Broken("reordered", f"{name} was rewound to {one.to} at token {len(texts)}")
            del texts[one.to :]
        elif isinstance(one, MovedEvent):
            if one.attempt <= attempt:
                raise Broken("repeated", f"{name} moved to attempt {one.attempt} after {attempt}")
            attempt = one.attempt
        if isinstance(one, TokenEvent | RewindEvent) and id != event_id(len(texts), ids_crc(expected.ids[: len(texts)])):
            raise Broken("wrong text", f"{name} has other ids than the model's at or before token {len(texts)}: event id {id}")
    return texts


def _disorder(chat: Chat, at: int, due: int) -> Fault:
    """What is wrong with the token at this place, where another was due."""
    came = chat.events[at][1]
    assert isinstance(came, TokenEvent)
    if came.offset < due:
        return "repeated"
    return "reordered" if any(isinstance(one, TokenEvent) and one.offset == due for _, one in chat.events[at:]) else "lost"


class Readers:
    """`async with Readers(urls, key) as readers:` – the first URL that answers serves each connection, as with a client of ours."""

    def __init__(self, urls: Sequence[str], key: str) -> None:
        self._urls = list(urls)
        self._key = key
        self._chats: list[Chat] = []

    async def __aenter__(self) -> Readers:
        self.http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {self._key}"}, connector=aiohttp.TCPConnector(limit=0))
        patient = Retry(first_wait_s=RETRY_S, max_wait_s=1.0, give_up_after_s=4 * PATIENCE_S)
        self.client = MixtralClient(self._urls, self._key, retry=patient)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for chat in self._chats:
            if chat.task is not None and not chat.task.done():
                chat.task.cancel()
        await asyncio.gather(*(chat.task for chat in self._chats if chat.task), return_exceptions=True)
        await self.client.close()
        await self.http.close()

    def start(self, content: str, *, tokens: int = 30, seed: int = 7, model: str = "brisk", by_client: bool = False) -> Chat:
        """Put a chat and read it in a task of its own; by_client: with the Python client instead of over the raw wire."""
        chat = Chat(content, seed, tokens, model)
        chat.task = asyncio.create_task(self.read(chat, by_client=by_client))
        self._chats.append(chat)
        return chat

    async def read(self, chat: Chat, *, by_client: bool = False) -> None:
        """Put the chat and read it to its end."""
        await (self._by_client(chat) if by_client else self._raw(chat))

    async def ended(self, *chats: Chat) -> None:
        """Wait for the ends of the chats and check each history."""
        for chat in chats:
            await chat.end()
        for chat in chats:
            check(chat, await self.view(chat))

    async def view(self, chat: Chat) -> JobView:
        return await self.client.job(chat.job_id)

    # ------------------------------------------------------------------------------------------ reading

    async def _by_client(self, chat: Chat) -> None:
        async with self.client.stream(chat.content, max_tokens=chat.tokens, seed=chat.seed, model=chat.model) as stream:
            try:
                async for event in stream:
                    chat.job_id = stream.job_id
                    chat.events.append((stream.last_id, event))
            except JobFailed as error:
                chat.events.append(("", ErrorEvent(error=ErrorDetail(message=str(error), type=error.kind or "", code=error.code))))

    async def _raw(self, chat: Chat) -> None:
        await self.put(chat)
        await self._follow(chat)

    def follow_again(self, chat: Chat) -> None:
        """Read on after an operator has brought the job back: the end it had is taken for none."""
        chat.events.pop()
        self.follow(chat)

    def follow(self, chat: Chat) -> None:
        """Read a chat that was put already, in a task of its own."""
        chat.task = asyncio.create_task(self._follow(chat))
        self._chats.append(chat)

    async def _follow(self, chat: Chat) -> None:
        turn = 0
        while not chat.is_over:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async for id, event in self._connection(chat, self._urls[turn % len(self._urls)]):
                    chat.events.append((id, event))
            turn += 1
            await asyncio.sleep(RETRY_S)

    async def put(self, chat: Chat) -> None:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        turn = 0
        while not chat.job_id:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                url = f"{self._urls[turn % len(self._urls)]}/v1/jobs"
                async with self.http.post(url, json=chat.body, headers=headers, timeout=ANSWER) as answer:
                    if answer.status in (200, 202):
                        chat.job_id = (await answer.json())["id"]
                        return
                    chat.refusals.append(answer.status)
                    if answer.status not in PASSING:
                        raise AssertionError(f"{answer.status}: {await answer.text()}")
            turn += 1
            await asyncio.sleep(RETRY_S)

    async def _connection(self, chat: Chat, url: str) -> AsyncIterator[tuple[str, JobEvent]]:
        headers = {"Last-Event-ID": chat.last_id} if chat.last_id else {}
        decoder = SseDecoder()
        limits = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=SILENCE_S)
        async with self.http.get(f"{url}/v1/jobs/{chat.job_id}/events", headers=headers, timeout=limits) as answer:
            if answer.status != 200:
                chat.refusals.append(answer.status)
                assert answer.status in PASSING, await answer.text()
                return
            chat.connections += 1
            async for piece in answer.content.iter_any():
                chat.comments += piece.count(b"\n: ") + piece.startswith(b":")
                for raw in decoder.feed(piece):
                    yield raw.id, EVENTS[raw.event].model_validate_json(raw.data)


@dataclass
class OpenAIStream:
    """What one call of OpenAI's streamed route brought."""

    text: str = ""
    is_done: bool = False
    error: str = ""
    job_id: str = ""


async def read_openai(answer: aiohttp.ClientResponse, seen: OpenAIStream) -> None:
    """Until the stream ends, however it ends. Raises what breaks the connection."""
    decoder = SseDecoder()
    async for piece in answer.content.iter_any():
        for raw in decoder.feed(piece):
            if raw.data == "[DONE]":
                seen.is_done = True
                continue
            chunk = json.loads(raw.data)
            if "error" in chunk:
                seen.error = chunk["error"]["code"]
                continue
            seen.job_id = chunk["id"].removeprefix("chatcmpl-")
            seen.text += "".join(one["delta"].get("content", "") for one in chunk["choices"])
