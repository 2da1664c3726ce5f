"""Who is served when and who is refused: ageing, bounds of keys and of the queue, whole batches, ETAs. Time is moved, never waited for."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
from redis.asyncio import Redis

from mixtral_client.protocol import JobSpec
from mixtral_server.errors import QueueFull
from mixtral_server.queue import JobQueue, QueueLimits
from support.queue_bench import ENDPOINT, Bench, Hand, frame


def bench_of(redis: Redis, **limits: float) -> Bench:
    return Bench(JobQueue(redis, {ENDPOINT: QueueLimits(**limits)}), redis)  # type: ignore[arg-type]


async def let_wait(bench: Bench, seconds: float) -> None:
    """All that waits has waited so much longer; nobody was away meanwhile."""
    await bench.redis.hincrby(bench.shard.key("clock"), "away", -int(seconds * 1e6))
    await bench.queue.reap(ENDPOINT)
    await bench.queue.reap(ENDPOINT)


# ------------------------------------------------------------------------------------------------ ageing


async def test_a_job_that_waited_long_enough_is_served_beside_better_priorities(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=100)
    old = await bench.put("ann", priority=2)
    await let_wait(bench, 150)
    fresh = await bench.put("bob", priority=1)
    assert [await bench.queue.position(old), await bench.queue.position(fresh)] == [1, 2]
    first = await bench.put("cyd", priority=0)
    assert await bench.waiting_order() == [first, old, fresh]


async def test_old_jobs_of_a_lower_priority_share_with_fresh_ones_and_do_not_go_before_them_all(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=100)
    of_ann = [await bench.put("ann", priority=9) for _ in range(20)]
    await let_wait(bench, 5000)
    of_bob = [await bench.put("bob") for _ in range(5)]
    assert (await bench.waiting_order())[:10] == [job for pair in zip(of_ann, of_bob, strict=False) for job in pair]


async def test_only_what_waited_rises_and_what_came_behind_it_stays_at_its_priority(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=100)
    old = await bench.put("ann", priority=5)
    await let_wait(bench, 450)
    young = await bench.put("ann", priority=5)
    middle = [await bench.put("bob", priority=3) for _ in range(3)]
    soon = await bench.put("cyd", priority=0)
    assert [await bench.queue.position(job) for job in (soon, old, *middle, young)] == [1, 2, 3, 4, 5, 6]
    await let_wait(bench, 90)  # all of them are at the best level but the last two, two levels lower
    assert [await bench.queue.position(job) for job in (old, soon)] == [1, 2]
    assert await bench.waiting_order() == [old, soon, *middle, young]


async def test_without_ageing_a_lower_priority_waits_for_ever(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=0)
    late = await bench.put(priority=9)
    await let_wait(bench, 3e8)
    fresh = [await bench.put("ann", priority=8), await bench.put("bob", priority=8)]
    assert await bench.waiting_order() == [*fresh, late]


@pytest.mark.parametrize("gap_s", [3600, -3600], ids=["away for an hour", "clock set back an hour"])
async def test_time_that_nobody_watched_ages_nobody(redis: Redis, gap_s: int) -> None:
    bench = bench_of(redis, ageing_s=100)
    await bench.queue.reap(ENDPOINT)
    late = await bench.put("ann", priority=1)
    key = bench.shard.key
    await redis.incrby(key("tick"), -gap_s * 1000)
    await redis.hincrby(key("clock"), "last", -gap_s * 1_000_000)
    await redis.hincrby(key(f"job:{late}"), "due", -gap_s * 1_000_000)
    for name, member in (("wait:ann", late), ("lower", late), ("lifts", "ann")):
        await redis.zincrby(key(name), -gap_s * 1_000_000, member)
    for _ in range(2):
        await bench.queue.reap(ENDPOINT)
    soon = await bench.put("bob")
    assert [await bench.queue.position(soon), await bench.queue.position(late)] == [1, 2]
    assert await bench.waiting_order() == [soon, late]


async def test_a_worker_is_told_the_level_at_which_a_job_was_served(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=100)
    await bench.put("ann", priority=7)
    await let_wait(bench, 450)
    await bench.put("bob", priority=2)
    await bench.put("cyd")
    worker = await bench.worker()
    assert [job.priority for job in await worker.take(5)] == [0, 2, 3]


async def test_many_users_rise_in_bounded_rounds_and_all_in_the_end(redis: Redis) -> None:
    bench = bench_of(redis, ageing_s=100)
    await bench.queue.reap(ENDPOINT)
    jobs = await asyncio.gather(*(bench.put(f"user{number}", priority=1) for number in range(600)))
    await bench.redis.hincrby(bench.shard.key("clock"), "away", -101_000_000)
    rounds = [await bench.queue.reap(ENDPOINT) for _ in range(3)]
    assert [one.more for one in rounds] == [True, False, False]
    assert await bench.redis.zcard(bench.shard.key("ring:0")) == len(jobs)


# ------------------------------------------------------------------------------------------------ bounds of keys


async def test_no_more_jobs_of_a_key_run_than_it_may_and_others_go_ahead(bench: Bench) -> None:
    of_key = [await bench.put("ann", key_id="k", max_running=2) for _ in range(5)]
    other_key = [await bench.put("ann", key_id="free") for _ in range(2)]
    of_bob = await bench.put("bob")
    worker = await bench.worker()
    given = {job.id: job for job in await worker.take(10)}
    assert set(given) == {*of_key[:2], *other_key, of_bob}
    assert [await bench.state(job) for job in of_key[2:]] == ["waiting"] * 3
    assert await worker.take(5) == []
    answer = await worker.turn(frame(given[of_key[0]], 1, "a", finish="stop"), room=5)
    assert [job.id for job in answer.jobs] == [of_key[2]]  # the freed slot is the next one's, in the same turn


@pytest.mark.parametrize("end", ["finish", "error", "cancel", "death", "logout"])
async def test_whatever_ends_a_job_of_a_key_lets_its_next_one_in(bench: Bench, end: str) -> None:
    jobs = [await bench.put("ann", key_id="k", max_running=1) for _ in range(3)]
    worker = await bench.worker()
    [job] = await worker.take(5)
    if end == "finish":
        await worker.turn(frame(job, 1, "a", finish="stop"))
    if end == "cancel":
        await bench.queue.cancel(jobs[0])
    if end == "error":
        await worker.turn(frame(job, 1, "x" * 100))  # beyond max_tokens: it ends
    if end == "death":
        await bench.lapse(worker)
        await bench.queue.reap(ENDPOINT)
    if end == "logout":
        await worker.close()
    order = []
    worker = await bench.worker()
    while jobs_now := await worker.take(5):
        assert len(jobs_now) == 1
        order.append(jobs_now[0].id)
        await worker.turn(frame(jobs_now[0], 1, "a", finish="stop"))
    assert order == (jobs if end in ("death", "logout") else jobs[1:])


async def test_a_job_above_its_keys_bound_keeps_its_place(bench: Bench) -> None:
    first, second = [await bench.put("ann", key_id="k", max_running=1) for _ in range(2)]
    later = [await bench.put("ann") for _ in range(2)]
    worker = await bench.worker()
    [job] = await worker.take()
    assert await bench.queue.position(second) == 1
    await worker.turn(frame(job, 1, "a", finish="stop"))
    assert job.id == first
    assert await bench.waiting_order() == [second, *later]


async def test_a_better_job_of_a_key_does_not_wait_for_its_worse_ones(bench: Bench) -> None:
    low = [await bench.put("ann", priority=9, key_id="k", max_running=1) for _ in range(2)]
    high = await bench.put("ann", key_id="k", max_running=1)
    worker, order = await bench.worker(), []
    for _ in range(3):
        [job] = await worker.take(5)
        order.append(job.id)
        await worker.turn(frame(job, 1, "a", finish="stop"))
    assert order == [high, *low]


async def test_a_keys_bound_that_changes_holds_for_all_its_jobs(bench: Bench) -> None:
    for _ in range(6):
        await bench.put("ann", key_id="k", max_running=4)
    await bench.put("ann", key_id="k", max_running=2)
    worker = await bench.worker()
    assert len(await worker.take(10)) == 2
    await bench.put("ann", key_id="k", max_running=5)
    assert len(await worker.take(10)) == 3
    assert await worker.take(10) == []


async def test_parked_jobs_are_cancelled_expire_and_are_counted_like_others(bench: Bench) -> None:
    jobs = [await bench.put("ann", key_id="k", max_running=1, queue_timeout_s=60) for _ in range(4)]
    await bench.queue.reap(ENDPOINT)
    assert (await bench.queue.depth(ENDPOINT)).waiting == 4
    assert await bench.queue.cancel(jobs[2]) == "cancelled"
    await bench.redis.zadd(bench.shard.key("deadlines"), {jobs[3]: 1})
    assert (await bench.queue.reap(ENDPOINT)).expired == 1
    assert (await bench.queue.depth(ENDPOINT)).waiting == 2
    worker = await bench.worker()
    for job in jobs[:2]:
        [given] = await worker.take(5)
        assert given.id == job
        await worker.turn(frame(given, 1, "a", finish="stop"))
    await worker.close()
    left = {key.split("}:")[1] for key in await bench.redis.keys() if await bench.redis.ttl(key) == -1}
    assert left <= {"format", "tick", "clock", "rate", "totals", "usage", "parked", "eta", "idle"}
    assert await bench.redis.get(bench.shard.key("parked")) == "0"


async def test_a_freed_slot_of_a_key_wakes_the_workers(bench: Bench) -> None:
    for _ in range(2):
        await bench.put("ann", key_id="k", max_running=1)
    worker, idle = [await bench.worker() for _ in range(2)]
    [job] = await worker.take(1)
    assert await idle.take(1) == []
    async with bench.redis.pubsub() as channel:
        await channel.subscribe(bench.shard.wake)
        assert await channel.get_message(timeout=5)
        await worker.turn(frame(job, 1, "a", finish="stop"))
        assert await channel.get_message(ignore_subscribe_messages=True, timeout=5)


@pytest.mark.parametrize("wrong", [{"priority": 10}, {"priority": -1}, {"key_id": "k", "max_running": 0}, {"max_running": 1}])
async def test_a_put_that_no_caller_may_make_is_a_mistake_of_ours(bench: Bench, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="priority is 0 to 9, max_running 1 or more and of a key_id"):
        await bench.put(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ bounds of the queue


async def test_ten_thousand_jobs_of_one_user_cost_another_neither_a_refusal_nor_more_than_one_batch(redis: Redis) -> None:
    bench = bench_of(redis, max_waiting=10_000, max_waiting_per_user=10_000)
    worker, batch = await bench.worker(slots=32), 32
    for _ in range(100):
        await asyncio.gather(*(bench.put("flood") for _ in range(100)))
    running = await worker.take(batch)
    await asyncio.gather(*(bench.put("flood") for _ in range(batch)))
    assert (await bench.queue.depth(ENDPOINT)).waiting == 10_000
    with pytest.raises(QueueFull, match="10,000 at most"):
        await bench.put("flood")
    for _ in range(3):  # again and again: the flood goes on behind
        job = await bench.put("bob")
        position = await bench.queue.position(job)
        assert position
        assert position <= batch
        await worker.turn(*(frame(one, 1, "a", finish="stop") for one in running))
        running = await worker.take(batch)
        assert job in [one.id for one in running]


async def test_a_full_queue_still_takes_who_has_less_than_an_equal_share(redis: Redis) -> None:
    bench = bench_of(redis, max_waiting=12)
    for _ in range(12):
        await bench.put("ann")
    with pytest.raises(QueueFull):
        await bench.put("ann")
    for _ in range(6):
        await bench.put("bob")
    with pytest.raises(
        QueueFull, match="18 jobs wait for mixtral_chat, 12 at most; the 2 users who wait share that equally, and you have 6"
    ):
        await bench.put("bob")
    for _ in range(4):
        await bench.put("cyd")
    with pytest.raises(QueueFull, match="the 3 users"):
        await bench.put("cyd")


async def test_a_queue_of_twice_its_bound_takes_only_who_has_nothing_waiting_and_of_three_times_nobody(redis: Redis) -> None:
    bench = bench_of(redis, max_waiting=6)
    for user, jobs in (("ann", 6), ("bob", 3), ("cyd", 2), ("dan", 1)):
        for _ in range(jobs):
            await bench.put(user)
    assert (await bench.queue.depth(ENDPOINT)).waiting == 12
    with pytest.raises(QueueFull):
        await bench.put("dan")
    for number in range(6):
        await bench.put(f"user{number}")
    with pytest.raises(QueueFull, match="18 jobs wait for mixtral_chat, 6 at most"):
        await bench.put("last")


async def test_tokens_bound_the_queue_as_jobs_do(redis: Redis) -> None:
    bench = bench_of(redis, max_waiting_tokens=1000, max_waiting_tokens_per_user=1500)
    await bench.put("ann", max_tokens=897)  # 900 with the prompt
    await bench.put("ann", max_tokens=397)
    assert (await bench.queue.depth(ENDPOINT)).waiting_tokens == 1300
    sentence = "come to 1,300 tokens as estimated, 1,000 at most; the 1 users who wait share that equally, and you have 1,300"
    with pytest.raises(QueueFull, match=sentence):
        await bench.put("ann")
    await bench.put("bob", max_tokens=447)
    await bench.put("bob", max_tokens=97)
    with pytest.raises(QueueFull, match="the 2 users"):
        await bench.put("bob")
    for worker in [await bench.worker()]:
        await worker.take(10)
    assert (await bench.queue.depth(ENDPOINT)).waiting_tokens == 0


async def test_one_users_tokens_are_bounded_but_a_single_job_of_any_size_is_taken(redis: Redis) -> None:
    bench = bench_of(redis, max_waiting_tokens_per_user=1000)
    await bench.put("ann", max_tokens=30_000)
    with pytest.raises(
        QueueFull, match="your jobs waiting for mixtral_chat come to 30,003 tokens as estimated, 1,000 at most; try again in"
    ):
        await bench.put("ann", max_tokens=1)
    await bench.put("bob")


# ------------------------------------------------------------------------------------------------ ETA


async def work_off(bench: Bench, worker: Hand, count: int, gap_ms: float, spread: random.Random) -> None:
    """So many jobs of the queue end one after another, so far apart by a clock that is moved."""
    for _ in range(count):
        [job] = await worker.take(1)
        gap = spread.expovariate(1 / gap_ms)
        for name in ("since", "at"):  # so long ago was all that the queue measured
            await bench.redis.hincrby(bench.shard.key("rate"), name, -round(gap))
        await worker.turn(frame(job, 1, "a", finish="stop"))


async def test_of_many_jobs_half_start_by_the_median_and_nine_of_ten_by_the_90th_percentile(bench: Bench) -> None:
    """Finishes come at random, one in 2 s; a job with 19 before it is told an ETA, and so the queue goes on a thousand times."""
    spread = random.Random(5)
    worker = await bench.worker()
    for _ in range(100):
        await bench.put("ann")
    await work_off(bench, worker, 100, 2000, spread)
    waits = [sum(spread.expovariate(1 / 2) for _ in range(20)) for _ in range(1000)]
    for _ in range(20):
        last = await bench.put("ann")
    place = await bench.queue.place(last)
    assert place
    assert place.eta_s
    assert place.eta_p90_s
    by_median = sum(wait <= place.eta_s for wait in waits) / len(waits)
    by_p90 = sum(wait <= place.eta_p90_s for wait in waits) / len(waits)
    assert 0.2 < by_median < 0.8
    assert by_p90 > 0.85
    assert place.eta_p90_s < 2.5 * place.eta_s


async def test_how_far_off_an_eta_was_is_counted_when_the_job_starts(bench: Bench) -> None:
    worker = await bench.worker()
    untold = await bench.put()
    [job] = await worker.take(1)
    await worker.turn(frame(job, 1, "a", finish="stop"))
    assert job.id == untold
    assert (await bench.queue.depth(ENDPOINT)).eta_errors.within[math.inf] == 0
    spec = JobSpec(prompt=[1], max_tokens=1, seed=1)
    told = [await bench.queue.put(ENDPOINT, "ann", spec) for _ in range(2)]
    for put in told:
        assert put.place
        assert 0 < (put.place.eta_s or 0) < (put.place.eta_p90_s or 0)
    await bench.redis.hincrby(bench.shard.key(f"job:{told[0].job_id}"), "created", -1_000_000)
    assert len(await worker.take(2)) == 2
    await worker.close()
    await (await bench.worker()).take(2)  # a second start says nothing of the queue
    errors = (await bench.queue.depth(ENDPOINT)).eta_errors
    assert (errors.within[math.inf], errors.within[300.0], errors.late) == (2, 1, 1)
    assert errors.sum_s == pytest.approx(1000, rel=0.05)
    assert list(errors.within) == sorted(errors.within)
    assert list(errors.within.values()) == sorted(errors.within.values())


async def test_the_eta_of_a_job_above_its_keys_bound_knows_of_the_bound(bench: Bench) -> None:
    worker = await bench.worker()
    for _ in range(3):
        await bench.put("bob")
    jobs = await worker.take(3)
    for job in jobs:
        await bench.redis.hincrby(bench.shard.key(f"job:{job.id}"), "started", -60_000)  # each ran for a minute
    await worker.turn(*(frame(job, 1, "a", finish="stop") for job in jobs))
    spec = JobSpec(prompt=[1], max_tokens=1, seed=1)
    puts = [await bench.queue.put(ENDPOINT, "ann", spec, key_id="k", max_running=1) for _ in range(3)]
    etas = [put.place.eta_s or 0 for put in puts if put.place]
    assert 0 < etas[0] < 5
    assert 30 < etas[1] < etas[2]
    assert etas[2] > 60


# ------------------------------------------------------------------------------------------------ whole batches


async def fill_for(bench: Bench, seconds: float) -> None:
    """The batch that is filling began to so much earlier."""
    assert await bench.redis.exists(bench.shard.key("filling"))
    await bench.redis.incrby(bench.shard.key("filling"), -int(seconds * 1000))


async def test_a_full_batch_goes_at_once_and_is_never_larger_than_it_may_be(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=30_000)
    worker = await bench.worker(static_batch=4)
    jobs = [await bench.put() for _ in range(9)]
    for batch in (jobs[:4], jobs[4:8]):
        answer = await worker.turn(room=64)
        assert [job.id for job in answer.jobs] == batch
        assert answer.again_s is None
    answer = await worker.turn(room=64)
    assert answer.jobs == []
    assert answer.again_s
    assert 25 < answer.again_s <= 30


async def test_a_batch_waits_for_its_linger_at_most_and_then_goes_as_it_is(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=30_000)
    worker = await bench.worker(static_batch=4)
    assert (await worker.turn(room=4)).again_s is None  # nothing waits: nothing fills
    jobs = [await bench.put() for _ in range(2)]
    assert (await worker.turn(room=4)).jobs == []
    await fill_for(bench, 20)
    jobs.append(await bench.put())  # it shares the wait of those before it
    answer = await worker.turn(room=4, number=worker.number)
    assert answer.again_s
    assert 5 < answer.again_s <= 10
    await fill_for(bench, 10)
    answer = await worker.turn(room=4, number=worker.number)
    assert [job.id for job in answer.jobs] == jobs
    assert "again_s" not in answer.body().decode()


async def test_room_smaller_than_a_batch_is_a_batch(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=30_000)
    worker = await bench.worker(static_batch=4, slots=3)
    jobs = [await bench.put() for _ in range(5)]
    assert [job.id for job in await worker.take(2)] == jobs[:2]
    assert [job.id for job in await worker.take(4)] == [jobs[2]]  # the slots are 3


async def test_free_workers_wait_together_and_not_one_after_another(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=30_000)
    first, second = await bench.worker(static_batch=4), await bench.worker(static_batch=4)
    job = await bench.put()
    assert (await first.turn(room=4)).jobs == []
    await fill_for(bench, 25)
    answer = await second.turn(room=4)
    assert answer.again_s
    assert answer.again_s <= 5
    await fill_for(bench, 5)
    assert [one.id for one in await second.take(4)] == [job]
    assert (await first.turn(room=4, number=first.number)).again_s is None


async def test_without_a_linger_and_for_other_workers_nothing_waits_to_be_filled(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=0)
    job = await bench.put()
    assert [one.id for one in await (await bench.worker(static_batch=4)).take(4)] == [job]
    bench = bench_of(redis, batch_wait_ms=30_000)
    job = await bench.put()
    assert [one.id for one in await (await bench.worker()).take(4)] == [job]


async def test_jobs_above_a_keys_bound_fill_no_batch(redis: Redis) -> None:
    bench = bench_of(redis, batch_wait_ms=30_000)
    for _ in range(4):
        await bench.put("ann", key_id="k", max_running=1)
    worker = await bench.worker(static_batch=4)
    assert (await worker.turn(room=4)).again_s
    await fill_for(bench, 30)
    assert len(await worker.take(4)) == 1
    assert (await worker.turn(room=4)).again_s is None
