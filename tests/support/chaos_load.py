"""The load of a chaos run: readers of six kinds, one chat after another, each chat checked to the token when it ends.

Decides who asks for what and what a chat's end counts as. Leaves the judgement of a history to history.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from mixtral_client import MixtralError
from mixtral_client.protocol import DoneEvent, ErrorDetail, ErrorEvent, JobView, TokenEvent, Usage, event_id, ids_crc
from mixtral_client.resume import EVENTS
from support.history import PASSING, RETRY_S, Broken, Chat, OpenAIStream, Readers, check, read_openai
from support.node import find_node
from support.toy_model import answer_to

READERS = {"native": 14, "python client": 6, "openai stream": 6, "openai whole": 4, "javascript": 4, "canceller": 4}
SCRIPT = Path(__file__).parents[1] / "faults" / "follow_chats.mjs"
OPENAI_SILENCE_S = 30.0  # an answer that is not streamed is silent to its end
VIEW_FOR_S = 240.0
PASSING_CODES = ("unavailable", "redis_unavailable")  # of an answer that ends in an error and is asked for anew


@dataclass(frozen=True)
class GivenUp:
    """A job whose reader was told that its workers died. Times are unix seconds."""

    job_id: str
    state: str
    attempts: int
    created_s: float
    told_s: float


@dataclass
class Tally:
    """What became of the chats."""

    chats: int = 0
    tokens: int = 0
    moves: int = 0
    resumes: int = 0
    rewinds: int = 0
    refusals: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)
    dead: list[GivenUp] = field(default_factory=list)
    open: dict[str, Chat] = field(default_factory=dict)

    def count(self, kind: str, chat: Chat) -> None:
        self.chats += 1
        self.by_kind[kind] += 1
        self.tokens += sum(isinstance(one, TokenEvent) for _, one in chat.events)
        self.moves += chat.moves
        self.rewinds += chat.rewinds
        self.resumes += max(0, chat.connections - 1)
        self.refusals += len(chat.refusals)


class Load:
    """`await load.run(until)`: readers begin chats until the event is set, then finish those they have."""

    def __init__(self, readers: Readers, url: str, key: str, model: str, seed: int, log: Path) -> None:
        self.tally = Tally()
        self._readers, self._url, self._key, self._model = readers, url, key, model
        self._seed, self._log = seed, log
        self._number = 0

    async def run(self, enough: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            for kind, count in READERS.items():
                for number in range(count):
                    tasks.create_task(self._reads(kind, random.Random(f"{self._seed} {kind} {number}"), enough))

    async def _reads(self, kind: str, draw: random.Random, enough: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            read: dict[str, Callable[[Chat, random.Random], Awaitable[None]]] = {
                "native": self._native,
                "python client": self._client,
                "openai stream": self._openai_stream,
                "openai whole": self._openai_whole,
                "canceller": self._cancels,
            }
            if kind == "javascript":
                node = await stack.enter_async_context(NodeReader([self._url], self._key, self._log))
                read[kind] = node.read
            while not enough.is_set():
                self._number += 1
                chat = Chat(f"{kind} {self._number}", draw.randrange(2**31), draw.randrange(20, 110), self._model)
                self.tally.open[chat.content] = chat
                try:
                    await read[kind](chat, draw)
                    await self._judge(chat)
                except Broken as broken:
                    self.tally.broken.append(broken)
                except Exception as error:  # noqa: BLE001 - whatever it is, the reader was not served, and the run goes on to say so
                    self.tally.broken.append(Broken("failed", f"{chat.content!r} (job {chat.job_id}) ended its reader: {error!r}"))
                self.tally.count(kind, chat)
                del self.tally.open[chat.content]

    async def _judge(self, chat: Chat) -> None:
        """Raises Broken for a history that was promised not to happen."""
        last = chat.events[-1][1]
        if isinstance(last, ErrorEvent) and last.error.code == "workers_died":
            if not chat.job_id:  # a refusal names no job: of its proof only the strikes of the last minute are left
                self.tally.dead.append(GivenUp(chat.content, "dead", 3, time.time() - 60.0, time.time()))
                return
            told_s, view = time.time(), await self._view(chat)
            self.tally.dead.append(GivenUp(chat.job_id, view.state, view.attempt, view.created, told_s))
            return
        check(chat, await self._view(chat))

    async def _view(self, chat: Chat) -> JobView:
        until = time.monotonic() + VIEW_FOR_S
        while True:
            try:
                return await self._readers.view(chat)
            except MixtralError as error:
                if error.status == 404:
                    raise Broken("lost", f"job {chat.job_id} of {chat.content!r} is not there any more") from error
                if time.monotonic() > until:
                    raise

    # ------------------------------------------------------------------------------------------ the kinds

    async def _native(self, chat: Chat, draw: random.Random) -> None:
        await self._readers.read(chat)

    async def _client(self, chat: Chat, draw: random.Random) -> None:
        await self._readers.read(chat, by_client=True)

    async def _cancels(self, chat: Chat, draw: random.Random) -> None:
        """Reads some of it, then wants no more."""
        chat.is_cancelled = True
        reading = asyncio.create_task(self._readers.read(chat))
        wanted = draw.randrange(chat.tokens)
        while chat.offset < wanted and not reading.done():  # noqa: ASYNC110 - the reader's place is looked at, nobody tells
            await asyncio.sleep(0.05)
        while not reading.done():
            with contextlib.suppress(MixtralError):
                await self._readers.client.cancel(chat.job_id)
                break
        await reading

    async def _openai_stream(self, chat: Chat, draw: random.Random) -> None:
        await self._openai(chat, is_stream=True)

    async def _openai_whole(self, chat: Chat, draw: random.Random) -> None:
        await self._openai(chat, is_stream=False)

    async def _openai(self, chat: Chat, *, is_stream: bool) -> None:
        """Ask anew with the same key until an answer is whole. Each answer, cut or whole, begins as the one right answer does."""
        body = chat.body | {"stream": is_stream}
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=OPENAI_SILENCE_S)
        while not chat.is_over:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._readers.http.post(
                    f"{self._url}/v1/chat/completions", json=body, headers=headers, timeout=limits
                ) as answer:
                    if answer.status == 200:
                        chat.connections += 1
                        await (self._take_stream(chat, answer) if is_stream else self._take_whole(chat, answer))
                    else:
                        await self._take_refusal(chat, answer)
            await asyncio.sleep(RETRY_S)

    async def _take_stream(self, chat: Chat, answer: aiohttp.ClientResponse) -> None:
        seen = OpenAIStream()
        try:
            await read_openai(answer, seen)
        finally:
            self._same_job(chat, seen.job_id)
            expected = answer_to(chat.content, chat.seed, chat.tokens)
            if not expected.text.startswith(seen.text):
                raise Broken("wrong text", f"{chat.content!r} was told {seen.text!r}; the model says {expected.text!r}")
        if seen.is_done:
            self._take_text(chat, seen.text)
        elif not seen.error:
            raise Broken("lost", f"{chat.content!r} (job {chat.job_id}) came to an orderly end without [DONE] or an error: {seen.text!r}")
        elif seen.error == "workers_died":
            chat.events.append(("", dead()))
        elif seen.error not in PASSING_CODES:
            raise Broken("failed", f"{chat.content!r} (job {chat.job_id}) was broken off by {seen.error!r}")

    async def _take_whole(self, chat: Chat, answer: aiohttp.ClientResponse) -> None:
        body = await answer.json()
        self._same_job(chat, body["id"].removeprefix("chatcmpl-"))
        self._take_text(chat, body["choices"][0]["message"]["content"])

    async def _take_refusal(self, chat: Chat, answer: aiohttp.ClientResponse) -> None:
        text = await answer.text()
        if "workers_died" in text:
            chat.events.append(("", dead()))
        elif answer.status in PASSING:
            chat.refusals.append(answer.status)
        else:
            raise Broken("failed", f"{chat.content!r} was answered {answer.status}: {text[:300]}")

    def _same_job(self, chat: Chat, job_id: str) -> None:
        if job_id and chat.job_id and job_id != chat.job_id:
            raise Broken("repeated", f"{chat.content!r} became two jobs under one Idempotency-Key: {chat.job_id} and {job_id}")
        chat.job_id = job_id or chat.job_id

    def _take_text(self, chat: Chat, text: str) -> None:
        """As the events that a native reader would have had: each token of the model, if the whole text is the model's."""
        expected = answer_to(chat.content, chat.seed, chat.tokens)
        if text != expected.text:
            raise Broken("wrong text", f"{chat.content!r} was told {text!r}; the model says {expected.text!r}")
        for offset in range(1, chat.tokens + 1):
            event = TokenEvent(offset=offset, text=text if offset == 1 else "")
            chat.events.append((event_id(offset, ids_crc(expected.ids[:offset])), event))
        usage = Usage(completion_tokens=chat.tokens)
        chat.events.append(("", DoneEvent(finish="length", usage=usage)))


def dead() -> ErrorEvent:
    return ErrorEvent(error=ErrorDetail(message="", type="server_error", code="workers_died"))


class NodeReader:
    """`async with NodeReader(urls, key, log) as node:` – one Node process with our JavaScript client; any number of chats at once."""

    def __init__(self, urls: Sequence[str], key: str, log: Path) -> None:
        self._words = [str(find_node()), str(SCRIPT), ",".join(urls), key]
        self._log = log
        self._chats: list[tuple[Chat, asyncio.Event]] = []

    async def __aenter__(self) -> NodeReader:
        with self._log.open("ab") as log:
            self._node = await asyncio.create_subprocess_exec(
                *self._words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=2**20
            )
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._node.returncode is None:
            self._node.kill()
        await self._node.wait()
        await self._listening

    async def read(self, chat: Chat, draw: random.Random | None = None) -> None:
        """Until the chat's end, or that of Node."""
        assert self._node.stdin is not None
        is_over = asyncio.Event()
        self._chats.append((chat, is_over))
        self._node.stdin.write(json.dumps({"number": len(self._chats) - 1, "request": chat.body}).encode() + b"\n")
        await is_over.wait()
        if not chat.is_over:
            raise Broken("failed", f"{chat.content!r}: Node ended before the chat did; see {self._log}")

    async def _listen(self) -> None:
        assert self._node.stdout is not None
        async for line in self._node.stdout:
            fields = json.loads(line)
            chat, is_over = self._chats[fields.pop("number")]
            if job_id := fields.pop("job", ""):
                chat.job_id = job_id
                continue
            chat.events.append((fields.pop("id", ""), EVENTS[fields.pop("event")].model_validate(fields)))
            if chat.is_over:
                is_over.set()
        for _, is_over in self._chats:
            is_over.set()
