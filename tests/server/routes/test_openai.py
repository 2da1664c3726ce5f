"""OpenAI's wire, by the openai package and by hand: answers, streams, errors, and what becomes of a job whose client leaves."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from mixtral_client.protocol import ChatCompletionChunk, Completion, FrameError
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.follower import Follower
from mixtral_server.routes.openai import Choice
from support.http import PATIENCE_S, state_of, until
from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.scripted_worker import ScriptedWorker, answer_to, text_of


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "mixtral_chat", "messages": [{"role": "user", "content": content}], **more}


async def events_of(answer: aiohttp.ClientResponse) -> list[tuple[str | None, str]]:
    """(id, data) of every event of the stream, comments left out."""
    blocks = (await answer.text()).split("\n\n")
    lines = [dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")) for block in blocks]
    return [(one.get("id"), one["data"]) for one in lines if "data" in one]


# ---------------------------------------------------------------------------------------------- the openai package


async def test_openai_package_gets_whole_answer_with_usage(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    answer = await client.chat.completions.create(**chat("hello there"))
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", answer_to("hello there"), "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 10, 13)
    assert (answer.model, answer.object) == ("mixtral_chat", "chat.completion")


async def test_answered_calls_leave_nothing_to_the_garbage_collector(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            await client.chat.completions.create(**chat("hello"))
            async for _ in await client.chat.completions.create(**chat("hello"), stream=True):
                pass
        await until(lambda: not any(type(one) in (Follower, Choice) for one in gc.get_objects()))
    finally:
        gc.enable()


async def test_openai_package_streams_one_chunk_per_token_and_usage_last(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    stream = await client.chat.completions.create(**chat("hello"), stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    *tokens, last, usage = chunks
    assert len(tokens) == 10
    assert tokens[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in tokens) == answer_to("hello")
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 10


async def test_openai_package_stream_without_usage_option_has_no_usage_chunk(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    chunks = [chunk async for chunk in await client.chat.completions.create(**chat(), stream=True)]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_openai_package_finish_reason_is_length_when_max_tokens_cuts(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    answer = await client.chat.completions.create(**chat("cut"), max_completion_tokens=4)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (answer_to("cut", 4), "length")


async def test_openai_package_completes_text_and_ids(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    text = await client.completions.create(model="mixtral_chat", prompt="Once upon")
    assert (text.choices[0].text, text.choices[0].finish_reason, text.object) == (text_of("Once upon"), "stop", "text_completion")
    ids = await client.completions.create(model="mixtral_chat", prompt=[1, 733, 16289])
    assert ids.choices[0].text == text_of("1 733 16289")
    assert worker.seen[-1].spec.prompt == [1, 733, 16289]


async def test_openai_package_streams_completions(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    chunks = [chunk async for chunk in await client.completions.create(model="mixtral_chat", prompt="Once", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of("Once")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 10 + ["stop"]


async def test_openai_package_lists_models_and_finds_one(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["mixtral_chat"]
    assert (await client.models.retrieve("mixtral_chat")).owned_by == "mixtral-chat"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here; this server has mixtral_chat"):
        await client.models.retrieve("gpt")


async def test_model_card_says_what_the_server_and_its_workers_know(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async def card() -> dict[str, Any]:
        async with http.get("/v1/models/mixtral_chat") as answer:
            one: dict[str, Any] = await answer.json()
        async with http.get("/v1/models") as answer:
            assert (await answer.json())["data"][0].keys() == one.keys()
        return one

    alone = await card()
    assert (alone["title"], alone["default_max_tokens"], alone["max_tokens"]) == ("Mixtral", 512, 32_768)
    assert (alone["workers"], alone["served"], alone["context_length"], alone["max_model_len"]) == (0, [], None, None)
    async with (
        ScriptedWorker(server.url, server.worker_key, max_seq_len=4096),
        ScriptedWorker(server.url, server.worker_key, max_seq_len=32_768, model="8x7b"),
        asyncio.timeout(PATIENCE_S),
    ):
        while (served := await card())["workers"] != 2:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.05)  # what is said of workers may be a second old
    assert (served["served"], served["context_length"], served["largest_context_length"]) == (["8x7b", "none"], 4096, 32_768)
    assert served["max_model_len"] == 4096


async def test_models_are_listed_while_redis_is_away(tmp_path: Path) -> None:
    with RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis, LiveServer(tmp_path, redis.url) as server:
        async with server.http() as http:
            redis.crash()
            async with http.get("/v1/models") as answer:
                assert answer.status == 200
                card = (await answer.json())["data"][0]
    assert (card["id"], card["workers"], card["context_length"]) == ("mixtral_chat", None, None)


async def test_openai_package_raises_its_own_errors(server: LiveServer, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(**chat() | {"model": "gpt-4"})
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match=r"temperature must be less than or equal to 2; got 3"):
        await client.chat.completions.create(**chat(), temperature=3)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="mx-c-wrong").chat.completions.create(**chat())
    with pytest.raises(openai.PermissionDeniedError, match="scope client; the one given has scope worker"):
        await client.with_options(api_key=server.worker_key).chat.completions.create(**chat())


async def test_early_error_of_the_worker_is_an_http_status_even_for_a_stream(server: LiveServer, client: openai.AsyncOpenAI) -> None:
    fail = FrameError(code="context_length_exceeded", message="prompt is 9,000 tokens; this worker takes at most 4,096")
    async with ScriptedWorker(server.url, server.worker_key, fail=fail):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="prompt is 9,000 tokens") as refused:
                await client.chat.completions.create(**chat(), stream=stream)
            assert refused.value.code == "context_length_exceeded"


async def test_sampling_reaches_the_worker_with_defaults_filled_in(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    await client.chat.completions.create(**chat())
    await client.chat.completions.create(**chat(), temperature=0, top_p=0.5, seed=7, stop=["a", "b"], max_tokens=3, extra_body={"top_k": 3})
    plain, given = (job.spec for job in worker.seen)
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k, plain.max_tokens, plain.stop) == (0.8, 0.9, 40, 512, [])
    assert (given.sampling.temperature, given.sampling.top_p, given.sampling.top_k, given.max_tokens, given.stop, given.seed) == (
        0,
        0.5,
        3,
        3,
        ["a", "b"],
        7,
    )


async def test_each_job_without_a_seed_gets_one_of_its_own(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    await asyncio.gather(*(client.chat.completions.create(**chat()) for _ in range(3)))
    assert len({job.spec.seed for job in worker.seen}) == 3


# ---------------------------------------------------------------------------------------------- the bytes of a stream


async def test_stream_chunks_are_of_the_wire_carry_ids_and_end_with_done(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    async with http.post("/v1/chat/completions", json=chat(stream=True)) as answer:
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.content_type == "text/event-stream"
        events = await events_of(answer)
    assert events[-1][1] == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(data) for _, data in events[:-1]]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-mixtral_chat.0-")
    offsets = [int(id.split(".")[0]) for id, _ in events[:10] if id is not None]
    assert offsets == list(range(1, 11))


async def test_completion_stream_chunks_are_of_the_wire(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    async with http.post("/v1/completions", json={"model": "mixtral_chat", "prompt": "x", "stream": True}) as answer:
        events = await events_of(answer)
    chunks = [Completion.model_validate_json(data) for _, data in events[:-1]]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 10 + ["stop"]


async def test_stream_broken_midway_ends_with_error_object_and_no_done(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker,
        http.post("/v1/chat/completions", json=chat(stream=True)) as answer,
    ):
        await answer.content.readuntil(b"\n\n")
        worker.fail = FrameError(code="engine_failed", message="the engine met NaN")
        events = await events_of(answer)
    error = json.loads(events[-1][1])["error"]
    assert (error["code"], error["message"]) == ("engine_failed", "the engine met NaN")
    assert "[DONE]" not in [data for _, data in events]


async def test_cancelled_job_ends_its_stream_with_error_object(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with (
        ScriptedWorker(server.url, server.worker_key, pause_after=1),
        http.post("/v1/chat/completions", json=chat(stream=True)) as answer,
    ):
        first = await answer.content.readuntil(b"\n\n")
        job_id = json.loads(first.split(b"data: ")[1])["id"].removeprefix("chatcmpl-")
        async with http.delete(f"/v1/jobs/{job_id}") as cancelled:
            assert cancelled.status == 200
        events = await events_of(answer)
    assert json.loads(events[-1][1])["error"]["code"] == "cancelled"


async def test_stream_that_waits_sends_comments(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, head_hold_s=0.05, ping_s=0.05) as server:
        async with server.http() as http, http.post("/v1/chat/completions", json=chat(stream=True)) as answer:
            assert answer.status == 200
            assert await answer.content.readuntil(b"\n") == b": ping\n"
            assert await answer.content.readuntil(b"\n") == b": ping\n"


async def test_openai_package_reads_on_after_a_pause_in_the_middle_of_an_answer(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, ping_s=0.05) as server:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.client_key, max_retries=0, timeout=PATIENCE_S) as client,
            ScriptedWorker(server.url, server.worker_key, pause_after=3) as worker,
        ):
            stream = await client.chat.completions.create(**chat("hello"), stream=True)
            asyncio.get_running_loop().call_later(1.0, worker.go.set)  # twenty comments later
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == answer_to("hello")


# ---------------------------------------------------------------------------------------------- clients that leave


async def test_job_of_a_stream_whose_client_left_is_cancelled(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        async with http.post("/v1/chat/completions", json=chat(stream=True)) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()
        assert (await state_of(http, worker.seen[0].id, "cancelled", "done"))["state"] == "cancelled"
        await until(lambda: bool(worker.dropped))


async def test_job_of_a_waiting_call_whose_client_left_is_cancelled(server: LiveServer, http: aiohttp.ClientSession) -> None:
    async with ScriptedWorker(server.url, server.worker_key, pause_after=0) as worker:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=chat()).__aenter__())
        await until(lambda: bool(worker.seen))
        asking.cancel()
        await asyncio.wait([asking])
        assert (await state_of(http, worker.seen[0].id, "cancelled", "done"))["state"] == "cancelled"


async def test_client_gone_within_grace_leaves_the_job_running(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, client_grace_s=600.0) as server:
        async with server.http() as http, ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
            async with http.post("/v1/chat/completions", json=chat(stream=True)) as answer:
                await answer.content.readuntil(b"\n\n")
                answer.close()
            worker.go.set()
            assert (await state_of(http, worker.seen[0].id, "cancelled", "done"))["state"] == "done"


# ---------------------------------------------------------------------------------------------- idempotency


async def test_repeat_with_same_key_attaches_to_the_same_job_from_its_first_token(server: LiveServer, http: aiohttp.ClientSession) -> None:
    key = {"Idempotency-Key": "one"}
    async with ScriptedWorker(server.url, server.worker_key, pause_after=2) as worker:
        async with http.post("/v1/chat/completions", json=chat(stream=True), headers=key) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()  # the job of a keyed call outlives its client
        worker.go.set()
        async with http.post("/v1/chat/completions", json=chat(stream=True), headers=key) as answer:
            chunks = [json.loads(data) for _, data in (await events_of(answer))[:-1]]
        async with http.post("/v1/chat/completions", json=chat(), headers=key) as whole:
            assert (await whole.json())["choices"][0]["message"]["content"] == answer_to("hello")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer_to("hello")
    assert len(worker.seen) == 1


async def test_same_key_with_another_body_is_refused(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    key = {"Idempotency-Key": "two"}
    async with http.post("/v1/chat/completions", json=chat("a"), headers=key) as first:
        assert first.status == 200
    async with http.post("/v1/chat/completions", json=chat("b"), headers=key) as second:
        assert second.status == 422
        assert (await second.json())["error"]["code"] == "idempotency_conflict"


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": "mixtral_chat"}, "messages", "messages is missing"),
        (chat() | {"messages": []}, "messages", "must have at least 1 item"),
        (chat() | {"messages": "hello"}, "messages", "must be a valid list; got 'hello'"),
        (
            chat() | {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "'system', 'developer', 'user' or 'assistant'; got 'tool'",
        ),
        (chat() | {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        (
            chat() | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "content parts must be of type 'text'",
        ),
        (chat() | {"messages": [{"role": "system", "content": "x"}]}, "messages", "at least one message of role user"),
        (chat() | {"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role", "must be of role user; got assistant"),
        (chat() | {"messages": [{"role": "user", "content": "x"}] * 2}, "messages[1].role", "must be of role assistant; got user"),
        (
            chat() | {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "messages[1].role",
            "must be of role assistant; got system",
        ),
        (chat(max_tokens=0), "max_tokens", "must be greater than or equal to 1; got 0"),
        (chat(max_tokens=32_769), "max_tokens", "may be 32,768 at most for mixtral_chat; got 32,769"),
        (chat(max_completion_tokens=10**6), "max_completion_tokens", "got 1,000,000"),
        (chat(max_tokens=1, max_completion_tokens=2), "max_completion_tokens", "two names of one limit; got 1 and 2"),
        (chat(temperature=-0.1), "temperature", "must be greater than or equal to 0; got -0.1"),
        (chat(temperature="hot"), "temperature", "must be a valid number, unable to parse string as a number; got 'hot'"),
        (chat(top_p=0), "top_p", "must be greater than 0; got 0"),
        (chat(seed=2**63), "seed", "must be less than or equal to"),
        (chat(seed=10**30), "seed", "must be a whole number within 64 bits; got 1e+30"),
        (chat(stop=[""]), "stop[0]", "must have at least 1 character; got ''"),
        (chat(stop=["x"] * 17), "stop", "must have at most 16 items"),
        (chat(n=9), "n", "must be less than or equal to 8; got 9"),
        (chat(n=0), "n", "must be greater than or equal to 1; got 0"),
        (chat(model=None), "model", "must be a valid string; got None"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
async def test_wrong_chat_is_refused_with_field_rule_and_what_was_given(
    http: aiohttp.ClientSession, body: dict[str, Any], param: str, words: str
) -> None:
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 400, await answer.text()
        error = (await answer.json())["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_request", param)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        (None, "prompt", "prompt must be a text, a list of token ids, or a list of either; got None"),
        ("", "prompt", "must have at least 1 character"),
        ([], "prompt", "must have at least 1 item"),
        ([1, "x"], "prompt[1]", "must be a valid integer"),
        ([1, -1], "prompt[1]", "must be greater than or equal to 0; got -1"),
        ([2**31], "prompt[0]", "must be less than or equal to 2147483647; got 2147483648"),
        (["a", ""], "prompt[1]", "must have at least 1 character; got ''"),
        (["a", 1], "prompt[1]", "must be a valid string; got 1"),
        ([[1], []], "prompt[1]", "must have at least 1 item"),
        ([[1, "x"]], "prompt[0][1]", "must be a valid integer"),
        (["a"] * 33, "prompt", "must have at most 32 items"),
    ],
)
async def test_wrong_prompt_is_refused_with_field_rule_and_what_was_given(
    http: aiohttp.ClientSession, prompt: Any, param: str, words: str
) -> None:
    async with http.post("/v1/completions", json={"model": "mixtral_chat", "prompt": prompt}) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_leading_system_and_developer_messages_and_a_last_assistant_message_are_taken(
    http: aiohttp.ClientSession, worker: ScriptedWorker
) -> None:
    roles = ["system", "developer", "user", "assistant", "user", "assistant"]
    async with http.post("/v1/chat/completions", json=chat() | {"messages": [{"role": role, "content": "x"} for role in roles]}) as answer:
        assert answer.status == 200
    assert worker.seen[0].spec.messages is not None
    assert [message.role for message in worker.seen[0].spec.messages] == roles


async def test_full_queue_is_answered_429_with_retry_after(empty_redis: str, tmp_path: Any) -> None:
    with LiveServer(tmp_path, empty_redis, EndpointConfig(name="mixtral_chat", max_waiting=1)) as server:
        async with server.http() as http:
            async with http.post("/v1/jobs", json=chat()) as first:
                assert first.status == 202
            async with http.post("/v1/chat/completions", json=chat()) as answer:
                assert answer.status == 429
                assert int(answer.headers["Retry-After"]) >= 1
                assert (await answer.json())["error"]["code"] == "queue_full"
