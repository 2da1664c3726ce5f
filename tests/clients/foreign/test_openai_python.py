"""The openai package for Python, with and without async, as its own users call it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from pydantic import BaseModel

from mixtral_server.apikeys import KeyLimits
from mixtral_server.endpoints import EndpointConfig
from support.json_worker import JsonWorker
from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.scripted_worker import FULL_LENGTH, ScriptedWorker, answer_to, text_of
from support.worker_thread import WorkerThread

PATIENCE_S = 20.0
HELLO: Any = [{"role": "user", "content": "hello"}]
ASKED: Any = {"model": "mixtral_chat", "messages": HELLO}


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


class Person(BaseModel):
    name: str
    age: int


def test_whole_answer_with_every_parameter_of_text(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    answer = client.chat.completions.create(
        model="mixtral_chat",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
            {"role": "assistant", "content": "Once"},
        ],
        n=2,
        stop=["zebra"],
        seed=11,
        temperature=0.5,
        top_p=0.9,
        logprobs=True,
        top_logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        max_completion_tokens=FULL_LENGTH,
        response_format={"type": "text"},
        user="ann",
        extra_body={"top_k": 7, "min_tokens": 1, "continue_final_message": True},
    )
    prompt = "developer: be brief\nuser: hello\nassistant: Once"
    assert [choice.message.content for choice in answer.choices] == [text_of(prompt)] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * FULL_LENGTH
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    chances = answer.choices[0].logprobs
    assert chances is not None
    assert chances.content is not None
    assert "".join(one.token for one in chances.content) == text_of(prompt)
    assert all(len(one.top_logprobs) == 2 for one in chances.content)
    drawn = worker.seen[0].spec
    assert (drawn.seed, drawn.sampling.top_k, drawn.sampling.logit_bias, drawn.min_tokens) == (11, 7, {5: -100}, 1)


def test_stream_is_read_to_its_end_with_usage(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    with client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer_to("hello")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == FULL_LENGTH


def test_streaming_helper_puts_n_answers_together(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    with client.chat.completions.stream(**ASKED, n=2, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [choice.message.content for choice in final.choices] == [answer_to("hello")] * 2
    assert final.usage is not None
    assert final.usage.completion_tokens == 2 * FULL_LENGTH


async def test_async_streaming_helper_and_many_calls_at_once(server: LiveServer, worker: ScriptedWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:

        async def said(content: str) -> str | None:
            async with client.chat.completions.stream(model="mixtral_chat", messages=[{"role": "user", "content": content}]) as stream:
                return (await stream.get_final_completion()).choices[0].message.content

        names = [f"number {number}" for number in range(12)]
        assert await asyncio.gather(*map(said, names)) == [answer_to(name) for name in names]


def test_parse_helper_gets_the_object_that_its_model_describes(server: LiveServer, client: openai.OpenAI) -> None:
    with WorkerThread(server, JsonWorker) as worker:
        answer = client.chat.completions.parse(**ASKED, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=30)
    wanted = worker.seen[0].spec.response_format
    assert wanted is not None
    assert wanted.json_schema is not None
    assert wanted.json_schema.json_schema["required"] == ["name", "age"]


def test_completions_of_a_list_of_prompts(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    answer = client.completions.create(model="mixtral_chat", prompt=["one", "two"], logprobs=1, max_tokens=4)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, text_of("one", 4), "length"),
        (1, text_of("two", 4), "length"),
    ]
    assert answer.choices[1].logprobs is not None
    assert answer.choices[1].logprobs.tokens == text_of("two", 4).replace(" ", " |").split("|")[:-1]


def test_raw_response_shows_request_id_ignored_fields_and_rates(server: LiveServer, worker: ScriptedWorker) -> None:
    key = asyncio.run(server.new_key("client", user="rated", limits=KeyLimits(requests_per_minute=60)))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(**ASKED, n=2, store=True, metadata={"a": "b"}, service_tier="auto")
    assert sorted(raw.headers["x-ignored-fields"].split(", ")) == ["metadata", "service_tier", "store"]
    assert raw.headers["x-ratelimit-remaining-requests"] == "58"
    assert raw.headers["x-request-id"].startswith("req-")
    answer = raw.parse()
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.choices[1].message.content == answer_to("hello")


def test_retry_after_of_a_rate_is_read_by_the_package(server: LiveServer, worker: ScriptedWorker) -> None:
    key = asyncio.run(server.new_key("client", user="hasty", limits=KeyLimits(requests_per_minute=1)))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S) as client:
        client.chat.completions.create(**ASKED)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**ASKED)
        headers = refused.value.response.headers
        assert refused.value.code == "rate_limit_exceeded"
        assert client._parse_retry_after_header(headers) == int(headers["retry-after"])
        assert client._should_retry(refused.value.response)


def test_call_that_a_full_queue_refused_is_tried_again_by_the_package(tmp_path: Path) -> None:
    endpoint = EndpointConfig(name="mixtral_chat", max_waiting_per_user=1)
    with (
        RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis,
        LiveServer(tmp_path, redis.url, endpoint) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=3, timeout=PATIENCE_S) as client,
        ThreadPoolExecutor() as threads,
    ):
        requests.post(f"{server.url}/v1/jobs", json=ASKED, headers={"Authorization": f"Bearer {server.client_key}"}, timeout=PATIENCE_S)
        asked = threads.submit(client.chat.completions.with_raw_response.create, **ASKED)
        deadline = time.monotonic() + PATIENCE_S
        while 'status="429"' not in requests.get(f"{server.url}/metrics", timeout=PATIENCE_S).text:
            assert time.monotonic() < deadline
        with WorkerThread(server):
            raw = asked.result(PATIENCE_S)
    assert raw.retries_taken >= 1
    assert raw.parse().choices[0].message.content == answer_to("hello")


def test_closed_stream_with_a_key_is_taken_up_again_from_its_first_token(server: LiveServer, client: openai.OpenAI) -> None:
    with WorkerThread(server, pause_after=3) as worker:
        key = {"Idempotency-Key": "taken up"}
        with client.chat.completions.create(**ASKED, stream=True, n=2, extra_headers=key) as stream:
            first = next(iter(stream))
        worker.pause_after = None
        with client.chat.completions.create(**ASKED, stream=True, n=2, extra_headers=key) as stream:
            chunks = list(stream)
        assert len(worker.seen) == 2
    assert {chunk.id for chunk in chunks} == {first.id}
    for index in range(2):
        said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(said) == answer_to("hello")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"n": 9}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ],
)
def test_what_is_refused_is_its_bad_request_error_with_the_field(client: openai.OpenAI, more: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, **more)
    assert (refused.value.code, refused.value.param, refused.value.type) == ("invalid_request", param, "invalid_request_error")


def test_images_are_refused_with_what_to_do(client: openai.OpenAI) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError, match=r"content parts must be of type 'text' .* got 'image_url'"):
        client.chat.completions.create(model="mixtral_chat", messages=[{"role": "user", "content": [part]}])


def test_models_say_what_they_take(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    [model] = client.models.list()
    assert model.id == "mixtral_chat"
    assert model.model_extra is not None
    assert model.model_extra["max_tokens"] == 32_768
    assert client.models.retrieve("mixtral_chat").owned_by == "mixtral-chat"
