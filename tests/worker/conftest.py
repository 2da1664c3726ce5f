"""Small random checkpoints for the worker's tests."""

from pathlib import Path

import pytest
from support.small_mixtral import SHAPES, write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small random Mixtral of each shape, in Mistral's layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {shape: write_checkpoint(root / shape, shape) for shape in SHAPES}


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["grouped"]
