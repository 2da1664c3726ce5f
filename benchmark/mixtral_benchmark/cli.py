"""`python -m benchmark`, `mixtral-benchmark`: flags in, one run or a sweep, tables and one JSON line out.

Decides what goes to which stream or file, and the exit code. Leaves flags to flags.py, the order of a run to run.py, figures to
measure.py and words to report.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mixtral_benchmark import compare, plots, report, side_by_side
from mixtral_benchmark.chaos import REPLICAS, WORKERS
from mixtral_benchmark.flags import Flags, parse
from mixtral_benchmark.house import House, HouseError
from mixtral_benchmark.run import INTERRUPTED, NOT_RUN, OK, SOME_FAILED, Benchmark, NotRun
from mixtral_benchmark.wires import Target


async def benchmark(flags: Flags, target: Target) -> int:
    """Run, print, and give the exit code. With --chaos in a house of its own."""
    console = Console(stderr=True)
    if not flags.chaos:
        return await _benchmark(flags, Benchmark(flags, target, console))
    console.print("starting two replicas and two workers with the demo model", highlight=False)
    try:
        async with House(flags.endpoint_name, REPLICAS, WORKERS) as house:
            flags = replace(flags, api_server=house.target.url)
            return await _benchmark(flags, Benchmark(flags, house.target, console, house))
    except* HouseError as refused:  # while it starts, or from the task that breaks it
        print(refused.exceptions[0], file=sys.stderr)
    return NOT_RUN


async def _benchmark(flags: Flags, run: Benchmark) -> int:
    """Ctrl-C ends the load, not the report."""
    interrupted = False
    try:
        await run()
    except NotRun as refused:
        print(refused, file=sys.stderr)
        return NOT_RUN
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.uncancel() > 0:
            raise
        interrupted = True
    if not run.runs:
        print("interrupted before the load began; nothing was measured", file=sys.stderr)
        return INTERRUPTED
    is_published = publish(flags, run)
    if interrupted:
        return INTERRUPTED
    some_failed = any(chat.failure for measured in run.runs for chat in measured.load.chats)
    return SOME_FAILED if not is_published or some_failed else OK


def publish(flags: Flags, run: Benchmark) -> bool:
    """Tables, the JSON object as the last line, then the files; False if one of them could not be written."""
    outcomes = [measured.outcome(run.server) for measured in run.runs]
    out = report.stdout_console()
    for measured, outcome in zip(run.runs, outcomes, strict=True):
        report.show(out, measured.load.chats, outcome)
    is_sweep = len(flags.runs) > 1
    if is_sweep:
        report.show_sweep(out, outcomes, run.saturated)
    whole = report.sweep(outcomes, run.saturated) if is_sweep else outcomes[0]
    print(report.json_line(whole), flush=True)
    rows = [report.chat_rows(measured.load.chats, measured.load.started_s) for measured in run.runs]
    written = {
        "json_file": lambda path: report.write_json(path, whole, rows),
        "csv_file": lambda path: report.write_csv(path, rows),
        "html_file": lambda path: path.write_text(plots.page(whole, run.runs), encoding="utf-8"),
    }
    are_written = [_is_written(name, getattr(flags, name), write) for name, write in written.items()]
    return all(are_written)


def _is_written(name: str, path: Path | None, write: Callable[[Path], Any]) -> bool:
    if path is None:
        return True
    try:
        write(path)
    except OSError as unwritten:
        print(f"--{name} {path} could not be written ({unwritten.strerror}); stdout has the result", file=sys.stderr)
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        sys.exit(compare.main(argv[1:]))
    if argv[:1] == ["side_by_side"]:
        sys.exit(side_by_side.main(argv[1:]))
    flags, target = parse(argv, os.environ)
    try:
        code = asyncio.run(benchmark(flags, target))
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
