"""Who runs when: nobody is lost, nobody overtakes, blocks are never over-given or shared wrongly, and every plan feeds the right tokens.

The toy engine below keeps what the real one's keys and values depend on: for each position, all tokens up to it. It finds them through
the row's block table alone, after the plan has travelled as a rank receives it, and makes the next id a hash of all it read. So a wrong
table, a forgotten chunk, a block given twice or one shared by sequences that begin otherwise yields other tokens than the sequence
computed alone, and is seen at once.
"""

import hashlib
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtral_worker.blocks import BlockPool, chain_key
from mixtral_worker.plan import PlanCodec, Row, Sampling, StepPlan
from mixtral_worker.scheduler import DoesNotFit, Scheduler, Sequence

BLOCK_SIZE = 4
MAX_SEQ_LEN = 40
POISON = 70_000  # a token after which no logits are finite; above every id that is drawn


def toy_next(ids: list[int], offset: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((ids, offset)).encode(), digest_size=2).digest())


def toy_answer(prompt: list[int], count: int) -> list[int]:
    produced: list[int] = []
    for offset in range(1, count + 1):
        produced.append(toy_next(prompt + produced, offset))
    return produced


class ToyEngine:
    """One rank: what it knows of blocks came with the plans."""

    def __init__(self, num_blocks: int, codec: PlanCodec) -> None:
        self.codec = codec
        self.store: list[list[tuple[int, ...]]] = [[(-1,)] * BLOCK_SIZE for _ in range(num_blocks)]

    def step(self, plan: StepPlan) -> list[int]:
        received = self.codec.unpack(self.codec.pack(plan))
        assert received == plan
        for row in received.rows:
            for block in row.blocks[-(-row.start // BLOCK_SIZE) :]:  # as the real one wipes them
                self.store[block] = [()] * BLOCK_SIZE
            so_far = self.read(row.blocks, row.start)[-1] if row.start else ()
            for position, token in enumerate(row.tokens, row.start):
                so_far = (*so_far, token)
                self.store[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = so_far
        return [self._draw(row) for row in plan.rows if row.samples]  # how does not travel: rank 0 alone draws

    def read(self, blocks: tuple[int, ...], end: int) -> list[tuple[int, ...]]:
        """What the first `end` positions of these blocks hold, each: all tokens up to it."""
        return [so_far for block in blocks for so_far in self.store[block]][:end]

    def _draw(self, row: Row) -> int:
        context = [so_far[-1] for so_far in self.read(row.blocks, row.end)]
        return -1 if POISON in context else toy_next(context, row.offset)


def prefixes(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(1, len(tokens) + 1)]


def keys_of(tokens: list[int]) -> list[bytes]:
    keys = [b""]
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        keys.append(chain_key(keys[-1], tokens[start : start + BLOCK_SIZE]))
    return keys[1:]


def sequence(name: str, prompt_tokens: int, max_tokens: int, produced: int = 0, priority: int = 0) -> Sequence:
    prompt = [sum(name.encode()) * 31 + i for i in range(prompt_tokens)]
    return Sequence(name, 1, prompt, max_tokens, Sampling(), toy_answer(prompt, produced), priority)


def saying(name: str, prompt: list[int], max_tokens: int = 4, priority: int = 0) -> Sequence:
    return Sequence(name, 1, prompt, max_tokens, priority=priority)


def make(max_slots: int, num_blocks: int, **limits: int) -> tuple[Scheduler, ToyEngine]:
    scheduler = Scheduler(max_slots, BlockPool(num_blocks, BLOCK_SIZE), MAX_SEQ_LEN, **limits)
    codec = PlanCodec(max_slots, MAX_SEQ_LEN, scheduler.max_step_tokens, BLOCK_SIZE)
    return scheduler, ToyEngine(num_blocks, codec)


def run_step(scheduler: Scheduler, engine: ToyEngine) -> StepPlan | None:
    plan = scheduler.plan_step()
    if plan:
        scheduler.record(plan, engine.step(plan))
    return plan


def run_to_end(scheduler: Scheduler, engine: ToyEngine, *sequences: Sequence) -> None:
    for one in sequences:
        scheduler.admit(one)
    while run_step(scheduler, engine):
        pass


class Batch(RuleBasedStateMachine):
    """Sequences with common beginnings come and go at random; each must produce what it would produce alone."""

    @initialize(slots=st.integers(1, 4), blocks=st.integers(3, 14), chunk=st.integers(1, 9), spare=st.integers(0, 6))
    def open(self, slots: int, blocks: int, chunk: int, spare: int) -> None:
        self.scheduler, self.engine = make(slots, blocks, prefill_chunk=chunk, max_step_tokens=slots + spare)
        self.admitted: dict[str, Sequence] = {}
        self.order: list[tuple[int, int, str]] = []
        self.chats: list[list[int]] = []  # what every sequence came to, as far as it came

    @rule(
        beginning=st.integers(0, 2),
        prompt=st.integers(1, 20),
        poisoned=st.sampled_from([False, False, False, True]),
        max_tokens=st.integers(1, 12),
        produced=st.integers(0, 11),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def admit(self, beginning: int, prompt: int, poisoned: bool, max_tokens: int, produced: int, priority: int) -> None:
        """A prompt that begins as others do."""
        ids = [100 * beginning + i // 2 for i in range(prompt)]
        if poisoned:
            ids[prompt // 2] = POISON
        self.take(ids, max_tokens, toy_answer(ids, 0 if poisoned else min(produced, max_tokens - 1)), priority)

    @precondition(lambda self: self.chats)
    @rule(data=st.data(), more=st.integers(0, 5), max_tokens=st.integers(1, 8), priority=st.sampled_from([0, 0, 1]))
    def go_on(self, data: st.DataObject, more: int, max_tokens: int, priority: int) -> None:
        """The next turn of a chat that ended or was cancelled, or the same again."""
        ids = data.draw(st.sampled_from(self.chats))
        self.take(ids + list(range(900, 900 + more)), max_tokens, [], priority)

    def take(self, prompt: list[int], max_tokens: int, produced: list[int], priority: int) -> None:
        name = f"job{len(self.order)}"
        new = Sequence(name, 1, prompt, max_tokens, Sampling(), produced, priority)
        try:
            self.scheduler.admit(new)
        except DoesNotFit:
            assert len(prompt) + max_tokens > min(MAX_SEQ_LEN, self.scheduler.pool.num_blocks * BLOCK_SIZE)
            return
        self.admitted[name] = new
        self.order.append((priority, len(self.order), name))

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.admitted))))

    def leave(self, job_id: str) -> None:
        assert self.scheduler.remove(job_id) is self.admitted[job_id]
        assert self.scheduler.remove(job_id) is None
        self.end(job_id)

    def end(self, job_id: str) -> None:
        gone = self.admitted.pop(job_id)
        self.chats.append(gone.prompt_ids + gone.produced_ids)

    @rule(cancelled=st.none() | st.none() | st.integers(0, 30), broken=st.none() | st.none() | st.integers(0, 30))
    def step(self, cancelled: int | None, broken: int | None) -> None:
        """One step; perhaps a job is cancelled while it computes, and perhaps the numbers of one break."""
        plan = self.scheduler.plan_step()
        assert (plan is None) == (not self.admitted)
        if plan is None:
            return
        next_ids = self.engine.step(plan)
        self.check(plan)
        if broken is not None and next_ids:
            next_ids[broken % len(next_ids)] = -1
        if cancelled is not None:
            self.leave(sorted(self.admitted)[cancelled % len(self.admitted)])
        tables = {one.job_id: list(one.blocks) for one in self.scheduler.running}
        for moved, next_id in self.scheduler.record(plan, next_ids):
            assert moved is self.admitted[moved.job_id]
            if next_id < 0:
                whole = moved.prompt_ids + moved.produced_ids
                found = self.scheduler.pool.find(keys_of(whole))
                others = {block for job_id, blocks in tables.items() if job_id != moved.job_id for block in blocks}
                assert not set(found) & (set(tables[moved.job_id]) - others), "only another's sound logits could vouch for them anew"
                self.end(moved.job_id)
                continue
            assert moved.produced_ids[-1] == next_id
            if moved.is_complete:
                self.end(moved.job_id)
                assert moved.produced_ids == toy_answer(moved.prompt_ids, moved.max_tokens)

    def check(self, plan: StepPlan) -> None:
        assert 1 <= sum(len(row.tokens) for row in plan.rows) <= self.scheduler.max_step_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows) <= self.scheduler.max_slots
        assert all(len(row.tokens) <= max(1, self.scheduler.prefill_chunk) for row in plan.rows)
        order = [(len(row.tokens) > 1, row.end) for row in plan.rows]
        assert order == sorted(order), "rows of one token stand first, each kind by rising end"
        by_slot = {one.slot: one for one in self.scheduler.running}
        owners = Counter(block for one in self.scheduler.running for block in one.blocks)
        for row in plan.rows:
            one = by_slot[row.slot]
            whole = one.prompt_ids + one.produced_ids
            assert self.engine.read(row.blocks, row.end) == prefixes(whole)[: row.end], "its blocks hold exactly its tokens"
            written = row.blocks[row.start // BLOCK_SIZE :]
            assert all(owners[block] == 1 for block in written), "nobody writes where another reads"
            assert not set(written) & set(self.scheduler.pool.find(keys_of(whole))), "nor where another may come to read"

    @invariant()
    def nobody_is_lost_and_no_block_either(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        here = [name for _, _, name in sorted(self.order) if name in self.admitted]
        assert sorted(here) == sorted(one.job_id for one in (*scheduler.running, *scheduler.waiting))
        for line in (scheduler.running, scheduler.waiting):
            assert [one.job_id for one in line] == [name for name in here if self.admitted[name] in line], "by priority, then arrival"
        owned = {block for one in scheduler.running for block in one.blocks}
        assert len(owned) == pool.num_blocks - pool.free_blocks
        assert all(len(set(one.blocks)) == len(one.blocks) for one in scheduler.running)
        assert not any(one.blocks for one in scheduler.waiting)
        assert len(scheduler.running) <= scheduler.max_slots
        assert 0 <= scheduler.reused_tokens <= scheduler.entered_tokens

    @invariant()
    def what_is_kept_is_what_its_key_says_and_sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = [one.prompt_ids + one.produced_ids for one in self.scheduler.running]
        for whole in self.chats[-8:] + running:
            found = self.scheduler.pool.find(keys_of(whole))
            end = len(found) * BLOCK_SIZE
            assert self.engine.read(tuple(found), end) == prefixes(whole)[:end]
            assert POISON not in whole[:end]

    @rule(steps=st.integers(2, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(None, None)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.admitted:
                break
            self.step(None, None)
        assert not self.admitted, "every job ends"
        assert self.scheduler.plan_step() is None
        pool = self.scheduler.pool
        assert pool.free_blocks == pool.num_blocks
        assert sorted(pool.allocate(pool.num_blocks)) == list(range(pool.num_blocks))


TestBatch = Batch.TestCase
TestBatch.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


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


def test_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    scheduler, engine = make(2, 20)
    run_to_end(scheduler, engine, first := saying("first", [1, 2, 3, 4, 5], 6))
    so_far = first.prompt_ids + first.produced_ids  # 11 tokens, of which the last was never fed: two full blocks
    scheduler.admit(second := saying("second", [*so_far, 6, 7]))
    plan = run_step(scheduler, engine)
    assert plan is not None
    assert (plan.rows[0].start, plan.rows[0].tokens) == (8, (*so_far[8:], 6, 7))
    assert (scheduler.entered_tokens, scheduler.reused_tokens) == (5 + 13, 8)
    assert second.produced_ids == toy_answer(second.prompt_ids, 1)


@pytest.mark.parametrize(("prompt_tokens", "start"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_same_prompt_again_computes_at_least_its_last_token(prompt_tokens: int, start: int) -> None:
    scheduler, engine = make(2, 20)
    run_to_end(scheduler, engine, saying("first", list(range(prompt_tokens)), 1))
    scheduler.admit(again := saying("again", list(range(prompt_tokens)), 1))
    plan = run_step(scheduler, engine)
    assert plan is not None
    assert (plan.rows[0].start, plan.rows[0].end) == (start, prompt_tokens)
    assert again.produced_ids == toy_answer(again.prompt_ids, 1)


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    scheduler, engine = make(3, 30, prefill_chunk=8, max_step_tokens=11)
    for name in "abc":
        scheduler.admit(saying(name, list(range(30))))
    fed = 0
    while plan := run_step(scheduler, engine):
        fed += sum(len(row.tokens) for row in plan.rows)
    assert scheduler.reused_tokens > 30
    assert fed == scheduler.entered_tokens - scheduler.reused_tokens + 3 * 3, "and three ids of each answer of four"


def test_blocks_in_use_are_shared_and_outlive_the_one_that_computed_them() -> None:
    scheduler, engine = make(2, 7)
    scheduler.admit(saying("first", list(range(16)), 8))
    run_step(scheduler, engine)
    scheduler.admit(second := saying("second", [*range(12), 99], 4))
    run_step(scheduler, engine)
    assert scheduler.pool.free_blocks == 1, "seven blocks for sequences of five and four"
    scheduler.remove("first")
    run_to_end(scheduler, engine)
    assert second.produced_ids == toy_answer(second.prompt_ids, 4)


def test_job_that_yielded_goes_on_behind_its_own_blocks() -> None:
    scheduler, engine = make(1, 20)
    scheduler.admit(low := sequence("low", 9, 8, priority=1))
    run_step(scheduler, engine)
    run_to_end(scheduler, engine, sequence("high", 2, 2))
    assert scheduler.preemptions == 1
    assert scheduler.reused_tokens == 8
    assert low.produced_ids == toy_answer(low.prompt_ids, 8)


def test_broken_numbers_leave_nothing_to_be_found() -> None:
    scheduler, engine = make(1, 20)
    scheduler.admit(saying("first", list(range(9))))
    for next_id in (5, -1):  # sound at first
        plan = scheduler.plan_step()
        assert plan is not None
        engine.step(plan)
        scheduler.record(plan, [next_id])
    assert (scheduler.pool.kept_blocks, scheduler.pool.free_blocks) == (0, 20)


def test_prompt_cancelled_before_any_logits_vouch_for_it_is_not_kept() -> None:
    scheduler, engine = make(1, 20, prefill_chunk=8)
    scheduler.admit(saying("first", list(range(20))))
    run_step(scheduler, engine)
    scheduler.remove("first")
    assert scheduler.pool.kept_blocks == 0


def test_found_tables_that_one_plan_cannot_carry_travel_one_after_another() -> None:
    scheduler, engine = make(4, 40, prefill_chunk=4)
    run_to_end(scheduler, engine, saying("first", list(range(30)), 1))
    for name in "abcd":
        scheduler.admit(saying(name, [*range(28), *name.encode()], 2))
    began = []
    while plan := run_step(scheduler, engine):
        new = sum(len(row.blocks) - row.known for row in plan.rows)
        assert new <= scheduler.max_new_blocks < 4 * 8
        began.append(sum(row.known == 0 for row in plan.rows))
    assert began == [2, 2, 0]


def test_better_priority_is_served_first_and_equals_by_arrival() -> None:
    scheduler, engine = make(1, 20)
    order = []
    for name, priority in (("a", 1), ("b", 2), ("c", 0), ("d", 1), ("e", 0)):
        scheduler.admit(sequence(name, 3, 1, priority=priority))
    while plan := scheduler.plan_step():
        order += [one.job_id for one, _ in scheduler.record(plan, engine.step(plan))]
    assert "".join(order) == "ceadb"


def test_better_prompt_is_fed_before_one_that_began_earlier() -> None:
    scheduler, engine = make(2, 20, prefill_chunk=4, max_step_tokens=5)
    scheduler.admit(sequence("low", 20, 2, priority=1))
    run_step(scheduler, engine)
    scheduler.admit(sequence("high", 8, 2))
    plan = run_step(scheduler, engine)
    assert plan is not None
    assert sorted((row.start, len(row.tokens)) for row in plan.rows) == [(0, 4), (4, 1)]


def test_waiting_job_takes_the_slot_of_the_youngest_of_the_lowest_priority() -> None:
    scheduler, engine = make(4, 40)
    jobs = [sequence(name, 3, 9, priority=priority) for name, priority in (("a", 2), ("b", 2), ("c", 1), ("d", 0))]
    for one in jobs:
        scheduler.admit(one)
    run_step(scheduler, engine)
    scheduler.admit(high := sequence("high", 3, 2))
    run_step(scheduler, engine)
    assert high in scheduler.running
    assert scheduler.waiting == [jobs[1]]
    run_to_end(scheduler, engine)
    assert all(one.produced_ids == toy_answer(one.prompt_ids, one.max_tokens) for one in (*jobs, high))


def test_equal_priority_takes_nobodys_slot() -> None:
    scheduler, engine = make(1, 20)
    scheduler.admit(first := sequence("first", 3, 9, priority=1))
    run_step(scheduler, engine)
    scheduler.admit(sequence("second", 3, 9, priority=1))
    run_step(scheduler, engine)
    assert (scheduler.running, scheduler.preemptions) == ([first], 0)


def test_waiting_job_takes_the_blocks_of_lower_ones_but_not_in_vain() -> None:
    scheduler, engine = make(4, 10)
    scheduler.admit(sequence("equal", 15, 9))
    scheduler.admit(low := sequence("low", 7, 9, priority=1))
    run_step(scheduler, engine)
    scheduler.admit(sequence("large", 21, 9))
    run_step(scheduler, engine)
    assert low in scheduler.running, "its blocks would not be enough"
    scheduler.remove("large")
    scheduler.admit(fitting := sequence("fitting", 16, 9))
    run_step(scheduler, engine)
    assert fitting in scheduler.running
    assert scheduler.waiting == [low]


def test_blocks_that_a_newcomer_would_share_are_not_counted_again_as_those_that_a_lower_job_would_free() -> None:
    scheduler, engine = make(3, 8)
    scheduler.admit(sequence("equal", 11, 9))
    scheduler.admit(low := saying("low", list(range(14)), priority=1))
    run_step(scheduler, engine)
    scheduler.admit(saying("newcomer", [*range(12), 96, 97, 98, 99, 100]))  # three of its five blocks are low's
    run_step(scheduler, engine)
    assert (low in scheduler.running, scheduler.preemptions) == (True, 0), "one free and low's four are less than five and one kept back"


def test_lower_priority_yields_its_blocks_even_if_older() -> None:
    scheduler, engine = make(2, 5)
    scheduler.admit(low := sequence("low", 7, 12, priority=1))
    scheduler.admit(high := sequence("high", 7, 12))
    while len(high.produced_ids) < 12:
        run_step(scheduler, engine)
        assert high in scheduler.running or high.is_complete
    assert (scheduler.preemptions, scheduler.running) == (1, [])
    run_to_end(scheduler, engine)
    assert low.produced_ids == toy_answer(low.prompt_ids, 12)


def test_cancelled_job_is_not_in_the_next_plan() -> None:
    scheduler, engine = make(2, 20)
    for name in "ab":
        scheduler.admit(sequence(name, 3, 9))
    run_step(scheduler, engine)
    cancelled = scheduler.remove("a")
    assert cancelled is not None
    plan = scheduler.plan_step()
    assert plan is not None
    assert [row.slot for row in plan.rows] == [scheduler.running[0].slot]
    assert scheduler.running[0].job_id == "b"


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
