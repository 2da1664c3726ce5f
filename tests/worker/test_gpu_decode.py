"""The kernels of a card's decode steps compute what the model's modules compute. Here Triton's interpreter runs them on the CPU, without
graphs; tests/gpu runs them as they are compiled."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mixtral_worker.engine import Engine
from mixtral_worker.kernels.gpu_decode import GpuDecode
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.parallel import Shard
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from mixtral_worker.sampling import keys, sample
from support import small_mixtral

CONTEXT, BLOCKS_EACH = 80, 5
TOKENS = [[(7 * i * (row + 3) + row) % 60 for i in range(CONTEXT)] for row in range(5)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("mixtral_worker.kernels.triton_decode")


def load(checkpoint: Path, kernels: ModuleType | None, dtype: torch.dtype = torch.float32, normalization: str = "renorm") -> Engine:
    """With kernels, or by the modules alone."""
    config = replace(ModelConfig.read(checkpoint), moe_normalization_mode=normalization)
    engine = Engine.load(checkpoint, config=config, dtype=dtype, max_slots=len(TOKENS), max_seq_len=CONTEXT)
    engine.fast = GpuDecode(kernels, engine.model, engine.cache, engine.rotation, engine.vocab_size, len(TOKENS)) if kernels else None
    return engine


def row(slot: int, start: int, end: int) -> Row:
    table = tuple(range(slot * BLOCKS_EACH, slot * BLOCKS_EACH + -(-end // 16)))
    return Row(slot, start, tuple(TOKENS[slot][start:end]), table, True, 1, Sampling(0))


def steps(engine: Engine) -> Tensor:
    """Prompts by the modules, then tokens one by one, in three rows of different lengths: the logits of every step."""
    plans = [
        (row(0, 0, 63), row(1, 0, 5)),
        (row(1, 5, 15), row(2, 0, 2)),
        *(tuple(row(slot, at, at + 1) for slot, at in ((2, i + 2), (1, i + 15), (0, i + 63))) for i in range(3)),
        (row(2, 5, 6),),
    ]
    return torch.cat([engine.logits(StepPlan(Kind.STEP, i, rows)) for i, rows in enumerate(plans, 1)])


@pytest.mark.parametrize(("shape", "normalization"), [*((shape, "renorm") for shape in small_mixtral.SHAPES), ("no_groups", "none")])
def test_the_kernels_give_the_modules_logits(shape: str, normalization: str, checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    fast, plain = (load(checkpoints[shape], one, normalization=normalization) for one in (kernels, None))
    torch.testing.assert_close(steps(fast), steps(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.cache.store, plain.cache.store, rtol=1e-4, atol=1e-4)


def test_the_kernels_give_the_modules_logits_in_float16(checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    """They round at other places: the difference is held against that of the modules to float32. bfloat16 is for cards: numpy lacks it."""
    exact = steps(load(checkpoints["grouped"], None))
    error, allowed = ((steps(load(checkpoints["grouped"], one, torch.float16)).float() - exact).abs() for one in (kernels, None))
    assert error.mean() < 1.2 * allowed.mean()
    assert error.max() < 2 * allowed.max()


def test_padding_rows_store_nothing_and_choose_no_expert(checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    """Three rows run in a step made for four."""
    engine = load(checkpoints["grouped"], kernels)
    assert engine.fast is not None
    engine.logits(StepPlan(Kind.STEP, 1, tuple(row(slot, 0, 1) for slot in (1, 2, 3))))
    assert engine.fast.expert_tokens.sum(1).tolist() == [2 * 3] * engine.config.n_layers
    stored = engine.cache.store.abs().amax((0, 1, 2, 4)).nonzero()[:, 0].tolist()
    assert stored == [slot * BLOCKS_EACH for slot in (1, 2, 3)]


def test_what_an_earlier_owner_left_in_a_block_reaches_nobody(checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    clean, dirty = (load(checkpoints["grouped"], kernels) for _ in range(2))
    dirty.cache.store.fill_(torch.nan)
    plan = StepPlan(Kind.STEP, 1, (row(1, 0, 1), row(3, 0, 1)))
    torch.testing.assert_close(dirty.logits(plan), clean.logits(plan), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    sound, broken = (load(checkpoints["grouped"], kernels) for _ in range(2))
    broken.model.embedding[TOKENS[3][0]] = torch.nan
    plan = StepPlan(Kind.STEP, 1, (row(1, 0, 1), row(3, 0, 1)))
    theirs, whole = broken.logits(plan), sound.logits(plan)
    assert theirs[1].isnan().any()
    assert torch.equal(theirs[0], whole[0])


def test_logits_stay_as_they_are_when_the_next_step_runs(checkpoints: dict[str, Path], kernels: ModuleType) -> None:
    engine = load(checkpoints["grouped"], kernels)
    first = engine.logits(StepPlan(Kind.STEP, 1, (row(0, 0, 1),)))
    kept = first.clone()
    engine.logits(StepPlan(Kind.STEP, 2, (row(0, 1, 2),)))
    assert torch.equal(first, kept)


def test_the_kernel_draws_what_sampling_draws(kernels: ModuleType) -> None:
    """Equal scores among them, as bfloat16 makes many: every cut keeps all that equal the last."""
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
        kernels.draw(scores, vocab_size, numbers, words, ids)
        assert ids.tolist() == sample(scores[:, :vocab_size], settings, offsets).tolist()


@pytest.mark.parametrize("tokens", [1, 9, 40, 130])
@pytest.mark.parametrize("experts_here", [range(8), range(2, 5)], ids=["all", "three"])
def test_the_kernel_for_many_tokens_computes_what_the_modules_experts_compute(
    tokens: int, experts_here: range, kernels: ModuleType
) -> None:
    """Expert 3 has no token, and of three on this rank the tokens of others are left alone."""
    grouped = importlib.import_module("mixtral_worker.kernels.triton_experts").grouped_experts
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
    expected, found = moe.compute(x, order, ends), grouped(x, order, ends, moe.w13, moe.w2)
    torch.testing.assert_close(found[is_here], expected[is_here], rtol=1e-4, atol=1e-5)
