"""A house of our own: server replicas and workers as child processes, ready to be measured, and broken.

Decides how programs are found, started, known to be ready, killed and ended; everything lives in one temporary folder and goes with it.
Leaves what is asked of them to run.py, and what is killed when to chaos.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import aiohttp

from mixtral_benchmark.wires import Target

START_LIMIT_S = 120.0
STOP_LIMIT_S = 40.0
POLL_S = 0.1

_TETHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a benchmark that is killed leaves no house behind
os.execv(sys.argv[1], sys.argv[1:])
"""


class HouseError(Exception):
    """The house cannot be started; the message is the one sentence a person sees."""


@dataclass
class Part:
    """One process of the house and what it is started with."""

    name: str
    command: list[str]
    ready_url: str
    log: Path
    environment: dict[str, str]
    said_when_ready: str = ""
    process: asyncio.subprocess.Process | None = None
    starts: int = 0

    async def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _TETHER, *self.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    async def kill(self) -> None:
        """SIGKILL to it and to all that it started, torchrun's ranks too, which have sessions of their own."""
        if self.process is not None:
            for pid in [*_descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LIMIT_S):
                    await self.process.wait()
        await self.kill()

    async def ready(self, http: aiohttp.ClientSession) -> None:
        """Raises HouseError when it ends or takes too long."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                while not (self._has_said_so and await _answers(http, self.ready_url)):
                    if self.process is None or self.process.returncode is not None:
                        raise HouseError(f"{self.name} ended while it started; its log ends: {self._last_words()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise HouseError(f"{self.name} was not ready after {START_LIMIT_S:g} s; its log ends: {self._last_words()}") from None

    @property
    def _has_said_so(self) -> bool:
        """Whether its log has the word once for each start: a server may still count a worker that was killed."""
        return not self.said_when_ready or self.log.read_text(errors="replace").count(self.said_when_ready) >= self.starts

    def _last_words(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").rstrip().splitlines()[-3:])


def _descendants(pid: int) -> list[int]:
    """Children, their children and so on; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:  # grows as it goes
        found += children.get(child, ())
    return found


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with asyncio.timeout(2), http.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


@dataclass
class House:
    """`async with House(endpoint) as house:` – then house.target takes chats. Everything is gone afterwards, its folder too."""

    endpoint: str
    replicas: int = 1
    workers: int = 1
    parts: list[Part] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    key: str = ""
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def target(self) -> Target:
        return Target(self.urls[0], self.endpoint, self.key)

    async def __aenter__(self) -> House:
        server, worker, torchrun = (program(name) for name in ("mixtral-server", "mixtral-worker", "torchrun"))
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mixtral-chaos-", ignore_cleanup_errors=True)))
            http = await self._stack.enter_async_context(aiohttp.ClientSession())
            own = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")} | {"PYTHONUNBUFFERED": "1"}
            for i, port in enumerate(free_ports(self.replicas), 1):
                url = f"http://127.0.0.1:{port}"
                command = [server, "--port", str(port), "--data_dir", str(folder / "data")]
                await self._start(http, Part(f"replica {i}", command, f"{url}/readyz", folder / f"replica{i}.log", own))
                self.urls.append(url)
            keys = _read_keys(folder / "data" / "keys.env")
            self.key = keys["MIXTRAL_CLIENT_KEY"]
            for i in range(1, self.workers + 1):
                url = self.urls[(i - 1) % self.replicas]
                command = [torchrun, "--nproc_per_node", "1", "--no-python", worker, "--api_server", url, "--endpoint_name", self.endpoint]
                environment = own | {"MIXTRAL_WORKER_KEY": keys["MIXTRAL_WORKER_KEY"]}
                log, ready_url = folder / f"worker{i}.log", f"{url}/readyz?workers={i}"
                await self._start(http, Part(f"worker {i}", command, ready_url, log, environment, "event=ready"))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def _start(self, http: aiohttp.ClientSession, part: Part) -> None:
        await part.start()
        self._stack.push_async_callback(part.stop)
        self.parts.append(part)
        await part.ready(http)


def program(name: str) -> str:
    """A console script beside this Python, else on PATH. Raises HouseError."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise HouseError(f"this starts programs of its own and needs {name}; install it with pip install 'mixtral-chat[server,worker]'")
    return found


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _read_keys(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in lines}
