"""`worker bench`: everyone gets the same chats, a figure is what it says, and what cannot be compared is refused."""

import json
from pathlib import Path

import pytest

from mixtral_worker import bench, bench_cli, bench_report
from mixtral_worker.bench_cli import OURS, Asked
from mixtral_worker.bench_peers import Answers, Chat
from mixtral_worker.settings import SettingsRefused


@pytest.mark.parametrize(
    ("argv", "ranks", "sentence"),
    [
        (["--shapes", "demo,huge"], 1, "--shapes 'huge' is none of demo, large, 8x7b-4, 8x7b"),
        (["--peers", "vllm"], 1, "--peers 'vllm' is none of transformers, transformers-continuous, llama.cpp"),
        (
            ["--device", "cuda", "--peers", "llama.cpp"],
            1,
            "--peers llama.cpp is measured on a CPU only; give --device cpu, or leave it out",
        ),
        (["--threads", "0"], 1, "--threads must be from 1 to 1024; given 0"),
        (["--rounds", "x"], 1, "argument --rounds: invalid int value: 'x'; see --help"),
        (["--json", "/nowhere/at/all.json"], 1, "/nowhere/at is no folder"),
        ([], 2, "torchrun started 2 ranks; run with --nproc_per_node 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(argv: list[str], ranks: int, sentence: str) -> None:
    with pytest.raises(SettingsRefused) as refused:
        bench_cli.parse(argv, ranks, lambda: False)
    assert sentence in str(refused.value)


def test_shapes_are_those_of_the_device_unless_named() -> None:
    assert bench_cli.parse([], 1, lambda: True).shapes == ("8x7b-4", "8x7b")
    assert bench_cli.parse(["--device", "cpu"], 1, lambda: True).shapes == ("demo", "large")
    assert bench_cli.parse(["--shapes", "demo"], 1, lambda: True).shapes == ("demo",)
    assert "llama.cpp" not in bench_cli.parse([], 1, lambda: True).peers
    assert bench_cli.parse(["--peers", "none"], 1, lambda: True).peers == ()


def test_a_batchs_figure_counts_what_comes_after_everyones_first_token() -> None:
    answers = Answers(ids=[[1] * 11, [1] * 11], first_s=[0.5, 1.0], whole_s=3.0)
    assert bench.figure("batch 2", answers) == 10.0
    assert bench.figure("mixed", answers) == 22 / 3
    assert bench.figure("ttft", answers) == 0.5


def test_a_ratio_above_one_means_that_this_engine_is_faster() -> None:
    assert bench_report.ratio("batch 8", [100.0, 300.0, 200.0], [100.0]) == 2.0
    assert bench_report.ratio("ttft", [0.1], [0.3]) == pytest.approx(3.0)


def test_every_round_has_other_chats_and_the_same_longest(checkpoint: Path) -> None:
    shape = bench.Shape(str(checkpoint), "float32", {1: 4, 8: 3}, 40)
    first, second = (bench._tasks(shape, bench.random.Random(f"0 {turn}")) for turn in range(2))
    assert list(first) == ["batch 1", "batch 8", "mixed", "ttft"]
    assert len(first["mixed"]) == 32
    assert len(first["ttft"][0].prompt) == 512
    assert max(chat.new_tokens for chat in first["mixed"]) == max(chat.new_tokens for chat in second["mixed"]) == 40
    assert first["batch 8"] != second["batch 8"]


def test_this_engine_and_transformers_give_the_same_tokens_and_the_last_line_is_json(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.Shape(str(checkpoint), "float32", {1: 5, 8: 3}, 12))
    out = tmp_path / "result.json"
    assert bench.run(Asked(("tiny",), ("transformers",), "cpu", 1, 1, 0, out)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    told = json.loads(last)
    assert json.loads(out.read_text()) == told
    tiny = told["shapes"]["tiny"]
    assert tiny["checks"]["transformers"]["tokens"] > 60
    assert [one for one in tiny["checks"]["transformers"]["differences"] if abs(one["margin"]) >= bench.TIE] == []
    for measure in ("batch 1", "batch 8", "mixed", "ttft"):
        assert tiny["figures"][measure].keys() == {OURS, "transformers"}
        assert all(number > 0 for numbers in tiny["figures"][measure].values() for number in numbers)
        assert 0 < tiny["outside"][measure][0] < 1
        assert tiny["bandwidth"][measure][0] > 0
    assert told["threads"] == 1
    assert told["packages"]["transformers"]


def test_a_peer_that_answers_too_short_spoils_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"llama\.cpp gave 3 tokens of 4"):
        bench._require_whole("llama.cpp", [Chat([1], 4)], Answers([[1, 2, 3]], [0.1], 0.2))
