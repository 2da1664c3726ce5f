"""The texts kept for polls: each poll reads only what is new, says the whole, and keeps no more than is allowed."""

from __future__ import annotations

from mixtral_server.keys import Shard
from mixtral_server.routes.aime_views import Texts, Workers
from support.queue_bench import ENDPOINT, Bench, frame


async def test_poll_reads_new_tokens_alone_and_says_the_whole_text(bench: Bench) -> None:
    texts, job_id = Texts(bench.queue), await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    assert (await texts.look(job_id))[1] == "abc"
    await worker.turn(frame(job, 4, "de"))
    record, text = await texts.look(job_id)
    assert ([entry.offset for entry in record.entries], text) == ([4], "abcde")
    record, text = await texts.look(job_id)
    assert (record.entries, text) == ((), "abcde")


async def test_text_of_an_ended_job_is_whole_at_every_poll(bench: Bench) -> None:
    texts, job_id = Texts(bench.queue), await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    await texts.look(job_id)
    await worker.turn(frame(job, 4, "de", finish="stop"))
    for _ in range(2):
        record, text = await texts.look(job_id)
        assert (record.state, text) == ("done", "abcde")


async def test_text_follows_a_log_that_lost_its_end(bench: Bench) -> None:
    texts, job_id = Texts(bench.queue), await bench.put()
    worker = await bench.worker()
    [job] = await worker.take()
    await worker.turn(frame(job, 1, "abc"))
    keys = [Shard(ENDPOINT).key(f"{kind}:{job_id}") for kind in ("job", "log")]
    script = "return redis.call('COPY', KEYS[1], KEYS[2], 'REPLACE')"
    for key in keys:
        await bench.redis.eval(script, 2, key, f"{key}.before")  # type: ignore[misc]
    await worker.turn(frame(job, 4, "de"))
    assert (await texts.look(job_id))[1] == "abcde"
    for key in keys:
        await bench.redis.eval(script, 2, f"{key}.before", key)  # type: ignore[misc]
    assert (await texts.look(job_id))[1] == "abc"
    await worker.turn(frame(job, 4, "def"))
    assert (await texts.look(job_id))[1] == "abcdef"


async def test_texts_beyond_the_limit_are_forgotten_and_read_anew(bench: Bench) -> None:
    texts = Texts(bench.queue, max_chars=8)
    worker = await bench.worker()
    ids = [await bench.put() for _ in range(3)]
    for job in await worker.take(3):
        await worker.turn(frame(job, 1, "abc"))
    for job_id in ids:
        await texts.look(job_id)
    entries = {job_id: bool((await texts.look(job_id))[0].entries) for job_id in reversed(ids)}
    assert entries == {ids[2]: False, ids[1]: False, ids[0]: True}
    assert (await texts.look(ids[0]))[1] == "abc"


async def test_workers_are_asked_for_once_a_second(bench: Bench) -> None:
    now_s = 0.0
    workers = Workers(bench.queue, lambda: now_s)
    assert await workers.of(ENDPOINT) == []
    await bench.worker("late")
    assert await workers.of(ENDPOINT) == []
    now_s = 1.0
    assert [one.name for one in await workers.of(ENDPOINT)] == ["late"]
