"""Our network computes what transformers' own compute, from every layout of a checkpoint, on one rank. On two: test_parallel.py."""

from pathlib import Path

import pytest
import torch

from mixtral_worker.engine import Engine
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from support.checkpoint_layouts import LAYOUTS
from support.small_mixtral import SHAPES, as_transformers

Reference = tuple[str, list[int], torch.Tensor]  # shape, ids, their logits


@pytest.fixture(scope="module", params=SHAPES)
def reference(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    shape = request.param
    ids = torch.randint(SHAPES[shape]["vocab_size"], (50,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        logits = as_transformers(checkpoints[shape], tmp_path_factory.mktemp(shape))(torch.tensor([ids])).logits[0]
    return shape, ids, logits


def test_logits_equal_those_of_transformers_from_every_layout(
    reference: Reference, checkpoints: dict[str, Path], layouts: dict[str, Path]
) -> None:
    shape, ids, expected = reference
    assert expected.abs().max() > 1
    for folder in (checkpoints[shape], *(layouts[name] for name in LAYOUTS if LAYOUTS[name] == shape)):
        engine = Engine.load(folder, max_slots=1, max_seq_len=64)
        assert_same(engine, ids, expected)


def assert_same(engine: Engine, ids: list[int], expected: torch.Tensor) -> None:
    ends = [17, 40, *range(41, 51)]  # two chunks of prefill, the second not at a block's edge, then decodes
    for start, end in zip([0, *ends], ends, strict=False):
        row = Row(0, start, tuple(ids[start:end]), (3, 0, 2, 1)[: -(-end // 16)], samples=True, offset=1, sampling=Sampling())
        ours = engine.logits(StepPlan(Kind.STEP, 1, (row,)))
        torch.testing.assert_close(ours[0], expected[end - 1], rtol=0, atol=1e-4)


def test_decodes_computed_together_look_through_windows_of_their_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    rng, lengths = torch.Generator().manual_seed(2), (5, 12, 33, 50)
    prompts = [torch.randint(64, (length,), generator=rng).tolist() for length in lengths]
    theirs = as_transformers(checkpoints["windowed"], tmp_path)
    engine = Engine.load(checkpoints["windowed"], max_slots=4, max_seq_len=64)

    def row(slot: int, start: int, end: int) -> Row:
        return Row(slot, start, tuple(prompts[slot][start:end]), tuple(range(4 * slot, 4 * slot + -(-end // 16))), True, 1, Sampling())

    for slot, length in enumerate(lengths):
        engine.logits(StepPlan(Kind.STEP, 1, (row(slot, 0, length - 1),)))
    together = engine.logits(StepPlan(Kind.STEP, 2, tuple(row(slot, length - 1, length) for slot, length in enumerate(lengths))))
    for ours, prompt in zip(together, prompts, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(ours, theirs(torch.tensor([prompt])).logits[0, -1], rtol=0, atol=1e-4)
