"""The program as a process: who speaks, what help costs, and which exit code says what."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_server import KEY, serving
from support.tiny_worker import write_tiny_worker

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_worker(tmp_path_factory.mktemp("tiny"))


def worker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    command = [sys.executable, "-m", "worker", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=own | environment, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
    )  # fmt: skip


def assert_one_sentence(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    said = [line for line in ended.stderr.splitlines() if line.startswith("mixtral-worker:")]
    assert len(said) == 1, ended.stderr
    assert all(word in said[0] for word in words), said[0]
    assert "Traceback" not in ended.stderr
    assert (ended.returncode, ended.stdout) == (code, "")


@pytest.mark.parametrize(
    "entry",
    [[sys.executable, "-m", "worker"], [sys.executable, "worker"], [str(Path(sys.executable).parent / "mixtral-worker")]],
    ids=["python -m worker", "python worker", "mixtral-worker"],
)
def test_every_entry_shows_the_same_help(entry: list[str]) -> None:
    shown = subprocess.run([*entry, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == worker("--help").stdout
    assert "--api_server URL" in shown.stdout


def test_help_and_refusals_come_without_loading_torch() -> None:
    script = """
import sys
from mixtral_worker import cli
sys.argv = ["worker", sys.argv[1]]
cli._end = sys.exit
try:
    cli.main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    for argument in ("--help", "--no_such_flag"):
        ended = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=LIMIT_S)
        assert ended.stderr.endswith("False\n"), ended.stderr


def test_only_rank_0_shows_help() -> None:
    shown = worker("--help", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")


def test_a_wrong_setting_is_said_by_the_first_rank_of_a_host_and_ends_all_with_code_2() -> None:
    assert_one_sentence(worker("--top_p", "7"), 2, "--top_p", "given 7")
    silent = worker("--top_p", "7", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")


def test_a_folder_that_is_no_checkpoint_is_refused_by_the_name_of_what_is_missing(tmp_path: Path) -> None:
    assert_one_sentence(worker("--ckpt_dir", str(tmp_path)), 2, "params.json", str(tmp_path))


def test_a_context_longer_than_the_checkpoint_was_made_for_is_refused_with_both_numbers(tiny: Path) -> None:
    assert_one_sentence(worker("--ckpt_dir", str(tiny), "--max_seq_len", "300"), 2, "--max_seq_len is 300", "at most 256")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_any_weight_is_read(tiny: Path, tmp_path: Path) -> None:
    params = (tiny / "params.json").read_text().replace('"vocab_size": 320', '"vocab_size": 310')
    (tmp_path / "params.json").write_text(params)
    assert_one_sentence(worker("--ckpt_dir", str(tmp_path), "--tokenizer_path", str(tiny)), 2, "320 ids", "the model 310")


def test_a_rank_count_that_the_model_cannot_be_split_by_is_refused_with_those_that_work(tiny: Path) -> None:
    assert_one_sentence(worker("--ckpt_dir", str(tiny), RANK="0", WORLD_SIZE="3"), 2, "3 ranks", "1, 2 or 4")


async def test_a_server_that_refuses_the_key_ends_the_worker_with_code_1_and_its_sentence(tiny: Path) -> None:
    async with serving() as server:
        arguments = ("--ckpt_dir", str(tiny), "--api_server", server.url)
        ended = await asyncio.to_thread(worker, *arguments, MIXTRAL_WORKER_KEY="mx-not-this-one")
        assert_one_sentence(ended, 1, "opens nothing here", "MIXTRAL_WORKER_KEY")
        assert "mx-not-this-one" not in ended.stderr
        assert server.logins == []
        ended = await asyncio.to_thread(worker, *arguments, "--endpoint_name", "elsewhere", MIXTRAL_WORKER_KEY=KEY)
        assert_one_sentence(ended, 1, "no endpoint elsewhere", "--endpoint_name")
