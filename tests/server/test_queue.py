"""What the queue promises, on both versions of Redis. Time is moved by editing leases and deadlines, never by waiting."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from mixtral_client.protocol import CALLER_ERRORS, ChatMessage, Drop, Expect, FrameError, JobSpec, TurnAnswer, TurnRequest, Usage, WorkerJob
from mixtral_server.dead import DeadLetters
from mixtral_server.errors import (
    IdempotencyConflict,
    JobNotFound,
    ModelNotFound,
    QueueFull,
    RedisUnavailable,
    SessionLapsed,
    TooManySessions,
    Unavailable,
)
from mixtral_server.keys import KEYS, Shard, key_kind
from mixtral_server.queue import FORMAT, JobQueue, QueueLimits
from mixtral_server.rates import Rate
from mixtral_server.records import LeasedJob, Put, Turned
from support.queue_bench import ENDPOINT, Bench, frame
from support.redis import RedisProcess, connect, redis_binary

# ------------------------------------------------------------------------------------------------ order


async def test_a_users_jobs_run_in_the_order_they_came(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(5)]
    assert await bench.waiting_order() == jobs


async def test_a_lower_priority_number_runs_first(bench: Bench) -> None:
    late, soon, middle = [await bench.put(priority=priority) for priority in (9, 0, 5)]
    assert await bench.waiting_order() == [soon, middle, late]


async def test_users_take_turns_however_many_jobs_one_of_them_has(bench: Bench) -> None:
    of_ann = [await bench.put("ann") for _ in range(6)]
    of_bob = [await bench.put("bob") for _ in range(3)]
    assert await bench.waiting_order() == [of_ann[0], of_bob[0], of_ann[1], of_bob[1], of_ann[2], of_bob[2], *of_ann[3:]]


async def test_users_share_by_tokens_not_by_jobs(bench: Bench) -> None:
    of_ann = {await bench.put("ann", max_tokens=97) for _ in range(10)}  # 100 units each, with their prompts of 3
    of_bob = {await bench.put("bob", max_tokens=7) for _ in range(100)}  # 10 units each
    first = (await bench.waiting_order())[:55]
    assert len(of_ann.intersection(first)) == 5
    assert len(of_bob.intersection(first)) == 50


async def test_a_user_of_twice_the_weight_gets_twice_the_tokens(bench: Bench) -> None:
    of_ann = {await bench.put("ann", weight=2.0) for _ in range(20)}
    of_bob = {await bench.put("bob", weight=1.0) for _ in range(20)}
    first = (await bench.waiting_order())[:15]
    assert (len(of_ann.intersection(first)), len(of_bob.intersection(first))) == (10, 5)


async def test_a_job_that_ended_early_costs_its_user_only_what_it_took(bench: Bench) -> None:
    of_ann = [await bench.put("ann", max_tokens=1000) for _ in range(4)]
    of_bob = [await bench.put("bob", max_tokens=7) for _ in range(4)]
    worker, order = await bench.worker(), []
    for _ in range(8):
        [job] = await worker.take()
        order.append(job.id)
        await worker.turn(frame(job, 1, "1234567", finish="stop", prompt_tokens=3))
    assert order == [job for pair in zip(of_ann, of_bob, strict=True) for job in pair]


async def test_time_away_earns_no_share(bench: Bench) -> None:
    of_bob = [await bench.put("bob") for _ in range(20)]
    worker = await bench.worker()
    assert len(await worker.take(10)) == 10
    of_zoe = [await bench.put("zoe") for _ in range(4)]
    order = await bench.waiting_order()
    # Bob stood alone for ten jobs; Zoe gets the next turn and then every second one, not ten in a row.
    assert order[:5] == [of_zoe[0], of_bob[10], of_zoe[1], of_bob[11], of_zoe[2]]


async def test_coming_back_earns_no_share(bench: Bench) -> None:
    of_bob, _ = [await bench.put("bob") for _ in range(20)], await bench.put("zoe")
    worker = await bench.worker()
    await worker.take(10)
    of_zoe = [await bench.put("zoe") for _ in range(4)]
    assert (await bench.waiting_order())[:4] == [of_zoe[0], of_bob[9], of_zoe[1], of_bob[10]]


async def test_what_an_early_end_gives_back_is_no_credit_for_a_time_away(bench: Bench) -> None:
    of_bob = [await bench.put("bob", max_tokens=97) for _ in range(30)]
    await bench.put("zoe", max_tokens=997)
    worker = await bench.worker()
    [long] = [job for job in await worker.take(15) if job.spec.max_tokens == 997]
    of_zoe = [await bench.put("zoe", max_tokens=97) for _ in range(4)]
    await worker.turn(frame(long, 1, "a", finish="stop"))
    # 999 of the 1,000 units charged for it come back, but Bob was served 1,400 meanwhile: she has missed nothing.
    assert (await bench.waiting_order())[:4] == [of_zoe[0], of_bob[14], of_zoe[1], of_bob[15]]


async def test_running_jobs_count_when_a_user_begins_to_wait(bench: Bench) -> None:
    await bench.put("ann", max_tokens=1000)
    worker = await bench.worker()
    await worker.take()
    more_of_ann, first_of_bob = await bench.put("ann"), await bench.put("bob")
    assert await bench.waiting_order() == [first_of_bob, more_of_ann]


async def test_running_jobs_count_once_for_a_user_who_comes_back(bench: Bench) -> None:
    of_bob, of_zoe = [await bench.put("bob") for _ in range(8)], await bench.put("zoe")
    worker = await bench.worker()
    assert of_zoe in [job.id for job in await worker.take(6)]
    again = await bench.put("zoe")  # one job of hers runs, five of Bob's do
    assert (await bench.waiting_order())[:2] == [again, of_bob[5]]


async def test_old_use_is_forgotten_once_nobody_waits(bench: Bench) -> None:
    await bench.put("ann", max_tokens=1000)
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "x" * 1000, finish="length", prompt_tokens=3))
    of_ann, of_bob = [await bench.put("ann") for _ in range(2)], await bench.put("bob")
    assert await bench.waiting_order() == [of_ann[0], of_bob, of_ann[1]]


async def test_position_tells_the_order_that_follows(bench: Bench) -> None:
    for number in range(24):
        await bench.put(("ann", "bob", "cyd", "ann")[number % 4], priority=number % 3 // 2)
    worker = await bench.worker()
    await worker.take(3)
    told = {}
    for key in await bench.redis.keys(bench.shard.key("job:*")):
        job = key.rpartition(":")[2]
        if position := await bench.queue.position(job):
            told[position] = job
    assert [told[position] for position in sorted(told)] == await bench.waiting_order()
    assert sorted(told) == list(range(1, 22))


async def test_position_is_none_once_a_worker_has_the_job(bench: Bench) -> None:
    job = await bench.put()
    assert await bench.queue.position(job) == 1
    await (await bench.worker()).take()
    assert await bench.queue.position(job) is None


async def test_eta_comes_from_the_measured_finish_rate(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(5)]
    place = await bench.queue.place(jobs[4])
    assert place
    assert (place.eta_s, place.eta_p90_s) == (None, None)
    worker = await bench.worker()
    for job in await worker.take(2):
        await worker.turn(frame(job, 1, "a", finish="stop"))
    rate = (await bench.queue.depth(ENDPOINT)).finish_rate
    first, last = await bench.queue.place(jobs[2]), await bench.queue.place(jobs[4])
    assert rate
    assert first
    assert last
    assert (first.position, last.position) == (1, 3)
    for place in (first, last):
        assert place.eta_s
        assert place.eta_p90_s
        assert 0.5 * place.position / rate < place.eta_s <= 1.1 * place.position / rate < 1.1 * place.eta_p90_s


# ------------------------------------------------------------------------------------------------ limits


async def test_full_queue_refuses_and_says_when_to_come_again(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_waiting=3)}), redis)
    jobs = [await bench.put() for _ in range(3)]
    with pytest.raises(
        QueueFull, match="3 jobs wait for mixtral_chat, 3 at most; the 1 users who wait share that equally, and you have 3; "
    ) as refused:
        await bench.put()
    assert refused.value.retry_after_s == 5.0  # nothing has been measured yet
    worker = await bench.worker()
    for job in await worker.take(2):
        await worker.turn(frame(job, 1, "a", finish="stop"))
    await bench.queue.cancel(jobs[2])
    for _ in range(3):
        assert await bench.put("late")
    with pytest.raises(QueueFull) as refused:
        await bench.put("late")
    rate = (await bench.queue.depth(ENDPOINT)).finish_rate
    assert rate
    assert refused.value.retry_after_s == pytest.approx(max(1.0, 1 / rate), rel=0.2)


async def test_one_user_over_the_limit_is_refused_alone(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_waiting_per_user=2)}), redis)
    for priority in (0, 1):
        await bench.put("ann", priority=priority)
    with pytest.raises(QueueFull, match=r"you have 2 jobs waiting"):
        await bench.put("ann")
    assert await bench.put("bob")
    await (await bench.worker()).take()
    assert await bench.put("ann")


async def test_unsaved_usage_stops_admission_at_its_bound(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_unsaved_usage=2)}), redis)
    for _ in range(2):
        await bench.queue.cancel(await bench.put())
    with pytest.raises(Unavailable, match="2 finished jobs of mixtral_chat are not yet in the ledger, 2 at most"):
        await bench.put()
    first, _ = await bench.queue.usage_batch(ENDPOINT)
    await bench.queue.usage_ack(ENDPOINT, [first])
    assert await bench.put()


async def test_unknown_endpoint_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(ModelNotFound, match="no endpoint 'gpt-9'; known are: mixtral_chat"):
        await bench.queue.put("gpt-9", "ann", JobSpec(prompt="x", max_tokens=1, seed=0))


async def test_unknown_jobs_are_not_found(bench: Bench) -> None:
    for job in (bench.shard.new_id(), Shard("elsewhere").new_id(), "nonsense", "", "x" * 5000):
        for ask in (bench.queue.read, bench.queue.place, bench.queue.cancel):
            with pytest.raises(JobNotFound):
                await ask(job)


# ------------------------------------------------------------------------------------------------ idempotency


async def test_a_repeated_idempotency_key_gives_the_same_job(bench: Bench) -> None:
    spec = JobSpec(messages=[ChatMessage(role="user", content="hi")], max_tokens=5, seed=1)
    puts = await asyncio.gather(*(bench.queue.put(ENDPOINT, "ann", spec, idempotency_key="k", body_hash="h") for _ in range(8)))
    assert len({put.job_id for put in puts}) == 1
    assert sorted(put.created for put in puts) == [False] * 7 + [True]
    assert (await bench.queue.depth(ENDPOINT)).waiting == 1


async def test_an_idempotency_key_with_another_body_is_refused(bench: Bench) -> None:
    await bench.put(idempotency_key="k", body_hash="one")
    with pytest.raises(IdempotencyConflict, match="another body"):
        await bench.put(idempotency_key="k", body_hash="two")


async def test_an_idempotency_key_belongs_to_its_user(bench: Bench) -> None:
    jobs = {await bench.put(user, idempotency_key="k", body_hash=user) for user in ("ann", "bob")}
    assert len(jobs) == 2


async def test_an_idempotency_key_is_kept_as_long_as_the_result(bench: Bench) -> None:
    job = await bench.put(idempotency_key="k")
    [key] = await bench.redis.keys(bench.shard.key("idem:*"))
    assert await bench.redis.ttl(key) == -1
    await bench.queue.cancel(job)
    assert 3590 < await bench.redis.ttl(key) <= 3600
    assert await bench.put(idempotency_key="k") == job
    await bench.redis.delete(bench.shard.key(f"job:{job}"))
    assert await bench.put(idempotency_key="k") != job


async def test_a_put_that_is_sent_twice_queues_one_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Redis client does when an answer is lost."""
    same = bench.shard.new_id()
    monkeypatch.setattr(Shard, "new_id", lambda _: same)
    assert [await bench.put(), await bench.put()] == [same, same]
    assert (await bench.queue.depth(ENDPOINT)).waiting == 1


# ------------------------------------------------------------------------------------------------ the log


async def test_tokens_are_appended_and_read_back(bench: Bench) -> None:
    job_id = await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "hel"))
    assert await bench.state(job_id) == "streaming"
    await worker.turn(frame(job, 4, "lo", finish="stop", prompt_tokens=3))
    snapshot = await bench.queue.read(job_id)
    assert (snapshot.text, snapshot.n, snapshot.ids) == ("hello", 5, [104, 101, 108, 108, 111])
    assert (snapshot.state, snapshot.finish, snapshot.terminal) == ("done", "stop", True)
    assert snapshot.usage == Usage(prompt_tokens=3, completion_tokens=5, total_tokens=8)
    assert snapshot.timings
    times = list(snapshot.timings.model_dump().values())
    assert None not in times
    assert times == sorted(times)


async def test_reading_after_an_offset_gives_the_entries_that_reach_beyond_it(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    for offset, letters in ((1, "abc"), (4, "de"), (6, "f")):
        await worker.turn(frame(job, offset, letters))
    assert [(entry.offset, "".join(entry.texts)) for entry in (await bench.queue.read(job_id, 3)).entries] == [(4, "de"), (6, "f")]
    assert [entry.offset for entry in (await bench.queue.read(job_id, 4)).entries] == [4, 6]
    assert (await bench.queue.read(job_id, 6)).entries == ()
    await worker.turn(frame(job, 7, "", finish="stop"))
    assert (await bench.queue.read(job_id, 6)).entries == ()
    assert (await bench.queue.read(job_id, 2**40)).n == 6


async def test_a_repeated_frame_is_ignored(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    for _ in range(3):
        answer = await worker.turn(frame(job, 1, "abc"))
        assert answer.expect == answer.drops == []
    assert (await bench.queue.read(job_id)).text == "abc"


async def test_a_frame_beyond_the_log_is_refused_with_the_offset_expected(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "ab"))
    answer = await worker.turn(frame(job, 4, "d", finish="stop"))
    assert [(expect.job, expect.offset) for expect in answer.expect] == [(job_id, 3)]
    assert (await bench.queue.read(job_id)).text == "ab"
    await worker.turn(frame(job, 3, "cd", finish="stop"))
    assert (await bench.queue.read(job_id)).text == "abcd"


async def test_a_frame_that_overlaps_the_log_adds_only_its_new_tail(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put(max_tokens=20)
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "añb"))
    await worker.turn(frame(job, 2, 'ñb/"\n', finish="stop"))
    snapshot = await bench.queue.read(job_id)
    assert snapshot.text == 'añb/"\n'
    assert snapshot.ids == [ord(letter) for letter in 'añb/"\n']
    assert [entry.offset for entry in snapshot.entries] == [1, 4]
    assert int(await bench.redis.hget(bench.shard.key(f"job:{job_id}"), "bytes")) == len('añb/"\n'.encode())


async def test_an_end_that_does_not_follow_the_log_is_refused(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abcd"))
    answer = await worker.turn(frame(job, 1, "ab", finish="stop"))
    assert [expect.offset for expect in answer.expect] == [5]
    assert await bench.state(job_id) == "streaming"
    await worker.turn(frame(job, 5, "", finish="stop"))
    assert (await bench.queue.read(job_id)).text == "abcd"


async def test_a_log_is_never_longer_than_max_tokens(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put(max_tokens=5)
    [job] = await worker.take()
    answer = await worker.turn(frame(job, 1, "abcdefgh"))
    snapshot = await bench.queue.read(job_id)
    assert (snapshot.text, snapshot.state, snapshot.finish) == ("abcde", "done", "length")
    assert [drop.job for drop in answer.drops] == [job_id]


async def test_a_finished_job_is_acknowledged_by_a_drop_and_then_frames_of_it_change_nothing(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    last = frame(job, 1, "ab", finish="stop")
    first = await worker.turn(last, lose_answer=True)
    assert [(drop.job, drop.attempt) for drop in first.drops] == [(job_id, 1)]
    assert (await worker.turn(last, number=worker.number)).drops == first.drops
    assert (await worker.turn(frame(job, 3, "c"))).drops == first.drops
    snapshot = await bench.queue.read(job_id)
    assert (snapshot.text, snapshot.finish) == ("ab", "stop")
    assert (await bench.queue.depth(ENDPOINT)).ended["done"] == 1


async def test_a_log_ends_with_one_terminal_entry(bench: Bench) -> None:
    worker = await bench.worker()
    for ending in ({"finish": "stop"}, {"error": FrameError(code="worker_error", message="no")}):
        job_id = await bench.put()
        [job] = await worker.take()
        await worker.turn(frame(job, 1, "ab", **ending))
        entries = await bench.redis.xrange(bench.shard.key(f"log:{job_id}"))
        assert [entry_id for entry_id, fields in entries if "end" in fields] == ["2-1"] == [entries[-1][0]]


async def test_a_workers_error_fails_the_job_and_is_the_callers_or_the_servers(bench: Bench) -> None:
    worker = await bench.worker()
    for code in (*sorted(CALLER_ERRORS), "numerical_error", "worker_error", "something_new"):
        job_id = await bench.put()
        [job] = await worker.take()
        await worker.turn(frame(job, 1, "", error=FrameError(code=code, message="because"), prompt_tokens=9))
        snapshot = await bench.queue.read(job_id)
        assert (snapshot.state, snapshot.finish) == ("failed", "error")
        kind = "invalid_request_error" if code in CALLER_ERRORS else "server_error"
        assert snapshot.error
        assert (snapshot.error.code, snapshot.error.type, snapshot.error.message) == (code, kind, "because")


async def test_text_beyond_all_measure_fails_its_job_alone(bench: Bench) -> None:
    worker, good_id, bad_id = await bench.worker(), await bench.put(), await bench.put()
    good, bad = await worker.take(2)
    flood = frame(bad, 1, "a").model_copy(update={"texts": ["x" * 5000]})
    await worker.turn(flood, frame(good, 1, "a"))
    assert (await bench.queue.read(good_id)).text == "a"
    snapshot = await bench.queue.read(bad_id)
    assert (snapshot.text, snapshot.state) == ("", "failed")
    assert snapshot.error
    assert snapshot.error.code == "worker_text_too_long"


async def test_one_bad_frame_spoils_no_other(bench: Bench) -> None:
    worker = await bench.worker()
    jobs = [await bench.put() for _ in range(4)]
    a, b, c, d = await worker.take(4)
    await bench.queue.cancel(b.id)
    stranger = frame(a, 1, "zz").model_copy(update={"job": bench.shard.new_id()})
    old = frame(d, 1, "zz").model_copy(update={"attempt": 7})
    answer = await worker.turn(stranger, frame(a, 5, "x"), frame(b, 1, "x"), old, frame(c, 1, "ok"), frame(d, 1, "ok"))
    assert [(await bench.queue.read(job)).text for job in jobs] == ["", "", "ok", "ok"]
    assert {(drop.job, drop.attempt) for drop in answer.drops} == {(stranger.job, 1), (b.id, 1), (d.id, 7)}
    assert [expect.job for expect in answer.expect] == [a.id]


# ------------------------------------------------------------------------------------------------ leases


async def test_a_job_travels_with_its_whole_request(bench: Bench) -> None:
    spec = JobSpec(messages=[ChatMessage(role="user", content='ü"/{}')], max_tokens=5, seed=-3, stop=["\n\n", "end"])
    await bench.queue.put(ENDPOINT, "ann", spec)
    [job] = await (await bench.worker()).take()
    assert (job.spec, job.attempt, job.produced_ids, job.sent_bytes, job.suspect) == (spec, 1, [], 0, False)


async def test_lapsed_lease_returns_job_to_front_of_queue(bench: Bench) -> None:
    first, second = await bench.put(), await bench.put()
    dead = await bench.worker()
    [job] = await dead.take()
    await dead.turn(frame(job, 1, "añb", prompt_tokens=3))
    await bench.lapse(dead)
    reaped = await bench.queue.reap(ENDPOINT)
    assert (reaped.lapsed_sessions, reaped.requeued) == (1, 1)
    assert await bench.state(first) == "waiting"
    again, other = await (await bench.worker()).take(2)
    assert (again.id, other.id) == (first, second)
    assert (again.attempt, again.produced_ids, again.sent_bytes) == (2, [97, 241, 98], 4)


async def test_a_lapsed_session_can_append_nothing(bench: Bench) -> None:
    job_id, slow = await bench.put(), await bench.worker()
    [job] = await slow.take()
    await bench.lapse(slow)
    await bench.queue.reap(ENDPOINT)
    with pytest.raises(SessionLapsed, match="log in anew"):
        await slow.turn(frame(job, 1, "abc"))
    assert (await bench.queue.read(job_id)).n == 0


async def test_a_frame_of_an_older_attempt_changes_nothing(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [old] = await worker.take()
    await worker.turn(frame(old, 1, "a", release=True))
    [new] = await worker.take()
    assert (old.attempt, new.attempt) == (1, 2)
    answer = await worker.turn(frame(old, 2, "zzz", finish="stop"), frame(new, 2, "b"))
    assert [(drop.job, drop.attempt) for drop in answer.drops] == [(job_id, 1)]
    assert (await bench.queue.read(job_id)).text == "ab"
    assert await bench.state(job_id) == "streaming"


async def test_a_worker_that_holds_an_older_attempt_drops_it_and_is_given_the_new_one(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [old] = await worker.take()
    await worker.turn(frame(old, 1, "a", release=True), lose_answer=True)
    worker.holding = {}
    await worker.turn(room=1, lose_answer=True)
    worker.holding = {job_id: old.attempt}
    answer = await worker.turn(room=1)
    assert [(drop.job, drop.attempt) for drop in answer.drops] == [(job_id, 1)]
    assert [(job.id, job.attempt, job.produced_ids) for job in answer.jobs] == [(job_id, 2, [97])]


async def test_every_turn_renews_the_lease(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.lapse(worker)
    await worker.turn()
    assert (await bench.queue.reap(ENDPOINT)).lapsed_sessions == 0
    [live] = await bench.queue.sessions(ENDPOINT)
    assert 9 < live.lease_left_s <= 10


async def test_a_lost_answer_leaks_no_job_and_leases_none_twice(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(5)]
    worker = await bench.worker()
    await worker.turn(room=2, lose_answer=True)
    again = await worker.turn(room=3)
    assert [job.id for job in again.jobs[:2]] == sorted(jobs[:2])
    assert {job.id for job in again.jobs} == set(jobs[:3])
    assert all(job.attempt == 1 for job in again.jobs)
    assert (await bench.queue.depth(ENDPOINT)).running == 3


async def test_a_repeat_of_the_last_turn_gets_the_same_answer(bench: Bench) -> None:
    for _ in range(4):
        await bench.put()
    worker = await bench.worker()
    running, other = await worker.take(2)
    frames = (frame(running, 1, "ab"), frame(other, 3, "x"))
    first = await worker.turn(*frames, room=5, lose_answer=True)
    await bench.put()
    repeat = await worker.turn(*frames, room=5, number=worker.number)
    assert repeat.body() == first.body()
    assert len(repeat.jobs) == 2
    assert (await bench.queue.depth(ENDPOINT)).running == 4


async def test_what_a_worker_reads_of_a_turn_is_what_the_turn_found(bench: Bench) -> None:
    """The server writes a request into the answer as it was put, without a look at it."""
    spec = JobSpec(messages=[ChatMessage(role="user", content='"\u2028é')], max_tokens=9, seed=5, stop=["a", "\\"], top_logprobs=2)
    job_id = (await bench.queue.put(ENDPOINT, "ann", spec, priority=3)).job_id
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "ab"))
    await bench.queue.close_session(worker.session, worker.key)
    found = await (await bench.worker()).turn(room=1)
    assert TurnAnswer.model_validate_json(found.body()) == TurnAnswer(
        turn=found.turn, jobs=[WorkerJob(id=job_id, attempt=2, spec=spec, produced_ids=[97, 98], sent_bytes=2, priority=3)]
    )
    said = Turned(
        7, [LeasedJob("j", 1, '{"max_tokens":1,"seed":2}', [], 0, True, 0)], [Drop(job="d", attempt=1)], [Expect(job="e", offset=3)], True
    )
    assert TurnAnswer.model_validate_json(said.body()) == TurnAnswer(
        turn=7,
        jobs=[WorkerJob(id="j", attempt=1, spec=JobSpec(max_tokens=1, seed=2), suspect=True)],
        drops=[Drop(job="d", attempt=1)],
        expect=[Expect(job="e", offset=3)],
        drain=True,
    )


async def test_a_turn_that_waits_for_work_may_lease_under_the_same_number(bench: Bench) -> None:
    worker = await bench.worker()
    assert await worker.take(2) == []
    job_id = await bench.put()
    assert [job.id for job in (await worker.turn(room=2, number=worker.number)).jobs] == [job_id]


async def test_a_turn_that_was_overtaken_changes_nothing(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "ab"))
    await bench.put()
    late = TurnRequest(session=worker.session, turn=1, frames=[frame(job, 3, "zz")], room=5)
    answer = await bench.queue.turn(late, worker.key)
    assert answer == Turned(turn=1)
    assert (await bench.queue.read(job_id)).text == "ab"
    assert (await bench.queue.depth(ENDPOINT)).running == 1


async def test_jobs_of_a_lost_answer_that_find_no_room_go_back(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(3)]
    worker = await bench.worker()
    await worker.turn(room=3, lose_answer=True)
    assert (await worker.turn(room=0)).jobs == []
    assert await bench.waiting_order() == jobs
    assert [(await bench.queue.read(job)).attempt for job in jobs] == [2, 2, 2]


async def test_a_worker_gets_no_more_than_its_room_and_its_slots(bench: Bench) -> None:
    for _ in range(10):
        await bench.put()
    worker = await bench.worker(slots=4)
    assert len(await worker.take(3)) == 3
    assert len(await worker.take(1000)) == 1
    assert await worker.take(1000) == []


async def test_a_released_job_keeps_its_place_and_is_not_counted_as_a_death(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(3)]
    worker = await bench.worker()
    for _ in range(4):
        [job] = await worker.take()
        assert job.id == jobs[0]
        answer = await worker.turn(frame(job, 1, "", release=True), room=1)
        assert answer.jobs == []  # what it hands back is not for the same turn
    assert not job.suspect
    assert await bench.waiting_order() == jobs


async def test_logging_out_releases_every_job_at_once(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(3)]
    worker = await bench.worker()
    await worker.take(2)
    assert await worker.close() == 2
    assert await worker.close() == 0
    assert await bench.waiting_order() == jobs
    with pytest.raises(SessionLapsed):
        await worker.turn()


async def test_a_session_of_another_key_is_out_of_reach(bench: Bench) -> None:
    worker = await bench.worker(key="mine")
    await bench.put()
    worker.key = "theirs"
    with pytest.raises(SessionLapsed):
        await worker.take()
    assert await worker.close() == 0
    worker.key = "mine"
    assert len(await worker.take()) == 1


@pytest.mark.parametrize("session", ["", "nonsense", Shard(ENDPOINT).new_id(), Shard("elsewhere").new_id()])
async def test_an_unknown_session_is_told_to_log_in_anew(bench: Bench, session: str) -> None:
    with pytest.raises(SessionLapsed):
        await bench.queue.turn(TurnRequest(session=session, turn=1), "key")
    assert await bench.queue.close_session(session, "key") == 0
    assert await bench.queue.drain_session(session) is False


async def test_sessions_of_a_key_are_capped_and_freed_by_logout_and_lapse(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_sessions_per_key=2)}), redis)
    first, second = await bench.worker(), await bench.worker()
    with pytest.raises(TooManySessions, match="2 sessions open on mixtral_chat"):
        await bench.worker()
    assert await bench.worker(key="other")
    await first.close()
    third = await bench.worker()
    await bench.lapse(second, third)
    await bench.queue.reap(ENDPOINT)
    assert await bench.worker()
    assert await bench.worker()


async def test_a_worker_asked_to_drain_gets_no_more_jobs_but_keeps_those_it_has(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(2)]
    worker = await bench.worker()
    [job] = await worker.take()
    assert await bench.queue.drain_session(worker.session)
    answer = await worker.turn(frame(job, 1, "a"), room=1)
    assert (answer.drain, answer.jobs) == (True, [])
    assert (await bench.queue.read(jobs[0])).text == "a"


async def test_live_workers_are_listed_with_what_they_said(bench: Bench) -> None:
    worker = await bench.worker("box-1", slots=8)
    await bench.put()
    await worker.take(5)
    request = worker.request(room=7).model_copy(update={"turn": 2, "telemetry": {"kv_free": 0.5}})
    await bench.queue.turn(request, worker.key)
    for turn, too_much in enumerate(({"x": "y" * 5000}, {"n": 2**80}), 3):
        await bench.queue.turn(worker.request(room=7).model_copy(update={"turn": turn, "telemetry": too_much}), worker.key)
    [live] = await bench.queue.sessions(ENDPOINT)
    assert (live.session, live.name, live.key_id, live.model, live.device) == (worker.session, "box-1", "key", "toy", "cpu")
    assert (live.max_slots, live.max_seq_len, live.running, live.room, live.drain) == (8, 512, 1, 7, False)
    assert live.telemetry == {"kv_free": 0.5}


# ------------------------------------------------------------------------------------------------ cancel


async def test_cancelling_a_waiting_job_removes_it_at_once(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(3)]
    assert await bench.queue.cancel(jobs[1]) == "cancelled"
    assert await bench.queue.position(jobs[2]) == 2
    assert await bench.waiting_order() == [jobs[0], jobs[2]]
    snapshot = await bench.queue.read(jobs[1])
    assert (snapshot.state, snapshot.finish) == ("cancelled", "cancelled")


async def test_cancelling_a_running_job_frees_its_slot_and_keeps_its_text(bench: Bench) -> None:
    worker, job_id = await bench.worker(slots=1), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    other = await bench.put()
    assert await bench.queue.cancel(job_id) == "cancelled"
    answer = await worker.turn(frame(job, 4, "def", finish="stop"), room=1)
    assert [drop.job for drop in answer.drops] == [job_id]
    assert [given.id for given in answer.jobs] == [other]
    snapshot = await bench.queue.read(job_id)
    assert (snapshot.text, snapshot.finish) == ("abc", "cancelled")


async def test_cancel_after_the_end_changes_nothing(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "a", finish="stop"))
    assert await bench.queue.cancel(job_id) == "done"
    assert (await bench.queue.read(job_id)).finish == "stop"
    assert len(await bench.queue.usage_batch(ENDPOINT)) == 1


async def test_nothing_cancelled_is_ever_queued_again(bench: Bench) -> None:
    worker, job_id = await bench.worker(), await bench.put()
    await worker.take()
    await bench.queue.cancel(job_id)
    await bench.lapse(worker)
    assert (await bench.queue.reap(ENDPOINT)).requeued == 0
    assert await bench.waiting_order() == []


# ------------------------------------------------------------------------------------------------ time


async def pass_deadline(bench: Bench, job: str) -> None:
    changed = await bench.redis.zadd(bench.shard.key("deadlines"), {job: 1}, xx=True, ch=True)
    assert changed == 1


async def test_a_job_past_its_deadline_expires(bench: Bench) -> None:
    kept, late = await bench.put(queue_timeout_s=60), await bench.put(queue_timeout_s=60)
    await bench.queue.reap(ENDPOINT)
    await pass_deadline(bench, late)
    assert (await bench.queue.reap(ENDPOINT)).expired == 1
    snapshot = await bench.queue.read(late)
    assert (snapshot.state, snapshot.finish) == ("expired", "expired")
    assert await bench.waiting_order() == [kept]


async def test_a_job_past_its_deadline_never_starts_even_before_it_is_reaped(bench: Bench) -> None:
    late, kept = await bench.put(queue_timeout_s=60), await bench.put()
    await bench.queue.reap(ENDPOINT)
    await pass_deadline(bench, late)
    assert [job.id for job in await (await bench.worker()).take(2)] == [kept]
    assert await bench.state(late) == "expired"


async def test_a_deadline_is_void_once_the_job_has_started(bench: Bench) -> None:
    job_id = await bench.put(queue_timeout_s=60)
    worker = await bench.worker()
    await worker.take()
    assert await bench.redis.zcard(bench.shard.key("deadlines")) == 0
    await worker.close()
    assert await bench.redis.zcard(bench.shard.key("deadlines")) == 0
    assert await bench.waiting_order() == [job_id]


@pytest.mark.parametrize("gap_s", [60, -60], ids=["away for a minute", "clock set back a minute"])
@pytest.mark.parametrize("first", ["reap", "turn", "put", "open"])
async def test_time_that_nobody_watched_lapses_nobody(bench: Bench, gap_s: int, first: str) -> None:
    """As if Redis or every server had been away: the tick and all times lie a minute back, or ahead."""
    worker, idle = await bench.worker(), await bench.worker()
    running = await bench.put()
    await worker.take()
    late = await bench.put(queue_timeout_s=30)
    await bench.queue.reap(ENDPOINT)
    await bench.redis.incrby(bench.shard.key("tick"), -gap_s * 1000)
    for key in ("sessions", "deadlines"):
        for member in await bench.redis.zrange(bench.shard.key(key), 0, -1):
            await bench.redis.zincrby(bench.shard.key(key), -gap_s * 1000, member)
    if first == "turn":
        await worker.turn()
    if first == "put":
        await bench.put(queue_timeout_s=30)
    if first == "open":
        await bench.worker()
    reaped = await bench.queue.reap(ENDPOINT)
    assert (reaped.lapsed_sessions, reaped.expired) == (0, 0)
    assert (reaped.shifted_s != 0) == (first == "reap")
    assert [await bench.state(running), await bench.state(late)] == ["leased", "waiting"]
    now_ms = float((await bench.redis.time())[0]) * 1000
    for deadline in [score for _, score in await bench.redis.zrange(bench.shard.key("deadlines"), 0, -1, withscores=True)]:
        assert 20_000 < deadline - now_ms < 32_000
    left_s = {live.session: live.lease_left_s for live in await bench.queue.sessions(ENDPOINT)}
    assert {worker.session, idle.session} <= set(left_s)
    assert all(5 < left < 15 for left in left_s.values())


async def test_the_first_reap_of_all_judges_nobody(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.redis.zadd(bench.shard.key("sessions"), {worker.session: 1})
    assert (await bench.queue.reap(ENDPOINT)).lapsed_sessions == 0
    assert (await bench.queue.reap(ENDPOINT)).lapsed_sessions == 1


async def test_one_round_of_reap_is_bounded_and_says_that_there_is_more(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_sessions_per_key=100)}), redis)
    await bench.lapse(*[await bench.worker() for _ in range(60)])
    first, second = await bench.queue.reap(ENDPOINT), await bench.queue.reap(ENDPOINT)
    assert (first.lapsed_sessions, first.more) == (50, True)
    assert (second.lapsed_sessions, second.more) == (10, False)


# ------------------------------------------------------------------------------------------------ poison


async def kill_holders(bench: Bench, room: int = 64) -> list[str]:
    """A worker takes what it can get and dies. Returns what it held."""
    worker = await bench.worker("victim")
    jobs = await worker.take(room)
    await bench.lapse(worker)
    await bench.queue.reap(ENDPOINT)
    return [job.id for job in jobs]


async def test_a_job_is_given_up_when_a_third_worker_dies_with_it(bench: Bench) -> None:
    poison = await bench.put("mallory")
    for death in range(3):
        assert await bench.state(poison) == "waiting", death
        assert await kill_holders(bench) == [poison]
    snapshot = await bench.queue.read(poison)
    assert (snapshot.state, snapshot.finish) == ("dead", "error")
    assert snapshot.error
    assert snapshot.error.code == "workers_died"
    assert snapshot.error.message.startswith("3 workers died while they ran this job, the last was victim")
    [letter] = await DeadLetters(bench.redis, [ENDPOINT]).list(ENDPOINT)
    assert (letter.job_id, letter.owner, letter.worker) == (poison, "mallory", "victim")


async def test_a_batch_holds_at_most_one_suspect(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(4)]
    for _ in range(2):
        assert sorted(await kill_holders(bench)) == sorted(jobs)
    fresh = [await bench.put() for _ in range(3)]
    first, second = await bench.worker(), await bench.worker()
    batch = await first.take(64)
    assert [job.suspect for job in batch] == [True, False, False, False]
    assert {job.id for job in batch[1:]} == set(fresh)
    assert await first.take(64) == []
    assert [job.suspect for job in await second.take(64)] == [True]
    await first.turn(frame(batch[0], 1, "a", finish="stop"))
    assert [job.suspect for job in await first.take(64)] == [True]


async def test_the_suspect_dies_with_its_worker_and_its_batch_mates_do_not(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(2)]
    for _ in range(2):
        await kill_holders(bench)
    mates = [await bench.put() for _ in range(5)]
    for _ in jobs:
        batch = await kill_holders(bench)
        assert sum(job in jobs for job in batch) == 1
    assert [await bench.state(job) for job in jobs] == ["dead", "dead"]
    assert {await bench.state(job) for job in mates} == {"waiting"}


async def test_one_dead_box_makes_none_of_its_chats_run_alone(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(64)]
    assert len(await kill_holders(bench)) == 64
    batch = await (await bench.worker()).take(64)
    assert [job.id for job in batch] == jobs
    assert not any(job.suspect for job in batch)


async def test_a_suspect_that_is_cancelled_or_ends_leaves_nothing_behind(bench: Bench) -> None:
    jobs = [await bench.put() for _ in range(2)]
    for _ in range(2):
        await kill_holders(bench)
    assert [await bench.queue.position(job) for job in jobs] == [1, 2]
    await bench.queue.cancel(jobs[0])
    worker = await bench.worker()
    [job] = await worker.take(5)
    await worker.turn(frame(job, 1, "a", finish="stop"))
    assert await bench.redis.keys(bench.shard.key("suspects:*")) == []
    assert (await bench.queue.depth(ENDPOINT)).waiting == 0


async def test_dead_letters_are_bounded(redis: Redis) -> None:
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits(max_dead_letters=2)}), redis)
    for number in range(3):
        await bench.put(f"user{number}")
        for _ in range(3):
            await kill_holders(bench)
    assert [letter.owner for letter in await DeadLetters(bench.redis, [ENDPOINT]).list(ENDPOINT)] == ["user2", "user1"]


# ------------------------------------------------------------------------------------------------ books


async def test_every_ended_job_leaves_one_row_for_the_ledger(bench: Bench) -> None:
    done, failed, cancelled, expired = [await bench.put(queue_timeout_s=60) for _ in range(4)]
    worker = await bench.worker()
    first, second = await worker.take(2)
    await worker.turn(
        frame(first, 1, "ab", finish="stop", prompt_tokens=5), frame(second, 1, "", error=FrameError(code="worker_error", message="no"))
    )
    await bench.queue.cancel(cancelled)
    await bench.queue.reap(ENDPOINT)
    await pass_deadline(bench, expired)
    await bench.queue.reap(ENDPOINT)
    batch = await bench.queue.usage_batch(ENDPOINT)
    rows = list(batch.values())
    assert [(row.id, row.state, row.finish, row.error_code) for row in rows] == [
        (done, "done", "stop", None),
        (failed, "failed", "error", "worker_error"),
        (cancelled, "cancelled", "cancelled", None),
        (expired, "expired", "expired", None),
    ]
    assert (rows[0].owner, rows[0].endpoint, rows[0].prompt_tokens, rows[0].completion_tokens, rows[0].attempts) == (
        "ann",
        ENDPOINT,
        5,
        2,
        1,
    )
    assert rows[0].created_s <= rows[0].finished_s
    assert rows[0].first_token_s is not None
    assert rows[2].queue_s is None
    assert [row.id for row in (await bench.queue.usage_batch(ENDPOINT, limit=2)).values()] == [done, failed]
    await bench.queue.usage_ack(ENDPOINT, list(batch)[:3])
    await bench.queue.usage_ack(ENDPOINT, [])
    assert [row.id for row in (await bench.queue.usage_batch(ENDPOINT)).values()] == [expired]


async def test_depth_counts_what_is_there(bench: Bench) -> None:
    for priority in (0, 0, 3):
        await bench.put("ann", priority=priority)
    await bench.queue.cancel(await bench.put("bob"))
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    depth = await bench.queue.depth(ENDPOINT)
    assert (depth.waiting, depth.running, depth.sessions, depth.users_waiting) == (2, 1, 1, 1)
    assert (depth.unsaved_usage, depth.dead_letters, depth.tokens) == (1, 0, 3)
    assert depth.waiting_by_priority == {0: 1, 3: 1}
    assert depth.ended == {"done": 0, "failed": 0, "cancelled": 1, "expired": 0, "dead": 0}


RATE = Rate("key", "k", 10, 1_000)


async def test_every_key_is_in_the_table_and_ends_or_is_bounded(bench: Bench) -> None:
    """A life with every script in it; afterwards nothing remains that grows with the jobs that were."""
    seen: dict[str, str] = {}

    async def look() -> set[str]:
        keys = set(await bench.redis.keys())
        seen.update({key: await bench.redis.type(key) for key in keys})
        return keys

    for number in range(8):
        words = {"queue_timeout_s": 50, "idempotency_key": f"k{number}", "rates": [RATE], "needs_native": number % 2 == 0}
        await bench.put(f"user {number % 3}}}:", priority=number % 2, **words)
    for _ in range(3):
        await bench.put("bounded", key_id="k", max_running=1)
    batches = await bench.worker(static_batch=64, slots=1000)
    await batches.turn(room=64)
    await look()
    await batches.close()
    for _ in range(2):
        await kill_holders(bench, room=2)
        await look()
    worker = await bench.worker()
    [one, *_] = await worker.take(2)
    await look()
    await worker.turn(frame(one, 1, "ab", finish="stop"))
    await bench.put("told")
    await kill_holders(bench, room=64)
    await look()
    await worker.close()
    for job in [key.rpartition(":")[2] for key in seen if ":job:" in key]:
        await bench.queue.cancel(job)
    left = await look()

    kinds = {key: key_kind(key) for key in seen}
    assert [key for key, kind in kinds.items() if kind is None or kind.type != seen[key]] == []
    assert {kind.pattern for kind in kinds.values() if kind} == {kind.pattern for kind in KEYS}
    lasting = {key.split("}:")[1] for key in left if await bench.redis.ttl(key) == -1}
    assert lasting == {"format", "tick", "clock", "rate", "totals", "usage", "dead", "parked", "eta", "filling"}


# ------------------------------------------------------------------------------------------------ Redis itself


async def test_flushed_scripts_are_loaded_again(bench: Bench) -> None:
    job_id, worker = await bench.put(), await bench.worker()
    await bench.redis.script_flush()
    [job] = await worker.take()
    await bench.redis.script_flush()
    await worker.turn(frame(job, 1, "ab", finish="stop"))
    await bench.redis.script_flush()
    assert (await bench.queue.read(job_id)).text == "ab"


async def test_a_newer_format_is_refused_with_a_sentence(redis: Redis) -> None:
    await redis.set(Shard(ENDPOINT).key("format"), FORMAT + 1)
    with pytest.raises(Unavailable, match=f"format {FORMAT + 1}; this server reads and writes format {FORMAT}; start the newer server"):
        await JobQueue(redis, {ENDPOINT: QueueLimits()}).start()


async def test_two_servers_of_one_format_start_side_by_side(redis: Redis) -> None:
    queues = [JobQueue(redis, {ENDPOINT: QueueLimits()}) for _ in range(2)]
    await asyncio.gather(*(queue.start() for queue in queues))
    job = (await queues[0].put(ENDPOINT, "ann", JobSpec(prompt="x", max_tokens=1, seed=0))).job_id
    assert (await queues[1].read(job)).state == "waiting"


@pytest.fixture(params=["6.2", "7.0"])
def own_redis(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    with RedisProcess(redis_binary(request.param), "--appendonly", "yes") as server:
        yield server


async def test_a_redis_that_is_gone_is_said_to_be_unavailable_and_nothing_is_lost(own_redis: RedisProcess) -> None:
    redis = connect(own_redis.url)
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits()}), redis)
    worker, job_id = await bench.worker(), await bench.put()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "ab"))
    own_redis.crash()
    for call in (bench.put(), bench.queue.read(job_id), bench.queue.reap(ENDPOINT), worker.turn()):
        with pytest.raises(RedisUnavailable, match="does not answer") as gone:
            await call
        assert gone.value.retry_after_s
    own_redis.start()
    await worker.turn(frame(job, 1, "abcd", finish="stop"))
    assert (await bench.queue.read(job_id)).text == "abcd"
    await redis.aclose()


async def test_at_maxmemory_new_jobs_are_refused_and_running_ones_finish(own_redis: RedisProcess) -> None:
    redis = connect(own_redis.url)
    bench = Bench(JobQueue(redis, {ENDPOINT: QueueLimits()}), redis)
    waiting = [await bench.put(f"user{number}") for number in range(3)]
    worker, dead = await bench.worker(), await bench.worker()
    [job] = await worker.take()
    [lost] = await dead.take()
    await bench.lapse(dead)
    await redis.config_set("maxmemory", 1)
    with pytest.raises(RedisUnavailable, match="takes no writes now \\(OOM\\)"):
        await bench.put()
    await worker.turn(frame(job, 1, "ab"))
    assert (await worker.turn(frame(job, 3, "c", finish="stop"))).drops
    assert (await bench.queue.read(job.id)).text == "abc"
    assert (await bench.queue.reap(ENDPOINT)).requeued == 1
    assert await bench.state(lost.id) == "waiting"
    assert await bench.queue.cancel(waiting[2]) == "cancelled"
    assert await worker.close() == 0
    await redis.aclose()


async def test_jobs_of_many_clients_and_workers_at_once_are_each_leased_and_finished_once(bench: Bench) -> None:
    leases: collections.Counter[tuple[str, int]] = collections.Counter()

    async def client(name: str) -> list[str]:
        return [await bench.put(name) for _ in range(20)]

    async def work(name: str) -> None:
        worker = await bench.worker(name)
        while jobs := await worker.take(4):
            leases.update((job.id, job.attempt) for job in jobs)
            await worker.turn(*(frame(job, 1, "ab", finish="stop") for job in jobs))

    jobs = [job for mine in await asyncio.gather(*(client(f"user{number}") for number in range(5))) for job in mine]
    await asyncio.gather(*(work(f"worker{number}") for number in range(4)))
    assert leases == collections.Counter({(job, 1): 1 for job in jobs})
    assert (await bench.queue.depth(ENDPOINT)).ended["done"] == 100


async def test_a_turn_is_one_round_trip_however_many_frames_it_has(bench: Bench) -> None:
    worker = await bench.worker()
    ended = [await bench.put() for _ in range(3)]
    jobs = await worker.take(3)
    waiting = [await bench.put() for _ in range(2)]
    async with bench.redis.monitor() as monitor:
        answer = await worker.turn(*(frame(job, 1, "ab", finish="stop") for job in jobs), room=2)
        await bench.redis.echo("over")
        asked = []
        while (seen := await monitor.next_command())["command"] != "ECHO over":
            if seen["client_type"] != "lua":
                asked.append(seen["command"].split()[0])
    assert asked == ["EVALSHA"]
    assert [job.id for job in answer.jobs] == waiting
    assert [await bench.state(job) for job in ended] == ["done"] * 3


# ------------------------------------------------------------------------------------------------ several jobs in one step


def specs(count: int) -> list[JobSpec]:
    return [JobSpec(prompt="x", max_tokens=8, seed=seed) for seed in range(count)]


async def test_several_jobs_are_put_in_one_step_and_wait_one_after_another(queue: JobQueue, bench: Bench) -> None:
    put = await queue.put(ENDPOINT, "ann", *specs(3))
    assert put.created
    assert len(set(put.job_ids)) == 3
    assert [await queue.position(job) for job in put.job_ids] == [1, 2, 3]
    worker = await bench.worker()
    assert [(job.id, job.spec.seed) for job in await worker.take(3)] == list(zip(put.job_ids, range(3), strict=True))


async def test_several_jobs_are_one_under_their_key_until_a_result_of_theirs_is_gone(queue: JobQueue, bench: Bench) -> None:
    async def put(count: int, body: str = "b") -> Put:
        return await queue.put(ENDPOINT, "ann", *specs(count), idempotency_key="k", body_hash=body)

    first = await put(3)
    again = await put(3)
    assert (again.created, again.job_ids) == (False, first.job_ids)
    with pytest.raises(IdempotencyConflict):
        await put(2, "c")
    await bench.redis.delete(bench.shard.key(f"job:{first.others[1]}"))
    anew = await put(3)
    assert anew.created
    assert not set(anew.job_ids) & set(first.job_ids)


async def test_several_jobs_are_taken_together_or_not_at_all(redis: Redis) -> None:
    limits = QueueLimits(max_waiting_per_user=4, max_waiting_tokens_per_user=40)
    queue = JobQueue(redis, {ENDPOINT: limits})
    await queue.put(ENDPOINT, "ann", *specs(2))
    with pytest.raises(QueueFull, match=r"you have 2 jobs waiting for .*, 4 at most; this request asks for 3 answers: ask for fewer, or"):
        await queue.put(ENDPOINT, "ann", *specs(3))
    big = [JobSpec(prompt="x", max_tokens=30, seed=1)] * 2
    with pytest.raises(QueueFull, match=r"your jobs waiting for .* come to 18 tokens as estimated, 40 at most; this request asks for 2"):
        await queue.put(ENDPOINT, "ann", *big)
    assert (await queue.depth(ENDPOINT)).waiting == 2
    await queue.put(ENDPOINT, "ann", *specs(2))
    assert (await queue.depth(ENDPOINT)).waiting == 4
