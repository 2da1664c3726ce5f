"""What a kill cost, and a run through real kills in which nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_benchmark.chaos import Incident, costs
from mixtral_benchmark.flags import parse
from mixtral_benchmark.measure import Arrival, Chat

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180


def chat(*times: float) -> Chat:
    return Chat(0, 0.0, 0.0, [Arrival(at_s, 1) for at_s in times], ended_s=times[-1])


def test_pause_is_the_longest_wait_for_a_token_that_the_kill_fell_into_or_caused() -> None:
    paused = chat(1.0, 2.0, 9.0, 9.5)  # the kill at 5 falls into its wait from 2 to 9
    late = chat(4.0, 5.5, 8.0, 30.0)  # had a token after the kill, then waited; what came after the part was back is not the kill's
    before, after = chat(1.0, 3.0), chat(6.0, 7.0)
    rows = costs([Incident("worker 1", 5.0, back_s=7.5)], [paused, late, before, after], started_s=1.0)
    assert rows == [{"what": "worker 1", "at_s": 4.0, "back_after_s": 2.5, "streaming": 2, "median_pause_s": 4.75, "max_pause_s": 7.0}]


def test_kill_that_hit_nobody_or_never_came_back_still_has_its_row() -> None:
    rows = costs([Incident("replica 1", 50.0)], [chat(1.0, 2.0)], started_s=0.0)
    assert rows == [{"what": "replica 1", "at_s": 50.0, "back_after_s": None, "streaming": 0, "median_pause_s": None, "max_pause_s": None}]


@pytest.mark.parametrize("flags", [["--api_server", "http://h"], ["-k", "key"], ["--api", "openai"], ["--sweep_rate"]])
def test_chaos_takes_no_server_and_no_wire_but_its_own(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--chaos", *flags], {})
    assert "leave out" in capsys.readouterr().err


@pytest.mark.timeout(2 * LIMIT_S)
def test_killed_replicas_and_workers_cost_pauses_and_no_token() -> None:
    load = ["--total_requests", "60", "--concurrent_requests", "4", "--max_tokens", "200", "--seed", "1"]
    command = [sys.executable, "-m", "benchmark", "--chaos", "--chaos_every_s", "2", *load]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    outcome = json.loads(run.stdout.rstrip("\n").splitlines()[-1])
    assert (outcome["completed"], outcome["failed"], outcome["failures"]) == (60, 0, {})
    kinds = {kill["what"].split()[0] for kill in outcome["kills"]}
    assert kinds == {"replica", "worker"}
    assert all(kill["back_after_s"] is not None for kill in outcome["kills"][:-1])
