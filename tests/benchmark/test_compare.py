"""Two results side by side: ratios, which is better, and what makes them no fair pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_benchmark.compare import NOT_COMPARED, OK, main
from mixtral_benchmark.intervals import confidence
from mixtral_benchmark.measure import Arrival, Chat, figures
from mixtral_benchmark.report import circumstances, result, sweep, write_json

FLAGS = {"endpoint_name": "m", "request_rate": None, "concurrent_requests": 4, "sweep_rate": None, "max_tokens": 8}


def outcome(ttft_s: float, jitter_s: float = 0.0, **flags: object) -> dict[str, Any]:
    chats = [Chat(i, 0.0, 0.0, [Arrival(ttft_s + jitter_s * i, 1), Arrival(9.0, 1)], ended_s=9.0, usage_tokens=2) for i in range(40)]
    facts = circumstances(FLAGS | flags, None)
    return result(chats, figures(chats, 0.0, 10.0), facts, 0.1, confidence(chats))


def written(path: Path, *runs: dict[str, Any]) -> str:
    write_json(path, runs[0] if len(runs) == 1 else sweep(runs, None), [[] for _ in runs])
    return str(path)


def compared(capsys: pytest.CaptureFixture[str], *paths: str) -> tuple[str, dict[str, Any]]:
    assert main(paths) == OK
    text = capsys.readouterr().out
    read: dict[str, Any] = json.loads(text.rstrip("\n").splitlines()[-1])
    return text, read


def test_ratio_is_the_second_over_the_first_and_says_which_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, read = compared(capsys, written(tmp_path / "a", outcome(1.0)), written(tmp_path / "b", outcome(0.5)))
    assert read["runs"][0]["ratios"]["median_ttft_ms"] == 0.5
    assert read["runs"][0]["not_alike"] == []
    row = next(line for line in text.splitlines() if "time to first token, p50" in line)
    assert row.split()[-4:] == ["1,000", "500.00", "0.500", "▲"]
    tpot = next(line for line in text.splitlines() if "time per output token, p50" in line)
    assert tpot.split()[-1] == "▼"


def test_difference_within_the_doubt_is_neither_better_nor_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [written(tmp_path / name, outcome(ttft_s, jitter_s=0.1)) for name, ttft_s in (("a", 1.0), ("b", 1.1))]
    row = next(line for line in compared(capsys, *paths)[0].splitlines() if "time to first token, p50" in line)
    assert row.split()[-1] not in ("▲", "▼")


def test_runs_that_asked_different_things_are_said_to_be_unlike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, read = compared(capsys, written(tmp_path / "a", outcome(1.0)), written(tmp_path / "b", outcome(1.0, max_tokens=9)))
    assert read["runs"][0]["not_alike"] == ["--max_tokens was 8 in A and 9 in B"]
    assert "not alike: --max_tokens was 8 in A and 9 in B" in text


def test_sweeps_are_compared_level_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "a", *(outcome(1.0, concurrent_requests=level) for level in (1, 2, 4)))
    after = written(tmp_path / "b", *(outcome(0.5, concurrent_requests=level) for level in (2, 4, 8)))
    _, read = compared(capsys, before, after)
    assert [run["label"] for run in read["runs"]] == ["2 at once", "4 at once"]


def test_what_is_no_result_or_no_pair_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "one", outcome(1.0))
    swept = written(tmp_path / "swept", outcome(1.0, concurrent_requests=1), outcome(1.0, concurrent_requests=2))
    other = written(tmp_path / "other", outcome(1.0, concurrent_requests=64), outcome(1.0, concurrent_requests=65))
    (tmp_path / "text").write_text("not JSON")
    (tmp_path / "old").write_text('{"format": 0}')
    cases = [
        (str(tmp_path / "missing"), "missing cannot be read as a result: No such file or directory"),
        (str(tmp_path / "text"), "text cannot be read as a result"),
        (str(tmp_path / "old"), "must be a result of this benchmark in format 1"),
        (swept, "one of the two is a sweep and the other a single run"),
    ]
    for path, sentence in cases:
        assert main([one, path]) == NOT_COMPARED
        assert sentence in capsys.readouterr().err
    assert main([swept, other]) == NOT_COMPARED
    assert "the two sweeps have no level in common" in capsys.readouterr().err
