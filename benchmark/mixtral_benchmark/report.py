"""What a run leaves behind: tables for people, the JSON object and CSV rows for programs, all from measure.figures.

Decides wording, order, rounding and which facts about server, commit and machine go along. Computes no figure of its own. Plots are
plots.py's, and two results side by side compare.py's.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixtral_benchmark.intervals import Interval
from mixtral_benchmark.measure import PERCENTILES, Chat, Figure, e2e_s, failures, tokens_per_s, tpot_s, ttft_s
from mixtral_benchmark.wires import ServerFacts

FORMAT = 1
"""Of the JSON object: counts up when a key changes its meaning or goes."""

TABLE_COLUMNS = 120
"""Width of the tables where stdout is no terminal and says none."""

SATURATED_CPU_SHARE = 0.8
"""Above this share of one core, the benchmark itself may be what is slow."""

ROWS = {
    "ttft": "time to first token",
    "scheduled_ttft": "  from the planned send",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "frame_gap": "gap between frames",
    "e2el": "whole chat",
    "scheduled_e2el": "  from the planned send",
    "server_queue": "first token: queue (server)",
    "server_prefill": "first token: prefill (server)",
    "network_ttft": "first token: the way there and back",
}


def stdout_console(columns: int = TABLE_COLUMNS) -> Console:
    """For tables: as wide as the terminal, else so many columns."""
    return Console(width=None if sys.stdout.isatty() else columns)


def level_of(outcome: Mapping[str, Any]) -> str:
    """How a run was loaded, in words: what tells the runs of a sweep apart."""
    flags = outcome["flags"]
    if flags["request_rate"] is not None:
        return f"{flags['request_rate']:g} chats a second"
    return f"trace {flags['trace']}" if flags.get("trace") else f"{flags['concurrent_requests']} at once"


def circumstances(flags: Mapping[str, object], server: ServerFacts | None) -> dict[str, Any]:
    """What a figure is worthless without. flags must hold no key."""
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark_version": version_of("mixtral-chat"),
        "git_commit": git_commit(Path(__file__).parent),
        "platform": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "aiohttp": version_of("aiohttp"),
            "cpu_count": os.cpu_count(),
        },
        "server": server and {"software": server.software, "workers": server.workers},
        "model_id": flags["endpoint_name"],
        "flags": dict(flags),
    }


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit that this code was checked out at, with -dirty behind it; None outside a checkout or without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() or None


def result(
    chats: Sequence[Chat],
    figures: Mapping[str, Figure],
    facts: Mapping[str, Any],
    client_cpu_share: float,
    confidence: Mapping[str, Interval] | None = None,
) -> dict[str, Any]:
    """The JSON object: circumstances, figures, 95 % intervals of some of them, failures by code."""
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    intervals = {name: [round(low, 4), round(high, 4)] for name, (low, high) in (confidence or {}).items()}
    return {**facts, "client_cpu_share": round(client_cpu_share, 3), **rounded, "ci95": intervals, "failures": failures(chats)}


def sweep(outcomes: Sequence[Mapping[str, Any]], saturated: str | None) -> dict[str, Any]:
    """The JSON object of a sweep: its runs in order, each whole, and why it ended before its last level."""
    return {"format": FORMAT, "saturated": saturated, "runs": list(outcomes)}


def chat_rows(chats: Sequence[Chat], started_s: float) -> list[dict[str, Any]]:
    """One row per chat for --json_file, times in ms from the start of the run."""

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 3)

    return [
        {
            "index": chat.index,
            "turn": chat.turn,
            "job": chat.job,
            "scheduled_ms": ms(chat.scheduled_s - started_s),
            "sent_ms": ms(chat.sent_s - started_s),
            "ttft_ms": ms(ttft_s(chat)),
            "tpot_ms": ms(tpot_s(chat)),
            "e2el_ms": ms(e2e_s(chat)),
            "prompt_tokens": chat.prompt_tokens,
            "tokens": chat.tokens,
            "tokens_per_s": speed and round(speed, 3),
            "finish": chat.finish,
            "failure": chat.failure and {"code": chat.failure.code, "message": chat.failure.message},
        }
        for chat in chats
        for speed in (tokens_per_s(chat),)
    ]


def write_json(path: Path, outcome: Mapping[str, Any], rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """rows: those of each run, which go into its object."""
    if "runs" in outcome:
        outcome = {**outcome, "runs": [{**run, "chats": of_run} for run, of_run in zip(outcome["runs"], rows, strict=True)]}
    else:
        outcome = {**outcome, "chats": rows[0]}
    path.write_text(json.dumps(outcome, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """A row per chat, that of its run (from 0) first; a failure is its code word."""
    flat = [{"run": run, **row, "failure": row["failure"] and row["failure"]["code"]} for run, of_run in enumerate(rows) for row in of_run]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else ["run"])
        writer.writeheader()
        writer.writerows(flat)


def json_line(outcome: Mapping[str, Any]) -> str:
    return json.dumps(outcome, allow_nan=False)


def show(console: Console, chats: Sequence[Chat], outcome: Mapping[str, Any]) -> None:
    """The table. Rows that measured nothing are left out."""
    console.print(totals(outcome), highlight=False)
    table = latencies(outcome)
    if table.row_count:
        console.print(table, highlight=False)
    if outcome.get("kills"):
        console.print(kill_table(outcome["kills"]), highlight=False)
    if outcome["failures"]:
        console.print(failure_table(chats), highlight=False)
    if outcome["client_cpu_share"] > SATURATED_CPU_SHARE:
        share = f"{outcome['client_cpu_share']:.0%}"
        console.print(f"The benchmark used {share} of a core: it may itself be the limit, and latencies too high. Use fewer chats at once.")


def totals(outcome: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    interrupted = f", {outcome['interrupted']} interrupted" if outcome["interrupted"] else ""
    interrupted += f", {outcome['unsent']} never sent" if outcome.get("unsent") else ""
    table.add_row(
        "chats completed", f"{outcome['completed']:,}", f"{outcome['failed']} failed{interrupted}, in {outcome['duration']:.2f} s"
    )
    table.add_row("chats per second", number(outcome["request_throughput"]), f"at most {outcome['max_concurrent_requests']} at once")
    table.add_row("tokens generated", f"{outcome['total_output_tokens']:,}", counting(outcome))
    table.add_row("tokens/s in all", number(outcome["output_throughput"]), steady(outcome))
    slowest = f"median; mean {number(outcome['mean_chat_tokens_per_s'])}, slowest 5 % below {number(outcome['p5_chat_tokens_per_s'])}"
    table.add_row("tokens/s per chat", number(outcome["median_chat_tokens_per_s"]), slowest)
    table.add_row("frames", f"{outcome['frames']:,}", sharing(outcome))
    if outcome.get("request_goodput") is not None:
        goals = " ".join(outcome["flags"]["slo"])
        table.add_row("good chats per second", number(outcome["request_goodput"]), f"{outcome['good_share']:.1%} of all kept {goals}")
    aime = f"total {number(outcome['output_throughput'])} tokens/s, single {number(outcome['mean_chat_tokens_per_s'])} tokens/s"
    table.add_row("in AIME's words", "", aime)
    return table


def counting(outcome: Mapping[str, Any]) -> str:
    sources = [
        f"{outcome[f'tokens_counted_by_{name}']} by {name}"
        for name in ("offsets", "usage", "events")
        if outcome[f"tokens_counted_by_{name}"]
    ]
    return f"chats counted: {', '.join(sources)}" if sources else ""


def steady(outcome: Mapping[str, Any]) -> str:
    if outcome["steady_window_s"] is None:
        return ""
    return f"{number(outcome['steady_output_throughput'])} in the steady window of {outcome['steady_window_s']:.2f} s"


def sharing(outcome: Mapping[str, Any]) -> str:
    if not outcome["frames"]:
        return ""
    share = outcome["frames_with_several_tokens"] / outcome["frames"]
    return f"{share:.1%} held several tokens (at most {outcome['max_tokens_in_a_frame']}), whose times are one"


def latencies(outcome: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    for heading in ("mean", "p50", *(f"p{percent}" for percent in PERCENTILES), "p50, 95 % sure"):
        table.add_column(heading, justify="right")
    flags = outcome["flags"]
    is_closed_loop = flags["request_rate"] is None and flags.get("trace") is None
    for name, words in ROWS.items():
        # A closed loop plans each send for the moment it happens: two rows would say the same.
        is_repeat = is_closed_loop and name.startswith("scheduled_")
        if outcome[f"mean_{name}_ms"] is not None and not is_repeat:
            keys = (f"mean_{name}_ms", f"median_{name}_ms", *(f"p{percent}_{name}_ms" for percent in PERCENTILES))
            interval = outcome["ci95"].get(f"median_{name}_ms")
            sure = f"{number(interval[0])} – {number(interval[1])}" if interval else ""
            table.add_row(words, *(number(outcome[key]) for key in keys), sure)
    return table


def show_sweep(console: Console, outcomes: Sequence[Mapping[str, Any]], saturated: str | None) -> None:
    """A line per run."""
    by_rate = bool(outcomes) and outcomes[0]["flags"]["sweep_rate"] is not None
    has_goals = bool(outcomes) and outcomes[0]["request_goodput"] is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["chats a second" if by_rate else "chats at once", "tokens/s", "per chat", "TTFT p50", "TTFT p99", "TPOT p50", "failed"]
    for heading in [*headings, "good"] if has_goals else headings:
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        level = outcome["flags"]["request_rate" if by_rate else "concurrent_requests"]
        keys = ("median_chat_tokens_per_s", "median_scheduled_ttft_ms", "p99_scheduled_ttft_ms", "median_tpot_ms")
        good = [f"{outcome['good_share']:.1%}"] if has_goals and outcome["good_share"] is not None else []
        throughput = outcome["output_throughput" if by_rate else "steady_output_throughput"]
        table.add_row(f"{level:g}", number(throughput), *(number(outcome[key]) for key in keys), str(outcome["failed"]), *good)
    console.print(table, highlight=False)
    if saturated:
        console.print(f"The sweep ended there: {saturated}.", highlight=False)


def kill_table(kills: Sequence[Mapping[str, Any]]) -> Table:
    """What was killed while the load ran, and what it cost the chats that were streaming."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("killed", "at s", "back after s", "chats streaming", "their pause p50 s", "longest"):
        table.add_column(heading, justify="left" if heading == "killed" else "right")
    for kill in kills:
        seconds = (number(kill[key]) for key in ("at_s", "back_after_s"))
        table.add_row(kill["what"], *seconds, str(kill["streaming"]), number(kill["median_pause_s"]), number(kill["max_pause_s"]))
    return table


def failure_table(chats: Sequence[Chat]) -> Table:
    first = {chat.failure.code: chat.failure.message for chat in reversed(chats) if chat.failure}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("failure", "chats", "the first one said"):
        table.add_column(heading)
    for code, count in failures(chats).items():
        table.add_row(Text(code), str(count), Text(first[code]))  # Text: what a server says is no markup
    return table


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
