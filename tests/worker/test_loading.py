"""Memory is divided before a weight is read, alike on all ranks; reading shows how far all of them are."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mixtral_worker import loading
from mixtral_worker.capacity import DoesNotFit
from mixtral_worker.loading import divide_memory, free_host_bytes, progress_over_ranks
from mixtral_worker.model.config import SHAPES, ModelConfig
from mixtral_worker.ranks import Ranks
from support.torchrun import ROOT, torchrun

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 8 GiB free."""
    monkeypatch.setattr(loading, "free_host_bytes", lambda: 8 * GIB)


def test_what_fits_sets_slots_and_cache(host: None, checkpoint: Path) -> None:
    config, here = ModelConfig.read(checkpoint), Ranks(0, 1, CPU, None)
    plan = divide_memory("small", config, torch.float32, here, 4096, None)
    assert (plan.max_slots, plan.kv_tokens) == (32, 32 * 4096)
    assert divide_memory("small", config, torch.float32, here, 4096, 5).kv_tokens == 5 * 4096


def test_cache_smaller_than_all_slots_can_use_is_said(host: None, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = divide_memory("small", ModelConfig.read(checkpoint), torch.float32, Ranks(0, 1, CPU, None), 32_768, 1000)
    assert plan.max_slots == 1000
    assert f"event=kv_cache_cut tokens={plan.kv_tokens} wanted_tokens={1000 * 32_768} " in caplog.text


def test_what_does_not_fit_is_refused_with_the_numbers_and_flags_of_this_worker(host: None) -> None:
    here, small = Ranks(0, 1, CPU, None), ModelConfig.read(Path("random:8x7b,n_layers=1"))
    with pytest.raises(DoesNotFit) as refused:
        divide_memory("mistral7b", SHAPES["mistral7b"], torch.float32, here, 32_768, None)
    assert str(refused.value).startswith("mistral7b in fp32 does not fit on this host's free memory: weights take 27.0 GiB and one chat of")
    assert str(refused.value).endswith("it needs a machine with more memory")
    with pytest.raises(DoesNotFit, match=r"take --max_seq_len \d+$"):
        divide_memory("small", small, torch.bfloat16, here, 2**20, None)
    with pytest.raises(DoesNotFit, match=r"take --dtype bfloat16 \(\d\.\d GiB left for chats\)"):
        divide_memory("small", small, torch.float32, here, 2**16, None)


def test_refusal_comes_from_torchrun_as_one_sentence_before_anything_is_read() -> None:
    arguments = ["--nproc_per_node", "2", "worker", "--ckpt_dir", "random:8x22b,n_layers=560", "--tp_size", "2"]
    with torchrun(arguments) as worker:
        assert worker.wait() != 0
        log = worker.rest_of_log()
    said = [line for line in log.splitlines() if line.startswith("mixtral-worker:")]
    assert len(said) == 1
    assert "random:8x22b,n_layers=560 in fp32 does not fit on this host's free memory: weights take 5225.4 GiB" in said[0]
    assert "event=loading" not in log


# ---- what is free


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_free_memory_is_the_hosts_or_what_its_container_leaves(tmp_path: Path) -> None:
    meminfo = write(tmp_path / "meminfo", "MemTotal:  9000000 kB\nMemAvailable:    4194304 kB\n")
    assert free_host_bytes(meminfo, tmp_path) == 4 * GIB
    write(tmp_path / "memory.max", "max\n")
    write(tmp_path / "memory.current", f"{GIB}\n")
    write(tmp_path / "memory.stat", f"anon 5\ninactive_file {GIB // 4}\n")
    assert free_host_bytes(meminfo, tmp_path) == 4 * GIB
    write(tmp_path / "memory.max", f"{2 * GIB}\n")
    assert free_host_bytes(meminfo, tmp_path) == GIB + GIB // 4
    write(tmp_path / "memory.max", f"{64 * GIB}\n")
    assert free_host_bytes(meminfo, tmp_path) == 4 * GIB


def test_where_the_system_does_not_say_it_is_half_of_what_is_built_in(tmp_path: Path) -> None:
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_host_bytes(tmp_path / "none", tmp_path) == built_in // 2


# ---- progress


def test_progress_is_the_sum_over_ranks_and_no_rank_goes_on_before_all_have_loaded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mixtral_worker")
    store = dist.HashStore()
    went_on = threading.Event()

    def leader() -> None:
        with progress_over_ranks(Ranks(0, 2, CPU, None, store)) as report:
            report(1 << 20, 4 << 20)
            report(4 << 20, 4 << 20)
        went_on.set()

    thread = threading.Thread(target=leader)
    with progress_over_ranks(Ranks(1, 2, CPU, None, store)) as report:
        report(3 << 20, 4 << 20)
        thread.start()
        assert not went_on.wait(3 * loading.ASK_EVERY_S)
        report(4 << 20, 4 << 20)
    thread.join(30)
    assert went_on.is_set()
    assert [record.message for record in caplog.records] == ["event=loading read_mb=8 of_mb=8 percent=100"]


def test_terminal_gets_a_bar_instead_of_lines(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")} | {
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "worker"], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=follower
    )
    os.close(follower)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(b"Hello")
    seen = b""
    try:
        while chunk := os.read(leader, 4096):
            seen += chunk
    except OSError:  # how a terminal ends on Linux
        pass
    assert process.wait(60) == 0, seen.decode()
    os.close(leader)
    assert "━" in seen.decode()
    assert b"event=loading" not in seen
    assert b"event=loaded ranks=1" in seen
