"""Jobs that were given up: what an operator sees of them, brings back, forgets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mixtral_client.protocol import ChatMessage, DoneEvent, ErrorEvent, JobEvent, JobSpec
from mixtral_server.cli import main
from mixtral_server.cursor import Notice, TokenRow, Tokens
from mixtral_server.dead import DeadLetters
from mixtral_server.dead_cli import age
from mixtral_server.errors import JobNotFound
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.rates import Rate
from mixtral_server.relay import Relay
from support.queue_bench import ENDPOINT, Bench, frame
from support.redis import RedisProcess


@pytest.fixture
def dead(bench: Bench) -> DeadLetters:
    return DeadLetters(bench.redis, [ENDPOINT])


async def given_up(bench: Bench, owner: str = "ann", *, tokens: str = "", **more: object) -> str:
    """A job whose three workers died, the first after it had reported these tokens."""
    job_id = await bench.put(owner, **more)
    for death in range(3):
        worker = await bench.worker(f"box-{death + 1}")
        taken = {job.id: job for job in await worker.take(1)}
        if tokens and death == 0:
            await worker.turn(frame(taken[job_id], 1, tokens, prompt_tokens=3))
        await bench.lapse(worker)
        await bench.queue.reap(ENDPOINT)
    assert await bench.state(job_id) == "dead"
    return job_id


async def test_letters_are_listed_newest_first_with_who_why_and_how_far(bench: Bench, dead: DeadLetters) -> None:
    jobs = [await given_up(bench, owner, tokens="abc"[:number]) for number, owner in enumerate(("ann", "bob"))]
    new, old = await dead.list(ENDPOINT)
    assert [new.job_id, old.job_id] == jobs[::-1]
    assert (new.owner, new.worker, new.endpoint, new.tokens, old.tokens) == ("bob", "box-3", ENDPOINT, 1, 0)
    assert new.reason.startswith("3 workers died while they ran this job, the last was box-3")
    assert 0 <= new.age_s <= old.age_s < 60
    assert [letter.job_id for letter in await dead.list(ENDPOINT, 1)] == jobs[1:]


async def test_retried_job_goes_on_at_its_next_token_and_ends_once_more(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, tokens="abc")
    assert await dead.retry(job_id) == "dead"
    assert await dead.list(ENDPOINT) == []
    waiting = await bench.queue.read(job_id)
    assert (waiting.state, waiting.text, waiting.finish, waiting.error) == ("waiting", "abc", None, None)
    healthy = await bench.worker()
    (job,) = await healthy.take()
    assert (job.id, "".join(map(chr, job.produced_ids)), job.suspect) == (job_id, "abc", False)
    await healthy.turn(frame(job, 4, "de", finish="stop", prompt_tokens=3))
    done = await bench.queue.read(job_id)
    assert (done.state, done.finish, done.text) == ("done", "stop", "abcde")
    assert done.usage is not None
    assert (done.usage.completion_tokens, done.usage.prompt_tokens) == (5, 3)
    log = [(entry_id, *fields[::2]) for entry_id, fields in await raw_log(bench, job_id)]
    assert log == [("3-0", "ids", "texts"), ("3-1", "end"), ("3-2", "retried"), ("5-0", "ids", "texts"), ("5-3", "end")]


async def raw_log(bench: Bench, job_id: str) -> list[tuple[str, list[str]]]:
    rows = await bench.redis.xrange(bench.shard.key(f"log:{job_id}"))
    return [(entry_id, [part for pair in fields.items() for part in pair]) for entry_id, fields in rows]


async def test_retried_job_keeps_its_place_before_its_owners_later_ones(bench: Bench, dead: DeadLetters) -> None:
    first = await given_up(bench)
    later = [await bench.put(), await bench.put()]
    await dead.retry(first)
    assert await bench.waiting_order() == [first, *later]


async def test_retried_job_has_three_lives_again(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench)
    await dead.retry(job_id)
    for _ in range(3):
        assert await bench.state(job_id) == "waiting"
        worker = await bench.worker()
        await worker.take()
        await bench.lapse(worker)
        await bench.queue.reap(ENDPOINT)
    assert await bench.state(job_id) == "dead"
    assert [letter.job_id for letter in await dead.list(ENDPOINT)] == [job_id]
    assert await dead.retry(job_id) == "dead"


async def test_ledger_counts_each_token_of_a_retried_job_once(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, tokens="abc")
    await dead.retry(job_id)
    worker = await bench.worker()
    (job,) = await worker.take()
    await worker.turn(frame(job, 4, "de", finish="stop", prompt_tokens=3))
    rows = (await bench.queue.usage_batch(ENDPOINT)).values()
    assert [(row.id, row.state, row.prompt_tokens, row.completion_tokens) for row in rows] == [
        (job_id, "dead", 3, 3),
        (f"{job_id}~1", "done", 0, 2),
    ]


async def test_dead_job_is_kept_longer_than_others_and_a_retried_one_until_its_end(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, idempotency_key="k", body_hash="b", tokens="a")
    keys = await bench.redis.keys(f"*{job_id}") + await bench.redis.keys("*:idem:*")
    assert len(keys) == 3
    assert all([604_000_000 < await bench.redis.pttl(key) <= 604_800_000 for key in keys])
    await dead.retry(job_id)
    assert [await bench.redis.pttl(key) for key in keys] == [-1, -1, -1]
    assert await bench.put(idempotency_key="k", body_hash="b") == job_id
    await bench.queue.cancel(job_id)
    assert all([0 < await bench.redis.pttl(key) <= 3_600_000 for key in keys])


async def test_retry_is_not_charged_to_its_owners_rate(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, rates=[Rate("key", "k", 10, 1_000)])
    bucket = bench.shard.key("bucket:key:k")
    before = await bench.redis.hgetall(bucket)
    await dead.retry(job_id)
    await bench.queue.cancel(job_id)
    assert await bench.redis.hgetall(bucket) == before


async def test_dropped_job_is_forgotten_whole(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, idempotency_key="k", body_hash="b", tokens="abc")
    assert await dead.drop(job_id)
    assert await dead.list(ENDPOINT) == []
    assert await bench.redis.keys(f"*{job_id}*") == []
    assert await bench.put(idempotency_key="k", body_hash="b") != job_id
    assert not await dead.drop(job_id)


@pytest.mark.parametrize("state", ["waiting", "leased", "cancelled"])
async def test_job_that_was_not_given_up_is_neither_retried_nor_dropped(bench: Bench, dead: DeadLetters, state: str) -> None:
    job_id = await bench.put()
    if state == "leased":
        await (await bench.worker()).take()
    if state == "cancelled":
        await bench.queue.cancel(job_id)
    assert (await dead.retry(job_id), await dead.drop(job_id)) == (state, False)
    assert await bench.state(job_id) == state


async def test_letter_whose_job_is_gone_says_so_and_can_be_dropped(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench)
    await bench.redis.delete(bench.shard.key(f"job:{job_id}"), bench.shard.key(f"log:{job_id}"))
    (letter,) = await dead.list(ENDPOINT)
    assert letter.tokens is None
    with pytest.raises(JobNotFound):
        await dead.retry(job_id)
    assert await dead.drop(job_id)
    assert await dead.list(ENDPOINT) == []


@pytest.mark.parametrize("job_id", ["", "x", "mixtral_chat.0-" + "0" * 32, "other.0-" + "0" * 32, "*"])
async def test_unknown_job_is_a_sentence(dead: DeadLetters, job_id: str) -> None:
    for act in (dead.retry, dead.show):
        with pytest.raises(JobNotFound, match="there is no job"):
            await act(job_id)


# ---------------------------------------------------------------------------------------------- readers


async def read_to_the_end(relay: Relay, job_id: str, after: int = 0, crc: int | None = None) -> tuple[list[TokenRow], JobEvent]:
    """The tokens and the end of one reader."""
    rows: list[TokenRow] = []
    with relay.follow(job_id, after, crc) as follower:
        while not follower.is_over:
            batch = await follower.batch(30.0)
            assert batch, "nothing came"
            rows += [row for one in batch if isinstance(one, Tokens) for row in one.rows()]
    assert isinstance(batch[-1], Notice)
    return rows, batch[-1].event


async def test_reader_who_comes_back_sees_the_chat_go_on_and_never_a_fork(bench: Bench, dead: DeadLetters) -> None:
    job_id = await given_up(bench, tokens="abc")
    async with Relay(bench.redis, bench.queue) as relay:  # type: ignore[arg-type]
        before, end = await read_to_the_end(relay, job_id)
        assert [offset for offset, _, _ in before] == [1, 2, 3]
        assert isinstance(end, ErrorEvent)
        await dead.retry(job_id)
        worker = await bench.worker()
        (job,) = await worker.take()
        await worker.turn(frame(job, 4, "de", finish="stop"))
        offset, crc, _ = before[-1]
        after, end = await read_to_the_end(relay, job_id, offset, crc)
        assert isinstance(end, DoneEvent)
        assert [offset for offset, _, _ in after] == [4, 5]
        assert before + after == (await read_to_the_end(relay, job_id))[0]


# ---------------------------------------------------------------------------------------------- the command


Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], redis_process: RedisProcess) -> Command:
    """`mixtral-server dead …` in a thread of its own, as it runs its own event loop. → (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    async def run(*words: str) -> tuple[int, str, str]:
        def command() -> int:
            try:
                main(["dead", *words, "--redis_url", redis_process.url, "--data_dir", str(tmp_path)])
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else 1
            return 0

        code = await asyncio.to_thread(command)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


async def test_command_lists_shows_retries_and_drops(bench: Bench, run: Command) -> None:
    jobs = [await given_up(bench, owner, tokens="abc") for owner in ("ann", "bob", "cyd")]
    code, out, _ = await run("list")
    assert code == 0
    rows = re.findall(r"^(\S+) +\d+ s +(\w+) +box-3 +3  3 workers died", out, re.M)
    assert rows == [(jobs[2], "cyd"), (jobs[1], "bob"), (jobs[0], "ann")]
    code, out, _ = await run("list", "--json", "--count", "2")
    assert [(one["job_id"], one["tokens"]) for one in json.loads(out)] == [(jobs[2], 3), (jobs[1], 3)]
    code, out, _ = await run("retry", jobs[0], jobs[1])
    assert (code, out) == (0, "retried 2 of 2 jobs\n")
    assert await bench.state(jobs[0]) == "waiting"
    code, out, err = await run("retry", jobs[0], "nonsense")
    assert (code, out) == (1, "retried 0 of 2 jobs\n")
    assert f"job {jobs[0]} is waiting; only a job that was given up can be retried" in err
    assert "there is no job 'nonsense'" in err
    code, out, _ = await run("drop", "--all", "--json")
    assert (code, json.loads(out)) == (0, {"dropped": [jobs[2]], "refused": {}})
    assert (await run("list", "--json"))[1] == "[]\n"


async def test_all_means_the_oldest_first_and_no_more_than_counted(bench: Bench, run: Command) -> None:
    jobs = [await given_up(bench, owner) for owner in ("ann", "bob", "cyd")]
    assert (await run("retry", "--all", "--count", "2"))[:2] == (0, "retried 2 of 2 jobs\n")
    assert [await bench.state(job) for job in jobs] == ["waiting", "waiting", "dead"]


async def test_show_tells_the_shape_and_only_when_asked_the_text(bench: Bench, run: Command) -> None:
    secret = ChatMessage(role="user", content="my secret is 1234")
    spec = JobSpec(messages=[ChatMessage(role="system", content="be brief"), secret], max_tokens=10, seed=7)
    job_id = (await bench.queue.put(ENDPOINT, "ann", spec)).job_id
    worker = await bench.worker()
    (job,) = await worker.take()
    await worker.turn(frame(job, 1, "xyz"))
    code, out, _ = await run("show", job_id)
    assert code == 0
    assert "system of 8 characters, user of 17 characters" in out
    assert re.search(r"^log +3 tokens, 3 characters$", out, re.M)
    assert "secret" not in out
    assert "xyz" not in out  # no id has such letters
    code, out, _ = await run("show", job_id, "--text", "--json")
    shown = json.loads(out)
    assert (shown["request"][1], shown["answer"], shown["last ids"]) == ("user: my secret is 1234", "xyz", [120, 121, 122])


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["retry"], 2, "one of the arguments job --all is required"),
        (["drop", "x", "--all"], 2, "not allowed with argument"),
        (["list", "--endpoint", "other"], 1, "there is no endpoint 'other'; known are mixtral_chat"),
        (["show", "nonsense"], 1, "there is no job 'nonsense'"),
    ],
)
async def test_wrong_words_change_nothing(bench: Bench, run: Command, words: list[str], code: int, sentence: str) -> None:
    job_id = await given_up(bench)
    ended, _, err = await run(*words)
    assert (ended, sentence in err) == (code, True), err
    assert await bench.state(job_id) == "dead"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59, "59 s"), (300, "5 min"), (7_200, "2.0 h"), (216_000, "2.5 days")])
def test_age_is_for_people(seconds: float, text: str) -> None:
    assert age(seconds) == text


async def test_letters_of_another_server_that_keeps_fewer_are_trimmed(bench: Bench, dead: DeadLetters) -> None:
    few = Bench(JobQueue(bench.redis, {ENDPOINT: QueueLimits(max_dead_letters=1)}), bench.redis)
    jobs = [await given_up(few, "ann"), await given_up(few, "bob")]
    assert [letter.job_id for letter in await dead.list(ENDPOINT)] == jobs[1:]
    assert await dead.retry(jobs[0]) == "dead", "its letter is gone, the job is not"
