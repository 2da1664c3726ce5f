"""AIME's wire as the benchmark meets it: submit, poll, count what each poll shows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from mixtral_benchmark.aime import AimeWire, ask_aime_server
from mixtral_benchmark.measure import Chat
from mixtral_benchmark.prompts import Talk
from mixtral_benchmark.wires import ChatFailed, Target, open_http
from mixtral_client.errors import MixtralError


class AimeServer:
    """Answers each poll with the next of its script."""

    def __init__(self) -> None:
        self.url = ""
        self.submitted: list[dict[str, Any]] = []
        self.accepted: tuple[int, Any] = (200, {"success": True, "job_id": "job#1", "ep_version": 2})
        self.polls: list[tuple[int, Any]] = []
        self.tickets: list[str] = []

    async def _submit(self, request: web.Request) -> web.Response:
        self.submitted.append(await request.json())
        status, body = self.accepted
        return web.json_response(body, status=status)

    async def _progress(self, request: web.Request) -> web.Response:
        self.tickets.append(request.query["job_id"])
        status, body = self.polls.pop(0)
        return web.json_response(body, status=status)

    async def _endpoints(self, request: web.Request) -> web.Response:
        return web.json_response({"endpoints": ["mixtral_chat"]})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/mixtral_chat", self._submit)
        app.router.add_get("/mixtral_chat/progress", self._progress)
        app.router.add_get("/api/endpoints", self._endpoints)
        return app


def running(tokens: int) -> tuple[int, Any]:
    said = {"text": "x" * tokens, "num_generated_tokens": tokens}
    return 200, {"success": True, "job_state": "processing", "progress": {"progress": tokens, "progress_data": said}}


def ended(tokens: int, **more: object) -> tuple[int, Any]:
    result = {"success": True, "text": "Once", "num_generated_tokens": tokens, "current_context_length": tokens + 11, **more}
    return 200, {"success": True, "job_state": "done", "job_result": result}


@pytest.fixture
async def aime() -> AsyncIterator[AimeServer]:
    server = AimeServer()
    runner = web.AppRunner(server.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


async def have(server: AimeServer, talk: Talk, chat: Chat, key: str | None = "secret") -> None:
    target = Target(server.url, "mixtral_chat", key)
    async with open_http(target) as http:
        await AimeWire(http, target, iter(range(100)).__next__, lambda chat, tokens: None).have(talk.ask(0, ()), chat)


async def test_tokens_arrive_with_the_poll_that_first_shows_them(aime: AimeServer) -> None:
    queued = (200, {"success": True, "job_state": "queued", "progress": {"progress": 0, "progress_data": {}, "queue_position": 3}})
    aime.polls = [queued, running(4), running(4), ended(9)]
    chat = Chat(0, 0.0, 0.0, texts=[])
    await have(aime, Talk(("hello",), max_tokens=20, temperature=0.5), chat)
    assert [(arrival.at_s, arrival.tokens) for arrival in chat.arrivals] == [(1, 4), (3, 5)]
    assert (chat.tokens, chat.prompt_tokens, chat.token_source, chat.ended_s, chat.texts) == (9, 11, "usage", 3, ["Once"])
    assert set(aime.tickets) == {"job#1"}
    sent = aime.submitted[0]
    assert json.loads(sent.pop("chat_context")) == [{"role": "user", "content": "hello"}]
    assert sent == {"prompt_input": "", "max_gen_tokens": 20, "temperature": 0.5, "wait_for_result": False, "key": "secret"}


@pytest.mark.parametrize(
    ("accepted", "polls", "code", "sentence"),
    [
        ((401, {"success": False, "error": ["Key not valid"]}), [], "http_401", "Key not valid"),
        ((400, {"success": False, "error": "Job queue reached max length 1000!"}), [], "http_400", "max length"),
        (None, [(402, {"success": False, "error": ["no such job", "really"]})], "http_402", "no such job; really"),
        (None, [(400, {"success": False, "error": "Job lapsed!", "job_state": "lapsed"})], "job_lapsed", "lapsed"),
        (None, [ended(3, error="out of memory")], "job_failed", "out of memory"),
    ],
)
async def test_refused_lapsed_and_failed_jobs_are_failures_with_their_reason(
    aime: AimeServer, accepted: tuple[int, Any] | None, polls: list[tuple[int, Any]], code: str, sentence: str
) -> None:
    aime.accepted, aime.polls = accepted or aime.accepted, polls
    with pytest.raises(ChatFailed) as failed:
        await have(aime, Talk(("hello",)), Chat(0, 0.0, 0.0))
    assert failed.value.failure.code == code
    assert sentence in failed.value.failure.message


@pytest.mark.parametrize("body", [[1], "text"])
async def test_answer_that_is_no_object_is_unreadable(aime: AimeServer, body: object) -> None:
    aime.accepted = (200, body)
    with pytest.raises(ValueError, match="an object was due"):
        await have(aime, Talk(("hello",)), Chat(0, 0.0, 0.0))


async def test_endpoints_are_those_the_server_lists(aime: AimeServer) -> None:
    target = Target(aime.url, "mixtral_chat", None)
    async with open_http(target) as http:
        assert (await ask_aime_server(http, target)).endpoints == ("mixtral_chat",)
        with pytest.raises(MixtralError):
            await ask_aime_server(http, Target(f"{aime.url}/nowhere", "mixtral_chat", None))
        with pytest.raises(aiohttp.ClientError):
            await ask_aime_server(http, Target("http://127.0.0.1:1", "mixtral_chat", None))
