"""A program for torchrun: what the ranks of one worker compute together. The tests read what rank 0 saves.

torchrun --nproc_per_node 2 -m support.two_ranks compute CHECKPOINTS OUT
torchrun --nproc_per_node 2 -m support.two_ranks fail CHECKPOINTS OUT      rank 1 breaks in its third step
"""

import sys
from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel import layers as fairscale_layers

from mixtral_worker import ranks
from mixtral_worker.blocks import BLOCK_SIZE, BlockPool
from mixtral_worker.engine import Engine
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import ColumnParallelLinear, RowParallelLinear, Shard
from mixtral_worker.plan import Kind, PlanCodec, Row, Sampling, StepPlan
from mixtral_worker.scheduler import Scheduler, Sequence

MAX_SLOTS, MAX_SEQ_LEN = 3, 64
PROMPTS = [[5, 9, 60, 33, 2], [17] * 30, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]


def layers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our sharded layers and fairscale's on the same weights and input."""
    shard = Shard.current()
    generator = torch.Generator().manual_seed(7)
    weight, x = torch.randn(24, 16, generator=generator), torch.randn(5, 16, generator=generator)
    ids = torch.randint(24, (5,), generator=generator)

    ours: Any = ColumnParallelLinear(16, 24, shard)
    theirs = fairscale_layers.ColumnParallelLinear(16, 24, bias=False)
    ours.weight.copy_(weight.chunk(2, 0)[shard.index])
    theirs.weight.data.copy_(weight.chunk(2, 0)[shard.index])
    column = shard.concat(ours(x)), theirs(x).detach()

    ours = RowParallelLinear(16, 24, shard)
    theirs = fairscale_layers.RowParallelLinear(16, 24, bias=False)
    ours.weight.copy_(weight.chunk(2, 1)[shard.index])
    theirs.weight.data.copy_(weight.chunk(2, 1)[shard.index])
    row = ours(x.chunk(2, 1)[shard.index].contiguous()), theirs(x).detach()

    theirs = fairscale_layers.ParallelEmbedding(24, 16)
    theirs.weight.data.copy_(weight.chunk(2, 1)[shard.index])
    embedding = torch.nn.functional.embedding(ids, weight), theirs(ids).detach()
    return {"column": column, "row": row, "embedding": embedding}


def logits(checkpoint: Path, ep_size: int) -> torch.Tensor:
    engine = Engine.load(checkpoint, ep_size=ep_size, max_slots=1, max_seq_len=MAX_SEQ_LEN)
    rows = [Row(0, 0, tuple(PROMPTS[2]), (0, 1), True, 1, Sampling()), Row(0, 17, (18,), (0, 1), True, 1, Sampling())]
    return torch.cat([engine.logits(StepPlan(Kind.STEP, 1, (row,))) for row in rows])


def jobs(checkpoint: Path, here: ranks.Ranks, fails: bool) -> list[list[int]]:
    """Rank 0 schedules and shares plans, the other ranks follow until they are told to stop."""
    engine = Engine.load(checkpoint, max_slots=MAX_SLOTS, max_seq_len=MAX_SEQ_LEN)
    scheduler = Scheduler(MAX_SLOTS, BlockPool(engine.num_blocks), MAX_SEQ_LEN, prefill_chunk=8)
    codec = PlanCodec(MAX_SLOTS, MAX_SEQ_LEN, scheduler.max_step_tokens, BLOCK_SIZE)
    sequences = [Sequence(str(i), 1, prompt, 12, Sampling(0.9 * i, seed=i)) for i, prompt in enumerate(PROMPTS)]
    if here.is_leader:
        for sequence in sequences:
            scheduler.admit(sequence)
        here.share(StepPlan(Kind.IDLE), codec)
        while plan := scheduler.plan_step():
            scheduler.record(plan, engine.step(here.share(plan, codec)))
        here.share(StepPlan(Kind.STOP), codec)
        return [sequence.produced_ids for sequence in sequences]
    while (plan := here.share(None, codec)).kind is not Kind.STOP:
        if plan.kind is Kind.STEP:
            if fails and plan.step == 3:
                raise RuntimeError("rank 1 breaks in step 3, as asked")
            engine.step(plan)
    return []


def main(task: str, checkpoints: Path, out: Path) -> None:
    with ranks.join("cpu") as here:
        torch.set_num_threads(1)
        shapes = sorted(path.name for path in checkpoints.iterdir())
        results = {"jobs": jobs(checkpoints / "grouped", here, fails=task == "fail")}
        with torch.inference_mode():
            results |= {"layers": layers(), "logits": {(shape, 1): logits(checkpoints / shape, 1) for shape in shapes}}
            with_experts = [shape for shape in shapes if ModelConfig.read(checkpoints / shape).is_moe]
            results["logits"] |= {(shape, 2): logits(checkpoints / shape, 2) for shape in with_experts}
        if here.is_leader:
            torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
