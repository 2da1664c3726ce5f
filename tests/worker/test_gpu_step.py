"""The kernels of a card's steps compute what the model's modules compute. Here Triton's interpreter runs them on the CPU, without graphs;
tests/gpu runs them as they are compiled."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixtral_worker.engine import Engine
from mixtral_worker.kernels import gpu_step
from mixtral_worker.kernels.gpu_step import GpuStep
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.parallel import Shard
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.sampling import keys, sample

CONTEXT, BLOCKS_EACH = 80, 5
SHAPES = ("grouped", "windowed", "dense")
TOKENS = [[(7 * i * (row + 3) + row) % 60 for i in range(CONTEXT)] for row in range(5)]


@pytest.fixture(scope="module", autouse=True)
def small_shapes() -> Iterator[None]:
    """Triton's interpreter (conftest.py) takes a millisecond for each program of a kernel: shapes are small here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_step, "DECODES", (1, 4))
        patch.setattr(gpu_step, "CHUNKS", (32,))
        patch.setattr(gpu_step, "PROMPTS", 2)
        patch.setattr(gpu_step, "MOST_READ_WHOLE", 4)
        yield


def load(checkpoint: Path, by_kernels: bool, dtype: torch.dtype = torch.float32, normalization: str = "renorm") -> Engine:
    """With kernels, or by the modules alone."""
    config = replace(ModelConfig.read(checkpoint), moe_normalization_mode=normalization)
    engine = Engine.load(checkpoint, config=config, dtype=dtype, max_slots=len(TOKENS), max_seq_len=CONTEXT)
    engine.fast = GpuStep(engine.model, engine.cache, engine.rotation, engine.vocab_size, len(TOKENS)) if by_kernels else None
    return engine


def row(slot: int, start: int, end: int) -> Row:
    table = tuple(range(slot * BLOCKS_EACH, slot * BLOCKS_EACH + -(-end // 16)))
    return Row(slot, start, tuple(TOKENS[slot][start:end]), table, True, 1, Sampling(0))


def steps(engine: Engine) -> Tensor:
    """A prompt in two parts, one that decodes beside two prompts, then tokens one by one: the logits of every step."""
    plans = [
        (row(0, 0, 32),),
        (row(0, 32, 64),),
        (row(0, 64, 65), row(2, 0, 2), row(1, 0, 15)),
        tuple(row(slot, at, at + 1) for slot, at in ((2, 2), (1, 15), (0, 65))),
        (row(2, 3, 4),),
    ]
    return torch.cat([engine.logits(StepPlan(Kind.STEP, i, rows)) for i, rows in enumerate(plans, 1)])


@pytest.mark.parametrize(("shape", "normalization"), [*((shape, "renorm") for shape in SHAPES), ("no_groups", "none")])
def test_the_kernels_give_the_modules_logits(shape: str, normalization: str, checkpoints: dict[str, Path]) -> None:
    fast, plain = (load(checkpoints[shape], one, normalization=normalization) for one in (True, False))
    torch.testing.assert_close(steps(fast), steps(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.cache.store, plain.cache.store, rtol=1e-4, atol=1e-4)


def test_the_kernels_give_the_modules_logits_in_float16(checkpoints: dict[str, Path]) -> None:
    """They round at other places: the difference is held against that of the modules to float32. bfloat16 is for cards: numpy lacks it."""
    exact = steps(load(checkpoints["grouped"], False))
    error, allowed = ((steps(load(checkpoints["grouped"], one, torch.float16)).float() - exact).abs() for one in (True, False))
    assert error.mean() < 1.2 * allowed.mean()
    assert error.max() < 2 * allowed.max()


def test_padding_rows_store_nothing_and_choose_no_expert(checkpoints: dict[str, Path]) -> None:
    """Three rows run in a step made for four."""
    engine = load(checkpoints["grouped"], True)
    assert engine.fast is not None
    engine.logits(StepPlan(Kind.STEP, 1, tuple(row(slot, 0, 1) for slot in (1, 2, 3))))
    assert engine.fast.expert_tokens.sum(1).tolist() == [2 * 3] * engine.config.n_layers
    stored = engine.cache.store.abs().amax((0, 1, 2, 4)).nonzero()[:, 0].tolist()
    assert stored == [slot * BLOCKS_EACH for slot in (1, 2, 3)]


def test_padding_of_prompts_stores_nothing_and_chooses_no_expert(checkpoints: dict[str, Path]) -> None:
    engine = load(checkpoints["grouped"], True)
    assert engine.fast is not None
    plan = StepPlan(Kind.STEP, 1, (row(4, 0, 1), row(1, 0, 3), row(2, 0, 16)))
    assert engine.fast.takes(plan.rows, [1, 1, 1])
    engine.logits(plan)
    assert engine.fast.expert_tokens.sum(1).tolist() == [2 * (1 + 3 + 16)] * engine.config.n_layers
    stored = engine.cache.store.view(*engine.cache.store.shape[:4], 16, -1).abs().amax((0, 1, 2, 5)).gt(0).sum(1)  # positions of each block
    assert stored.nonzero()[:, 0].tolist() == [5, 10, 20]
    assert stored.sum() == 1 + 3 + 16


def test_what_no_graph_has_room_for_goes_through_the_modules(checkpoints: dict[str, Path]) -> None:
    engine = load(checkpoints["grouped"], True)
    assert engine.fast is not None
    assert not engine.fast.takes([row(slot, 0, 2) for slot in range(3)], [1] * 3), "more prompts than a graph has rows for"
    assert not engine.fast.takes([row(0, 0, 40)], [2]), "logits after every token"
    assert not engine.fast.takes([row(0, 0, 33)], [1]), "more tokens than a graph has"
    assert not engine.fast.takes([row(slot, 0, 1) for slot in range(5)], [1] * 5), "more decodes than a graph has"


def test_ids_are_those_of_rows_that_sample(checkpoints: dict[str, Path]) -> None:
    fast, plain = (load(checkpoints["grouped"], one) for one in (True, False))
    rows = (row(3, 0, 1), replace(row(1, 0, 16), samples=False), row(2, 0, 12))
    assert fast.step(StepPlan(Kind.STEP, 1, rows)) == plain.step(StepPlan(Kind.STEP, 1, rows))


def test_what_an_earlier_owner_left_in_a_block_reaches_nobody(checkpoints: dict[str, Path]) -> None:
    clean, dirty = (load(checkpoints["grouped"], True) for _ in range(2))
    dirty.cache.store.fill_(torch.nan)
    plan = StepPlan(Kind.STEP, 1, (row(1, 0, 1), row(3, 0, 1)))
    torch.testing.assert_close(dirty.logits(plan), clean.logits(plan), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(checkpoints: dict[str, Path]) -> None:
    sound, broken = (load(checkpoints["grouped"], True) for _ in range(2))
    broken.model.embedding[TOKENS[3][0]] = torch.nan
    plan = StepPlan(Kind.STEP, 1, (row(1, 0, 1), row(3, 0, 1)))
    theirs, whole = broken.logits(plan), sound.logits(plan)
    assert theirs[1].isnan().any()
    assert torch.equal(theirs[0], whole[0])


def test_logits_stay_as_they_are_when_the_next_step_runs(checkpoints: dict[str, Path]) -> None:
    engine = load(checkpoints["grouped"], True)
    first = engine.logits(StepPlan(Kind.STEP, 1, (row(0, 0, 1),)))
    kept = first.clone()
    engine.logits(StepPlan(Kind.STEP, 2, (row(0, 1, 2),)))
    assert torch.equal(first, kept)


def test_the_kernel_draws_what_sampling_draws() -> None:
    """Equal scores among them, as bfloat16 makes many: every cut keeps all that equal the last."""
    from mixtral_worker.kernels import triton_rows

    scores = torch.randn(48, 500, generator=torch.Generator().manual_seed(0)) * 3
    scores[::2] = scores[::2].bfloat16().float()
    scores[7, 3], scores[9, 4] = torch.nan, torch.inf
    cuts = [(1.0, 0, 0.0), (0.9, 0, 0.0), (1.0, 40, 0.0), (0.8, 40, 0.0), (0.5, 3, 0.0), (1.0, 0, 0.05), (0.9, 600, 0.1), (0.95, 1, 0.0)]
    settings = [Sampling((0.0, 0.7, 1.3)[i % 3], *cuts[i % 8][:2], seed=(-1) ** i * i * 2**40, min_p=cuts[i % 8][2]) for i in range(48)]
    offsets = list(range(1, 49))
    numbers = torch.tensor([(s.temperature, math.log(s.min_p) if s.min_p else -math.inf, s.top_p) for s in settings])
    halves = keys(torch.tensor([s.seed for s in settings]), torch.tensor(offsets))
    words = torch.cat((torch.tensor([[s.top_k] for s in settings], dtype=torch.int32), halves), 1)
    for vocab_size in (500, 481):
        ids = torch.empty(48, dtype=torch.int32)
        triton_rows.draw(scores, vocab_size, numbers, words, ids)
        assert ids.tolist() == sample(scores[:, :vocab_size], settings, offsets).tolist()


@pytest.mark.parametrize("tokens", [1, 9, 40, 130])
@pytest.mark.parametrize("experts_here", [range(8), range(2, 5)], ids=["all", "three"])
def test_the_kernel_for_many_tokens_computes_what_the_modules_experts_compute(tokens: int, experts_here: range) -> None:
    """Expert 3 has no token, and of three on this rank the tokens of others are left alone."""
    from mixtral_worker.kernels.triton_experts import grouped_experts

    draw = torch.Generator().manual_seed(tokens)
    moe = MoE(ModelConfig(48, 1, 1, 1, 48, 40, 64, 8, 2), Shard())
    moe.experts = experts_here
    for name, size in (("w13", (80, 48)), ("w2", (48, 40))):
        setattr(moe, name, nn.Parameter(torch.randn(len(experts_here), *size, generator=draw) / 8, requires_grad=False))
    x = torch.randn(tokens, 48, generator=draw)
    pairs = torch.rand(tokens, 8, generator=draw).index_fill_(1, torch.tensor([3]), 0).topk(2).indices.flatten() - experts_here.start
    is_here = (pairs >= 0) & (pairs < len(experts_here))
    pairs = pairs.where(is_here, len(experts_here))
    order = pairs.argsort(stable=True)
    ends = (pairs <= torch.arange(len(experts_here))[:, None]).sum(1)
    expected, found = moe.compute(x, order, ends), grouped_experts(x, order, ends, moe.w13, moe.w2)
    torch.testing.assert_close(found[is_here], expected[is_here], rtol=1e-4, atol=1e-5)
