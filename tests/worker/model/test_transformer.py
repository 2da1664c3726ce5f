"""Our network computes what transformers' Mixtral computes, on one rank. On two: test_parallel.py."""

from pathlib import Path

import pytest
import torch

from mixtral_worker.engine import Engine
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan
from support.small_mixtral import SHAPES, as_transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(shape: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ids = torch.randint(SHAPES[shape]["vocab_size"], (50,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = Engine.load(checkpoints[shape], max_slots=1, max_seq_len=64)
    with torch.inference_mode():
        expected = as_transformers(checkpoints[shape], tmp_path)(torch.tensor([ids])).logits[0]
    assert expected.abs().max() > 1
    ends = [17, 40, *range(41, 51)]  # two chunks of prefill, the second not at a block's edge, then decodes
    for start, end in zip([0, *ends], ends, strict=False):
        row = Row(0, start, tuple(ids[start:end]), (3, 0, 2, 1)[: -(-end // 16)], samples=True, offset=1, sampling=Sampling())
        ours = engine.logits(StepPlan(Kind.STEP, 1, (row,)))
        torch.testing.assert_close(ours[0], expected[end - 1], rtol=0, atol=1e-4)
