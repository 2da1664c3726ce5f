"""The compiled forward pass computes what the model's modules compute, and every token's logits are its own."""

import logging
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtral_worker.engine import Engine
from mixtral_worker.kernels import build
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from support import small_mixtral

CONTEXT, BLOCKS_EACH = 80, 5
TOKENS = [[(7 * i * (row + 3) + row) % 60 for i in range(CONTEXT)] for row in range(5)]


def row(slot: int, start: int, end: int) -> Row:
    table = tuple(range(slot * BLOCKS_EACH, slot * BLOCKS_EACH + -(-end // 16)))
    return Row(slot, start, tuple(TOKENS[slot][start:end]), table, True, 1, Sampling(0))


def load(checkpoint: Path, dtype: torch.dtype = torch.float32, normalization: str = "renorm") -> Engine:
    config = replace(ModelConfig.read(checkpoint), moe_normalization_mode=normalization)
    engine = Engine.load(checkpoint, config=config, dtype=dtype, max_slots=len(TOKENS), max_seq_len=CONTEXT)
    assert engine.fast is not None, "this machine has a compiler, or the tests could not hold the two paths equal"
    return engine


def steps(engine: Engine) -> Tensor:
    """Prompts, one of them cut in two, then tokens one by one: the logits of every step."""
    plans = [
        (row(0, 0, 33), row(1, 0, 5)),
        (row(1, 5, 16), row(2, 0, 1), row(0, 33, 34)),
        *(tuple(row(slot, at, at + 1) for slot, at in ((2, i + 1), (1, i + 16), (0, i + 34))) for i in range(40)),
    ]
    return torch.cat([engine.logits(StepPlan(Kind.STEP, i, rows)) for i, rows in enumerate(plans, 1)])


@pytest.mark.parametrize(("shape", "normalization"), [*((shape, "renorm") for shape in small_mixtral.SHAPES), ("no_groups", "none")])
def test_the_compiled_pass_gives_the_modules_logits(shape: str, normalization: str, checkpoints: dict[str, Path]) -> None:
    compiled, plain = (load(checkpoints[shape], normalization=normalization) for _ in range(2))
    plain.fast = None
    torch.testing.assert_close(steps(compiled), steps(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.cache.store, plain.cache.store, rtol=1e-4, atol=1e-4)


def test_the_compiled_pass_gives_the_modules_logits_in_bfloat16(checkpoints: dict[str, Path]) -> None:
    """They round at other places: the difference is held against that of the modules to float32."""
    exact = steps(load(checkpoints["grouped"]))
    compiled, plain = (load(checkpoints["grouped"], torch.bfloat16) for _ in range(2))
    plain.fast = None
    error, allowed = ((steps(engine).float() - exact).abs() for engine in (compiled, plain))
    assert error.mean() < 1.2 * allowed.mean()
    assert error.max() < 2 * allowed.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tokens_logits_are_bit_for_bit_the_same_in_any_batch_and_however_its_prompt_is_cut(
    dtype: torch.dtype, threads: int, checkpoints: dict[str, Path]
) -> None:
    engine = load(checkpoints["grouped"], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = engine.logits(StepPlan(Kind.STEP, 1, (row(0, 0, 40),)))
        engine.cache.store.zero_()
        for start, end in ((0, 1), (1, 9), (9, 39)):
            engine.logits(StepPlan(Kind.STEP, 1, (row(0, start, end),)))
        others = tuple(row(slot, 0, 1) for slot in (1, 2, 3, 4))
        crowded = engine.logits(StepPlan(Kind.STEP, 2, (*others[:2], row(0, 39, 40), *others[2:])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[0], crowded[2])


def test_numbers_that_are_none_in_one_row_reach_no_other(checkpoint: Path) -> None:
    engine = load(checkpoint)
    rows = (row(1, 3, 4), row(2, 3, 4), row(3, 3, 4))
    for one in (1, 2, 3):
        engine.logits(StepPlan(Kind.STEP, 1, (row(one, 0, 3),)))
    clean = engine.logits(StepPlan(Kind.STEP, 2, rows))
    engine.cache.store[:, :, :, 2 * BLOCKS_EACH] = torch.nan
    spoilt = engine.logits(StepPlan(Kind.STEP, 2, rows))
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


def test_experts_are_counted_as_the_router_chose_them(checkpoint: Path) -> None:
    engine = load(checkpoint)
    assert engine.fast is not None
    engine.logits(StepPlan(Kind.STEP, 1, (row(0, 0, 40), row(1, 0, 7))))
    assert engine.fast.expert_tokens.sum(1).tolist() == [2 * 47] * engine.config.n_layers


def test_without_a_compiler_the_modules_compute_and_the_log_says_why(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = steps(load(checkpoint))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "mixtral_worker"):
        engine = Engine.load(checkpoint, max_slots=len(TOKENS), max_seq_len=CONTEXT)
    assert engine.fast is None
    assert "no C++ compiler found" in caplog.text
    torch.testing.assert_close(steps(engine), expected, rtol=1e-4, atol=1e-4)


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return nothing_of_this_name; }")
    with caplog.at_level(logging.WARNING, "mixtral_worker"):
        assert build.library(source) is None
    assert "nothing_of_this_name" in caplog.text


def test_a_source_is_compiled_once_and_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer.cpp"
    made = []
    for number in (1, 1, 2):
        source.write_text(f'extern "C" int answer() {{ return {number}; }}')
        functions = build.library(source)
        assert functions is not None
        assert functions.answer() == number
        made.append(sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "mixtral_worker").iterdir()))
    assert made[0] == made[1]
    assert len(made[2]) == 2


@pytest.mark.parametrize("processor", ["x86-64", "haswell"] if platform.machine() == "x86_64" else ["armv8-a"])
def test_processors_that_can_do_less_get_the_same_logits(processor: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps(load(checkpoint))
    monkeypatch.setattr(build, "FLAGS", tuple(f"-march={processor}" if "march" in flag else flag for flag in build.FLAGS))
    torch.testing.assert_close(steps(load(checkpoint)), expected, rtol=1e-4, atol=1e-4)
    assert steps(load(checkpoint, torch.bfloat16)).isfinite().all()
