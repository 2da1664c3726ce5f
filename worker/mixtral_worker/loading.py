"""Weights and KV cache of this rank: the memory that there is, what fits in it, and the reading with its progress.

Decides what counts as free memory and how progress is shown. How memory is divided is capacity.py's, what is read from where is
checkpoint.py's. Nothing is read before every rank has found, from the same numbers, that it fits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mixtral_worker import capacity
from mixtral_worker.capacity import Memory, MemoryPlan, Wanted
from mixtral_worker.model import checkpoint
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.parallel import Shard
from mixtral_worker.ranks import Ranks
from mixtral_worker.telemetry import LOG, line

TELL_EVERY_S = 2.0
ASK_EVERY_S = 0.1
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PROPOSED = {"bf16": "--dtype bfloat16"}  # to what does not fit: what this worker can run
CGROUP = Path("/sys/fs/cgroup")


def divide_memory(
    name: str, config: ModelConfig, dtype: torch.dtype, here: Ranks, context: int, slots: int | None, context_flag: str = "--max_seq_len"
) -> MemoryPlan:
    """Room for weights and chats, the same on every rank. Call on all. Raises DoesNotFit."""
    precision = PRECISIONS[dtype]
    wanted = Wanted(name, config, precision, precision, context, slots)
    plan = capacity.plan_memory(wanted, _memory(config, precision, here), PROPOSED, context_flag)
    full = plan.max_slots * wanted.full_tokens
    if plan.kv_tokens < full:
        then = "fewer long chats run together; lower --max_seq_len or --max_batch_size"
        LOG.warning(line("kv_cache_cut", tokens=plan.kv_tokens, wanted_tokens=full, then=then))
    return plan


def _memory(config: ModelConfig, precision: str, here: Ranks) -> Memory:
    """What is free before loading: the least that a rank finds, so that all divide alike."""
    shard = Shard.current()
    if here.device.type == "cuda":
        free_bytes = shard.least(torch.cuda.mem_get_info(here.device)[0], here.device)
        return Memory(torch.cuda.get_device_name(here.device), free_bytes, here.world)
    free_bytes = shard.least(free_host_bytes(), here.device)
    return capacity.host_memory(free_bytes, here.world, config, precision, here.world // here.ranks_on_host)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """What new pages this host, or the container that we are in, still has."""
    try:
        free_bytes = next(int(row.split()[1]) for row in meminfo.read_text().splitlines() if row.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):  # not Linux
        free_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(row.split() for row in (cgroup / "memory.stat").read_text().splitlines())
        return min(free_bytes, limit - used + int(stat["inactive_file"]))  # what files left in memory goes when it is short
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free_bytes


# ---- progress


@contextmanager
def progress_over_ranks(here: Ranks) -> Iterator[checkpoint.Progress]:
    """For checkpoint.load on every rank; rank 0 shows how far all are. When the block ends, all have loaded.

    Without that a rank would meet the others in a collective, which waits less long than a slow disk may take.
    """
    mine = total = 0
    with _shown() if here.is_leader else _silent() as show:

        def report(filled: int, of_rank: int) -> None:
            nonlocal mine, total
            mine, total, done = filled, of_rank * here.world, here.add("loaded_bytes", filled - mine)  # shares are equal
            show(done, total)

        yield report
        while (done := here.add("loaded_bytes", 0)) < total:
            show(done, total)
            time.sleep(ASK_EVERY_S)
        show(total, total)


@contextmanager
def _silent() -> Iterator[Callable[[int, int], None]]:
    yield lambda _done, _total: None


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """A bar where stderr is a terminal, else a line in the log now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines().show
        return
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self) -> None:
        self._told_s, self._told_bytes = time.monotonic(), -1

    def show(self, done: int, total: int) -> None:
        is_due = time.monotonic() - self._told_s >= TELL_EVERY_S
        if done != self._told_bytes and (is_due or done == total):
            self._told_s, self._told_bytes = time.monotonic(), done
            LOG.info(line("loading", read_mb=done >> 20, of_mb=total >> 20, percent=100 * done // total))
