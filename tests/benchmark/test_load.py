"""When chats are sent, and that no fate of one is lost."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_benchmark.load import Load, poisson_arrivals_s
from mixtral_benchmark.measure import figures
from support.scripted_server import Stage, chunk, openai_end, token

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@UNTIMED
@given(st.integers(1, 200), st.floats(0.01, 1000), st.integers(0, 2**32))
def test_poisson_arrivals_begin_at_0_ascend_and_repeat_with_their_seed(count: int, rate_per_s: float, seed: int) -> None:
    moments_s = poisson_arrivals_s(count, rate_per_s, seed)
    assert len(moments_s) == count
    assert moments_s[0] == 0
    assert moments_s == sorted(moments_s)
    assert moments_s == poisson_arrivals_s(count, rate_per_s, seed)


def test_poisson_gaps_have_the_mean_and_the_spread_of_their_rate() -> None:
    moments_s = poisson_arrivals_s(20_001, 4.0, seed=1)
    gaps = [after - before for before, after in pairwise(moments_s)]
    mean = math.fsum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    # An exponential's standard deviation is its mean.
    assert math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(0.25, rel=0.05)


def test_different_seeds_give_different_moments() -> None:
    assert poisson_arrivals_s(10, 1.0, 0) != poisson_arrivals_s(10, 1.0, 1)


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
    moments_s = poisson_arrivals_s(3, 1.0, seed=0)

    async def script() -> None:
        for index, moment_s in enumerate(moments_s):
            stage.advance(moment_s)
            await stage.until(lambda due=index + 1: len(stage.sent_chats) == due)  # type: ignore[misc]
        for index in range(3):
            await stage.end(100.0, index, chunk(1, "a") + openai_end(1))

    chats = await stage.play(stage.load(total=3, concurrency=None, rate_per_s=1.0), script())
    assert [chat.scheduled_s for chat in chats] == moments_s
    assert [chat.sent_s for chat in chats] == moments_s


async def test_open_loop_counts_a_send_that_a_cap_delayed_from_the_moment_planned(stage: Stage) -> None:
    planned_s = poisson_arrivals_s(2, 1.0, seed=0)[1]

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
