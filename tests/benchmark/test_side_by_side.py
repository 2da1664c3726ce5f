"""Ratios of a comparison, and what stops it before it compares anything. The comparison itself is `make side-by-side`."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_benchmark.house import HouseError
from mixtral_benchmark.side_by_side import OURS, _line, _ratios, _require, main


def run(contender: str, level: int, tokens_per_s: float, ttft_ms: float) -> dict[str, Any]:
    figures = {"output_throughput": tokens_per_s, "median_ttft_ms": ttft_ms, "median_tpot_ms": 10.0, "total_output_tokens": 64}
    return {"contender": contender, "flags": {"concurrent_requests": level}, **figures}


def test_ratio_is_ours_over_theirs_of_the_medians_over_the_rounds_at_the_same_level() -> None:
    runs = [run(OURS, 8, speed, 20.0) for speed in (90.0, 100.0, 500.0)] + [run("peer", 8, speed, 80.0) for speed in (40.0, 50.0, 60.0)]
    lines = [_line(runs, name, 8) for name in (OURS, "peer")]
    assert lines[0].spread == (90.0, 500.0)
    assert _ratios(lines) == [{"peer": "peer", "concurrent_requests": 8, "throughput": 2.0, "ttft": 0.25, "tpot": 1.0}]


def test_peer_that_measured_nothing_has_no_ratio() -> None:
    lines = [_line([run(OURS, 1, 10.0, 1.0), run("peer", 1, 0.0, 1.0)], name, 1) for name in (OURS, "peer")]
    assert _ratios(lines)[0]["throughput"] is None


def test_missing_peer_is_an_error_that_says_how_to_get_it() -> None:
    with pytest.raises(HouseError, match=r"no_such_peer package; install the peers with pip install 'mixtral-chat\[peers\]'"):
        _require("no_such_peer", "somebody's server")


@pytest.mark.parametrize("level", ["0", "a", "1,,2"])
def test_wrong_concurrency_is_refused(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--concurrency", level])
    assert "--concurrency" in capsys.readouterr().err
