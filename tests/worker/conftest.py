"""Small random checkpoints, and what two real ranks make of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support import checkpoint_layouts, small_mixtral, two_ranks

TORCHRUN_DEADLINE_S = 60
RunRanks = Callable[[str, Path], subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small random Mixtral of each shape, in Mistral's layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {shape: small_mixtral.write_checkpoint(root / shape, shape) for shape in small_mixtral.SHAPES}


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["grouped"]


@pytest.fixture(scope="session")
def layouts(checkpoints: dict[str, Path]) -> dict[str, Path]:
    """The same models in the other layouts, in folders beside them."""
    root = next(iter(checkpoints.values())).parent
    return {name: checkpoint_layouts.write_layout(name, root) for name in checkpoint_layouts.LAYOUTS}


@pytest.fixture(scope="session")
def run_two_ranks(checkpoint: Path) -> RunRanks:
    """Run support/two_ranks.py with a task under a real torchrun."""
    root = Path(two_ranks.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'worker'}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", two_ranks.__name__]

    def run(task: str, out: Path) -> subprocess.CompletedProcess[str]:
        arguments = [task, str(checkpoint.parent), str(out)]
        return subprocess.run(torchrun + arguments, env=environment, capture_output=True, text=True, timeout=TORCHRUN_DEADLINE_S)

    return run


@pytest.fixture(scope="session")
def of_two_ranks(run_two_ranks: RunRanks, layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two computed, with every layout in its folder."""
    assert layouts
    out = tmp_path_factory.mktemp("two_ranks") / "results.pt"
    ended = run_two_ranks("compute", out)
    assert ended.returncode == 0, ended.stderr
    results: dict[str, Any] = torch.load(out)
    return results
