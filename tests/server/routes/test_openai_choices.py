"""Several answers to one OpenAI request: n, lists of prompts, their seeds and usage, and that all of them share one fate."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from mixtral_client.protocol import ChatCompletionChunk, Frame, FrameError
from mixtral_client.sse import SseDecoder
from mixtral_server.apikeys import KeyLimits
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.routes.specs import seed_of
from support.http import PATIENCE_S, state_of, until
from support.http import text_of as text_at
from support.live_server import LiveServer
from support.scripted_worker import FULL_LENGTH, ScriptedWorker, answer_to, text_of

CHAT: dict[str, Any] = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


async def data_of(answer: aiohttp.ClientResponse) -> list[str]:
    return [one.data for one in SseDecoder().feed(await answer.read())]


def test_seeds_of_answers_follow_from_the_seed_of_the_request() -> None:
    assert seed_of(7, 0) == 7
    assert seed_of(7, 2) == int(hashlib.sha256(b"7.2").hexdigest()[:16], 16) >> 1
    assert len({seed_of(seed, index) for seed in (-1, 0, 7) for index in range(8)}) == 24
    assert all(0 <= seed_of(-(2**63), index) < 2**63 for index in range(1, 8))


async def test_n_answers_are_n_jobs_with_seeds_of_their_own_and_one_usage(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    answer = await client.chat.completions.create(**CHAT, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [answer_to("hello")] * 3
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert sorted(job.spec.seed for job in worker.seen) == sorted(seed_of(7, index) for index in range(3))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 30, 32)


async def test_n_answers_without_a_seed_differ_in_their_seeds(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    await client.chat.completions.create(**CHAT, n=4)
    await client.chat.completions.create(**CHAT, n=4)
    assert len({job.spec.seed for job in worker.seen}) == 8


async def test_n_streams_come_in_one_each_token_with_its_index(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    body = CHAT | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    async with http.post("/v1/chat/completions", json=body) as answer:
        *data, end = await data_of(answer)
    chunks = [ChatCompletionChunk.model_validate_json(one) for one in data]
    assert end == "[DONE]"
    assert len({chunk.id for chunk in chunks}) == 1
    of_index: dict[int, list[Any]] = defaultdict(list)
    for chunk in chunks[:-1]:
        of_index[chunk.choices[0].index].append(chunk.choices[0])
    assert sorted(of_index) == [0, 1, 2]
    for choices in of_index.values():
        assert [one.delta.role for one in choices] == ["assistant"] + [None] * (FULL_LENGTH + 1)
        assert "".join(one.delta.content or "" for one in choices) == answer_to("hello")
        assert [one.finish_reason for one in choices] == [None] * (FULL_LENGTH + 1) + ["stop"]
    usage = chunks[-1].usage
    assert usage is not None
    assert chunks[-1].choices == []
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 30, 32)


async def test_first_answer_is_streamed_while_another_still_waits_for_a_slot(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedWorker(server.url, server.worker_key, slots=1, pause_after=FULL_LENGTH - 1) as worker,
        http.post("/v1/chat/completions", json=CHAT | {"n": 2, "stream": True}) as answer,
    ):
        first = await answer.content.readuntil(b"\n\n")
        assert json.loads(first.split(b"data: ")[1])["choices"][0]["index"] in (0, 1)
        assert len(worker.seen) == 1
        worker.go.set()
        data = await data_of(answer)
    assert [json.loads(one)["choices"][0]["finish_reason"] for one in data[:-1]].count("stop") == 2
    assert data[-1] == "[DONE]"


async def test_answers_are_opened_in_order_whichever_has_its_tokens_first(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        SecondFirst(server.url, server.worker_key) as worker,
        http.post("/v1/chat/completions", json=CHAT | {"n": 2, "seed": 7, "stream": True, "logprobs": True}) as answer,
    ):
        head = [json.loads((await answer.content.readuntil(b"\n\n")).split(b"data: ")[1])["choices"][0] for _ in range(3)]
        worker.go.set()
        data = await data_of(answer)
    assert [(one["index"], one["delta"].get("role")) for one in head] == [(0, "assistant"), (1, "assistant"), (1, None)]
    assert data[-1] == "[DONE]"
    assert not any("role" in json.loads(one)["choices"][0]["delta"] for one in data[:-1])


class SecondFirst(ScriptedWorker):
    """The answer with the request's own seed waits for `go`."""

    def _frame(self, one: Any) -> Frame | None:
        return None if one.job.spec.seed == 7 and not self.go.is_set() else super()._frame(one)


async def test_logprobs_of_n_answers_stand_with_their_own_answer(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    body = {"model": "mixtral_chat", "prompt": ["a", "b"], "logprobs": 1}
    async with http.post("/v1/completions", json=body) as answer:
        choices = (await answer.json())["choices"]
    async with http.post("/v1/completions", json=body | {"stream": True}) as answer:
        chunks = [json.loads(one)["choices"][0] for one in (await data_of(answer))[:-1]]
    for index, prompt in enumerate(("a", "b")):
        tokens = text_of(prompt).split()
        assert [one.strip() for one in choices[index]["logprobs"]["tokens"]] == tokens
        streamed = [one for one in chunks if one["index"] == index and one["logprobs"]]
        assert [one["logprobs"]["tokens"][0].strip() for one in streamed] == tokens
        assert [one["logprobs"]["text_offset"] for one in streamed] == [[offset] for offset in choices[index]["logprobs"]["text_offset"]]


# ---------------------------------------------------------------------------------------------- lists of prompts


@pytest.mark.parametrize(
    ("prompts", "said"), [(["one", "two words"], ["one", "two words"]), ([[1, 2], [3]], ["1 2", "3"])], ids=["texts", "ids"]
)
async def test_each_prompt_of_a_list_has_its_n_answers_in_order(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, prompts: Any, said: list[str]
) -> None:
    answer = await client.completions.create(model="mixtral_chat", prompt=prompts, n=2, seed=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(text_of(one) for one in said for _ in range(2)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(one.split()) for one in said)
    assert answer.usage.completion_tokens == 40
    # as if each prompt had been sent alone
    assert sorted(job.spec.seed for job in worker.seen) == sorted([5, 5, seed_of(5, 1), seed_of(5, 1)])


async def test_equal_prompts_without_a_seed_are_drawn_apart(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    await client.completions.create(model="mixtral_chat", prompt=["x", "x"])
    assert len({job.spec.seed for job in worker.seen}) == 2


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"prompt": ["x"] * 8, "n": 5}, "prompt", "a request may ask for 32 answers at most; got 8 prompts with n 5"),
        ({"best_of": 2}, "best_of", "best_of must be n, 1 here"),
        ({"n": 2, "best_of": 3}, "best_of", "best_of must be n, 2 here, for no answer is made that is not sent; got 3: leave it out"),
    ],
)
async def test_more_answers_than_there_may_be_are_refused(
    http: aiohttp.ClientSession, more: dict[str, Any], param: str, words: str
) -> None:
    async with http.post("/v1/completions", json={"model": "mixtral_chat", "prompt": "x"} | more) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert error["param"] == param
    assert words in error["message"]


# ---------------------------------------------------------------------------------------------- one fate


async def test_client_that_leaves_gives_up_all_its_answers(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with ScriptedWorker(server.url, server.worker_key, slots=2, pause_after=2) as worker:
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3, "stream": True}) as answer:
            await answer.content.readuntil(b"\n\n")
            await until(lambda: len(worker.seen) == 2)
            answer.close()
        await until(lambda: len(worker.dropped) == 2)
        for job in worker.seen:
            assert (await state_of(http, job.id, "cancelled", "done"))["state"] == "cancelled"
    async with ScriptedWorker(server.url, server.worker_key, slots=4) as worker:  # nothing is left that waits
        async with http.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "next"}]}) as answer:
            assert answer.status == 200
        assert len(worker.seen) == 1


async def test_answer_that_fails_fails_the_call_and_the_others_are_given_up_at_once(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, client_grace_s=600.0) as server:
        async with server.http() as http:
            await one_of_three_fails(server, http)


async def one_of_three_fails(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedWorker(server.url, server.worker_key, slots=1, pause_after=2) as worker,
        http.post("/v1/chat/completions", json=CHAT | {"n": 3, "stream": True}) as answer,
    ):
        await answer.content.readuntil(b"\n\n")
        worker.fail = FrameError(code="engine_failed", message="the engine met NaN")
        data = await data_of(answer)
        assert json.loads(data[-1])["error"]["code"] == "engine_failed"
        worker.fail = None
        worker.go.set()
        nothing_waits = 'mixtral_queue_waiting{endpoint="mixtral_chat"} 0'
        async with asyncio.timeout(PATIENCE_S):
            while nothing_waits not in await text_at(http, "/metrics"):  # noqa: ASYNC110 - the server has no event for it
                await asyncio.sleep(0.02)


async def test_answer_that_is_refused_at_once_is_an_http_status_also_for_n(server: LiveServer, client: openai.AsyncOpenAI) -> None:
    fail = FrameError(code="context_length_exceeded", message="prompt is 9,000 tokens; this worker takes at most 4,096")
    async with ScriptedWorker(server.url, server.worker_key, fail=fail):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="prompt is 9,000 tokens"):
                await client.chat.completions.create(**CHAT, n=3, stream=stream)


async def test_repeat_with_same_key_attaches_to_all_answers(server: LiveServer, http: aiohttp.ClientSession) -> None:
    key = {"Idempotency-Key": "three"}
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3, "stream": True}, headers=key) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()
        worker.go.set()
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3}, headers=key) as whole:
            choices = (await whole.json())["choices"]
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3, "stream": True}, headers=key) as again:
            chunks = [json.loads(one)["choices"][0] for one in (await data_of(again))[:-1]]
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 2}, headers=key) as other:
            assert other.status == 422
    assert [one["message"]["content"] for one in choices] == [answer_to("hello")] * 3
    for index in range(3):
        assert "".join(one["delta"].get("content", "") for one in chunks if one["index"] == index) == answer_to("hello")
    assert len(worker.seen) == 3


async def test_queue_without_room_for_all_answers_takes_none(empty_redis: str, tmp_path: Path) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", max_waiting_per_user=3)) as server:
        async with server.http() as http:
            async with http.post("/v1/chat/completions", json=CHAT | {"n": 4}) as refused:
                error = (await refused.json())["error"]
            assert (refused.status, error["code"]) == (429, "queue_full")
            assert "you have 0 jobs waiting for mixtral_chat, 3 at most; this request asks for 4 answers: ask for fewer" in error["message"]
            async with ScriptedWorker(server.url, server.worker_key) as worker:
                async with http.post("/v1/chat/completions", json=CHAT | {"n": 3}) as taken:
                    assert taken.status == 200
                assert len(worker.seen) == 3


async def test_rate_counts_every_answer_and_lets_in_all_or_none(server: LiveServer) -> None:
    key = await server.new_key("client", limits=KeyLimits(requests_per_minute=5))
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as http, ScriptedWorker(server.url, server.worker_key) as worker:
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3}) as first:
            assert (first.status, first.headers["X-RateLimit-Remaining-Requests"]) == (200, "2")
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 3}) as second:
            error = (await second.json())["error"]
            assert (second.status, second.headers["X-RateLimit-Remaining-Requests"]) == (429, "2")
            assert (
                "may start 5 chats a minute at mixtral_chat, 2 are left; this request asks for 3 answers: ask for fewer" in error["message"]
            )
        async with http.post("/v1/chat/completions", json=CHAT | {"n": 2}) as third:
            assert third.status == 200
        assert len(worker.seen) == 5
