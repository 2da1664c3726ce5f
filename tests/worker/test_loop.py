"""The step loop with a real engine and a real link, against a real HTTP server: what a job answers, and what fails alone."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import pytest
import torch

from mixtral_client.protocol import CALLER_ERRORS, PROTOCOL_VERSION, JobSpec, SessionRequest, WorkerJob
from mixtral_worker.blocks import BLOCK_SIZE
from mixtral_worker.link import Link, LinkRefused
from mixtral_worker.loop import Batch, Crew, run_leader
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.ranks import Ranks
from mixtral_worker.watchdog import Watchdog
from support.fake_server import ENDPOINT, KEY, FakeServer, Job, serving
from support.tiny_worker import MAX_SEQ_LEN, POISON_ID, TinyWorker, reference, write_tiny_worker

STORY = [("user", "Tell me a story about a cat and a dog.")]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyWorker]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread is no faster on so small a model, and much slower on a busy machine
    yield TinyWorker.load(write_tiny_worker(tmp_path_factory.mktemp("tiny")))
    torch.set_num_threads(threads)


def json_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


class Leader:
    """run_leader in a thread of its own, as rank 0 of one."""

    def __init__(self, worker: TinyWorker, server: FakeServer, max_slots: int, key: str, max_unsent_tokens: int) -> None:
        login = SessionRequest(
            endpoint=ENDPOINT,
            name="box",
            protocol=PROTOCOL_VERSION,
            version="1",
            model="tiny",
            device="cpu",
            max_slots=max_slots,
            max_seq_len=MAX_SEQ_LEN,
        )
        self.stop_signal: signal.Signals | None = None
        self.batch = Batch(worker.scheduler(max_slots), worker.tokenizer, "instruct")
        crew = Crew(worker.engine, Ranks(0, 1, torch.device("cpu"), None), worker.codec, Watchdog(0, 60.0))
        self.link = Link(server.url, key, login, max_unsent_tokens)
        self.rounds = 0  # of the loop
        self.running = asyncio.ensure_future(asyncio.to_thread(run_leader, self.batch, crew, self.link, self._asked_to_stop))

    def _asked_to_stop(self) -> signal.Signals | None:
        self.rounds += 1
        return self.stop_signal

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not what():
                await asyncio.wait([self.running], timeout=0.01)

    async def stopped(self, by: signal.Signals | None = None) -> None:
        self.stop_signal = by or self.stop_signal
        async with asyncio.timeout(60):
            await self.running


@asynccontextmanager
async def leading(
    worker: TinyWorker, server: FakeServer, max_slots: int = 8, key: str = KEY, max_unsent_tokens: int = 10_000
) -> AsyncIterator[Leader]:
    leader = Leader(worker, server, max_slots, key, max_unsent_tokens)
    try:
        yield leader
    finally:
        leader.stop_signal = leader.stop_signal or signal.SIGINT
        await asyncio.wait([leader.running], timeout=60)


def assert_as_alone(worker: TinyWorker, job: Job) -> None:
    expected = reference(worker, job.spec)
    assert job.error is None
    assert job.ids == expected.ids
    assert job.text == expected.text
    assert job.finish == expected.finish


VARIED: list[dict[str, Any]] = [
    {"messages": STORY, "max_tokens": 60, "seed": 1},
    {"messages": STORY, "max_tokens": 60, "seed": 16},  # ends by itself
    {"messages": [("system", "Be kind."), ("user", "Hi"), ("assistant", "猫"), ("user", "Bär?")], "max_tokens": 40, "seed": 2},
    {"messages": STORY, "max_tokens": 50, "temperature": 0},
    {"messages": STORY, "max_tokens": 60, "seed": 3, "stop": ["t", "ä"]},
    {"messages": STORY, "max_tokens": 60, "seed": 4, "top_k": 5, "top_p": 0.8, "stop": ["never said"]},
    {"prompt": "Once upon a time", "max_tokens": 30, "seed": 5},
    {"prompt": [1, 300, 301, 302], "max_tokens": 30, "seed": 5},
    {"messages": [("user", "Go on:"), ("assistant", "The cat")], "max_tokens": 20, "seed": 8},
    {"messages": STORY, "max_tokens": 1, "seed": 9},
    {"messages": STORY, "max_tokens": 10_000, "seed": 10, "top_k": 3},
]


async def test_every_answer_streams_exactly_what_the_engine_gives_it_alone(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, max_slots=4):
        jobs = [await server.put(**spec) for spec in VARIED]
        await server.finished(*jobs)
        assert {job.finish for job in jobs} == {"stop", "length"}
        for job in jobs:
            assert_as_alone(worker, job)
        assert all(len(frames) in (1, 2) for frames in (job.prompt_tokens for job in jobs))


async def test_an_answer_that_meets_the_context_ends_with_length(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        job = await server.put(prompt=[1] + [300] * (MAX_SEQ_LEN - 6), max_tokens=500, temperature=0)
        await server.finished(job)
        assert job.finish == "length"
        assert len(job.ids) == 5
        assert_as_alone(worker, job)


@pytest.mark.parametrize("tokens", [1, 7, 39])
@pytest.mark.parametrize("spec", [VARIED[0], VARIED[5]], ids=["plain", "held back by a stop string"])
async def test_a_job_taken_over_goes_on_with_the_ids_and_the_bytes_it_would_have_had(
    worker: TinyWorker, spec: dict[str, Any], tokens: int
) -> None:
    async with serving() as server:
        async with leading(worker, server):
            whole = await server.put(**spec)
            await server.finished(whole)
        async with leading(worker, server):
            moved = await server.put(**spec, ids=whole.ids[:tokens], texts=whole.texts[:tokens])
            await server.finished(moved)
    assert (moved.ids, moved.texts, moved.finish) == (whole.ids, whole.texts, whole.finish)


async def test_sessions_that_lapse_under_way_change_no_answer(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        jobs = [await server.put(messages=STORY, max_tokens=120, top_k=4, seed=seed) for seed in range(6)]
        for progress in (20, 60, 90):
            await server.until(lambda least=progress: all(len(job.ids) > least or job.is_over for job in jobs))  # type: ignore[misc]
            await server.lapse()
        await server.finished(*jobs)
        for job in jobs:
            assert_as_alone(worker, job)
        assert max(job.attempt for job in jobs) > 1


async def test_lost_answers_change_no_answer(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        server.answers_to_lose = 2
        jobs = [await server.put(**spec) for spec in VARIED[:6]]
        for _ in range(4):
            seen = len(server.turns)
            await server.until(lambda least=seen: len(server.turns) > least or all(job.is_over for job in jobs))  # type: ignore[misc]
            server.answers_to_lose = 1
        await server.finished(*jobs)
        for job in jobs:
            assert_as_alone(worker, job)


async def test_a_server_that_is_away_makes_the_loop_pause_at_the_buffers_bound_and_costs_no_token(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, max_unsent_tokens=40) as leader:
        jobs = [await server.put(messages=STORY, max_tokens=150, top_k=4, seed=seed) for seed in (1, 2)]
        await server.until(lambda: all(job.ids for job in jobs))
        await server.stop()
        await leader.until(lambda: leader.link.is_full)
        rounds = leader.rounds
        await leader.until(lambda: leader.rounds > rounds + 3)
        unsent = leader.batch.telemetry().tokens_total - sum(len(job.ids) for job in jobs)
        assert 40 <= unsent < 40 + len(jobs)
        await server.start()
        await server.finished(*jobs)
        for job in jobs:
            assert_as_alone(worker, job)
        assert len(server.logins) == 1


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
STEERED: list[dict[str, Any]] = [
    {"messages": STORY, "max_tokens": 60, "seed": 1, "min_p": 0.02, "repetition_penalty": 1.4},
    {"messages": STORY, "max_tokens": 60, "temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"messages": STORY, "max_tokens": 60, "seed": 16, "min_tokens": 50, "logit_bias": {302: -100.0}},  # would end sooner
    {"messages": STORY, "max_tokens": 40, "seed": 16, "ignore_eos": True, "top_logprobs": 3},
    {"messages": STORY, "max_tokens": 60, "seed": 2, "stop_token_ids": list(range(262, 320, 3))},
    {"messages": STORY, "max_tokens": 120, "seed": 4, "response_format": json_of(PERSON), "top_logprobs": 1},
    {"messages": STORY, "max_tokens": 30, "seed": 5, "response_format": {"type": "json_object"}, "repetition_penalty": 1.2},
]


async def test_steered_jobs_answer_alike_alone_batched_and_taken_over(worker: TinyWorker) -> None:
    alone = []
    async with serving() as server:
        async with leading(worker, server, max_slots=1):
            for spec in STEERED:
                alone.append(job := await server.put(**spec))
                await server.finished(job)
        async with leading(worker, server, max_slots=5):
            batched = [await server.put(**spec) for spec in [*STEERED, *VARIED]]
            await server.finished(*batched)
        async with leading(worker, server, max_slots=8):
            moved = [
                await server.put(**one.given, ids=one.ids[:cut], texts=one.texts[:cut]) for one in alone for cut in (1, len(one.ids) // 2)
            ]
            await server.finished(*moved)
    for job in batched[len(STEERED) :]:
        assert_as_alone(worker, job)
    for one, other in [*zip(alone, batched, strict=False), *zip([one for one in alone for _ in range(2)], moved, strict=True)]:
        assert other.error is None
        assert (other.ids, other.texts, other.finish) == (one.ids, one.texts, one.finish)


async def test_what_a_job_asks_of_its_end_is_kept(worker: TinyWorker) -> None:
    eos_id = worker.tokenizer.eos_id
    async with serving() as server, leading(worker, server):
        plain = await server.put(**VARIED[1])
        least, on, stopped = [await server.put(**STEERED[place]) for place in (2, 3, 4)]
        await server.finished(plain, least, on, stopped)
    assert plain.ids[-1] == eos_id
    assert len(plain.ids) < 40 < 50 <= len(least.ids)
    assert eos_id not in least.ids[:50]
    assert 302 not in least.ids
    assert on.ids[: len(plain.ids)] == plain.ids
    assert (len(on.ids), on.finish) == (40, "length")
    assert (stopped.ids[-1] in STEERED[4]["stop_token_ids"], stopped.finish, stopped.texts[-1]) == (True, "stop", "")


async def test_logprobs_come_with_every_token_of_the_jobs_that_ask_and_of_no_other(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        asked, other = await server.put(**STEERED[3]), await server.put(**VARIED[0])
        await server.finished(asked, other)
    assert other.logprobs == []
    assert [one.id for one in asked.logprobs] == asked.ids
    for one in asked.logprobs:
        assert bytes.fromhex(one.bytes) == worker.tokenizer.token_bytes(one.id)
        assert one.logprob <= one.top[0].logprob < 0
        assert [top.logprob for top in one.top] == sorted((top.logprob for top in one.top), reverse=True)
        assert len(one.top) == 3


async def test_a_whole_structured_answer_is_json_of_its_schema_and_a_cut_one_says_so(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        jobs = [
            await server.put(messages=STORY, max_tokens=200, seed=seed, response_format=json_of(PERSON), min_tokens=10, ignore_eos=True)
            for seed in range(8)
        ]
        cut = await server.put(messages=STORY, max_tokens=3, seed=1, response_format=json_of(PERSON))
        begun = await server.put(
            messages=[*STORY, ("assistant", '{"name": "Ann", ')], max_tokens=200, seed=3, response_format=json_of(PERSON)
        )
        await server.finished(*jobs, cut, begun)
    whole = [job for job in jobs if job.finish == "stop"]
    assert len(whole) > 4
    for job in whole:
        jsonschema.validate(json.loads(job.text), PERSON)
    assert (cut.finish, len(cut.ids)) == ("length", 3)
    assert json.loads('{"name": "Ann", ' + begun.text)["name"] == "Ann"


async def test_a_chat_too_long_is_shortened_from_its_oldest_turn_where_the_request_says_so(worker: TinyWorker) -> None:
    turns = [(role, f"{role} {turn} " + "cat " * 8) for turn in range(20) for role in ("user", "assistant")]
    messages = [("system", "Be kind."), *turns, ("user", "And now?")]
    async with serving() as server, leading(worker, server):
        refused = await server.put(messages=messages, max_tokens=20)
        shortened = await server.put(messages=messages, max_tokens=20, truncate="oldest_turns")
        fitting = await server.put(messages=messages[-1:], max_tokens=20, truncate="oldest_turns")
        hopeless = await server.put(messages=[*messages[:-1], ("user", "cat " * 400)], truncate="oldest_turns")
        await server.finished(refused, shortened, fitting, hopeless)
    assert refused.error is not None
    assert refused.error.code == "context_length_exceeded"
    dropped = shortened.dropped_messages[-1]
    assert 0 < dropped < len(turns)
    assert MAX_SEQ_LEN - 20 - 60 < shortened.prompt_tokens[-1] <= MAX_SEQ_LEN - 20
    kept = prompt_ids(worker, [messages[0], *messages[1 + dropped :]])
    assert shortened.prompt_tokens[-1] == len(kept)
    assert len(prompt_ids(worker, [messages[0], *messages[1 + dropped - 2 :]])) > MAX_SEQ_LEN - 20
    assert fitting.dropped_messages == []
    assert hopeless.error is not None
    assert hopeless.error.code == "context_length_exceeded"
    assert f"even without its {len(turns)} oldest messages" in hopeless.error.message


def prompt_ids(worker: TinyWorker, messages: list[tuple[str, str]]) -> list[int]:
    return encode_chat(worker.tokenizer, [Message(role, content) for role, content in messages], "instruct")


async def test_a_job_complete_with_text_that_was_held_back_only_gets_its_end_when_taken_over(worker: TinyWorker) -> None:
    async with serving() as server:
        async with leading(worker, server):
            whole = await server.put(**VARIED[0])
            await server.finished(whole)
        last = whole.text[-1]
        async with leading(worker, server):
            held = await server.put(**{**VARIED[0], "stop": [last + "never said"]})
            await server.finished(held)
            moved = await server.put(**held.given, ids=held.ids, texts=held.texts)
            await server.finished(moved)
    assert (moved.error, moved.text, moved.finish) == (None, held.text, "length")


REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    (
        {"messages": [("user", "cat " * 400)]},
        "context_length_exceeded",
        [f"at most {MAX_SEQ_LEN - 1}", f"{MAX_SEQ_LEN} context minus 1", "shorten"],
    ),
    ({"messages": [("user", "a"), ("user", "b")]}, "roles_out_of_order", ["message 2", "take turns"]),
    ({"messages": [("system", "a")]}, "no_user_message", ["add a user message"]),
    ({"prompt": [1, 5000]}, "token_out_of_vocabulary", ["5000", "320"]),
    ({"messages": STORY, "ids": [77_777], "texts": ["?"]}, "token_out_of_vocabulary", ["77777", "320"]),
    ({"messages": STORY, "logit_bias": {320: 1.0}}, "token_out_of_vocabulary", ["320"]),
    ({"messages": STORY, "stop_token_ids": [5000]}, "token_out_of_vocabulary", ["5000", "320"]),
    ({"messages": STORY, "response_format": json_of({"type": "poem"})}, "response_format_refused", ["Invalid type: poem"]),
    ({"messages": STORY, "ids": [300], "texts": ["not what id 300 says, and longer"]}, "worker_error", ["sent_bytes"]),
]


@pytest.mark.parametrize(("spec", "code", "words"), REFUSED, ids=[code + str(n) for n, (_, code, _) in enumerate(REFUSED)])
async def test_a_job_the_model_cannot_take_fails_alone_and_says_why(
    worker: TinyWorker, spec: dict[str, Any], code: str, words: list[str]
) -> None:
    async with serving() as server, leading(worker, server):
        before = await server.put(**VARIED[0])
        refused = await server.put(**spec)
        after = await server.put(**VARIED[2])
        await server.finished(before, refused, after)
        assert refused.error is not None
        assert refused.error.code == code
        assert (code in CALLER_ERRORS) == (code != "worker_error")
        assert all(word in refused.error.message for word in words), refused.error.message
        assert_as_alone(worker, before)
        assert_as_alone(worker, after)


async def test_a_job_whose_scores_are_not_finite_fails_alone(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server):
        good = [await server.put(**spec) for spec in VARIED[:3]]
        poisoned = await server.put(prompt=[1, 300, POISON_ID])
        late = await server.put(**VARIED[4])
        await server.finished(*good, poisoned, late)
        assert poisoned.error is not None
        assert poisoned.error.code == "numerical_error"
        assert poisoned.ids == []
        for job in (*good, late):
            assert_as_alone(worker, job)


async def test_a_cancelled_job_frees_its_slot_for_the_next(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, max_slots=1):
        endless = await server.put(messages=STORY, max_tokens=10_000, temperature=0)
        await server.until(lambda: bool(endless.ids))
        following = await server.put(**VARIED[2])
        assert following.attempt == 0
        await server.cancel(endless)
        await server.finished(following)
        assert len(endless.ids) < MAX_SEQ_LEN // 2
        assert_as_alone(worker, following)


def test_the_priority_that_a_job_travels_with_decides_who_keeps_the_slot(worker: TinyWorker) -> None:
    batch = Batch(worker.scheduler(max_slots=1), worker.tokenizer, "instruct")
    for name, priority in (("low", 3), ("high", 1), ("last", 2)):
        spec = JobSpec(prompt="Once", max_tokens=9, seed=1)
        assert batch.take(WorkerJob(id=name, attempt=1, spec=spec, priority=priority)) == []
        plan = batch.plan_step()
        assert plan
        batch.record(plan, worker.engine.step(plan))
    assert [one.job_id for one in batch.scheduler.running] == ["high"]
    assert [one.job_id for one in batch.scheduler.waiting] == ["last", "low"]


async def test_a_job_that_was_complete_when_its_worker_died_only_gets_its_end(worker: TinyWorker) -> None:
    async with serving() as server:
        async with leading(worker, server):
            whole = await server.put(**VARIED[0])
            await server.finished(whole)
        async with leading(worker, server):
            moved = await server.put(**VARIED[0], ids=whole.ids, texts=whole.texts)
            await server.finished(moved)
    assert (moved.ids, moved.text, moved.finish) == (whole.ids, whole.text, whole.finish)


async def test_sigterm_finishes_what_runs_claims_nothing_more_and_logs_out(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, max_slots=2) as leader:
        jobs = [await server.put(messages=STORY, max_tokens=150, top_k=4, seed=seed) for seed in range(3)]
        await server.until(lambda: bool(jobs[0].ids and jobs[1].ids))
        await leader.stopped(by=signal.SIGTERM)
        assert_as_alone(worker, jobs[0])
        assert_as_alone(worker, jobs[1])
        assert not jobs[2].is_over
        assert server.waiting == [jobs[2]]
        assert server.sessions == {}
        assert server.logouts == ["session-1"]


async def test_sigint_hands_everything_back_at_once_with_every_token_made_in_the_log(worker: TinyWorker) -> None:
    async with serving() as server:
        async with leading(worker, server) as leader:
            job = await server.put(messages=STORY, max_tokens=10_000, top_k=3)
            await server.until(lambda: len(job.ids) > 3)
            await leader.stopped(by=signal.SIGINT)
            assert server.waiting == [job]
            assert not job.is_over
            assert len(job.ids) == leader.batch.telemetry().tokens_total
        async with leading(worker, server):
            await server.finished(job)
        assert_as_alone(worker, job)


async def test_a_server_that_drains_its_workers_gets_every_answer_and_a_goodbye(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server) as leader:
        job = await server.put(**VARIED[0])
        await server.until(lambda: bool(job.ids))
        server.drain = True
        await leader.stopped()
        assert_as_alone(worker, job)
        assert server.logouts == ["session-1"]


async def test_a_refused_worker_raises_the_servers_sentence(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, key="wrong") as leader:
        with pytest.raises(LinkRefused, match="opens nothing here"):
            await leader.stopped()


async def test_telemetry_counts_slots_blocks_jobs_and_tokens(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server, max_slots=3) as leader:
        jobs = [await server.put(**VARIED[0]) for _ in range(5)]
        await server.finished(*jobs)
        busiest = max((turn.telemetry for turn in server.turns), key=lambda numbers: numbers["running"])
        assert busiest["running"] == busiest["slots"] == 3
        assert 0 < busiest["kv_blocks_used"] <= busiest["kv_blocks"]
        numbers = leader.batch.telemetry()
        assert (numbers.running, numbers.waiting, numbers.kv_blocks_used) == (0, 0, 0)
        assert (numbers.jobs_total, numbers.failed_total) == (5, 0)
        assert numbers.tokens_total == sum(len(job.ids) for job in jobs)


async def test_telemetry_says_how_much_of_a_chat_was_not_computed_again(worker: TinyWorker) -> None:
    async with serving() as server, leading(worker, server) as leader:
        first = await server.put(messages=STORY, max_tokens=40, temperature=0)
        await server.finished(first)
        before = leader.batch.telemetry()
        assert (before.reused_tokens_total, before.preemptions_total) == (0, 0)
        assert before.kv_blocks_kept == (before.prompt_tokens_total + len(first.ids) - 1) // BLOCK_SIZE
        again = await server.put(messages=STORY, max_tokens=40, temperature=0)
        await server.finished(again)
        assert_as_alone(worker, again)
        after = leader.batch.telemetry()
        assert after.prompt_tokens_total == 2 * before.prompt_tokens_total
        assert after.reused_tokens_total == (before.prompt_tokens_total - 1) // BLOCK_SIZE * BLOCK_SIZE > 0
