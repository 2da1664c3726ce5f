"""The compiled kernels and their graphs compute what the modules compute, at every size of batch and at Mixtral's own widths."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_worker.engine import Engine
from mixtral_worker.kernels.gpu_step import DECODES, GpuStep
from mixtral_worker.model.parallel import Shard
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from support import small_mixtral

CONTEXT, BLOCKS_EACH = 1024, 64


def load(folder: Path, card: torch.device, dtype: torch.dtype, slots: int) -> Engine:
    engine = Engine.load(folder, device=card, dtype=dtype, max_slots=slots, max_seq_len=CONTEXT)
    assert isinstance(engine.fast, GpuStep), "this card can run the kernels, or they could not be held equal to the modules"
    return engine


def row(engine: Engine, slot: int, start: int, end: int) -> Row:
    draw = random.Random(slot)
    tokens = [draw.randrange(engine.config.vocab_size) for _ in range(end)]
    table = tuple(range(slot * BLOCKS_EACH, slot * BLOCKS_EACH + -(-end // 16)))
    return Row(slot, start, tuple(tokens[start:]), table, True, 1, Sampling(0))


def decode(engine: Engine, rows: int, steps: int = 4) -> Tensor:
    """Prompts of many lengths, one after another in chunks, then steps of all rows together: the logits of every step.

    The last prompt goes on while the others decode.
    """
    lengths = [1 + 37 * slot % 900 for slot in range(rows)]
    prompts = [
        (row(engine, slot, start, min(start + 300, length)),) for slot, length in enumerate(lengths) for start in range(0, length, 300)
    ]
    beside = (*(row(engine, slot, length, length + 1) for slot, length in enumerate(lengths[:-1])), row(engine, rows - 1, 0, lengths[-1]))
    prompts.append(beside)
    lengths = [length + 1 for length in lengths[:-1]] + lengths[-1:]
    first = [engine.logits(StepPlan(Kind.STEP, 1, rows)).float() for rows in prompts]
    plans = [tuple(row(engine, slot, length + i, length + i + 1) for slot, length in enumerate(lengths)) for i in range(steps)]
    return torch.cat([*first, *(engine.logits(StepPlan(Kind.STEP, 2 + i, rows)).float() for i, rows in enumerate(plans))])


def both(engine: Engine, rows: int) -> tuple[Tensor, Tensor]:
    """By the kernels, by the modules."""
    fast, by_kernels = engine.fast, decode(engine, rows)
    engine.cache.store.zero_()
    engine.fast = None
    by_modules = decode(engine, rows)
    engine.cache.store.zero_()
    engine.fast = fast
    return by_kernels, by_modules


@pytest.mark.parametrize("shape", small_mixtral.SHAPES)
def test_the_kernels_give_the_modules_logits_in_float32(shape: str, card: torch.device, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = load(small_mixtral.write_checkpoint(tmp_path_factory.mktemp(shape), shape), card, torch.float32, 12)
    by_kernels, by_modules = both(engine, 11)
    torch.testing.assert_close(by_kernels, by_modules, rtol=1e-3, atol=1e-3)


def test_every_size_of_batch_gives_the_modules_logits_at_mixtrals_widths(card: torch.device) -> None:
    """In bfloat16, where both round: no score may be farther off than rounding takes it."""
    engine = load(Path("random:8x7b,n_layers=2,vocab_size=4096"), card, torch.bfloat16, DECODES[-1])
    for rows in (1, 2, 7, 16, 17, 32, 64):
        by_kernels, by_modules = both(engine, rows)
        error = (by_kernels - by_modules).norm() / by_modules.norm()
        assert error < 0.02, f"{rows} rows: relative error {error:.3g}"


@pytest.mark.parametrize("tokens", [3, 40, 100, 200, 512])
def test_experts_of_many_tokens_are_the_modules_at_mixtrals_widths(tokens: int, card: torch.device) -> None:
    engine = load(Path("random:8x7b,n_layers=1,vocab_size=4096"), card, torch.bfloat16, 1)
    moe: Any = engine.model.layers[0].feed_forward
    x = torch.randn(tokens, engine.config.dim, device=card, dtype=torch.bfloat16)
    with torch.inference_mode():
        by_kernel = moe(x).float()
        moe.grouped = None
        by_torch = moe(x).float()
    assert (by_kernel - by_torch).norm() / by_torch.norm() < 0.01


def test_more_rows_than_any_graph_has_go_through_the_modules(card: torch.device, tmp_path: Path) -> None:
    engine = load(small_mixtral.write_checkpoint(tmp_path), card, torch.float32, DECODES[-1] + 1)
    plan = StepPlan(Kind.STEP, 1, tuple(row(engine, slot, 0, 1) for slot in range(DECODES[-1] + 1)))
    together = engine.logits(plan)
    alone = engine.logits(StepPlan(Kind.STEP, 2, plan.rows[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


@contextmanager
def nccl_group(card: torch.device) -> Iterator[dist.ProcessGroup]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, os.environ.get(name, value))
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            group = dist.group.WORLD
            assert group is not None
            yield group
        finally:
            dist.destroy_process_group()


def test_graphs_hold_the_collectives_of_several_ranks(card: torch.device, tmp_path: Path) -> None:
    """One card is all that this test asks for: a group of one rank takes NCCL's whole way into the graph and sums nothing."""

    class Collective(Shard):
        def sum(self, x: Tensor) -> Tensor:
            dist.all_reduce(x, group=self.group)
            return x

        def concat(self, x: Tensor) -> Tensor:
            parts = [torch.empty_like(x)]
            dist.all_gather(parts, x.contiguous(), group=self.group)
            return torch.cat(parts, dim=-1)

    engine = load(small_mixtral.write_checkpoint(tmp_path), card, torch.float32, 4)
    alone = decode(engine, 4)
    engine.cache.store.zero_()
    with nccl_group(card) as group:
        shard = Collective(group=group)
        engine.model.shard = shard
        for layer in engine.model.layers:
            layer.attention.wo.shard = layer.feed_forward.shard = shard
        engine.fast = GpuStep.make(engine.model, engine.cache, engine.rotation, engine.vocab_size, 4)
        together = decode(engine, 4)
        engine.fast = None  # before its group ends
    assert torch.equal(together, alone)
