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
        while queue and (every == 0 or scheduler.step >= every * (len(jobs) - len(queue)) or not scheduler.running):
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


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("taken", [1, MAX_TOKENS - 1])
def test_job_that_moves_here_goes_on_with_the_same_tokens(
    taken: int, drawn: bool, engine: Engine, alone: dict[tuple[int, bool], tuple[list[int], list[float]]]
) -> None:
    jobs = [job(seed, drawn=drawn, produced=alone[seed, drawn][0][:taken]) for seed in range(JOBS)]
    run(engine, jobs, chunk=13)
    for seed, one in enumerate(jobs):
        assert_same(one, alone[seed, drawn])


def test_token_whose_numbers_break_fails_its_job_alone_even_in_blocks_used_again(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text((checkpoint / "params.json").read_text())
    weights = load_file(checkpoint / "consolidated.safetensors")
    weights["tok_embeddings.weight"][159] = torch.nan
    save_file(weights, tmp_path / "consolidated.safetensors")
    engine = Engine.load(tmp_path, max_slots=4, max_seq_len=MAX_SEQ_LEN, num_blocks=12)

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
