"""A scripted server: a real aiohttp server that speaks OpenAI's wire and the native one, and emits tokens when a test says so.

Time is the test's too: `Stage` is the clock and the watcher of the load under test, so that what was measured can be compared
with the script exactly, however slow the machine is.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from mixtral_benchmark.arrivals import Pace, moments_s
from mixtral_benchmark.load import Load, Plan
from mixtral_benchmark.measure import Chat
from mixtral_benchmark.prompts import Talk, same
from mixtral_benchmark.wires import NativeWire, OpenAIWire, Target, Wire
from mixtral_client.protocol import event_id

KEY = "mx-test-key"
ENDPOINT = "mixtral_chat"


def sse(data: object, id: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"id: {id}\n" if id else "").encode() + f"data: {text}\n\n".encode()


def chunk(offset: int | None, text: str | None, finish: str | None = None, **more: object) -> bytes:
    """One chunk of OpenAI's stream; offset None as servers without offsets send it."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    body = {"id": "chat-1", "object": "chat.completion.chunk", "created": 0, "model": ENDPOINT, "choices": [choice], **more}
    return sse(body, None if offset is None else event_id(offset, 7))


def usage(completion: int, prompt: int = 11) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return sse({"id": "chat-1", "object": "chat.completion.chunk", "created": 0, "model": ENDPOINT, "choices": [], "usage": counts})


def openai_end(tokens: int, prompt: int = 11) -> bytes:
    return chunk(None, None, "stop") + usage(tokens, prompt) + sse("[DONE]")


def native(kind: str, id: str | None = None, **fields: object) -> bytes:
    """One event of the native stream: its kind is the event's name."""
    return f"event: {kind}\n".encode() + sse(fields, id)


def token(offset: int, text: str = "x") -> bytes:
    return native("token", event_id(offset, 7), offset=offset, text=text)


def done(tokens: int, finish: str = "stop", prompt: int = 11, **timings: float) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    return native("done", finish=finish, usage=counts, timings=timings or None)


class ScriptedServer:
    """Chats are named by the seed they ask for. play(seed) is what becomes of a chat's stream; without it the test writes by hand."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.workers: int | None = 1
        self.cancelled: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.refuse: Callable[[int], web.Response | None] = lambda seed: None
        self.play: Callable[[str, Callable[[bytes], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]] | None = None
        self._open: defaultdict[int, asyncio.Future[tuple[web.Request, web.StreamResponse]]] = defaultdict(
            lambda: asyncio.get_running_loop().create_future()
        )
        self._closed: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def _models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        card = {"id": ENDPOINT, "object": "model", "created": 0, "owned_by": "test"}
        return web.json_response({"object": "list", "data": [card]})

    async def _ready(self, request: web.Request) -> web.Response:
        if self.workers is None:
            raise web.HTTPNotFound
        return web.json_response({"status": "ok", "workers": self.workers})

    def _check_key(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            error = {"message": "no such key", "type": "authentication_error", "code": "invalid_api_key"}
            raise web.HTTPUnauthorized(text=json.dumps({"error": error}), content_type="application/json")

    async def _asked(self, request: web.Request) -> tuple[int, web.Response | None]:
        self._check_key(request)
        body = await request.json()
        seed = body.get("seed", len(self.requests))
        self.requests.append(body)
        return seed, self.refuse(seed)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        seed, refused = await self._asked(request)
        return refused or await self._stream(request, seed)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        seed, refused = await self._asked(request)
        return refused or web.json_response({"id": f"job-{seed}", "model": ENDPOINT, "state": "waiting", "position": 1}, status=202)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, int(request.match_info["job"].removeprefix("job-")))

    async def _view(self, request: web.Request) -> web.Response:
        return web.json_response(self.views[request.match_info["job"]])

    async def _delete(self, request: web.Request) -> web.Response:
        self.cancelled.append(request.match_info["job"])
        return web.json_response({}, status=200)

    async def _stream(self, request: web.Request, seed: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.play is not None:
            await self.play("native" if "jobs" in request.path else "openai", response.write)
            return response
        self._open[seed].set_result((request, response))
        await self._closed[seed].wait()
        return response

    async def write(self, seed: int, data: bytes) -> None:
        _, response = await self._open[seed]
        await response.write(data)

    def end(self, seed: int) -> None:
        """The body ends as it should; what it said is another matter."""
        self._closed[seed].set()

    async def cut(self, seed: int) -> None:
        """The connection breaks."""
        request, _ = await self._open[seed]
        if request.transport:
            request.transport.abort()
        self._closed[seed].set()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/readyz", self._ready)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/jobs", self._put)
        app.router.add_get("/v1/jobs/{job}/events", self._events)
        app.router.add_get("/v1/jobs/{job}", self._view)
        app.router.add_delete("/v1/jobs/{job}", self._delete)
        return app

    def release(self) -> None:
        for closed in self._closed.values():
            closed.set()


@dataclass
class Stage:
    """Clock and watcher in one: the script moves time, and waits until the load has seen what it wrote."""

    server: ScriptedServer
    http: aiohttp.ClientSession
    time_s: float = 0.0
    sent_chats: list[int] = field(default_factory=list)
    ended_chats: list[int] = field(default_factory=list)
    arrivals: int = 0
    _sleepers: list[tuple[float, asyncio.Event]] = field(default_factory=list)
    _happened: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return self.time_s

    async def sleep_until(self, at_s: float) -> None:
        if at_s > self.time_s:
            woken = asyncio.Event()
            self._sleepers.append((at_s, woken))
            self._happened.set()
            await woken.wait()

    def sent(self, chat: Chat) -> None:
        self.sent_chats.append(chat.index)
        self._happened.set()

    def arrived(self, chat: Chat, tokens: int) -> None:
        self.arrivals += 1
        self._happened.set()

    def ended(self, chat: Chat) -> None:
        self.ended_chats.append(chat.index)
        self._happened.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._happened.clear()
                await self._happened.wait()

    async def until_asleep(self) -> None:
        """The load waits for a moment to come."""
        await self.until(lambda: any(not woken.is_set() for _, woken in self._sleepers))

    def advance(self, to_s: float) -> None:
        self.time_s = to_s
        for at_s, woken in self._sleepers:
            if at_s <= to_s:
                woken.set()

    async def at(self, to_s: float, seed: int, data: bytes, arrivals: int) -> None:
        """Once the chat is sent: at this moment its stream carries data, which brings so many arrivals."""
        await self.until(lambda: seed in self.sent_chats)
        due = self.arrivals + arrivals
        self.advance(to_s)
        await self.server.write(seed, data)
        await self.until(lambda: self.arrivals == due)

    async def end(self, at_s: float, seed: int, data: bytes) -> None:
        """Once the chat is sent: at this moment its stream carries its last data and ends."""
        await self.until(lambda: seed in self.sent_chats)
        self.advance(at_s)
        await self.server.write(seed, data)
        self.server.end(seed)
        await self.until(lambda: seed in self.ended_chats)

    def wire(self, api: str, verify: bool = False) -> Wire:
        target = Target(self.server.url, ENDPOINT, KEY)
        if api == "openai":
            return OpenAIWire(self.http, target, self.now, self.arrived)
        return NativeWire(self.http, target, self.now, self.arrived, verify=verify)

    def load(
        self,
        api: str = "openai",
        total: int = 1,
        concurrency: int | None = 1,
        rate_per_s: float | None = None,
        verify: bool = False,
        timeout_s: float = 60,
    ) -> Load:
        talks = same(total, "hello", Talk((), max_tokens=8, seed=0))
        moments = None if rate_per_s is None else moments_s(total, Pace(rate_per_s), 0)
        return self.load_of(Plan(talks, concurrency, moments, timeout_s), api, verify)

    def load_of(self, plan: Plan, api: str = "openai", verify: bool = False) -> Load:
        return Load(plan, self.wire(api, verify), self, self)

    async def play(self, load: Load, script: Coroutine[Any, Any, None]) -> Sequence[Chat]:
        """Run load and script side by side; the chats in the order in which they were sent."""
        async with asyncio.timeout(30), asyncio.TaskGroup() as both:
            both.create_task(load.run())
            both.create_task(script)
        return load.chats
