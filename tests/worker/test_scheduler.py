"""Who runs when: nobody is lost, nobody overtakes, blocks are never over-given, and every plan feeds the right tokens.

The toy engine below keeps its "keys and values" in blocks just as the real one does: it stores the tokens themselves, reads a
sequence back through the row's block table, and makes the next id a hash of all it read. So a wrong table, a forgotten chunk or a
block given twice yields other tokens than the sequence computed alone.
"""

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtral_worker.blocks import BlockPool
from mixtral_worker.plan import Sampling, StepPlan
from mixtral_worker.scheduler import DoesNotFit, Scheduler, Sequence

BLOCK_SIZE = 4
MAX_SEQ_LEN = 40


def toy_next(ids: list[int], offset: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((ids, offset)).encode(), digest_size=2).digest())


def toy_answer(prompt: list[int], count: int) -> list[int]:
    produced: list[int] = []
    for offset in range(1, count + 1):
        produced.append(toy_next(prompt + produced, offset))
    return produced


class ToyEngine:
    def __init__(self, num_blocks: int) -> None:
        self.store = [[-1] * BLOCK_SIZE for _ in range(num_blocks)]

    def step(self, plan: StepPlan) -> list[int]:
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                self.store[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token
        return [toy_next(self._context(row.blocks, row.end), row.offset) for row in plan.rows if row.samples]

    def _context(self, blocks: tuple[int, ...], end: int) -> list[int]:
        return [token for block in blocks for token in self.store[block]][:end]


def sequence(name: str, prompt_tokens: int, max_tokens: int, produced: int = 0) -> Sequence:
    prompt = [sum(name.encode()) * 31 + i for i in range(prompt_tokens)]
    return Sequence(name, 1, prompt, max_tokens, Sampling(), toy_answer(prompt, produced))


def make(max_slots: int, num_blocks: int, **limits: int) -> tuple[Scheduler, ToyEngine]:
    return Scheduler(max_slots, BlockPool(num_blocks, BLOCK_SIZE), MAX_SEQ_LEN, **limits), ToyEngine(num_blocks)


def run_step(scheduler: Scheduler, engine: ToyEngine) -> StepPlan | None:
    plan = scheduler.plan_step()
    if plan:
        scheduler.record(plan, engine.step(plan))
    return plan


class Batch(RuleBasedStateMachine):
    """Sequences come and go at random; each must produce what it would produce alone."""

    @initialize(slots=st.integers(1, 4), blocks=st.integers(3, 14), chunk=st.integers(1, 9), spare=st.integers(0, 6))
    def open(self, slots: int, blocks: int, chunk: int, spare: int) -> None:
        self.scheduler, self.engine = make(slots, blocks, prefill_chunk=chunk, max_step_tokens=slots + spare)
        self.admitted: dict[str, Sequence] = {}
        self.order: list[str] = []

    @rule(prompt=st.integers(1, 20), max_tokens=st.integers(1, 12), produced=st.integers(0, 11))
    def admit(self, prompt: int, max_tokens: int, produced: int) -> None:
        new = sequence(f"job{len(self.order)}", prompt, max_tokens, min(produced, max_tokens - 1))
        try:
            self.scheduler.admit(new)
        except DoesNotFit:
            assert prompt + max_tokens > self.scheduler.pool.num_blocks * BLOCK_SIZE
            return
        self.admitted[new.job_id] = new
        self.order.append(new.job_id)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.admitted)))
        assert self.scheduler.remove(job_id) is self.admitted.pop(job_id)
        assert self.scheduler.remove(job_id) is None

    @rule(cancelled=st.none() | st.none() | st.integers(0, 30))
    def step(self, cancelled: int | None) -> None:
        """One step; perhaps a job is cancelled while it computes."""
        plan = self.scheduler.plan_step()
        assert (plan is None) == (not self.admitted)
        if plan is None:
            return
        self.check(plan)
        next_ids = self.engine.step(plan)
        if cancelled is not None:
            job_id = sorted(self.admitted)[cancelled % len(self.admitted)]
            assert self.scheduler.remove(job_id) is self.admitted.pop(job_id)
        for moved, next_id in self.scheduler.record(plan, next_ids):
            assert moved is self.admitted[moved.job_id]
            assert moved.produced_ids[-1] == next_id
            if moved.is_complete:
                del self.admitted[moved.job_id]
                assert moved.produced_ids == toy_answer(moved.prompt_ids, moved.max_tokens)

    def check(self, plan: StepPlan) -> None:
        assert 1 <= sum(len(row.tokens) for row in plan.rows) <= self.scheduler.max_step_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows) <= self.scheduler.max_slots
        assert all(len(row.tokens) <= max(1, self.scheduler.prefill_chunk) for row in plan.rows)
        order = [(len(row.tokens) > 1, row.end) for row in plan.rows]
        assert order == sorted(order), "rows of one token stand first, each kind by rising end"

    @invariant()
    def nobody_is_lost_and_no_block_either(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        here = [*self.scheduler.running, *self.scheduler.waiting]
        assert [one.job_id for one in here] == [job_id for job_id in self.order if job_id in self.admitted], "all, in order of arrival"
        held = [block for one in here for block in one.blocks]
        assert len(held) == len(set(held)) == self.scheduler.pool.num_blocks - self.scheduler.pool.free_blocks
        assert not any(one.blocks for one in self.scheduler.waiting)
        assert len(self.scheduler.running) <= self.scheduler.max_slots

    @rule(steps=st.integers(2, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(None)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.admitted:
                break
            self.step(None)
        assert not self.admitted, "every job ends"
        assert self.scheduler.plan_step() is None
        assert self.scheduler.pool.free_blocks == self.scheduler.pool.num_blocks


TestBatch = Batch.TestCase
TestBatch.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_running_chats_go_on_in_every_step_of_a_long_prompt() -> None:
    scheduler, engine = make(2, 20, prefill_chunk=5)
    scheduler.admit(chat := sequence("chat", 2, 20))
    run_step(scheduler, engine)
    scheduler.admit(sequence("long", 30, 5))
    for produced in range(2, 8):
        plan = run_step(scheduler, engine)
        assert plan is not None
        assert [len(row.tokens) for row in plan.rows] == [1, 5]
        assert len(chat.produced_ids) == produced


def test_short_prompts_share_one_step() -> None:
    scheduler, _ = make(4, 20, prefill_chunk=16)
    for name in "abc":
        scheduler.admit(sequence(name, 4, 5))
    plan = scheduler.plan_step()
    assert plan is not None
    assert [len(row.tokens) for row in plan.rows] == [4, 4, 4]


def test_job_joins_and_leaves_between_steps() -> None:
    scheduler, engine = make(2, 20)
    scheduler.admit(first := sequence("first", 3, 9))
    run_step(scheduler, engine)
    scheduler.admit(second := sequence("second", 3, 9))
    run_step(scheduler, engine)
    assert scheduler.running == [first, second]
    scheduler.remove("first")
    assert scheduler.free_slots == 1
    run_step(scheduler, engine)
    assert (len(first.produced_ids), len(second.produced_ids)) == (2, 2)


def test_job_removed_while_its_step_computes_takes_nobody_elses_token() -> None:
    scheduler, engine = make(3, 20)
    jobs = [sequence(name, 3, 9) for name in "abc"]
    for one in jobs:
        scheduler.admit(one)
    plan = scheduler.plan_step()
    assert plan is not None
    next_ids = engine.step(plan)
    scheduler.remove("b")
    assert scheduler.record(plan, next_ids) == [(jobs[0], next_ids[0]), (jobs[2], next_ids[2])]
    assert [one.produced_ids for one in jobs] == [next_ids[:1], [], next_ids[2:]]


def test_free_slots_leave_out_those_that_waiting_jobs_will_take() -> None:
    scheduler, engine = make(3, 20)
    scheduler.admit(sequence("a", 3, 9))
    assert scheduler.free_slots == 2
    run_step(scheduler, engine)
    for name in "bcd":
        scheduler.admit(sequence(name, 3, 9))
    assert scheduler.free_slots == 0


def test_the_youngest_yields_when_blocks_run_out_and_loses_no_token() -> None:
    scheduler, engine = make(2, 5)
    scheduler.admit(old := sequence("old", 7, 12))
    scheduler.admit(young := sequence("young", 7, 12))
    yielded = False
    while run_step(scheduler, engine):
        yielded |= young in scheduler.waiting and len(young.produced_ids) > 0
        assert old not in scheduler.waiting
    assert yielded
    assert old.produced_ids == toy_answer(old.prompt_ids, 12)
    assert young.produced_ids == toy_answer(young.prompt_ids, 12)


def test_newcomer_waits_until_each_running_job_could_still_grow() -> None:
    scheduler, engine = make(3, 5)
    for name in "ab":
        scheduler.admit(sequence(name, 4, 4))
    run_step(scheduler, engine)
    scheduler.admit(newcomer := sequence("c", 4, 4))
    run_step(scheduler, engine)
    assert [one.job_id for one in scheduler.running] == ["a", "b"]
    assert scheduler.pool.free_blocks == 1, "enough for the newcomer alone"
    scheduler.remove("a")
    run_step(scheduler, engine)
    assert newcomer in scheduler.running


def test_small_job_never_overtakes_a_large_one_that_waits_for_blocks() -> None:
    scheduler, engine = make(3, 10)
    scheduler.admit(sequence("running", 20, 4))
    run_step(scheduler, engine)
    scheduler.admit(sequence("large", 20, 4))
    scheduler.admit(sequence("small", 1, 4))
    run_step(scheduler, engine)
    assert [one.job_id for one in scheduler.waiting] == ["large", "small"]


def test_resumed_job_prefills_what_it_produced_and_draws_the_next_offset() -> None:
    scheduler, engine = make(1, 20)
    scheduler.admit(resumed := sequence("moved", 3, 8, produced=5))
    plan = run_step(scheduler, engine)
    assert plan is not None
    assert plan.rows[0].tokens == (*resumed.prompt_ids, *toy_answer(resumed.prompt_ids, 5))
    assert plan.rows[0].offset == 6
    assert resumed.produced_ids == toy_answer(resumed.prompt_ids, 6)


def test_job_with_its_last_token_gives_its_slot_and_blocks_back_by_itself() -> None:
    scheduler, engine = make(1, 4)
    scheduler.admit(sequence("a", 3, 1))
    run_step(scheduler, engine)
    assert (scheduler.free_slots, scheduler.pool.free_blocks) == (1, 4)
    assert scheduler.plan_step() is None


def test_job_whose_logits_were_not_finite_leaves_alone_and_without_a_token() -> None:
    scheduler, engine = make(2, 20)
    scheduler.admit(bad := sequence("bad", 3, 9))
    scheduler.admit(good := sequence("good", 3, 9))
    plan = scheduler.plan_step()
    assert plan is not None
    _, next_id = engine.step(plan)
    assert scheduler.record(plan, [-1, next_id]) == [(bad, -1), (good, next_id)]
    assert (bad.produced_ids, good.produced_ids) == ([], [next_id])
    assert scheduler.running == [good]


def test_same_job_is_not_admitted_twice_at_once() -> None:
    scheduler, _ = make(1, 20)
    scheduler.admit(sequence("a", 3, 9))
    with pytest.raises(ValueError, match="job a is in this worker already"):
        scheduler.admit(sequence("a", 3, 9))


def test_job_that_already_has_its_tokens_is_not_admitted() -> None:
    scheduler, _ = make(1, 20)
    with pytest.raises(ValueError, match="job a has all its 5 tokens"):
        scheduler.admit(sequence("a", 3, 5, produced=5))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "blocks", "message"),
    [
        (31, 10, 20, "31 prompt tokens and 10 to generate make 41; this worker takes at most 40 "),
        (20, 13, 8, "20 prompt tokens and 13 to generate need 9 KV blocks of 4 tokens; this worker has 8;"),
        (0, 5, 8, "job big has an empty prompt"),
    ],
)
def test_job_that_could_never_run_is_refused_with_the_numbers(prompt: int, max_tokens: int, blocks: int, message: str) -> None:
    scheduler, _ = make(2, blocks)
    with pytest.raises(DoesNotFit, match=message):
        scheduler.admit(sequence("big", prompt, max_tokens))
    assert scheduler.plan_step() is None


def test_step_budget_below_the_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens 3 leaves no token for each of 4 slots"):
        make(4, 8, max_step_tokens=3)
