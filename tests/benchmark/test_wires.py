"""What was measured is what the scripted server did, to the last bit, on both wires."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any

import pytest
from aiohttp import web

from mixtral_benchmark.measure import Arrival, Chat, figures
from support.scripted_server import Stage, chunk, done, native, openai_end, sse, token, usage


async def one(stage: Stage, api: str, script: Coroutine[Any, Any, None], **more: Any) -> Chat:
    chats = await stage.play(stage.load(api, **more), script)
    assert len(chats) == 1
    return chats[0]


async def fails(stage: Stage, api: str, data: bytes, **more: Any) -> str:
    """The code word after the stream carried data and ended."""
    chat = await one(stage, api, stage.end(1.0, 0, data), **more)
    assert not chat.completed
    assert chat.failure is not None
    return chat.failure.code


async def test_openai_times_are_those_of_the_script(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(0.5, 0, chunk(1, "Once"), arrivals=1)
        await stage.at(0.75, 0, chunk(2, " upon"), arrivals=1)
        await stage.at(1.75, 0, chunk(3, " a"), arrivals=1)
        await stage.end(2.0, 0, openai_end(3))

    load = stage.load("openai")
    chats = await stage.play(load, script())
    assert chats[0].arrivals == [Arrival(0.5, 1), Arrival(0.75, 1), Arrival(1.75, 1)]
    found = figures(chats, load.started_s, load.ended_s)
    expected = {
        "mean_ttft_ms": 500,
        "mean_tpot_ms": 625,
        "p99_itl_ms": 992.5,
        "mean_e2el_ms": 2000,
        "output_throughput": 1.5,
        "duration": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert (chats[0].prompt_tokens, chats[0].finish, chats[0].token_source) == (11, "stop", "offsets")


async def test_native_times_are_those_of_the_script_and_of_the_server(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(0.5, 0, native("queued", position=1, eta_s=None) + token(1), arrivals=1)
        await stage.at(0.75, 0, token(2), arrivals=1)
        await stage.end(1.0, 0, done(2, "length", queue_s=0.125, first_token_s=0.25, total_s=0.9))

    chat = await one(stage, "native", script())
    assert chat.arrivals == [Arrival(0.5, 1), Arrival(0.75, 1)]
    assert (chat.ended_s, chat.finish, chat.job, chat.tokens) == (1.0, "length", "job-0", 2)
    assert (chat.server_queue_s, chat.server_first_token_s, chat.prompt_tokens) == (0.125, 0.25, 11)


@pytest.mark.parametrize(("api", "write"), [("openai", lambda n: chunk(n, "x")), ("native", token)])
async def test_tokens_of_one_read_share_its_time(stage: Stage, api: str, write: Any) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, write(1) + write(2) + write(3), arrivals=3)
        await stage.at(2.0, 0, write(4), arrivals=1)
        await stage.end(3.0, 0, openai_end(4) if api == "openai" else done(4))

    chats = await stage.play(load := stage.load(api), script())
    found = figures(chats, load.started_s, load.ended_s)
    assert [found[name] for name in ("frames", "frames_with_several_tokens", "tokens_in_shared_frames", "max_tokens_in_a_frame")] == [
        2,
        1,
        3,
        3,
    ]
    assert found["mean_itl_ms"] == pytest.approx(1000 / 3)
    assert found["mean_frame_gap_ms"] == 1000


async def test_event_split_over_two_reads_has_the_time_of_the_second(stage: Stage) -> None:
    data = token(1)

    async def script() -> None:
        await stage.at(1.0, 0, data[:9], arrivals=0)
        await stage.at(2.0, 0, data[9:], arrivals=1)
        await stage.end(3.0, 0, done(1))

    assert (await one(stage, "native", script())).arrivals == [Arrival(2.0, 1)]


async def test_openai_chunk_that_skips_offsets_brings_that_many_tokens(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, chunk(2, "Once upon"), arrivals=1)
        await stage.at(2.0, 0, chunk(3, ""), arrivals=1)
        await stage.end(3.0, 0, openai_end(3))

    chat = await one(stage, "openai", script())
    assert chat.arrivals == [Arrival(1.0, 2), Arrival(2.0, 1)]
    assert chat.tokens == 3


async def test_openai_role_chunk_is_no_first_token(stage: Stage) -> None:
    role = sse({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})

    async def script() -> None:
        await stage.at(1.0, 0, role, arrivals=0)
        await stage.at(2.0, 0, chunk(None, "Once"), arrivals=1)
        await stage.end(3.0, 0, openai_end(1))

    assert (await one(stage, "openai", script())).arrivals[0].at_s == 2.0


async def test_openai_server_without_offsets_is_counted_by_its_usage(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, chunk(None, "Once upon"), arrivals=1)
        await stage.at(2.0, 0, chunk(None, " a time"), arrivals=1)
        await stage.end(3.0, 0, openai_end(5))

    chat = await one(stage, "openai", script())
    assert (chat.tokens, chat.token_source) == (5, "usage")


async def test_native_rewind_and_move_are_counted_and_tokens_stay_exact(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, token(1) + token(2), arrivals=2)
        await stage.at(2.0, 0, native("moved", attempt=2) + native("rewind", to=1) + token(2) + token(3), arrivals=2)
        await stage.end(3.0, 0, done(3))

    chat = await one(stage, "native", script())
    assert (chat.completed, chat.tokens, chat.moves, chat.rewinds) == (True, 3, 1, 1)


async def test_native_event_of_an_unknown_kind_is_passed_over(stage: Stage) -> None:
    chat = await one(stage, "native", stage.end(1.0, 0, token(1) + native("unheard_of", what=1) + done(1)))
    assert (chat.completed, chat.tokens) == (True, 1)


async def test_verified_stream_equals_the_log(stage: Stage) -> None:
    stage.server.views["job-0"] = {"id": "job-0", "model": "m", "state": "done", "created": 0, "tokens": 2, "text": "Once upon"}
    chat = await one(stage, "native", stage.end(1.0, 0, token(1, "Once") + token(2, " upon") + done(2)), verify=True)
    assert chat.completed


async def test_stream_that_differs_from_the_log_fails_verification_though_the_times_stand(stage: Stage) -> None:
    stage.server.views["job-0"] = {"id": "job-0", "model": "m", "state": "done", "created": 0, "tokens": 2, "text": "Once more"}
    assert await fails(stage, "native", token(1, "Once") + token(2, " upon") + done(2), verify=True) == "verify_text"
    assert stage.server.cancelled == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (token(1) + token(3), "stream_gap"),
        (token(1) + token(1), "stream_repeat"),
        (token(1), "stream_cut"),
        (token(1) + native("error", error={"message": "m", "type": "server_error", "code": "engine_failed"}), "engine_failed"),
        (token(1) + done(1, "cancelled"), "cancelled"),
        (token(1) + native("token", text="no offset"), "unreadable_stream"),
        (b"event: token\n" + sse("Once upon"), "unreadable_stream"),
    ],
)
async def test_native_failure_is_counted_under_its_name_and_its_job_cancelled(stage: Stage, data: bytes, code: str) -> None:
    assert await fails(stage, "native", data) == code
    assert stage.server.cancelled == ["job-0"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (chunk(1, "Once"), "stream_cut"),
        (chunk(1, "Once") + usage(1) + sse("[DONE]"), "stream_cut"),
        (chunk(2, "Once") + chunk(1, "Once"), "stream_repeat"),
        (chunk(1, "Once") + sse({"error": {"message": "m", "type": "server_error", "code": "worker_lost"}}) + sse("[DONE]"), "worker_lost"),
        (chunk(1, "Once") + sse({"error": {"message": "m", "code": None}}), "stream_error"),
        (chunk(1, "Once") + sse({"error": "m"}), "stream_error"),
        (sse("Once upon"), "unreadable_stream"),
        (sse(["Once"]), "unreadable_stream"),
    ],
)
async def test_openai_failure_is_counted_under_its_name(stage: Stage, data: bytes, code: str) -> None:
    assert await fails(stage, "openai", data) == code


@pytest.mark.parametrize("api", ["openai", "native"])
async def test_broken_connection_is_counted_as_lost(stage: Stage, api: str) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, token(1) if api == "native" else chunk(1, "Once"), arrivals=1)
        await stage.server.cut(0)

    chat = await one(stage, api, script())
    assert chat.failure is not None
    assert chat.failure.code == "connection_lost"
    assert "after 1 tokens" in chat.failure.message


@pytest.mark.parametrize("api", ["openai", "native"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (json.dumps({"error": {"message": "the queue is full", "type": "rate_limit_error", "code": "queue_full"}}), "queue_full"),
        ("Bad gateway", "http_429"),
    ],
)
async def test_refusal_is_counted_under_the_servers_own_word_else_its_status(stage: Stage, api: str, body: str, code: str) -> None:
    async def script() -> None:
        await stage.until(lambda: stage.ended_chats == [0])

    stage.server.refuse = lambda seed: web.Response(status=429, text=body)
    chat = await one(stage, api, script())
    assert chat.failure is not None
    assert chat.failure.code == code
