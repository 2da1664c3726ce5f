"""A job's tokens are the same whatever runs beside it, however its prompt is cut, and wherever it goes on.

In float32 two ways of computing one position differ by rounding. So a different token is allowed, and ends the comparison, only
where the two best scores lie within TIE.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_worker.blocks import BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.model.config import ModelError
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.sampling import gumbel, sample
from mixtral_worker.scheduler import Scheduler, Sequence

TIE = 1e-4
MAX_SLOTS, MAX_SEQ_LEN = 6, 350
MAX_TOKENS = 24
PROMPT_TOKENS = [300, 31, 2, 17, 50, 1, 16, 15]  # one so long that it decodes apart from the others
JOBS = len(PROMPT_TOKENS)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.load(checkpoint, max_slots=MAX_SLOTS, max_seq_len=MAX_SEQ_LEN)


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(160) for _ in range(PROMPT_TOKENS[seed])]


def job(seed: int, *, drawn: bool, produced: list[int] | None = None) -> Sequence:
    settings = [Sampling(0.8), Sampling(1.0, top_k=20), Sampling(0.9, top_p=0.8), Sampling(1.5)]
    sampling = replace(settings[seed % 4], seed=seed) if drawn else Sampling(0)
    return Sequence(f"job{seed}", 1, prompt(seed), MAX_TOKENS, sampling, list(produced or []))


def run(
    engine: Engine, jobs: list[Sequence], *, slots: int = MAX_SLOTS, blocks: int | None = None, chunk: int = 512, every: int = 0
) -> int:
    """Run jobs to their end, the next joining `every` so many steps (0: all at once). Returns how often one was preempted."""
    scheduler = Scheduler(slots, BlockPool(blocks or engine.num_blocks), MAX_SEQ_LEN, prefill_chunk=chunk)
    queue, preempted = list(jobs), 0
    while queue or scheduler.running or scheduler.waiting:
        while queue and (every == 0 or scheduler.step >= every * (len(jobs) - len(queue)) or not (scheduler.running or scheduler.waiting)):
            scheduler.admit(queue.pop(0))
        before = list(scheduler.running)
        plan = scheduler.plan_step()
        assert plan is not None
        preempted += sum(one in scheduler.waiting for one in before)
        scheduler.record(plan, engine.step(plan))
    return preempted


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[int, bool], tuple[list[int], list[float]]]:
    """Each job's tokens, computed from its whole context anew for every token, and by how much each token won."""
    answers = {}
    for seed in range(JOBS):
        for drawn in (False, True):
            one, margins = job(seed, drawn=drawn), []
            for offset in range(1, MAX_TOKENS + 1):
                ids = (*one.prompt_ids, *one.produced_ids)
                row = Row(0, 0, ids, tuple(range(-(-len(ids) // 16))), True, offset, one.sampling)
                scores = engine.logits(StepPlan(Kind.STEP, offset, (row,)))
                one.produced_ids += sample(scores, [one.sampling], [offset]).tolist()
                if drawn:
                    noise = gumbel(torch.tensor([one.sampling.seed]), torch.tensor([offset]), scores.shape[1])
                    scores = scores / one.sampling.temperature + noise
                best = scores[0].topk(2).values
                margins.append(float(best[0] - best[1]))
            answers[seed, drawn] = one.produced_ids, margins
    return answers


def assert_same(one: Sequence, answer: tuple[list[int], list[float]]) -> None:
    for offset, (got, expected, margin) in enumerate(zip(one.produced_ids, *answer, strict=True), 1):
        if got != expected:
            assert margin < TIE, f"{one.job_id} has another token at offset {offset}, where the best won by {margin}"
            return


def test_answers_differ_between_jobs_and_settings(alone: dict[tuple[int, bool], tuple[list[int], list[float]]]) -> None:
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(alone)
    assert min(len(set(tokens)) for tokens, _ in alone.values()) > 3


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "way",
    [
        {"slots": 1},
        {"slots": 6},
        {"slots": 6, "every": 3},
        {"slots": 3, "every": 1, "chunk": 7},
        {"slots": 6, "chunk": 5},
        {"slots": 4, "chunk": 16},
    ],
    ids=str,
)
def test_tokens_are_the_same_alone_in_a_batch_joining_late_and_in_chunks(
    way: dict[str, int], drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    jobs = [job(seed, drawn=drawn) for seed in range(JOBS)]
    run(engine, jobs, **way)
    for seed, one in enumerate(jobs):
        assert_same(one, alone[seed, drawn])


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_preempted_job_goes_on_with_the_same_tokens(
    drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    jobs = [job(seed, drawn=drawn) for seed in range(JOBS)]
    assert run(engine, jobs, blocks=25) > 0
    for seed, one in enumerate(jobs):
        assert_same(one, alone[seed, drawn])


def run_on(scheduler: Scheduler, engine: Engine, *jobs: Sequence, steps: int = 10_000) -> None:
    for one in jobs:
        scheduler.admit(one)
    for _ in range(steps):
        plan = scheduler.plan_step()
        if plan is None:
            return
        scheduler.record(plan, engine.step(plan))


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_prompts_that_are_there_already_get_the_same_tokens(
    drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    """Two of each at once, so that a prompt is shared while it is in use, and then all once more."""
    scheduler = Scheduler(MAX_SLOTS, BlockPool(engine.num_blocks), MAX_SEQ_LEN, prefill_chunk=50)
    rounds = [[replace(job(seed, drawn=drawn), job_id=f"{turn}-{seed}") for seed in range(JOBS)] for turn in range(3)]
    run_on(scheduler, engine, *(one for pair in zip(*rounds[:2], strict=True) for one in pair))
    run_on(scheduler, engine, *rounds[2])
    for turn in rounds:
        for seed, one in enumerate(turn):
            assert_same(one, alone[seed, drawn])
    reusable = sum((tokens - 1) // 16 * 16 for tokens in PROMPT_TOKENS)
    assert 1.5 * reusable < scheduler.reused_tokens <= 2 * reusable, "all in the last round; a twin begins before it can find anything"


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_next_turn_of_a_chat_gets_the_tokens_it_would_get_without_the_turns_before(
    drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    """Whole chats are the jobs' prompts and answers; the turn before had a part of them as its own prompt and answer."""
    scheduler = Scheduler(MAX_SLOTS, BlockPool(engine.num_blocks), MAX_SEQ_LEN)
    seeds = [seed for seed in range(JOBS) if PROMPT_TOKENS[seed] > 30]
    for seed in seeds:
        ids = prompt(seed)
        run_on(scheduler, engine, Sequence(f"before{seed}", 1, ids[:-14], 5, replace(job(seed, drawn=drawn).sampling, seed=99)))
    assert scheduler.reused_tokens == 0
    jobs = [job(seed, drawn=drawn) for seed in seeds]
    run_on(scheduler, engine, *jobs)
    for seed, one in zip(seeds, jobs, strict=True):
        assert_same(one, alone[seed, drawn])
    assert scheduler.reused_tokens == sum((PROMPT_TOKENS[seed] - 14) // 16 * 16 for seed in seeds)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_chat_goes_on_behind_its_own_answer_with_the_same_tokens(
    drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    """The generated tokens' blocks are shared too: the second turn's prompt is the first's with its answer."""
    scheduler, fresh = (Scheduler(MAX_SLOTS, BlockPool(engine.num_blocks), MAX_SEQ_LEN) for _ in range(2))
    one = job(1, drawn=drawn)
    run_on(scheduler, engine, one)
    assert_same(one, alone[1, drawn])
    ids = [*one.prompt_ids, *one.produced_ids, 7, 8, 9]
    second, reference = (Sequence(name, 1, ids, MAX_TOKENS, one.sampling) for name in ("second", "reference"))
    run_on(scheduler, engine, second)
    run_on(fresh, engine, reference)
    assert scheduler.reused_tokens == 48, "of 58, where the first turn's prompt had 31"
    assert second.produced_ids == reference.produced_ids


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_job_that_yielded_its_slot_goes_on_behind_its_own_blocks_with_the_same_tokens(
    drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    scheduler = Scheduler(2, BlockPool(engine.num_blocks), MAX_SEQ_LEN)
    low = [replace(job(seed, drawn=drawn), priority=1) for seed in (1, 4)]
    run_on(scheduler, engine, *low, steps=9)
    high = [job(seed, drawn=drawn) for seed in (0, 3, 5)]
    run_on(scheduler, engine, *high)
    assert scheduler.preemptions == 2
    assert scheduler.reused_tokens >= 32 + 48
    for seed, one in zip((1, 4, 0, 3, 5), low + high, strict=True):
        assert_same(one, alone[seed, drawn])


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("taken", [1, MAX_TOKENS - 1])
def test_job_that_moves_here_goes_on_with_the_same_tokens(
    taken: int, drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    jobs = [job(seed, drawn=drawn, produced=alone[seed, drawn][0][:taken]) for seed in range(JOBS)]
    run(engine, jobs, chunk=13)
    for seed, one in enumerate(jobs):
        assert_same(one, alone[seed, drawn])


def with_broken_token(checkpoint: Path, folder: Path) -> Engine:
    """Token 159 has no finite numbers."""
    (folder / "params.json").write_text((checkpoint / "params.json").read_text())
    weights = load_file(checkpoint / "consolidated.safetensors")
    weights["tok_embeddings.weight"][159] = torch.nan
    save_file(weights, folder / "consolidated.safetensors")
    return Engine.load(folder, max_slots=4, max_seq_len=MAX_SEQ_LEN, num_blocks=12)


def test_token_whose_numbers_break_fails_its_job_alone_even_in_blocks_used_again(checkpoint: Path, tmp_path: Path) -> None:
    engine = with_broken_token(checkpoint, tmp_path)

    def tokens_beside(*others: Sequence) -> list[list[int]]:
        scheduler = Scheduler(4, BlockPool(12), MAX_SEQ_LEN)
        sound = [Sequence(f"sound{length}", 1, [*range(length)], 40, Sampling(0)) for length in (3, 40)]
        for sequence in (*others, *sound):
            scheduler.admit(sequence)
        while plan := scheduler.plan_step():
            scheduler.record(plan, engine.step(plan))
        return [sequence.produced_ids for sequence in sound]

    expected = tokens_beside()
    broken = [Sequence(f"broken{i}", 1, [159] * length, 10, Sampling(0)) for i, length in enumerate((20, 30))]
    assert tokens_beside(*broken) == expected
    assert [sequence.produced_ids for sequence in broken] == [[], []]
    assert tokens_beside() == expected, "in the blocks that the broken jobs left"


def test_blocks_that_a_token_broke_are_found_by_nobody(checkpoint: Path, tmp_path: Path) -> None:
    engine = with_broken_token(checkpoint, tmp_path)
    scheduler = Scheduler(4, BlockPool(12), MAX_SEQ_LEN)
    begin = [*range(32)]  # sound, and kept when another job has drawn a token behind it
    run_on(scheduler, engine, first := Sequence("first", 1, [*begin, 5], 8, Sampling(0)))
    run_on(scheduler, engine, broken := Sequence("broken", 1, [*begin, *[159] * 20], 8, Sampling(0)))
    assert (broken.produced_ids, scheduler.reused_tokens) == ([], 32)
    assert scheduler.pool.kept_blocks == 0
    run_on(scheduler, engine, again := Sequence("again", 1, [*begin, 5], 8, Sampling(0)))
    assert (again.produced_ids, scheduler.reused_tokens) == (first.produced_ids, 32)


def test_bfloat16_follows_float32_closely(checkpoint: Path, engine: Engine) -> None:
    half = Engine.load(checkpoint, dtype=torch.bfloat16, max_slots=1, max_seq_len=MAX_SEQ_LEN)
    ids = tuple(prompt(3))
    for rows in ([(0, ids)], [(0, ids[:-1]), (len(ids) - 1, ids[-1:])]):
        for start, tokens in rows:
            row = Row(0, start, tokens, tuple(range(-(-(start + len(tokens)) // 16))), True, 1, Sampling(0))
            plan = StepPlan(Kind.STEP, 1, (row,))
            exact, ours = engine.logits(plan), half.logits(plan).float()
        assert ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact, ours).item() > 0.99


def test_kv_cache_has_room_for_every_slot_unless_a_size_is_given(checkpoint: Path) -> None:
    assert Engine.load(checkpoint, max_slots=3, max_seq_len=33).num_blocks == 9
    assert Engine.load(checkpoint, max_slots=3, max_seq_len=33, num_blocks=4).num_blocks == 4


def test_loading_reports_its_progress_up_to_the_whole(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine.load(checkpoint, max_slots=1, max_seq_len=16, progress=lambda filled, total: seen.append((filled, total)))
    whole = sum(weight.nbytes for weight in engine.model.parameters())
    assert seen[-1] == (whole, whole)
    assert seen == sorted(set(seen))


def test_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"params\.json is missing"):
        Engine.load(tmp_path, max_slots=1, max_seq_len=16)
