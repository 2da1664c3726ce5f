"""The server's benchmark runs, counts what readers got, and says so in one JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_server.bench.house import open_house
from mixtral_server.bench.load import answer_size
from mixtral_server.bench.measures import percentile
from support.limits import with_open_files

LIMIT_S = 100.0


def bench(*flags: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_server.bench", *flags], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_every_token_and_every_call_is_counted_where_it_arrived(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    load = ("--wire", "openai", "--streams", "3", "--tokens", "5", "--calls", "10", "--callers", "4")
    figures = bench("tokens", "jobs", *load, "--json_file", str(path))
    assert json.loads(path.read_text()) == figures
    runs = [(row["wire"], row["tokens_per_frame"], row["tokens"]) for row in figures["tokens"]]
    assert runs == [("openai", 1, 15), ("openai", 8, 120)]
    assert figures["jobs"][0]["calls"] == 10
    assert figures["flags"]["streams"] == 3
    assert figures["versions"]["redis"]


def test_latency_depth_and_memory_have_figures() -> None:
    flags = (
        "--wire",
        "native",
        "--streams",
        "2",
        "--turns_per_s",
        "50",
        "--seconds",
        "0.2",
        "--most_waiting",
        "1000",
        "--chats",
        "3",
        "--readers",
        "10",
    )
    figures = bench("latency", "depth", "finished", "idle", *flags)
    assert [row["tokens"] for row in figures["latency"]] == [10, 20]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] + 0.05 for row in figures["latency"])
    [row] = figures["depth"]
    assert row["waiting"] == 1000
    assert all(row[f"{step}_p50_us"] > 0 for step in ("put", "position", "claim", "cancel"))
    assert all(row["redis_bytes_per_finished_chat"] > 1000 for row in figures["finished"])
    assert figures["idle"][0]["readers"] == 10


def test_figures_of_several_rounds_are_medians_and_each_round_is_kept() -> None:
    figures = bench("jobs", "--calls", "6", "--callers", "2", "--rounds", "3")
    [median], rounds = figures["jobs"], [round["jobs"][0] for round in figures["rounds"]]
    assert len(rounds) == 3
    assert median["calls"] == 6
    for figure in ("jobs_per_s", "p50_ms", "server_cpu"):
        assert median[figure] == sorted(row[figure] for row in rounds)[1]


async def test_the_server_has_a_core_of_its_own(tmp_path: Path) -> None:
    """Or shares the only one."""
    cores = os.sched_getaffinity(0)
    async with open_house(tmp_path) as house:
        ours = os.sched_getaffinity(0)
        assert os.sched_getaffinity(house.server_pid) == (cores - ours or cores)
        assert os.sched_getaffinity(house.redis_pid) == ours
        assert len(ours) == max(1, len(cores) - 1)
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("speed",), "invalid choice: 'speed'"),
        (("jobs", "--rounds", "0"), "argument --rounds: must be a whole number from 1 to 1,000,000; got '0'"),
        (("tokens", "--streams", "-1"), "argument --streams: must be a whole number from 1 to 1,900; got '-1'"),
        (("tokens", "--tokens_per_frame", "1", "1.5"), "argument --tokens_per_frame: must be a whole number from 1 to 1,024; got '1.5'"),
        (("depth", "--most_waiting", "999"), "argument --most_waiting: must be a whole number from 1,000 to 1,000,000; got '999'"),
        (("latency", "--seconds", "nan"), "argument --seconds: must be a number from 0.1 to 3,600; got 'nan'"),
        (("jobs", "--json_file", "/nowhere/run.json"), "--json_file /nowhere/run.json: name a file in a folder that exists"),
        (("jobs", "--json_file", "/"), "--json_file /: name a file in a folder that exists"),
    ],
)
def test_a_wrong_flag_ends_with_usage_before_anything_is_measured(flags: tuple[str, ...], sentence: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mixtral_server.bench", *flags], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_more_connections_than_open_files_are_refused_before_anything_is_measured() -> None:
    command = with_open_files(64, 1000, [sys.executable, "-m", "mixtral_server.bench", "idle", "--readers", "2000"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "4,256 open files are needed and this account may have 1,000" in done.stderr


def test_connections_of_measures_that_are_not_run_need_no_open_files() -> None:
    command = [sys.executable, "-m", "mixtral_server.bench", "jobs", "--calls", "6", "--callers", "2", "--readers", "2000"]
    done = subprocess.run(with_open_files(64, 1000, command), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
    assert percentile([7.0], 0.99) == 7.0


def test_an_answer_is_whole_with_its_last_byte() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    assert [answer_size(whole[:cut]) for cut in (0, 20, len(whole) - 4)] == [None, None, None]
    assert answer_size(whole[:-3]) == answer_size(whole) == len(whole)
