"""`python -m benchmark side_by_side`: our whole stack, transformers' server and llama.cpp's, one after the other, on the same weights.

Decides who takes part and how each is asked to do its best, which chats all are asked, and what is compared. Each server has the
machine to itself while it is measured, by the very code that measures any other; then the next round begins, so that a machine that slows
down slows all. All answer greedily, so that equal weights give equal answers and equal work, which the result shows.

Peers come with pip install 'mixtral-chat[peers]'; one that is missing is an error, since a comparison without it would be another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from rich import box
from rich.console import Console
from rich.table import Table

from mixtral_benchmark import report
from mixtral_benchmark.flags import levels, parse
from mixtral_benchmark.house import House, HouseError, Part, free_ports, program
from mixtral_benchmark.run import INTERRUPTED, NOT_RUN, OK, SOME_FAILED, Benchmark, NotRun
from mixtral_benchmark.wires import Target

OURS = "mixtral-chat"
ENDPOINT = "mixtral_chat"

HEROES = ("cat", "dog", "girl", "boy", "bird", "bear", "fish", "frog", "king", "mouse", "duck", "rabbit", "fox", "lion", "tree", "robot")
DEEDS = ("was brave", "got lost", "found a gift", "made a friend", "wanted to fly", "told a lie", "went to the sea", "lost a toy")


@dataclass(frozen=True)
class Contender:
    """A server with the demo model, started and ready. url has no /v1."""

    name: str
    target: Target


@dataclass(frozen=True)
class Line:
    """One contender at one level: medians over the rounds of each round's figure."""

    contender: str
    level: int
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    tokens: int  # generated in one round
    spread: tuple[float, float]  # lowest and highest tokens_per_s


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    try:
        return asyncio.run(_compare(given))
    except (HouseError, NotRun) as refused:
        print(refused, file=sys.stderr)
        return NOT_RUN
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    reader = argparse.ArgumentParser(
        prog="mixtral-benchmark side_by_side", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--concurrency", type=levels, default=(1, 8, 32), metavar="N,N,…", help="chats at once; default 1,8,32")
    reader.add_argument("--chats", type=int, default=32, metavar="N", help="chats of each run, at least one per place; default 32")
    reader.add_argument("--max_tokens", type=int, default=128, metavar="N", help="longest answer; default 128")
    reader.add_argument("--rounds", type=int, default=2, metavar="N", help="every contender is started and measured so often; default 2")
    reader.add_argument("--json_file", type=Path, metavar="PATH", help="also write the result, with every run whole, to this file")
    return reader


async def _compare(given: argparse.Namespace) -> int:
    console = Console(stderr=True)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mixtral-side-by-side-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        console.print("writing the demo model as Hugging Face folder and as GGUF", highlight=False)
        await _export(folder)
        for number in range(1, given.rounds + 1):
            for start in (ours, transformers_server, llama_cpp_server):
                async with start(folder) as contender:
                    console.print(f"round {number}: {contender.name}", highlight=False)
                    measured = await _measure(given, contender, folder, console)
                    runs += [{"round": number, "contender": contender.name, **run} for run in measured]
    names = dict.fromkeys(run["contender"] for run in runs)
    lines = [_line(runs, name, level) for level in given.concurrency for name in names]
    out = report.stdout_console()
    out.print(_table(lines), highlight=False)
    failed = sum(run["failed"] for run in runs)
    if failed:
        out.print(f"{failed} chats failed; their runs compare nothing", highlight=False)
    outcome = {"format": report.FORMAT, "versions": _versions(), "ratios": _ratios(lines), "runs": runs}
    print(report.json_line(outcome), flush=True)
    if given.json_file:
        given.json_file.write_text(json.dumps(outcome, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return SOME_FAILED if failed else OK


async def _measure(given: argparse.Namespace, contender: Contender, folder: Path, console: Console) -> list[dict[str, Any]]:
    """One run at each level."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Tell a story about a {hero} who {deed}."}) for deed in DEEDS for hero in HEROES))
    outcomes = []
    for level in given.concurrency:
        target = ["--api_server", contender.target.url, "--endpoint_name", contender.target.endpoint]
        total, warmup = max(given.chats, level), min(level, 4)
        load = ["--concurrent_requests", str(level), "--total_requests", str(total), "--warmup_requests", str(warmup)]
        chats = ["--prompt_file", str(prompts), "--max_tokens", str(given.max_tokens), "--temperature", "0"]
        flags, _ = parse([*target, *load, *chats], {})
        benchmark = Benchmark(flags, contender.target, console)
        await benchmark()
        # The result names the prompts by what they are called here: their folder is gone with the run.
        outcomes.append(benchmark.runs[0].outcome(benchmark.server, replace(flags, prompt_file=Path(prompts.name))))
    return outcomes


# ---------------------------------------------------------------------------------------------- contenders


@contextlib.asynccontextmanager
async def ours(folder: Path) -> AsyncIterator[Contender]:
    """One server, one worker, as `make demo` runs them."""
    async with House(ENDPOINT) as house:
        yield Contender(OURS, house.target)


@contextlib.asynccontextmanager
async def transformers_server(folder: Path) -> AsyncIterator[Contender]:
    """`transformers serve` with its continuous batching."""
    _require("fastapi", "transformers serve")
    model, cache = folder / "hf", folder / "no_cache"
    cache.mkdir(exist_ok=True)  # it lists this folder's models, and fails where there is none
    (port,) = free_ports(1)
    command = [program("transformers"), "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    command += ["--continuous-batching", "--dtype", "float32"]
    log, ready_url = folder / "transformers.log", f"http://127.0.0.1:{port}/health"
    part = Part("transformers serve", command, ready_url, log, _alone(HF_HUB_CACHE=str(cache)))
    async with _running(part):
        yield Contender("transformers serve", Target(f"http://127.0.0.1:{port}", str(model), None))


@contextlib.asynccontextmanager
async def llama_cpp_server(folder: Path) -> AsyncIterator[Contender]:
    """The server of llama-cpp-python, which answers one chat at a time; keys and values in float32 like everybody's."""
    _require("llama_cpp", "llama_cpp.server")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(folder / "demo.gguf"), "--model_alias", "demo", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--n_ctx", "1024", "--type_k", "0", "--type_v", "0", "--interrupt_requests", "false"]
    part = Part("llama.cpp server", command, f"http://127.0.0.1:{port}/v1/models", folder / "llama_cpp.log", _alone())
    async with _running(part):
        yield Contender("llama.cpp server", Target(f"http://127.0.0.1:{port}", "demo", None))


@contextlib.asynccontextmanager
async def _running(part: Part) -> AsyncIterator[None]:
    async with aiohttp.ClientSession() as http:
        await part.start()
        try:
            await part.ready(http)
            yield
        finally:
            await part.stop()


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise HouseError(f"{what} needs the {package} package; install the peers with pip install 'mixtral-chat[peers]'")


def _alone(**more: str) -> dict[str, str]:
    """Nobody looks anything up on the network."""
    return dict(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


async def _export(folder: Path) -> None:
    for form, name in (("huggingface", "hf"), ("gguf", "demo.gguf")):
        command = [program("mixtral-worker"), "export", "--format", form, "--out", str(folder / name)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
        if process.returncode:
            raise HouseError(f"the demo model could not be exported: {said.decode(errors='replace').strip()[-300:]}")


# ---------------------------------------------------------------------------------------------- what came of it


def _line(runs: Sequence[dict[str, Any]], contender: str, level: int) -> Line:
    mine = [run for run in runs if run["contender"] == contender and run["flags"]["concurrent_requests"] == level]
    speeds = [run["output_throughput"] or 0.0 for run in mine]
    ttft, tpot = (median(run[f"median_{name}_ms"] or 0.0 for run in mine) for name in ("ttft", "tpot"))
    return Line(contender, level, median(speeds), ttft, tpot, mine[0]["total_output_tokens"], (min(speeds), max(speeds)))


def _ratios(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Ours over theirs: above 1 we are faster (throughput), below 1 we are quicker (times)."""
    mine = {line.level: line for line in lines if line.contender == OURS}
    return [
        {
            "peer": line.contender,
            "concurrent_requests": line.level,
            "throughput": _ratio(mine[line.level].tokens_per_s, line.tokens_per_s),
            "ttft": _ratio(mine[line.level].ttft_ms, line.ttft_ms),
            "tpot": _ratio(mine[line.level].tpot_ms, line.tpot_ms),
        }
        for line in lines
        if line.contender != OURS
    ]


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 3) if b else None


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("at once", "server", "tokens/s", "lowest – highest", "TTFT p50 ms", "TPOT p50 ms", "tokens", "ours is"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    ratios = {(ratio["peer"], ratio["concurrent_requests"]): ratio["throughput"] for ratio in _ratios(lines)}
    for line in lines:
        ratio = ratios.get((line.contender, line.level))
        spread = f"{report.number(line.spread[0])} – {report.number(line.spread[1])}"
        times = "" if ratio is None else f"{ratio:.2f}×"
        figures = (report.number(line.tokens_per_s), spread, report.number(line.ttft_ms), report.number(line.tpot_ms))
        table.add_row(str(line.level), line.contender, *figures, f"{line.tokens:,}", times)
    return table


def _versions() -> dict[str, str | None]:
    return {name: report.version_of(name) for name in ("mixtral-chat", "torch", "transformers", "llama-cpp-python")}
