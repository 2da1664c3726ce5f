"""What only a card can show. `make test-gpu` runs this folder; `make test` leaves it out, since most machines have no card.

MIXTRAL_TEST_DEVICE=cpu runs what does not need a card's own numbers on a CPU, to see that the tests themselves hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support import small_mixtral
from support.parts import PartMissing


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    name = os.environ.get("MIXTRAL_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise PartMissing("the GPU tests need an NVIDIA card and a torch built for it; make test runs all that need none")
    # Products of float32 in TF32 would be compared with a CPU's at a thousandth of their precision.
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield torch.device(name)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def card(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise PartMissing("this test measures a card's own memory, which MIXTRAL_TEST_DEVICE=cpu has none of")
    return device


@pytest.fixture(scope="session", params=small_mixtral.SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_mixtral.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)
