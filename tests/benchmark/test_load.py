"""When chats are sent, and that no fate of one is lost."""

from __future__ import annotations

import asyncio

import pytest

from mixtral_benchmark.arrivals import Pace, moments_s
from mixtral_benchmark.load import Load, Plan
from mixtral_benchmark.measure import figures
from mixtral_benchmark.prompts import Talk
from support.scripted_server import Stage, chunk, done, native, openai_end, token


async def test_closed_loop_sends_the_next_chat_at_the_moment_one_ends(stage: Stage) -> None:
    async def script() -> None:
        await stage.until(lambda: stage.sent_chats == [0, 1])
        await stage.at(1.0, 0, chunk(1, "a"), arrivals=1)
        await stage.end(2.0, 0, openai_end(1))
        await stage.until(lambda: stage.sent_chats == [0, 1, 2])
        await stage.end(3.0, 1, chunk(1, "b") + openai_end(1))
        await stage.end(5.0, 2, chunk(1, "c") + openai_end(1))

    load = stage.load(total=3, concurrency=2)
    chats = await stage.play(load, script())
    assert [chat.sent_s for chat in chats] == [0.0, 0.0, 2.0]
    assert [chat.scheduled_s for chat in chats] == [0.0, 0.0, 2.0]
    found = figures(chats, load.started_s, load.ended_s)
    assert (found["completed"], found["max_concurrent_requests"], found["duration"]) == (3, 2, 5.0)


async def test_closed_loop_goes_on_after_a_failure(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, chunk(1, "a"), arrivals=1)
        await stage.server.cut(0)
        await stage.end(2.0, 1, chunk(1, "b") + openai_end(1))

    chats = await stage.play(stage.load(total=2, concurrency=1), script())
    assert [chat.completed for chat in chats] == [False, True]


async def test_open_loop_sends_at_its_moments_though_no_chat_has_ended(stage: Stage) -> None:
    planned_s = moments_s(3, Pace(1.0), seed=0)

    async def script() -> None:
        for index, moment_s in enumerate(planned_s):
            stage.advance(moment_s)
            await stage.until(lambda due=index + 1: len(stage.sent_chats) == due)  # type: ignore[misc]
        for index in range(3):
            await stage.end(100.0, index, chunk(1, "a") + openai_end(1))

    chats = await stage.play(stage.load(total=3, concurrency=None, rate_per_s=1.0), script())
    assert [chat.scheduled_s for chat in chats] == planned_s
    assert [chat.sent_s for chat in chats] == planned_s


async def test_open_loop_counts_a_send_that_a_cap_delayed_from_the_moment_planned(stage: Stage) -> None:
    planned_s = moments_s(2, Pace(1.0), seed=0)[1]

    async def script() -> None:
        await stage.end(100.0, 0, chunk(1, "a") + openai_end(1))
        await stage.at(101.0, 1, chunk(1, "b"), arrivals=1)
        await stage.end(102.0, 1, openai_end(1))

    load = stage.load(total=2, concurrency=1, rate_per_s=1.0)
    chats = await stage.play(load, script())
    assert (chats[1].scheduled_s, chats[1].sent_s) == (planned_s, 100.0)
    found = figures(chats[1:], load.started_s, load.ended_s)
    assert found["mean_ttft_ms"] == 1000
    assert found["mean_scheduled_ttft_ms"] == pytest.approx((101 - planned_s) * 1000)


async def test_chat_beyond_its_time_limit_fails_as_timeout_and_its_job_is_cancelled(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, token(1), arrivals=1)
        await stage.until(lambda: stage.ended_chats == [0])

    chats = await stage.play(stage.load("native", timeout_s=0.3), script())
    assert chats[0].failure is not None
    assert chats[0].failure.code == "timeout"
    assert stage.server.cancelled == ["job-0"]


async def test_server_that_is_gone_fails_every_chat_as_connection_refused(stage: Stage) -> None:
    with_nobody = stage.server.url.rpartition(":")[0] + ":1"
    stage.server.url = with_nobody
    load = stage.load(total=3, concurrency=2)
    await load.run()
    assert [chat.failure and chat.failure.code for chat in load.chats] == ["connection_refused"] * 3


@pytest.mark.parametrize("api", ["openai", "native"])
async def test_cancelled_load_keeps_what_it_measured_and_leaves_no_job_running(stage: Stage, api: str) -> None:
    load: Load = stage.load(api, total=5, concurrency=2)
    running = asyncio.create_task(load.run())
    await stage.at(1.0, 0, chunk(1, "a") if api == "openai" else token(1), arrivals=1)
    await stage.until(lambda: stage.sent_chats == [0, 1])
    await stage.at(2.0, 1, chunk(1, "b") if api == "openai" else token(1), arrivals=1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    found = figures(load.chats, load.started_s, load.ended_s)
    assert (found["completed"], found["failed"], found["interrupted"], found["duration"]) == (0, 0, 2, 2.0)
    assert sorted(stage.server.cancelled) == (["job-0", "job-1"] if api == "native" else [])


async def test_each_chat_asks_with_a_seed_of_its_own(stage: Stage) -> None:
    async def script() -> None:
        for index in range(3):
            await stage.end(1.0, index, chunk(1, "a") + openai_end(1))

    await stage.play(stage.load(total=3, concurrency=3), script())
    assert sorted(request["seed"] for request in stage.server.requests) == [0, 1, 2]
    assert {json_text(request["messages"]) for request in stage.server.requests} == {"hello"}


def json_text(messages: list[dict[str, str]]) -> str:
    assert [message["role"] for message in messages] == ["user"]
    return messages[0]["content"]


def three_turns(**more: object) -> Talk:
    return Talk(("one", "two", "three"), max_tokens=8, seed=0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("api", ["openai", "native"])
async def test_each_turn_is_asked_with_all_that_was_said_and_answered_before(stage: Stage, api: str) -> None:
    def piece(offset: int, text: str) -> bytes:
        return chunk(offset, text) if api == "openai" else token(offset, text)

    def end(tokens: int) -> bytes:
        return openai_end(tokens) if api == "openai" else done(tokens)

    async def script() -> None:
        await stage.end(1.0, 0, piece(1, "uno") + piece(2, "!") + end(2))
        await stage.end(2.0, 1, piece(1, "dos") + end(1))
        await stage.end(3.0, 2, piece(1, "tres") + end(1))

    chats = await stage.play(stage.load_of(Plan([three_turns()], 1, None, 60), api), script())
    assert [(chat.index, chat.turn, chat.tokens) for chat in chats] == [(0, 0, 2), (1, 1, 1), (2, 2, 1)]
    said = [[message["content"] for message in request["messages"]] for request in stage.server.requests]
    assert said == [["one"], ["one", "uno!", "two"], ["one", "uno!", "two", "dos", "three"]]


async def test_tokens_that_a_rewind_took_back_are_not_said_again_in_the_next_turn(stage: Stage) -> None:
    async def script() -> None:
        again = token(1, "a") + token(2, "b") + native("rewind", to=1) + token(2, "c") + done(2)
        await stage.end(1.0, 0, again)
        await stage.end(2.0, 1, token(1) + done(1))

    talk = Talk(("one", "two"), max_tokens=8, seed=0)
    await stage.play(stage.load_of(Plan([talk], 1, None, 60), "native"), script())
    assert [message["content"] for message in stage.server.requests[1]["messages"]] == ["one", "ac", "two"]


async def test_next_turn_waits_for_the_user_to_think_and_counts_from_then(stage: Stage) -> None:
    async def script() -> None:
        await stage.end(1.0, 0, chunk(1, "a") + openai_end(1))
        await stage.until_asleep()
        stage.advance(5.0)
        await stage.end(6.0, 1, chunk(1, "b") + openai_end(1))
        await stage.until_asleep()
        stage.advance(10.0)
        await stage.end(11.0, 2, chunk(1, "c") + openai_end(1))

    chats = await stage.play(stage.load_of(Plan([three_turns(think_s=4.0)], 1, None, 60)), script())
    assert [(chat.scheduled_s, chat.sent_s) for chat in chats] == [(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)]


async def test_turns_behind_a_failed_one_are_never_sent_and_counted(stage: Stage) -> None:
    async def script() -> None:
        await stage.at(1.0, 0, chunk(1, "a"), arrivals=1)
        await stage.server.cut(0)
        await stage.end(2.0, 3, chunk(1, "b") + openai_end(1))

    load = stage.load_of(Plan([three_turns(), Talk(("four",), max_tokens=8, seed=3)], 1, None, 60))
    chats = await stage.play(load, script())
    assert [(chat.index, chat.completed) for chat in chats] == [(0, False), (3, True)]
    assert load.unsent == 2
