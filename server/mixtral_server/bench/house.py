"""What is measured: a Redis and one server process, each started for the run and asked what CPU time and memory they took.

Decides nothing about load. Linux only: CPU time and memory come from /proc.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtral_server.redis_server import EmbeddedRedis

ENDPOINT = "bench"
MOST_WAITING = 4_000_000
START_LIMIT_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")

_ENDPOINT_FILE = f"""
name = "{ENDPOINT}"
max_waiting = {MOST_WAITING}
max_waiting_per_user = {MOST_WAITING}
lease_s = 60
"""


class BenchFailed(Exception):
    """The measure has no result; the message says why."""


@dataclass(frozen=True)
class Cpu:
    """CPU seconds since the processes began, user and system together, kernel work on their behalf included."""

    server: float
    redis: float

    def __sub__(self, before: Cpu) -> Cpu:
        return Cpu(self.server - before.server, self.redis - before.redis)


@dataclass(frozen=True)
class House:
    """One server on one Redis. Keys are of the first start."""

    port: int
    server_pid: int
    redis_pid: int
    redis_url: str
    client_key: str
    worker_key: str

    def cpu(self) -> Cpu:
        return Cpu(cpu_s(self.server_pid), cpu_s(self.redis_pid))


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, runs on these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@asynccontextmanager
async def open_redis(folder: Path) -> AsyncIterator[EmbeddedRedis]:
    """A Redis as the server starts its own: on a unix socket, with the default durability."""
    async with EmbeddedRedis(folder) as redis:
        yield redis


@asynccontextmanager
async def open_house(folder: Path, *flags: str) -> AsyncIterator[House]:
    """A server with its defaults, but for the flags and an endpoint that takes jobs without end. Its log goes to folder/server.log.

    It has the first core to itself; Redis, this process and what it starts meanwhile have the others. They share the only one.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    endpoints = folder / "endpoints"
    endpoints.mkdir()
    (endpoints / "bench.toml").write_text(_ENDPOINT_FILE)
    with on_cores(others or [first]):
        async with open_redis(folder) as redis:
            assert redis.pid is not None  # the folder is new: no other server owns it
            with (folder / "server.log").open("wb") as log, on_cores([first]):
                server = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", "from mixtral_server.cli import main; main()"),
                    *("--port", "0", "--data_dir", str(folder), "--redis_url", redis.url, "--endpoint_dir", str(endpoints), *flags),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                )
            try:
                port = await _port_of(server, folder)
                keys = dict(re.findall(r"^MIXTRAL_(\w+)_KEY=(\S+)$", (folder / "keys.env").read_text(), re.MULTILINE))
                yield House(port, server.pid, redis.pid, redis.url, keys["CLIENT"], keys["WORKER"])
            finally:
                if server.returncode is None:
                    server.terminate()
                await server.wait()


async def _port_of(server: asyncio.subprocess.Process, folder: Path) -> int:
    assert server.stdout is not None  # it is a pipe
    try:
        async with asyncio.timeout(START_LIMIT_S):
            async for line in server.stdout:
                if match := re.search(rb"listens on http://\S+:(\d+)", line):
                    return int(match[1])
    except TimeoutError:
        pass
    raise BenchFailed(f"the server did not start: {(folder / 'server.log').read_text()[-500:]}")


def cpu_s(pid: int) -> float:
    """All threads', user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
