"""What a caller asks of the draws: taken whole, refused with the rule where it is wrong, and answered in each wire's form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from mixtral_client.protocol import FrameError, JobAccepted, SamplingFields, TokenLogprobs
from mixtral_client.sse import SseDecoder
from mixtral_server.endpoints import EndpointConfig
from support.http import PATIENCE_S, until
from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker, answer_to, logprobs_of, text_of, token

SCHEMA = {"type": "object", "properties": {"age": {"type": ["integer", "null"], "default": None}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
ASKED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": -1.0,
    "frequency_penalty": 2.0,
    "logit_bias": {"7": -100, "300": 1.5},
    "seed": -3,
    "stop": ["."],
    "stop_token_ids": [5, 6],
    "min_tokens": 4,
    "ignore_eos": True,
    "response_format": FORMAT,
}
WIRES = {
    "/v1/chat/completions": {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"model": "mixtral_chat", "prompt": "hello"},
    "/v1/jobs": {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]},
}
PROMPTS = {"/v1/chat/completions": "user: hello", "/v1/completions": "hello", "/v1/jobs": "user: hello"}


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def expected(prompt: str, offset: int, top: int) -> dict[str, Any]:
    """An entry of OpenAI's logprobs."""

    def one(chance: Any) -> dict[str, Any]:
        return {"token": chance.text, "logprob": chance.logprob, "bytes": list(bytes.fromhex(chance.bytes)) or None}

    chances = logprobs_of(prompt, offset, top)
    return one(chances) | {"top_logprobs": [one(chance) for chance in chances.top]}


@pytest.mark.parametrize("path", WIRES)
async def test_every_field_reaches_the_worker(http: aiohttp.ClientSession, worker: ScriptedWorker, path: str) -> None:
    assert ASKED.keys() == SamplingFields.model_fields.keys()
    async with http.post(path, json=WIRES[path] | ASKED) as answer:
        assert answer.status in (200, 202), await answer.text()
    await until(lambda: bool(worker.seen))
    spec = worker.seen[0].spec
    got = spec.model_dump(by_alias=True, exclude_unset=True) | spec.sampling.model_dump()
    assert got["response_format"]["json_schema"]["schema"] == SCHEMA
    for name in ASKED.keys() - {"response_format", "logit_bias"}:
        assert got[name] == ASKED[name]
    assert got["logit_bias"] == {7: -100, 300: 1.5}


async def test_what_is_left_out_takes_the_endpoints_default(empty_redis: str, tmp_path: Path) -> None:
    endpoint = EndpointConfig(name="mixtral_chat", min_p=0.05, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3)
    body = WIRES["/v1/chat/completions"] | {"min_p": 0}
    with LiveServer(tmp_path, empty_redis, endpoint) as server:
        async with (
            server.http() as http,
            ScriptedWorker(server.url, server.worker_key) as worker,
            http.post("/v1/chat/completions", json=body) as answer,
        ):
            assert answer.status == 200
    drawn = worker.seen[0].spec.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p) == (0.8, 0.9, 40, 0)
    assert (drawn.repetition_penalty, drawn.presence_penalty, drawn.frequency_penalty) == (1.1, 0.2, 0.3)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"min_p": 1.5}, "min_p", "must be less than or equal to 1; got 1.5"),
    ({"min_p": "x"}, "min_p", "must be a valid number"),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than or equal to 0.1; got 0"),
    ({"presence_penalty": 2.1}, "presence_penalty", "must be less than or equal to 2; got 2.1"),
    ({"frequency_penalty": -3}, "frequency_penalty", "must be greater than or equal to -2; got -3"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "must be a valid integer"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "must be greater than or equal to 0"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "must be less than or equal to 100; got 101"),
    ({"logit_bias": {str(id): 1 for id in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": []}, "logit_bias", "must be a valid dictionary"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids", "at most 64"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids[0]", "less than or equal to 2147483647"),
    ({"min_tokens": -1}, "min_tokens", "must be greater than or equal to 0; got -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "may be as high as max_tokens at most, 8 here; got 9"),
    ({"ignore_eos": "perhaps"}, "ignore_eos", "must be a valid boolean"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text', 'json_object' or 'json_schema'; got 'xml'"),
    ({"response_format": "json"}, "response_format", "must be"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be given with type 'json_schema'"),
    ({"response_format": {"type": "text", "json_schema": FORMAT["json_schema"]}}, "response_format", "only with it"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema", "valid dictionary"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
        "response_format.json_schema.schema",
        "may be 65,536 bytes of JSON at most; got 70,013",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(500)}}},
        "response_format.json_schema.schema",
        "may be nested 64 levels deep at most",
    ),
]
CHAT_WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be less than or equal to 20; got 21"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs to be true"),
    ({"truncate": "middle"}, "truncate", "must be 'oldest_turns'; got 'middle'"),
]


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize(("more", "param", "words"), WRONG)
async def test_a_wrong_value_is_refused_with_its_rule(http: aiohttp.ClientSession, path: str, more: Any, param: str, words: str) -> None:
    await assert_refused(http, path, WIRES[path] | more, param, words)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs"])
@pytest.mark.parametrize(("more", "param", "words"), CHAT_WRONG)
async def test_a_wrong_value_of_a_chat_is_refused_with_its_rule(
    http: aiohttp.ClientSession, path: str, more: Any, param: str, words: str
) -> None:
    await assert_refused(http, path, WIRES[path] | more, param, words)


async def test_a_prompt_has_no_turns_to_leave_out_and_no_more_than_20_logprobs(http: aiohttp.ClientSession) -> None:
    await assert_refused(
        http, "/v1/jobs", {"model": "mixtral_chat", "prompt": "x", "truncate": "oldest_turns"}, "truncate", "give messages"
    )
    await assert_refused(http, "/v1/completions", WIRES["/v1/completions"] | {"logprobs": 21}, "logprobs", "less than or equal to 20")


async def assert_refused(http: aiohttp.ClientSession, path: str, body: Any, param: str, words: str) -> None:
    async with http.post(path, json=body) as answer:
        assert answer.status == 400, await answer.text()
        error = (await answer.json())["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param)
    assert words in error["message"]


@pytest.mark.parametrize("code", ["response_format_refused", "response_format_unavailable", "token_out_of_vocabulary"])
async def test_what_the_worker_cannot_do_for_a_caller_is_400(server: LiveServer, client: openai.AsyncOpenAI, code: str) -> None:
    async with ScriptedWorker(server.url, server.worker_key, fail=FrameError(code=code, message="change the schema")):
        with pytest.raises(openai.BadRequestError, match="change the schema") as refused:
            await client.chat.completions.create(**WIRES["/v1/chat/completions"], response_format=FORMAT)
    assert refused.value.code == code


# ---------------------------------------------------------------------------------------------- logprobs


async def test_openai_package_gets_logprobs_of_a_whole_answer(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    answer = await client.chat.completions.create(**WIRES["/v1/chat/completions"], logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [one.model_dump() for one in logprobs.content or ()] == [expected("user: hello", offset, 3) for offset in range(1, 11)]
    assert answer.choices[0].message.content == answer_to("hello")


async def test_openai_package_streams_each_token_with_its_logprobs(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    stream = await client.chat.completions.create(**WIRES["/v1/chat/completions"], logprobs=True, stream=True)
    *tokens, last = [chunk.choices[0] async for chunk in stream]
    assert tokens[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in tokens) == answer_to("hello")
    got = [one.model_dump() for choice in tokens if choice.logprobs for one in choice.logprobs.content or ()]
    assert got == [expected("user: hello", offset, 0) for offset in range(1, 11)]
    assert last.logprobs is None


async def test_completions_give_logprobs_in_openais_older_form(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    whole = (await client.completions.create(**WIRES["/v1/completions"], logprobs=2)).choices[0]
    assert whole.logprobs is not None
    texts = [token("hello", offset)[1] for offset in range(1, 11)]
    offsets = [len("".join(texts[:place])) for place in range(10)]
    assert whole.logprobs.tokens == texts
    assert whole.logprobs.token_logprobs == [-0.25] * 10
    assert whole.logprobs.top_logprobs == [{text: -0.25, "\ufffd": -2.0} for text in texts]
    assert whole.logprobs.text_offset == offsets
    stream = await client.completions.create(**WIRES["/v1/completions"], logprobs=2, stream=True)
    *tokens, _ = [chunk.choices[0] async for chunk in stream]
    assert "".join(one.text for one in tokens) == text_of("hello") == whole.text
    assert [one.logprobs and one.logprobs.text_offset for one in tokens] == [[offset] for offset in offsets]


async def test_without_the_wish_there_are_none(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    async with http.post("/v1/chat/completions", json=WIRES["/v1/chat/completions"]) as answer:
        assert (await answer.json())["choices"][0]["logprobs"] is None
    assert "logprobs" not in (await native(http, await put(http)))[0]


async def put(http: aiohttp.ClientSession, **more: Any) -> str:
    async with http.post("/v1/jobs", json=WIRES["/v1/jobs"] | more) as answer:
        assert answer.status == 202, await answer.text()
        return JobAccepted.model_validate(await answer.json()).id


async def native(http: aiohttp.ClientSession, job_id: str, **query: str) -> list[dict[str, Any]]:
    """The fields of every token's event."""
    async with http.get(f"/v1/jobs/{job_id}/events", params=query) as answer:
        assert answer.status == 200, await answer.text()
        return [json.loads(one.data) for one in SseDecoder().feed(await answer.read()) if one.event == "token"]


async def test_native_events_carry_logprobs_live_from_the_log_after_a_resume_and_after_a_move(
    server: LiveServer, http: aiohttp.ClientSession
) -> None:
    job_id = await put(http, logprobs=True, top_logprobs=2)
    wanted = [logprobs_of("user: hello", offset, 2) for offset in range(1, 11)]
    async with ScriptedWorker(server.url, server.worker_key, pause_after=4) as first:
        await until(lambda: any(one.produced == 4 for one in first._running.values()))
    async with ScriptedWorker(server.url, server.worker_key, per_turn=1):
        live = await native(http, job_id)
    assert [TokenLogprobs.model_validate(one["logprobs"]) for one in live] == wanted
    assert await native(http, job_id) == live
    assert await native(http, job_id, after="7") == live[7:]


async def test_a_frame_that_repeats_tokens_of_the_log_adds_the_logprobs_of_the_others_alone(
    server: LiveServer, http: aiohttp.ClientSession
) -> None:
    job_id = await put(http, logprobs=True)
    async with ScriptedWorker(server.url, server.worker_key, pause_after=3) as worker:
        await until(lambda: any(one.produced == 3 for one in worker._running.values()))
        for one in worker._running.values():
            one.produced = 1  # sent again from offset 2 on, with what follows
        worker.per_turn = 20
        worker.go.set()
        told = await native(http, job_id)
    assert [one["logprobs"]["id"] for one in told] == [token("user: hello", offset)[0] for offset in range(1, 11)]


async def test_usage_says_how_many_messages_were_left_out(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    plain = await client.chat.completions.create(**WIRES["/v1/chat/completions"])
    shortened = await client.chat.completions.create(**WIRES["/v1/chat/completions"], extra_body={"truncate": "oldest_turns"})
    assert [one.usage and one.usage.model_dump()["dropped_messages"] for one in (plain, shortened)] == [0, 4]
