"""A short soak, as `make soak` makes a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.soak import Soaked, soak, tell
from support.chaos_load import Tally


@pytest.mark.timeout(400)
def test_memory_holds_still_under_even_load(tmp_path: Path) -> None:
    soaked = soak(tmp_path / "soak", 45.0)
    tell(soaked)
    assert soaked.tally.broken == []
    assert (soaked.open, soaked.tally.dead) == (0, [])
    assert soaked.tally.chats > 50
    assert soaked.too_large() == []


def test_growth_is_judged_after_the_first_third() -> None:
    def run(last_mb: float) -> list[str]:
        sizes = [50.0, 70.0, 80.0, *[90.0] * 4, *[last_mb] * 3]
        return Soaked(Tally(), [(float(at), at, {"server": size}) for at, size in enumerate(sizes)]).too_large()

    assert run(104.0) == []
    assert run(106.0) == ["server grew from 90.0 to 106.0 MB"]
