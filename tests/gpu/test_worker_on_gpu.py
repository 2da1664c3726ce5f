"""`torchrun worker` on every card of this machine: a chat in the terminal, by the ranks that the demo model allows."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from support.torchrun import torchrun

LIMIT_S = 180


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_model_answers_on_all_cards_together(device: torch.device, dtype: str) -> None:
    cards = torch.cuda.device_count() if device.type == "cuda" else 1
    ranks = max(count for count in (1, 2, 4) if count <= cards)  # the demo model has 4 kv heads
    flags = ["--nproc_per_node", str(ranks), "worker", "--device", device.type, "--dtype", dtype, "--temperature", "0"]
    asking, answering = os.pipe(), None
    os.write(asking[1], b"Tell a long story: Once upon a time\n")
    os.close(asking[1])
    with torchrun(flags, stdin=asking[0], stdout=subprocess.PIPE) as run:
        assert run.process.stdout is not None
        answering = run.process.stdout.read().decode()
        code = run.wait()
    os.close(asking[0])
    assert code == 0, run.rest_of_log()
    assert "Once upon a time, there was a" in answering
