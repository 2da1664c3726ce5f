"""The queue as AIME's workers see it: which jobs they are given, in which order, and what becomes of their text."""

from __future__ import annotations

import random

import pytest

from mixtral_client.protocol import JobSpec
from mixtral_server.aime_queue import AimeJob, AimeQueue, AimeSession, Post, Taken
from mixtral_server.dead import DeadLetters
from mixtral_server.dead_cli import shape_of, words_of
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.keys import key_kind
from mixtral_server.records import Parameters
from support.queue_bench import ENDPOINT, Bench

CHAT = EndpointConfig(name=ENDPOINT)


class AimeHand:
    """One AIME worker, logged in."""

    def __init__(self, queue: AimeQueue, name: str) -> None:
        self.queue = queue
        self.session = AimeSession(CHAT, "key", name)
        self.polls = 0

    async def take(self, room: int = 1) -> list[AimeJob]:
        self.polls += 1
        while True:
            asked = await self.queue.ask(self.session, str(self.polls), room, is_first=True)
            assert asked is not None
            if asked.again_s is None:
                return list(asked.jobs)

    async def post(self, job: AimeJob, text: str, **more: object) -> Taken:
        [taken] = await self.queue.post(self.session, [Post(job.id, job.attempt, text=text, **more)])  # type: ignore[arg-type]
        return taken


@pytest.fixture
def aime(bench: Bench) -> AimeQueue:
    return AimeQueue(bench.redis, bench.queue)


async def hand(aime: AimeQueue, name: str = "a", slots: int = 64) -> AimeHand:
    worker = AimeHand(aime, name)
    facts = {"model": "m", "device": "d", "version": "1", "max_slots": slots, "max_seq_len": 0}
    await aime.open(worker.session, facts, {})  # type: ignore[arg-type]
    return worker


async def test_a_job_wakes_a_worker_that_found_none(bench: Bench, aime: AimeQueue) -> None:
    worker = await hand(aime)
    async with bench.redis.pubsub() as channel:
        await channel.subscribe(bench.shard.wake)
        assert await channel.get_message(timeout=5)
        for _ in range(2):
            assert await worker.take() == []
            await bench.put()
            assert await channel.get_message(ignore_subscribe_messages=True, timeout=5)
            assert len(await worker.take()) == 1


async def texts_of(bench: Bench, job_id: str) -> list[str]:
    return [text for entry in (await bench.queue.read(job_id)).entries for text in entry.texts]


async def test_jobs_that_need_a_native_worker_are_passed_by_in_the_queues_order(bench: Bench, aime: AimeQueue) -> None:
    """Whatever jobs there are: an AIME worker is given every open one and no other, each user's in the order in which they are due, the
    users in turn."""
    for seed in range(20):
        await bench.redis.flushall()
        await bench.queue.start()
        draw = random.Random(seed)
        put: dict[str, tuple[str, bool, int]] = {}
        for _ in range(40):
            owner, is_closed, priority = draw.choice("abc"), draw.random() < 0.5, draw.choice([0, 0, 2])
            put[await bench.put(owner, needs_native=is_closed, priority=priority)] = (owner, is_closed, priority)
        worker = await hand(aime)
        taken = [job.id for _ in range(41) for job in await worker.take()]
        assert set(taken) == {job for job, (_, is_closed, _) in put.items() if not is_closed}
        for owner in "abc":
            mine = [job for job in taken if put[job][0] == owner]
            due = sorted((job for job in mine), key=lambda job: (put[job][2], list(put).index(job)))
            assert mine == due, seed
        assert set(await bench.waiting_order()) == {job for job, (_, is_closed, _) in put.items() if is_closed}
        left = [key async for key in bench.redis.scan_iter("*:native*")]
        assert left == []


async def test_better_level_goes_first_also_past_closed_jobs(bench: Bench, aime: AimeQueue) -> None:
    await bench.put("ann", needs_native=True, priority=0)
    late = await bench.put("ann", priority=5)
    first = await bench.put("bob", priority=2)
    worker = await hand(aime)
    assert [job.id for _ in range(3) for job in await worker.take()] == [first, late]


async def test_suspect_that_needs_a_native_worker_is_passed_by(bench: Bench, aime: AimeQueue) -> None:
    closed, opened = await bench.put(needs_native=True), await bench.put("bob")
    for _ in range(2):
        native = await bench.worker()
        taken = [job.id for job in await native.take(2)]
        assert closed in taken
        await bench.lapse(native)
        await bench.queue.reap(ENDPOINT)
    worker = await hand(aime)
    assert [job.id for job in await worker.take(2)] == [opened]


async def test_closed_job_that_is_cancelled_leaves_nothing_behind(bench: Bench, aime: AimeQueue) -> None:
    job = await bench.put(needs_native=True, key_id="k", max_running=1)
    parked = await bench.put(needs_native=True, key_id="k", max_running=1)
    for one in (job, parked):
        await bench.queue.cancel(one)
    assert [key async for key in bench.redis.scan_iter("*:native*")] == []
    assert await (await hand(aime)).take() == []


async def test_text_has_as_many_offsets_as_tokens_and_comes_with_the_last(bench: Bench, aime: AimeQueue) -> None:
    job_id, worker = await bench.put(), await hand(aime)
    [job] = await worker.take()
    await worker.post(job, "abc", tokens=3)
    await worker.post(job, "abc", tokens=4)
    await worker.post(job, 'abcd"e\\/\n€', tokens=5)
    assert await texts_of(bench, job_id) == ["", "", "abc", "", 'd"e\\/\n€']
    await worker.post(job, 'abcd"e\\/\n€', tokens=7, ending="stop")
    record = await bench.queue.read(job_id)
    assert (record.state, record.n, record.text, record.finish) == ("done", 7, 'abcd"e\\/\n€', "stop")
    assert len(set(record.ids)) > 2


async def test_job_that_an_aime_worker_held_starts_anew_and_costs_its_user_once(bench: Bench, aime: AimeQueue) -> None:
    job_id, worker = await bench.put(), await hand(aime)
    [job] = await worker.take()
    await worker.post(job, "abc", tokens=3)
    await bench.lapse()
    await bench.redis.zadd(bench.shard.key("sessions"), {worker.session.id: 1})
    await bench.queue.reap(ENDPOINT)
    record = await bench.queue.read(job_id)
    assert (record.state, record.n, record.entries, record.anew) == ("waiting", 0, (), 1)
    native = await bench.worker()
    [taken] = await native.take()
    assert (taken.produced_ids, taken.sent_bytes, taken.attempt) == ([], 0, 2)
    assert await worker.post(job, "abcd") == Taken(False, True, "leased")
    assert await worker.post(job, "abcde") == Taken(False, False, "leased")


async def test_job_that_was_given_up_starts_anew_when_it_is_retried(bench: Bench, aime: AimeQueue) -> None:
    job_id, dead = await bench.put(), DeadLetters(bench.redis, [ENDPOINT])
    for number in range(3):
        worker = await hand(aime, str(number))
        [job] = await worker.take()
        await worker.post(job, "abc", tokens=3)
        await bench.lapse()
        await bench.redis.zadd(bench.shard.key("sessions"), {worker.session.id: 1})
        await bench.queue.reap(ENDPOINT)
    assert (await bench.queue.read(job_id)).text == "abc"
    assert await dead.retry(job_id) == "dead"
    assert (await bench.queue.read(job_id)).n == 0
    worker = await hand(aime, "last")
    [job] = await worker.take()
    await worker.post(job, "xy", tokens=2, ending="stop")
    assert ((await bench.queue.read(job_id)).text, await bench.state(job_id)) == ("xy", "done")
    assert sum(row.completion_tokens for row in (await bench.queue.usage_batch(ENDPOINT)).values()) == 3


async def test_poll_whose_connection_is_gone_gives_its_jobs_back_without_a_death(bench: Bench, aime: AimeQueue) -> None:
    job_id, worker = await bench.put(), await hand(aime)
    for attempt in range(1, 6):
        [job] = await worker.take()
        assert job.attempt == attempt
        assert await aime.give_back(worker.session, str(worker.polls), [job]) == 1
        await hand(aime)
    assert await bench.state(job_id) == "waiting"


async def test_worker_whose_poll_is_gone_stays_while_it_holds_a_job(bench: Bench, aime: AimeQueue) -> None:
    worker = await hand(aime)
    await bench.put()
    [job] = await worker.take()
    await aime.give_back(worker.session, str(worker.polls))
    assert await aime.is_open(worker.session)
    await worker.post(job, "abc", ending="stop")
    await aime.give_back(worker.session, "an earlier one")
    assert await aime.is_open(worker.session)
    await aime.give_back(worker.session, str(worker.polls))
    assert not await aime.is_open(worker.session)


async def test_content_of_a_job_that_is_no_chat_travels_as_it_was_put(bench: Bench, aime: AimeQueue) -> None:
    content = Parameters(parameters={"a": [1, None, {"b": "ü"}]}, max_tokens=10, likely_tokens=1)
    await bench.queue.put(ENDPOINT, "ann", content)
    await bench.queue.put(ENDPOINT, "ann", JobSpec(prompt="x", max_tokens=1, seed=2))
    worker = await hand(aime)
    assert [job.content for job in await worker.take(2)] == [content, JobSpec(prompt="x", max_tokens=1, seed=2)]


async def test_every_key_that_aime_workers_leave_is_of_a_known_kind(bench: Bench, aime: AimeQueue) -> None:
    await bench.put(needs_native=True)
    await bench.put()
    worker = await hand(aime)
    [job] = await worker.take()
    await worker.post(job, "abc", tokens=3)
    keys = [key async for key in bench.redis.scan_iter("*")]
    assert [key for key in keys if key_kind(key) is None] == []


async def test_log_is_the_last_text_whatever_a_worker_says_on_its_way(bench: Bench, aime: AimeQueue) -> None:
    """Texts that grow, shrink, change or stand still, with counts that do as they like: offsets have no gap, none is beyond the limit."""
    for seed in range(60):
        draw = random.Random(seed)
        most = draw.randint(1, 12)
        job_id = await bench.put(max_tokens=most)
        worker = await hand(aime, f"w{seed}")
        [job] = await worker.take()
        text = ""
        for _ in range(draw.randint(0, 12)):
            text = draw.choice([text + draw.choice(["a", "é€", '"\\', ""]), text[: len(text) // 2], "other"])
            await worker.post(job, text, tokens=draw.choice([None, 0, len(text), 3, 1000]))
            record = await bench.queue.read(job_id)
            assert text.startswith(record.text), seed
        await worker.post(job, text, tokens=draw.choice([None, len(text), 1000]), ending="stop")
        record = await bench.queue.read(job_id)
        assert (record.state, record.text) == ("done", text), seed
        assert record.n == sum(len(entry.ids) for entry in record.entries) <= most
        assert [entry.offset for entry in record.entries] == [
            1 + sum(len(one.ids) for one in record.entries[:at]) for at in range(len(record.entries))
        ]


async def test_given_up_job_that_is_no_chat_is_shown_by_the_size_of_its_inputs(bench: Bench, aime: AimeQueue) -> None:
    put = await bench.queue.put(ENDPOINT, "ann", Parameters(parameters={"image": "x" * 5000, "steps": 5}, max_tokens=10, likely_tokens=1))
    remains = await DeadLetters(bench.redis, [ENDPOINT]).show(put.job_id)
    assert shape_of(remains)["request"] == ["image of 5,000 characters", "steps of 1 characters"]
    assert words_of(remains.spec)[1] == "steps: 5"
