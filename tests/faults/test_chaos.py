"""A short chaos run, as `make chaos` makes a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.chaos import run, tell
from support.chaos_faults import KINDS, schedule

SEED, SECONDS = 4, 25.0


@pytest.mark.timeout(600)
def test_random_faults_under_load_lose_repeat_and_change_no_token(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", SEED, SECONDS)
    tell(outcome)
    assert outcome.as_promised, outcome.counts()
    assert sum(outcome.faults.values()) >= 15
    assert set(outcome.tally.by_kind) == {"native", "python client", "openai stream", "openai whole", "javascript", "canceller"}


def test_one_seed_is_one_schedule_and_a_long_one_has_every_fault() -> None:
    assert schedule(5, 600.0, 1.0) == schedule(5, 600.0, 1.0) != schedule(6, 600.0, 1.0)
    assert {(fault.what, fault.how) for fault in schedule(5, 600.0, 1.0)} == set(KINDS)
