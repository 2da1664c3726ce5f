"""Rates of keys and visitors: taken with the job, in the same step, and put right when it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from mixtral_client.protocol import JobSpec
from mixtral_server.apikeys import KeyLimits
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import LimitReached, QueueFull
from mixtral_server.queue import JobQueue, Put, QueueLimits
from mixtral_server.rates import Allowance, Rate, duration
from support.http import state_of
from support.live_server import LiveServer
from support.queue_bench import ENDPOINT, Bench, frame
from support.redis import RedisProcess, redis_binary
from support.scripted_worker import ScriptedWorker

PROMPT_TOKENS = 3
BUCKET = f"{{{ENDPOINT}.0}}:bucket:key:k"
KINDS = ("Requests", "Tokens")


async def put(bench: Bench, rate: Rate, *others: Rate, max_tokens: int = 7, **more: object) -> Put:
    spec = JobSpec(prompt=[1] * PROMPT_TOKENS, max_tokens=max_tokens, seed=1)
    return await bench.queue.put(ENDPOINT, "ann", spec, rates=(rate, *others), **more)  # type: ignore[arg-type]


async def left(bench: Bench, rate: Rate) -> Allowance:
    """What the rate holds now: a refused request changes nothing and says it."""
    try:
        put_now = await bench.queue.put(ENDPOINT, "looks", JobSpec(prompt=[1], max_tokens=1, seed=1), rates=(rate, NEVER))
    except LimitReached as error:
        return error.allowances[0]
    raise AssertionError(f"a spent rate let in {put_now}")


NEVER = Rate("address", "spent", 1)


@pytest.fixture
async def rate(bench: Bench) -> Rate:
    """20 requests and 1,000 tokens a minute, both full; nothing flows in while a test runs, as far as whole numbers show."""
    await bench.queue.cancel((await put(bench, NEVER)).job_id)
    return Rate("key", "k", 20, 1_000)


async def later(bench: Bench, seconds: float) -> None:
    """As if it were so much later."""
    for key in await bench.redis.keys("*:bucket:*"):
        await bench.redis.hincrby(key, "at", -int(seconds * 1000))


# ---------------------------------------------------------------------------------------------- the buckets


async def test_requests_over_the_rate_are_refused_and_let_in_as_time_passes(bench: Bench) -> None:
    rate = Rate("key", "k", 3)
    assert [int((await put(bench, rate)).allowances[0].requests or 0) for _ in range(3)] == [2, 1, 0]
    with pytest.raises(
        LimitReached, match=r"^this key may start 3 chats a minute at mixtral_chat; wait 20 s, or have it raised"
    ) as refused:
        await put(bench, rate)
    assert 19 < (refused.value.retry_after_s or 0) <= 20
    await later(bench, 20)
    await put(bench, rate)
    with pytest.raises(LimitReached):
        await put(bench, rate)


async def test_tokens_are_charged_by_estimate_and_corrected_by_what_the_job_took(bench: Bench, rate: Rate) -> None:
    await put(bench, rate, max_tokens=600)
    assert int((await left(bench, rate)).tokens or 0) in (397, 398)
    with pytest.raises(LimitReached, match=r"1,000 tokens a minute at mixtral_chat, 39\d are left; this request may take 503, 3 of prompt"):
        await put(bench, rate, max_tokens=500)
    worker = await bench.worker()
    (job,) = await worker.take()
    await worker.turn(frame(job, 1, "abcde", finish="stop", prompt_tokens=10))
    now = await left(bench, rate)
    assert int(now.tokens or 0) in range(985, 990), "10 of prompt and 5 of answer"
    assert int(now.requests or 0) == 19


async def test_what_a_job_took_beyond_its_estimate_is_a_debt(bench: Bench, rate: Rate) -> None:
    await put(bench, rate, max_tokens=100)
    worker = await bench.worker()
    (job,) = await worker.take()
    await worker.turn(frame(job, 1, "abcde", finish="stop", prompt_tokens=3_000))
    assert int((await left(bench, rate)).tokens or 0) in range(-2_006, -1_999)
    await later(bench, 60)
    with pytest.raises(LimitReached) as refused:
        await put(bench, rate)
    assert 59 < (refused.value.retry_after_s or 0) < 62, "a minute more until the debt is paid"


@pytest.mark.parametrize(("end", "requests"), [("cancelled", 19), ("expired", 20)])
async def test_job_that_never_ran_gives_its_tokens_back(bench: Bench, rate: Rate, end: str, requests: int) -> None:
    """And its request if nobody began it in time; one that its caller cancels was asked all the same."""
    made = await put(bench, rate, max_tokens=600, queue_timeout_s=1000)
    if end == "cancelled":
        await bench.queue.cancel(made.job_id)
    else:
        await bench.queue.reap(ENDPOINT)
        await bench.redis.zadd(bench.shard.key("deadlines"), {made.job_id: 1})
    await bench.queue.reap(ENDPOINT)
    assert await bench.state(made.job_id) == end
    now = await left(bench, rate)
    assert (int(now.tokens or 0), int(now.requests or 0)) == (1_000, requests)


async def test_repeat_with_its_idempotency_key_is_not_charged_and_never_refused(bench: Bench, rate: Rate) -> None:
    first = await put(bench, rate, max_tokens=600, idempotency_key="x", body_hash="b")
    again = [await put(bench, rate, max_tokens=600, idempotency_key="x", body_hash="b") for _ in range(3)]
    assert {(one.job_id, one.created) for one in again} == {(first.job_id, False)}
    now = await left(bench, rate)
    assert int(now.requests or 0) == 19
    assert int(now.tokens or 0) in (397, 398)


async def test_request_that_the_queue_refuses_is_not_charged(bench: Bench, rate: Rate) -> None:
    full = Bench(JobQueue(bench.redis, {ENDPOINT: QueueLimits(max_waiting_per_user=1)}), bench.redis)
    await put(full, rate)
    with pytest.raises(QueueFull) as refused:
        await put(full, rate)
    assert int(refused.value.allowances[0].requests or 0) == 19


async def test_of_several_rates_none_is_charged_when_one_refuses(bench: Bench, rate: Rate) -> None:
    for _ in range(3):
        with pytest.raises(LimitReached, match="this address may start 1 chats"):
            await put(bench, rate, NEVER)
    assert (await left(bench, rate)).requests == 20
    assert await bench.redis.exists(BUCKET) == 0, "a full bucket is not stored"


async def test_request_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt(bench: Bench, rate: Rate) -> None:
    made = await put(bench, rate, max_tokens=2_000)
    assert int(made.allowances[0].tokens or 0) == -1_003
    await later(bench, 90)
    with pytest.raises(LimitReached):
        await put(bench, rate, max_tokens=2_000)
    await later(bench, 31)
    await put(bench, rate, max_tokens=2_000)


async def test_buckets_are_one_for_all_servers_and_apart_from_others(bench: Bench) -> None:
    other = Bench(JobQueue(bench.redis, {ENDPOINT: QueueLimits()}), bench.redis)
    made = await asyncio.gather(*(put(one, Rate("key", "k", 3)) for one in (bench, other) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(one, Put) for one in made) == 3
    await put(bench, Rate("key", "another", 3))


async def test_bucket_is_gone_when_it_is_full_again(bench: Bench, rate: Rate) -> None:
    await put(bench, rate)
    assert 0 < await bench.redis.pttl(BUCKET) <= 3_000
    await later(bench, 3)
    await put(bench, rate, max_tokens=3_000)
    assert 179_000 < await bench.redis.pttl(BUCKET) <= 182_000, "its debt is kept until it is paid"


async def test_raised_limit_holds_from_the_next_request_on(bench: Bench) -> None:
    await put(bench, Rate("key", "k", 1))
    with pytest.raises(LimitReached):
        await put(bench, Rate("key", "k", 1))
    await later(bench, 1)
    made = await put(bench, Rate("key", "k", 60, 500))
    assert int(made.allowances[0].tokens or 0) == 490, "a limit that is new begins full"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (-1, "0ms"), (0.0115, "12ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------- over HTTP


CHAT = {"model": ENDPOINT, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}


def shown(answer: aiohttp.ClientResponse) -> dict[str, str]:
    names = [f"X-RateLimit-{what}-{kind}" for what in ("Limit", "Remaining", "Reset") for kind in KINDS]
    return {name.removeprefix("X-RateLimit-"): answer.headers[name] for name in names if name in answer.headers}


def as_holder(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_one_user_over_the_limit_is_refused_alone(server: LiveServer) -> None:
    limited = await server.new_key("client", user="limited", limits=KeyLimits(requests_per_minute=2))
    async with server.http() as http:
        statuses = []
        for _ in range(4):
            async with http.post("/v1/jobs", json=CHAT, headers=as_holder(limited)) as answer:
                statuses.append(answer.status)
                error = (await answer.json()).get("error")
        assert statuses == [202, 202, 429, 429]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert error["message"].startswith("this key may start 2 chats a minute at mixtral_chat; wait ")
        assert 1 <= int(answer.headers["Retry-After"]) <= 30
        assert shown(answer).keys() == {"Limit-Requests", "Remaining-Requests", "Reset-Requests"}
        async with http.post("/v1/jobs", json=CHAT) as answer:
            assert (answer.status, shown(answer)) == (202, {}), "a key without limits has none to tell of"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs"])
async def test_answers_tell_what_is_left_of_both_limits(server: LiveServer, path: str) -> None:
    key = await server.new_key("client", user=path, limits=KeyLimits(requests_per_minute=60, tokens_per_minute=6_000))
    async with (
        server.http() as http,
        ScriptedWorker(server.url, server.worker_key),
        http.post(path, json=CHAT, headers=as_holder(key)) as answer,
    ):
        assert answer.status in (200, 202)
    told = shown(answer)
    assert (told["Limit-Requests"], told["Limit-Tokens"]) == ("60", "6000")
    assert (told["Remaining-Requests"], int(told["Remaining-Tokens"])) == ("59", 6_000 - 10 - 9)
    assert told["Reset-Requests"] in ("1s", "1000ms")
    assert told["Reset-Tokens"] == "190ms"


async def test_streamed_answers_carry_the_limits_too(server: LiveServer) -> None:
    key = await server.new_key("client", user="streams", limits=KeyLimits(requests_per_minute=60))
    async with (
        server.http() as http,
        ScriptedWorker(server.url, server.worker_key),
        http.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=as_holder(key)) as answer,
    ):
        assert (answer.status, shown(answer)["Remaining-Requests"]) == (200, "59")
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_endpoints_limits_hold_for_keys_without_their_own(empty_redis: str, tmp_path: Path) -> None:
    endpoint = EndpointConfig(name=ENDPOINT, requests_per_minute=1, tokens_per_minute=100)
    with LiveServer(tmp_path, empty_redis, endpoint) as server:
        exempt = await server.new_key("client", user="exempt", limits=KeyLimits(requests_per_minute=0, tokens_per_minute=0))
        async with server.http() as http:
            for key, statuses in ((server.client_key, [202, 429]), (exempt, [202, 202, 202])):
                for status in statuses:
                    async with http.post("/v1/jobs", json=CHAT, headers=as_holder(key)) as answer:
                        assert answer.status == status
            async with http.post("/v1/jobs", json=CHAT) as answer:
                assert shown(answer)["Limit-Tokens"] == "100"


async def test_changed_limit_is_felt_by_every_server(server: LiveServer, tmp_path: Path, one_redis: RedisProcess) -> None:
    key = await server.new_key("client", user="changed")
    with LiveServer(tmp_path, one_redis.url, database_url=server.settings.sql_url) as other:
        async with server.http() as here, aiohttp.ClientSession(other.url) as there:
            for http in (here, there):
                async with http.post("/v1/jobs", json=CHAT, headers=as_holder(key)) as answer:
                    assert (answer.status, shown(answer)) == (202, {})
            await server.set_key(key, requests_per_minute=1)
            async with asyncio.timeout(3 * 5):  # a hang guard: three times the promise
                for http in (here, there):
                    while True:
                        async with http.post("/v1/jobs", json=CHAT, headers=as_holder(key)) as answer:
                            if answer.status == 429:
                                break
                        await asyncio.sleep(0.05)


async def test_key_of_lower_priority_gets_no_better_place(server: LiveServer) -> None:
    key = await server.new_key("client", user="low", limits=KeyLimits(priority=5))
    async with server.http() as http:
        async with http.post("/v1/jobs", json=CHAT | {"priority": 4}, headers=as_holder(key)) as answer:
            assert answer.status == 403
            assert "jobs of this key may have priority 5 to 9; got 4" in await answer.text()
        async with http.post("/v1/jobs", json=CHAT | {"priority": 5}, headers=as_holder(key)) as answer:
            assert answer.status == 202


async def test_job_without_a_priority_takes_its_keys_own(server: LiveServer) -> None:
    low = await server.new_key("client", user="low", limits=KeyLimits(priority=5))
    async with server.http() as http:
        async with http.post("/v1/jobs", json=CHAT, headers=as_holder(low)) as answer:
            first = (await answer.json())["id"]
        async with http.post("/v1/jobs", json=CHAT | {"priority": 4}) as answer:
            second = (await answer.json())["id"]
        async with ScriptedWorker(server.url, server.worker_key, slots=1) as worker:
            await state_of(http, second, "done")
            async with http.get(f"/v1/jobs/{first}/events", headers=as_holder(low)) as events:
                await events.read()
        assert [job.id for job in worker.seen] == [second, first]


async def test_redis_that_is_away_is_no_free_pass(tmp_path: Path) -> None:
    with RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis, LiveServer(tmp_path, redis.url) as server:
        key = await server.new_key("client", user="limited", limits=KeyLimits(requests_per_minute=1))
        async with server.http() as http:
            redis.stop()
            async with http.post("/v1/jobs", json=CHAT, headers=as_holder(key)) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "redis_unavailable")
            redis.start()
