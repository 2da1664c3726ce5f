"""What `worker bench` shows: one table per shape, medians with the least and the most of all rounds, goals in brackets."""

from __future__ import annotations

import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixtral_worker.bench_cli import OURS, Asked

TABLE_WIDTH = 180
TITLES = {
    "batch 1": "1 chat, tokens/s",
    "batch 8": "8 chats, tokens/s",
    "batch 32": "32 chats, tokens/s",
    "mixed": "32 of mixed lengths, tokens/s",
    "ttft": "first token of 512, ms",
}
# Ours over theirs, at least; of ttft theirs over ours.
GOALS = {
    ("demo", "batch 1", "transformers"): 2.2,
    ("demo", "batch 32", "transformers"): 2.0,
    ("demo", "mixed", "transformers"): 4.0,
    ("demo", "batch 32", "llama.cpp"): 1.2,
    ("demo", "ttft", "transformers"): 1.0,
    ("large", "batch 1", "llama.cpp"): 0.6,
    ("large", "batch 8", "llama.cpp"): 0.85,
    ("large", "batch 32", "llama.cpp"): 1.4,
    ("large", "ttft", "transformers"): 1.0,
}
MOST_OUTSIDE = {"large": 0.05}
PACKAGES = ("torch", "triton", "transformers", "llama_cpp_python")
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


@dataclass(frozen=True)
class Check:
    """How a peer's answers compare with this engine's."""

    tokens: int  # compared, up to each chat's first difference
    differences: list[dict[str, Any]]  # chat, offset, and by how much this engine's token won there


@dataclass
class Result:
    """One shape's figures: measure → who → one number per round. Tokens per second, but seconds for ttft."""

    dtype: str
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    outside: dict[str, list[float]] = field(default_factory=dict)  # of this engine's time, the share outside the forward pass
    bandwidth: dict[str, list[float]] = field(default_factory=dict)  # share of the device's that this engine's passes reached
    checks: dict[str, Check] = field(default_factory=dict)


def show(name: str, result: Result) -> None:
    console = Console(width=TABLE_WIDTH)
    peers = [who for who in next(iter(result.figures.values())) if who != OURS]
    table = Table(title=f"{name}, {result.dtype}: median (least – most) of {len(next(iter(result.figures.values()))[OURS])} rounds")
    table.add_column("")
    table.add_column(OURS, justify="right")
    for peer in peers:
        table.add_column(peer, justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("outside forward", justify="right")
    table.add_column("of bandwidth", justify="right")
    for measure, figures in result.figures.items():
        cells = [TITLES[measure], _figure(measure, figures[OURS])]
        for peer in peers:
            cells += [_figure(measure, figures[peer]), _ratio(name, measure, peer, figures)]
        outside = statistics.median(result.outside[measure])
        most = MOST_OUTSIDE.get(name)
        is_held = most is not None and measure.startswith("batch")
        cells.append(f"{outside:.1%}" + (f" ({'≤' if outside <= (most or 0) else 'above'} {most:.0%})" if is_held else ""))
        cells.append(f"{statistics.median(result.bandwidth[measure]):.0%}" if measure in result.bandwidth else "")
        table.add_row(*cells)
    console.print(table)
    for peer, check in result.checks.items():
        console.print(f"{peer}: {check.tokens} greedy tokens equal, {len(check.differences)} answers differ from some token on")
        for one in check.differences:
            console.print(f"  chat {one['chat']} at offset {one['offset']}: this engine's token was better by {one['margin']:.2g}")


def ratio(measure: str, ours: list[float], theirs: list[float]) -> float:
    """How many times as fast this engine is."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    return other / mine if measure == "ttft" else mine / other


def circumstances(asked: Asked) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _commit(),
        "device": asked.device,
        "hardware": _hardware(asked.device),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": asked.threads,
        "rounds": asked.rounds,
        "seed": asked.seed,
        "peers": asked.peers,
    }


def _figure(measure: str, numbers: list[float]) -> str:
    scale, digits = (1000, 1) if measure == "ttft" else (1, 0)
    middle, least, most = (x * scale for x in (statistics.median(numbers), min(numbers), max(numbers)))
    return f"{middle:,.{digits}f} ({least:,.{digits}f} – {most:,.{digits}f})"


def _ratio(name: str, measure: str, peer: str, figures: dict[str, list[float]]) -> str:
    reached, goal = ratio(measure, figures[OURS], figures[peer]), GOALS.get((name, measure, peer))
    return f"{reached:.2f}×" + (f" ({'≥' if reached >= goal else 'below'} {goal:g})" if goal else "")


def _hardware(device: str) -> str:
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return torch.cuda.get_device_name()
    try:
        rows = [row.partition(":") for row in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in rows}
    flags = facts.get("flags", "").split()
    told = ", ".join(flag for flag in TELLING_FLAGS if flag in flags)
    return f"{sum(key.strip() == 'processor' for key, _, _ in rows)} × {facts.get('model name', platform.machine())} ({told})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        is_changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with changes" if is_changed else "")
