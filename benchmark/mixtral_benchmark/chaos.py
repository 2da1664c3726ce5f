"""--chaos: a house of our own, broken while a load runs.

Decides what the house is (two server replicas on one data folder with its Redis, two workers with the demo model, all as child
processes), what is killed when, and what a kill cost: of each chat that was streaming, the longest pause until its next token. Chats are
read by the client that resumes (mixtral_client) and compared with the log, so a lost or doubled token fails its chat. Leaves the load
to load.py.

A kill is SIGKILL, and the killed part is started again at once, as a supervisor would. A replica may take the embedded Redis
with it. Nothing is killed while another part is not back: there is always one replica and one worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from mixtral_benchmark.load import Clock
from mixtral_benchmark.measure import Chat, Failure, distribution
from mixtral_benchmark.prompts import Ask
from mixtral_benchmark.verify import Transcript
from mixtral_benchmark.wires import ChatFailed, NativeWire, Target
from mixtral_client.client import MixtralClient
from mixtral_client.errors import JobFailed

REPLICAS = WORKERS = 2
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
        """SIGKILL to it and to all that it started in its session."""
        if self.process is not None:
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


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with asyncio.timeout(2), http.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


@dataclass
class Incident:
    """One kill: when, of what, and when that was back."""

    what: str
    at_s: float
    back_s: float | None = None


@dataclass
class House:
    """`async with House(endpoint) as house:` – then house.target takes chats. Everything is gone afterwards, its folder too."""

    endpoint: str
    parts: list[Part] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    key: str = ""
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def target(self) -> Target:
        return Target(self.urls[0], self.endpoint, self.key)

    async def __aenter__(self) -> House:
        server, worker, torchrun = (_program(name) for name in ("mixtral-server", "mixtral-worker", "torchrun"))
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mixtral-chaos-", ignore_cleanup_errors=True)))
            http = await self._stack.enter_async_context(aiohttp.ClientSession())
            own = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")} | {"PYTHONUNBUFFERED": "1"}
            for i, port in enumerate(_free_ports(REPLICAS), 1):
                url = f"http://127.0.0.1:{port}"
                command = [server, "--port", str(port), "--data_dir", str(folder / "data")]
                await self._start(http, Part(f"replica {i}", command, f"{url}/readyz", folder / f"replica{i}.log", own))
                self.urls.append(url)
            keys = _read_keys(folder / "data" / "keys.env")
            self.key = keys["MIXTRAL_CLIENT_KEY"]
            for i in range(1, WORKERS + 1):
                url = self.urls[(i - 1) % REPLICAS]
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

    async def break_things(self, clock: Clock, every_s: float, seed: int, incidents: list[Incident]) -> None:
        """Kill a part every every_s, each once before any twice. Runs until cancelled. Raises HouseError if one does not come back."""
        draw = random.Random(seed)
        async with aiohttp.ClientSession() as http:
            while True:
                for part in draw.sample(self.parts, len(self.parts)):
                    await clock.sleep_until(clock.now() + every_s)
                    incident = Incident(part.name, clock.now())
                    incidents.append(incident)
                    await part.kill()
                    await part.start()
                    for each in self.parts:  # a killed replica takes Redis with it, and its worker is away until it is back
                        await each.ready(http)
                    incident.back_s = clock.now()


def _program(name: str) -> str:
    """A console script beside this Python, else on PATH. Raises HouseError."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise HouseError(f"--chaos starts a house of its own and needs {name}; install it with pip install 'mixtral-chat[server,worker]'")
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _read_keys(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in lines}


# ---------------------------------------------------------------------------------------------- reading through it


class ResumingWire(NativeWire):
    """The native wire as our own client reads it: over as many connections and replicas as it takes. Always compared with the log."""

    def __init__(self, clients: Sequence[MixtralClient], *more: Any) -> None:
        super().__init__(*more, verify=True)
        self._clients = clients

    async def have(self, ask: Ask, chat: Chat) -> None:
        client = self._clients[chat.index % len(self._clients)]  # half of the readers at each replica
        options = {name: value for name, value in ask.body(self._target.endpoint).items() if name != "messages"}
        transcript = Transcript(keep_text=True)
        async with client.stream(list(ask.messages), **options) as stream:  # type: ignore[arg-type]
            try:
                async for event in stream:
                    self._event(chat, self._now(), event, transcript)
            except JobFailed as failed:
                raise ChatFailed(Failure(failed.code, failed.message)) from failed
            chat.job = stream.job_id
        view = await client.job(chat.job)
        if failure := transcript.compare(view, chat.usage_tokens):
            raise ChatFailed(failure)


@contextlib.asynccontextmanager
async def clients_of(house: House) -> AsyncIterator[list[MixtralClient]]:
    """One client for each replica to begin with; each turns to the others when its own is gone."""
    async with contextlib.AsyncExitStack() as stack:
        turns = [house.urls[i:] + house.urls[:i] for i in range(len(house.urls))]
        yield [await stack.enter_async_context(MixtralClient(urls, house.key)) for urls in turns]


# ---------------------------------------------------------------------------------------------- what it cost


def costs(incidents: Sequence[Incident], chats: Sequence[Chat], started_s: float) -> list[dict[str, Any]]:
    """A row for each kill: how many chats were streaming, and how long each paused for it (its longest wait for a token that began
    before the killed part was back and ended after the kill)."""
    rows = []
    for incident in incidents:
        until_s = incident.at_s if incident.back_s is None else incident.back_s
        pauses = distribution(_pause_s(chat, incident.at_s, until_s) for chat in chats)
        rows.append(
            {
                "what": incident.what,
                "at_s": round(incident.at_s - started_s, 3),
                "back_after_s": None if incident.back_s is None else round(incident.back_s - incident.at_s, 3),
                "streaming": pauses.count if pauses else 0,
                "median_pause_s": pauses and round(pauses.percentiles[50], 3),
                "max_pause_s": pauses and round(pauses.highest, 3),
            }
        )
    return rows


def _pause_s(chat: Chat, from_s: float, until_s: float) -> float | None:
    """None for a chat that was not streaming at from_s."""
    times = [arrival.at_s for arrival in chat.arrivals]
    if not times or times[0] > from_s or times[-1] <= from_s:
        return None
    return max(after - before for before, after in pairwise(times) if after > from_s and before <= until_s)
