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
