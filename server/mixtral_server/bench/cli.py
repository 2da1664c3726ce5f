"""`python -m mixtral_server.bench`: which measures are run, with what load, and what is printed of them.

Progress goes to stderr; stdout gets a table for each measure and, as its last line, one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from mixtral_server.bench import depth, measures
from mixtral_server.bench.house import BenchFailed
from mixtral_server.bench.measures import Row
from mixtral_server.open_files import allow_open_files

Figures: TypeAlias = dict[str, list[Row]]
"""Of each measure, a row for each run."""
FORMAT = 1
MAX_TOKENS = 32_768  # of one job
MOST_CONNECTIONS = 1900  # one address may have 2,000, by default
OTHER_FILES = 256  # beside connections
LIBRARIES = ("aiohttp", "hiredis", "orjson", "pydantic", "redis")

ABOUT = """\
What one server process can do: tokens and jobs per CPU second, latency, queue depth, memory.

Each measure starts a Redis and a server of its own in a temporary folder and puts load on it from other processes of this machine. A
server has the first core to itself; all else shares the others.
CPU seconds are those of the server process alone, kernel work on its behalf included; Redis's stand beside them. Linux only."""


def main(arguments: Sequence[str] | None = None) -> None:
    flags = _flags(arguments)
    began = circumstances(flags)
    rounds: list[Figures] = []
    try:
        for number in range(1, flags.rounds + 1):
            rounds.append({})
            for name in flags.measure or MEASURES:
                rounds[-1][name] = asyncio.run(MEASURES[name](flags))
                _show(f"{name}, round {number} of {flags.rounds}" if flags.rounds > 1 else name, rounds[-1][name])
                if flags.json_file:  # after each: what was measured outlives a run that is cut short
                    Path(flags.json_file).write_text(json.dumps(began | _report(rounds)) + "\n", encoding="utf-8")
    except BenchFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    report = _report(rounds)
    if flags.rounds > 1:
        for name in rounds[0]:
            _show(f"{name}, median of {flags.rounds} rounds", report[name])
    print(json.dumps(began | report))


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Leaves with a sentence where a measure could only fail, or its result could not be kept."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.json_file and not (Path(flags.json_file).parent.is_dir() and not Path(flags.json_file).is_dir()):
        parser.error(f"--json_file {flags.json_file}: name a file in a folder that exists")
    connections = {"tokens": flags.streams, "latency": flags.streams, "jobs": flags.callers, "idle": flags.readers}
    needed = 2 * max(connections.get(name, 0) for name in flags.measure or MEASURES) + OTHER_FILES  # `idle` warms up with more
    if (allowed := allow_open_files(needed)) < needed:
        parser.error(
            f"{needed:,} open files are needed and this account may have {allowed:,}: raise its hard limit (ulimit -Hn), "
            "or ask for fewer --readers, --streams and --callers"
        )
    return flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixtral_server.bench", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measure", nargs="*", choices=[[], *MEASURES], help=f"{', '.join(MEASURES)}; none named: all")
    count, many = _number(1, 1_000_000), _number(1, MOST_CONNECTIONS)
    parser.add_argument("--streams", type=many, default=64, help="readers at once, each of a job of its own (%(default)s)")
    parser.add_argument("--tokens", type=_number(1, MAX_TOKENS), default=6000, help="frames of each stream (%(default)s)")
    parser.add_argument("--tokens_per_frame", type=_number(1, 1024), nargs="+", default=[1, 8], help="a run for each (1 8)")
    parser.add_argument("--wire", nargs="+", choices=("openai", "native"), default=["openai", "native"], help="a run for each (both)")
    rate = _number(0, 10_000, float)
    parser.add_argument("--turns_per_s", type=rate, default=0.0, help="latency under load: turns a second; 0 = half of what was measured")
    parser.add_argument("--seconds", type=_number(0.1, 3600, float), default=10.0, help="latency: how long (%(default)s)")
    parser.add_argument("--callers", type=many, default=64, help="jobs: calls open at once (%(default)s)")
    parser.add_argument("--batch", type=_number(1, 100_000), default=32, help="jobs: slots of the worker (%(default)s)")
    parser.add_argument("--calls", type=count, default=20_000, help="jobs: calls in all (%(default)s)")
    parser.add_argument("--most_waiting", type=_number(1000, 1_000_000), default=100_000, help="depth: the longest queue (%(default)s)")
    parser.add_argument("--chats", type=count, default=2000, help="finished: chats of 100 tokens (%(default)s)")
    parser.add_argument("--readers", type=_number(1, 20_000), default=2000, help="idle: streams held open (%(default)s)")
    parser.add_argument("--rounds", type=count, default=1, help="all of it so many times; figures are then medians (%(default)s)")
    parser.add_argument("--json_file", help="also write the JSON object to this file")
    return parser


def _number(least: float, most: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"must be a {'whole ' if kind is int else ''}number from {least:,} to {most:,}; got {text[:20]!r}"
            )
        return number

    return read


def say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- measures


async def _tokens(flags: argparse.Namespace) -> list[Row]:
    return [
        await measures.tokens(
            say, streams=flags.streams, tokens_per_frame=size, job_tokens=min(flags.tokens, MAX_TOKENS // size) * size, wire=wire
        )
        for size in flags.tokens_per_frame
        for wire in flags.wire
    ]


async def _latency(flags: argparse.Namespace) -> list[Row]:
    loaded = flags.turns_per_s
    if not loaded:
        most = await measures.tokens(say, streams=flags.streams, tokens_per_frame=1, job_tokens=2000, wire="openai")
        loaded = 0.5 * most["tokens_per_server_cpu_s"] / flags.streams
    return [
        await measures.latency(say, streams=streams, turns_per_s=rate, seconds=flags.seconds, wire=wire)
        for streams, rate in ((1, 50.0), (flags.streams, loaded))
        for wire in flags.wire
    ]


async def _jobs(flags: argparse.Namespace) -> list[Row]:
    return [await measures.jobs(say, callers=flags.callers, batch=flags.batch, calls=flags.calls)]


async def _depth(flags: argparse.Namespace) -> list[Row]:
    return await depth.depth(say, most=flags.most_waiting)


async def _finished(flags: argparse.Namespace) -> list[Row]:
    return await depth.finished(say, chats=flags.chats, tokens=100)


async def _idle(flags: argparse.Namespace) -> list[Row]:
    return await measures.idle(say, readers=flags.readers)


MEASURES: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, list[Row]]]] = {
    "tokens": _tokens,
    "latency": _latency,
    "jobs": _jobs,
    "depth": _depth,
    "finished": _finished,
    "idle": _idle,
}


# ---------------------------------------------------------------------------------------------- output


def _show(name: str, rows: Sequence[Row]) -> None:
    """One line for each figure, one column for each run."""
    print(f"\n{name}")
    for figure in rows[0]:
        cells = (f"{row[figure]:,}" if isinstance(row[figure], int | float) else str(row[figure]) for row in rows)
        print(f"  {figure:<26}" + "".join(f"{cell:>14}" for cell in cells))
    print(flush=True)


def _report(rounds: Sequence[Figures]) -> dict[str, Any]:
    """Rows of each measure: of the one round, or medians of several and, under "rounds", each by itself."""
    if len(rounds) == 1:
        return dict(rounds[0])
    whole = [one for one in rounds if one.keys() == rounds[0].keys()]  # the last may have just begun
    medians = {name: [_median(rows) for rows in zip(*(one[name] for one in whole), strict=True)] for name in rounds[0]}
    return {**medians, "rounds": list(rounds)}


def _median(rows: Sequence[Row]) -> Row:
    """Of each figure; what is no figure is the same in all rows."""

    def middle(values: Sequence[Any]) -> Any:
        if not all(isinstance(value, int | float) for value in values):
            return values[0]
        return type(values[0])(statistics.median(values))

    return {name: middle([row[name] for row in rows]) for name in rows[0]}


def circumstances(flags: argparse.Namespace) -> Row:
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "git_commit": _commit(),
        "platform": {"system": platform.platform(), "cpu": _cpu_model(), "python": platform.python_version()},
        "versions": {name: _version(name) for name in LIBRARIES},
        "flags": {name: value for name, value in vars(flags).items() if name != "json_file"},
    }


def _commit() -> str | None:
    """Of the checkout this file stands in; None for an installed server."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _cpu_model() -> str:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
