"""The engine on a card computes what it computes on a CPU, alone and in batches, in the memory that was planned for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mixtral_worker import capacity
from mixtral_worker.blocks import BlockPool
from mixtral_worker.capacity import Memory, Wanted
from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.engine import Engine
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.sampling import sample
from mixtral_worker.scheduler import Scheduler, Sequence

MAX_SLOTS, MAX_SEQ_LEN, MAX_TOKENS = 8, 256, 24
TIE = 1e-4  # of the two best scores: within it float32 may choose either


def engine_of(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Engine:
    return Engine.load(folder, device=device, dtype=dtype, max_slots=MAX_SLOTS, max_seq_len=MAX_SEQ_LEN)


def prompt(engine: Engine, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(engine.config.vocab_size) for _ in range(draw.choice((1, 15, 16, 17, 40, 100)))]


def scores_of(engine: Engine, ids: list[int]) -> torch.Tensor:
    """After every token of ids, fed as a prompt and then one by one."""
    half = len(ids) // 2
    blocks = tuple(range(-(-len(ids) // 16)))
    first = engine.logits(StepPlan(Kind.STEP, 1, (Row(0, 0, tuple(ids[:half]), blocks[: -(-half // 16)], True, 1, Sampling(0)),)), [half])
    rest = [
        engine.logits(StepPlan(Kind.STEP, i, (Row(0, i, (ids[i],), blocks[: i // 16 + 1], True, 1, Sampling(0)),)))
        for i in range(half, len(ids))
    ]
    return torch.cat([first, *rest]).float().cpu()


def test_scores_in_float32_are_a_cpus(checkpoint: Path, device: torch.device) -> None:
    here, there = engine_of(checkpoint, device), engine_of(checkpoint, "cpu")
    ids = [random.Random(i).randrange(here.config.vocab_size) for i in range(60)]
    torch.testing.assert_close(scores_of(here, ids), scores_of(there, ids), rtol=1e-3, atol=1e-3)


def test_scores_in_bfloat16_stay_near_those_in_float32(device: torch.device) -> None:
    exact, rough = (engine_of(DEMO_CKPT_DIR, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    ids = [1, 3, 274, 547, 265, 747, 992, 4080, 434, 445, 265, 403, 4]
    one, other = (scores_of(engine, ids).softmax(-1) for engine in (exact, rough))
    assert (one - other).abs().sum(-1).max() < 0.2


def answers(engine: Engine, slots: int, temperature: float) -> dict[str, list[int]]:
    scheduler = Scheduler(slots, BlockPool(engine.num_blocks), MAX_SEQ_LEN, prefill_chunk=33)
    jobs = [Sequence(str(seed), 1, prompt(engine, seed), MAX_TOKENS, Sampling(temperature, seed=seed)) for seed in range(12)]
    for job in jobs:
        scheduler.admit(job)
    while (plan := scheduler.plan_step()) is not None:
        scheduler.record(plan, engine.step(plan))
        for job in jobs:
            if job.is_complete:
                scheduler.remove(job.job_id)
    return {job.job_id: job.produced_ids for job in jobs}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_in_float32_are_the_same_alone_and_in_a_batch(checkpoint: Path, device: torch.device, temperature: float) -> None:
    engine = engine_of(checkpoint, device)
    alone, batched = (answers(engine, slots, temperature) for slots in (1, MAX_SLOTS))
    different = [job for job in alone if alone[job] != batched[job]]
    assert {len(tokens) for tokens in alone.values()} == {MAX_TOKENS}
    for job in different:
        offset = next(i for i, (a, b) in enumerate(zip(alone[job], batched[job], strict=True)) if a != b)
        context = [*prompt(engine, int(job)), *alone[job][:offset]]
        best = scores_of(engine, [*context, 0])[len(context) - 1].topk(2).values
        assert temperature or best[0] - best[1] < TIE, f"job {job} differs at {offset}"
    assert len(different) <= 1


def test_draw_is_the_same_on_card_and_cpu_for_the_same_scores(device: torch.device) -> None:
    scores = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 3
    settings = [Sampling((0.0, 0.7, 1.3)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=(0, 40)[i % 2], seed=i) for i in range(64)]
    offsets = list(range(1, 65))
    here, there = (sample(scores.to(where), settings, offsets).tolist() for where in (device, torch.device("cpu")))
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1  # logarithms differ in the last place


def test_engine_takes_the_memory_that_was_planned(card: torch.device) -> None:
    folder = Path("random:mistral7b")
    config = ModelConfig.read(folder)
    free, _ = torch.cuda.mem_get_info(card)
    plan = capacity.plan_memory(Wanted("mistral7b", config, "bf16", "bf16", 4096, 4), Memory("card", free))
    before = torch.cuda.memory_allocated(card)
    engine = Engine.load(folder, device=card, dtype=torch.bfloat16, max_slots=4, max_seq_len=4096, num_blocks=plan.kv_tokens // 16)
    taken = torch.cuda.memory_allocated(card) - before
    assert taken == pytest.approx(plan.weights_bytes + plan.kv_tokens * plan.kv_bytes_per_token, rel=0.02)
    assert engine.num_blocks * 16 == plan.kv_tokens
