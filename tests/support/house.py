"""A whole service as processes: one Redis, server replicas on one data folder, toy workers; each can be killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.ports import free_port
from support.redis import RedisProcess, redis_binary
from support.redis_kinds import ClusterRedis, SentinelRedis

ROOT = Path(__file__).resolve().parents[2]
START_S = 40.0
END_S = 60.0  # a hang guard
BRISK, STEADY = "brisk", "steady"
KEEP_S = 120.0  # of finished chats: a run of many minutes must not grow by them
LEASES_S = {BRISK: 2.0, STEADY: 8.0}
"""Endpoint → lease: the one for tests that wait for a lapse, the other for tests that there is none."""


class Program:
    """One Python program of ours as a child process that can be started again; what it says goes to a log file."""

    def __init__(self, module: str, arguments: list[str], log: Path, **environment: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        own = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
        paths = os.pathsep.join(str(ROOT / part) for part in ("server", "worker", "clients/python", "tests"))
        self.environment = own | {"PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"} | environment  # SIGABRT says where it stands
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, which: signal.Signals) -> None:
        os.kill(self.pid, which)

    def kill(self) -> None:
        """kill -9, also of one that is stopped; no-op for one that has ended."""
        if self._process is not None and self.is_running:
            self._process.kill()
            self._process.wait(END_S)

    async def ended(self) -> int:
        """Its exit status, once it has ended by itself."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, END_S)

    async def hears(self, word: str, times: int = 1) -> None:
        """Until its log has the word so often. Raises AssertionError with the log."""
        deadline = time.monotonic() + START_S
        while self.said().count(word) < times:
            if not self.is_running or time.monotonic() > deadline:
                raise AssertionError(f"{self._command[2]} did not say {word!r} {times} times: {self.said()}")
            await asyncio.sleep(0.02)


class Replica(Program):
    """`python -m server` on a port that it keeps over restarts."""

    def __init__(self, data_dir: Path, redis_url: str, log: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        where = ["--port", str(self.port), "--data_dir", str(data_dir), "--redis_url", redis_url]
        super().__init__("server", [*where, *flags], log)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while self.readiness() != 200:
            if not self.is_running or time.monotonic() > deadline:
                raise AssertionError(f"the server is not ready: {self.said()}")
            time.sleep(0.05)

    async def ready(self) -> None:
        await asyncio.to_thread(self.wait_ready)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=END_S) as answer:
            text: str = answer.read().decode()
            return text

    def readiness(self) -> int:
        """Status of /readyz; 0 when nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except (urllib.error.URLError, OSError):
            return 0


class House:
    """`with House(folder) as house:` – two replicas a and b that are ready; workers are hired."""

    flags = (
        *("--ready_delay_s", "1", "--shutdown_grace_s", "10", "--ping_s", "0.5", "--client_grace_s", "1"),
        *("--worker_poll_s", "5", "--worker_claim_s", "1"),
    )

    def __init__(
        self,
        folder: Path,
        *,
        replicas: int = 2,
        database_url: str = "",
        leases_s: Mapping[str, float] = LEASES_S,
        on: RedisProcess | SentinelRedis | ClusterRedis | None = None,
        redis_url: str = "",
        more_flags: Sequence[str] = (),
        keep_s: float = KEEP_S,
    ) -> None:
        """leases_s: endpoint → lease of its workers; on: another Redis than the one of its own; redis_url: another URL than that names;
        more_flags: of every replica; keep_s: how long finished chats can be read."""
        self._folder = folder
        self._redis = on or RedisProcess(redis_binary("6.2"), "--appendonly", "yes", "--appendfsync", "everysec")
        self.data_dir = folder / "data"
        endpoints = folder / "endpoints"
        endpoints.mkdir(parents=True)
        for name, lease_s in leases_s.items():
            (endpoints / f"{name}.toml").write_text(f'name = "{name}"\nlease_s = {lease_s}\nkeep_s = {keep_s}\n')
        flags = [*self.flags, *more_flags, "--endpoint_dir", str(endpoints), *(("--database_url", database_url) if database_url else ())]
        self.replicas = [
            Replica(self.data_dir, redis_url or self._redis.url, folder / f"server-{number}.log", *flags) for number in range(replicas)
        ]
        self.workers: list[Program] = []

    def __enter__(self) -> House:
        self._redis.__enter__()
        try:
            self.restore()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        for replica in self.replicas:
            replica.kill()
        self._redis.__exit__()

    @property
    def redis(self) -> RedisProcess:
        assert isinstance(self._redis, RedisProcess)
        return self._redis

    def restore(self) -> None:
        """Every replica runs, and nothing is left of earlier chats."""
        if not self._redis.is_running:
            self._redis.start()
        self._redis.flush()
        for replica in self.replicas:
            if replica.is_running:
                replica.signal(signal.SIGCONT)
            else:
                replica.start()
        for replica in self.replicas:
            replica.wait_ready()

    @property
    def a(self) -> Replica:
        return self.replicas[0]

    @property
    def b(self) -> Replica:
        return self.replicas[1]

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas]

    def key(self, scope: str) -> str:
        lines = (self.data_dir / "keys.env").read_text().splitlines()
        pairs = dict(line.removeprefix("export ").split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        return pairs[f"MIXTRAL_{scope.upper()}_KEY"]

    async def hire(self, url: str = "", *, endpoint: str = BRISK, slots: int = 8, token_ms: float = 30, poison: str = "") -> Program:
        """A toy worker that has logged in."""
        worker = self.engage(url, endpoint=endpoint, slots=slots, token_ms=token_ms, poison=poison)
        worker.start()
        await worker.hears("event=session_opened")
        return worker

    def engage(self, url: str = "", *, endpoint: str = BRISK, slots: int = 8, token_ms: float = 30, poison: str = "") -> Program:
        """A toy worker that has yet to start."""
        number = len(self.workers) + 1
        words = ["--api_server", url or self.a.url, "--endpoint", endpoint, "--slots", str(slots), "--token_ms", str(token_ms)]
        words += ["--name", f"toy-{number}", "--poison", poison]
        log = self._folder / f"worker-{time.monotonic_ns()}.log"
        worker = Program("support.toy_worker", words, log, MIXTRAL_WORKER_KEY=self.key("worker"))
        self.workers.append(worker)
        return worker

    async def command(self, *words: str) -> str:
        """What `mixtral-server WORDS` prints beside the running replicas. Raises AssertionError unless it ends with 0."""
        where = ["--data_dir", str(self.data_dir), "--redis_url", self.redis.url, "--endpoint_dir", str(self._folder / "endpoints")]
        program = Program("server", [*words, *where], self._folder / f"command-{time.monotonic_ns()}.log")
        program.start()
        code = await program.ended()
        assert code == 0, program.said()
        return program.said()

    def dismiss(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
