"""Ranks meet, share plans and end together."""

import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from mixtral_worker import ranks
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.plan import Kind, PlanCodec, Sampling, StepPlan
from mixtral_worker.scheduler import Scheduler, Sequence
from support import two_ranks


def test_two_ranks_generate_the_tokens_of_one(of_two_ranks: dict[str, Any], checkpoint: Path) -> None:
    engine = Engine.load(checkpoint, max_slots=3, max_seq_len=64)
    scheduler = Scheduler(3, BlockPool(engine.num_blocks), 64)
    sequences = [Sequence(str(i), 1, prompt, 12, Sampling(0.9 * i, seed=i)) for i, prompt in enumerate(two_ranks.PROMPTS)]
    for sequence in sequences:
        scheduler.admit(sequence)
    while plan := scheduler.plan_step():
        scheduler.record(plan, engine.step(plan))
    assert [sequence.produced_ids for sequence in sequences] == of_two_ranks["jobs"]


def test_torchrun_ends_non_zero_when_a_rank_fails_in_the_middle_of_a_step(run_two_ranks: Any, tmp_path: Path) -> None:
    ended: CompletedProcess[str] = run_two_ranks("fail", tmp_path / "none.pt")
    assert ended.returncode != 0
    assert "rank 1 breaks in step 3, as asked" in ended.stderr
    assert not (tmp_path / "none.pt").exists()


def test_without_torchrun_this_process_leads_alone() -> None:
    codec = PlanCodec(1, 16, 16, BLOCK_SIZE)
    with ranks.join("cpu") as here:
        assert (here.is_leader, here.world, here.device) == (True, 1, torch.device("cpu"))
        plan = StepPlan(Kind.IDLE, 4)
        assert here.share(plan, codec) is plan


def test_a_leader_without_a_plan_is_told_so() -> None:
    with ranks.join("cpu") as here, pytest.raises(ValueError, match="rank 0 gives the plan"):
        here.share(None, PlanCodec(1, 16, 16, BLOCK_SIZE))


@pytest.mark.parametrize("ranks_on_host", [1, 2, 10_000])
def test_processors_are_shared_evenly_and_nobody_is_left_without(ranks_on_host: int) -> None:
    before = torch.get_num_threads()
    try:
        ranks.set_threads(ranks_on_host)
        assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // ranks_on_host)
    finally:
        torch.set_num_threads(before)


def test_a_small_model_keeps_to_one_thread_and_a_large_one_to_all() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ranks.keep_small_model_to_one_thread(ranks.SMALL_MODEL_BYTES)
        assert torch.get_num_threads() == 2
        ranks.keep_small_model_to_one_thread(ranks.SMALL_MODEL_BYTES - 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
