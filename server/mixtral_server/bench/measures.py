"""The measures, one function each: start what is measured, put load on it, and return rows of figures.

Decides what is divided by what. Leaves load to load.py, the processes to house.py and printing to cli.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mixtral_server.bench.house import BenchFailed, House, open_house, rss_bytes
from mixtral_server.bench.load import (
    CallerPlan,
    ReaderPlan,
    ReaderResult,
    Target,
    WorkerPlan,
    WorkerResult,
    call_whole,
    hold_streams,
    read_streams,
    work,
)

Row: TypeAlias = dict[str, Any]
Say: TypeAlias = Callable[[str], None]
T = TypeVar("T")

NAP_S = 0.002
"""Throughput: readers and callers on this machine that are woken by every packet put their waking on the server's bill; others do not."""


@asynccontextmanager
async def house(*flags: str) -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory(prefix="mixtral-bench-") as folder:
        async with open_house(Path(folder), *flags) as opened:
            yield opened


async def in_child(work: Callable[..., T], *args: Any) -> T:
    """Run it in a process of its own. Raises BenchFailed with what went wrong there; ends it when we are cancelled."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs, work, args), daemon=True)
    child.start()
    theirs.close()
    try:
        kind, result = await asyncio.to_thread(_receive, ours)
    finally:
        child.kill() if child.is_alive() and not ours.closed else None
        ours.close()
    if kind == "failed":
        raise BenchFailed(result)
    answer: T = result
    return answer


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return "failed", "a load process ended without a result"


def _answer(pipe: Connection, work: Callable[..., object], args: Sequence[Any]) -> None:
    try:
        pipe.send(("done", work(*args)))
    except BenchFailed as error:
        pipe.send(("failed", str(error)))
    except BaseException:  # noqa: BLE001 - told to the process that waits for us, with its trace
        pipe.send(("failed", traceback.format_exc()))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def per(count: int, cpu_s: float) -> int | None:
    """None for a run so short that the kernel's clock, which ticks every 10 ms, saw no CPU time."""
    return round(count / cpu_s) if cpu_s else None


# ---------------------------------------------------------------------------------------------- tokens


async def tokens(say: Say, *, streams: int, tokens_per_frame: int, job_tokens: int, wire: str) -> Row:
    """Tokens that readers received, per CPU second of the server. All is counted from the first request to the last answer."""
    say(f"tokens: {streams} {wire} streams of {job_tokens:,} tokens, {tokens_per_frame} a frame")
    async with house() as opened:
        run = await _streamed(
            opened, WorkerPlan(streams, streams, job_tokens, tokens_per_frame), ReaderPlan(streams, job_tokens, wire, nap_s=NAP_S)
        )
    return {
        "streams": streams,
        "wire": wire,
        "tokens_per_frame": tokens_per_frame,
        "tokens": run.read.tokens,
        "tokens_per_server_cpu_s": per(run.read.tokens, run.server_cpu_s),
        "tokens_per_redis_cpu_s": per(run.read.tokens, run.redis_cpu_s),
        "tokens_per_s": round(run.read.tokens / run.read.seconds),
        "bytes_per_token": round(run.read.bytes / run.read.tokens),
        "reads_per_token": round(run.read.reads / run.read.tokens, 3),
        **run.shares(),
    }


async def latency(say: Say, *, streams: int, turns_per_s: float, seconds: float, wire: str) -> Row:
    """From just before a worker sends a turn to the moment at which a reader has the token: two processes, one monotonic clock."""
    say(f"latency: {streams} {wire} streams, {turns_per_s:g} turns/s, {seconds:g} s")
    job_tokens = max(1, int(turns_per_s * seconds))
    async with house() as opened:
        worker = WorkerPlan(streams, streams, job_tokens, 1, turns_per_s)
        run = await _streamed(opened, worker, ReaderPlan(streams, job_tokens, wire, is_timed=True))
    times = run.read.latencies_ms
    return {
        "streams": streams,
        "wire": wire,
        "turns_per_s": round(run.work.turns / run.work.seconds, 1),
        "tokens": len(times),
        **{f"p{share}_ms": round(percentile(times, share / 100), 3) for share in (50, 90, 99)},
        "max_ms": round(max(times), 1),
        **run.shares(),
    }


class Run:
    """One load of streams: what worker and readers report, and what server and Redis took meanwhile."""

    def __init__(self, work: WorkerResult, read: ReaderResult, server_cpu_s: float, redis_cpu_s: float) -> None:
        self.work = work
        self.read = read
        self.server_cpu_s = server_cpu_s
        self.redis_cpu_s = redis_cpu_s

    def shares(self) -> Row:
        """CPU of each process over the time in which tokens came: 1.0 is one core."""
        return {
            "server_cpu": round(self.server_cpu_s / self.read.seconds, 2),
            "redis_cpu": round(self.redis_cpu_s / self.read.seconds, 2),
            "worker_cpu": round(self.work.cpu_s / self.read.seconds, 2),
            "reader_cpu": round(self.read.cpu_s / self.read.seconds, 2),
        }


async def _streamed(opened: House, worker: WorkerPlan, reader: ReaderPlan) -> Run:
    before = opened.cpu()
    worked, read = await _both(
        in_child(work, Target(opened.port, opened.worker_key), worker),
        in_child(read_streams, Target(opened.port, opened.client_key), reader),
    )
    took = opened.cpu() - before
    return Run(worked, read, took.server, took.redis)


A = TypeVar("A")
B = TypeVar("B")


async def _both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    return await asyncio.gather(first, second)


# ---------------------------------------------------------------------------------------------- jobs


async def jobs(say: Say, *, callers: int, batch: int, calls: int) -> Row:
    """Whole answers of one token over the OpenAI route, by one worker with `batch` slots that answers at once."""
    say(f"jobs: {calls:,} calls by {callers} callers, batch {batch}")
    async with house() as opened:
        before = opened.cpu()
        worked, called = await _both(
            in_child(work, Target(opened.port, opened.worker_key), WorkerPlan(batch, calls, 1, 1, waits_for_all=False)),
            in_child(call_whole, Target(opened.port, opened.client_key), CallerPlan(callers, calls, NAP_S)),
        )
        took = opened.cpu() - before
    return {
        "callers": callers,
        "batch": batch,
        "calls": called.calls,
        "jobs_per_s": round(called.calls / called.seconds),
        "jobs_per_server_cpu_s": per(called.calls, took.server),
        "jobs_per_redis_cpu_s": per(called.calls, took.redis),
        "jobs_per_turn": round(called.calls / worked.turns, 1),
        "p50_ms": round(statistics.median(called.latencies_ms), 1),
        "p99_ms": round(percentile(called.latencies_ms, 0.99), 1),
        "server_cpu": round(took.server / called.seconds, 2),
        "redis_cpu": round(took.redis / called.seconds, 2),
        "worker_cpu": round(worked.cpu_s / called.seconds, 2),
        "caller_cpu": round(called.cpu_s / called.seconds, 2),
    }


# ---------------------------------------------------------------------------------------------- readers that only wait


async def idle(say: Say, *, readers: int) -> list[Row]:
    """Memory of the server process for each reader whose job waits: its connection, its request, its place among the followers."""
    say(f"idle: {readers:,} native streams of waiting jobs")
    async with house("--max_connections", str(2 * readers + 1000), "--max_connections_per_address", str(2 * readers + 1000)) as opened:
        warm_up = readers // 10
        client = Target(opened.port, opened.client_key)
        held = await asyncio.to_thread(hold_streams, client, warm_up)  # what is made once is made now
        before = rss_bytes(opened.server_pid)
        held += await asyncio.to_thread(hold_streams, client, readers)
        grown = rss_bytes(opened.server_pid) - before
        for connection in held:
            connection.close()
    return [{"readers": readers, "server_rss_bytes_per_reader": round(grown / readers)}]
