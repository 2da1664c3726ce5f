"""Tokens that change with the batch's shape are counted, and only those."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mixtral_worker import flips
from mixtral_worker.engine import Engine
from mixtral_worker.flips import ALONE, Shape, measure
from support.torchrun import torchrun


@pytest.mark.parametrize("shape", [Shape(3, 1), Shape(1, 7), Shape(1, 512), Shape(2, 5)], ids=str)
def test_every_position_of_every_shape_has_the_tokens_of_one_pass_over_the_whole(shape: Shape, checkpoint: Path) -> None:
    engine = Engine.load(checkpoint, max_slots=4, max_seq_len=40)
    sequences = [[(7 * slot + 3 * at) % 160 for at in range(40)] for slot in range(4)]
    alone, other = measure(engine, sequences, ALONE), measure(engine, sequences, shape)
    assert torch.equal(alone.best, other.best)
    assert torch.equal(alone.drawn, other.drawn)
    assert not torch.equal(alone.best, alone.drawn)
    assert (alone.score - other.score).abs().max() < 1e-4
    assert alone.best.unique().numel() > 20


def test_coarser_numbers_are_seen_to_differ(checkpoint: Path) -> None:
    sequences = [[(7 * slot + 3 * at) % 160 for at in range(40)] for slot in range(4)]
    exact, coarse = (
        measure(Engine.load(checkpoint, dtype=dtype, max_slots=4, max_seq_len=40), sequences, ALONE)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < int((exact.best != coarse.best).sum()) < exact.best.numel() / 2
    assert (exact.score - coarse.score).abs().max() > 1e-3


def test_ranks_of_a_torchrun_measure_together_and_rank_0_shows(checkpoint: Path) -> None:
    asked = [
        "flips",
        "--ckpt_dir",
        str(checkpoint),
        "--tokenizer_path",
        "none",
        "--max_batch_size",
        "9",
        "--max_seq_len",
        "30",
        "--ep_size",
        "2",
    ]
    with torchrun(["--nproc_per_node", "2", "worker", *asked]) as ran:
        assert ran.wait() == 0, ran.rest_of_log()
        assert ran.process.stdout is not None
        shown = ran.process.stdout.read().decode()
    assert shown.count("grouped in float32, ranks: 2; compared with steps of 1 chat, 1 token each") == 1
    rows = re.findall(r"(\d+ chats?, \d+ tokens? each) +270 +0 \(0\.000%\) +0 \(0\.000%\)", shown)
    assert rows == [str(shape) for shape in flips.SHAPES if shape.sequences <= 9], shown
