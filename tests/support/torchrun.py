"""A worker started as its users start it: `torchrun … worker …`, literally."""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 120.0


class Torchrun:
    """A running torchrun; its stderr as lines, its ranks as process ids."""

    def __init__(self, command: list[str], cwd: Path, environment: Mapping[str, str], stdin: int, stdout: int) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_own_terminal if stdin >= 0 and os.isatty(stdin) else None,
        )
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self._lines.put(line.decode(errors="replace").rstrip("\n"))
        self._lines.put(None)

    def log_line(self, word: str) -> str:
        """The next line of stderr that holds the word. Raises AssertionError with the log if it ends without."""
        while True:
            line = self._lines.get(timeout=HANG_S)
            if line is None:
                self._lines.put(None)
                raise AssertionError(f"torchrun ended without saying {word!r}:\n" + "\n".join(self.log))
            self.log.append(line)
            if word in line:
                return line

    def rest_of_log(self) -> str:
        while (line := self._lines.get(timeout=HANG_S)) is not None:
            self.log.append(line)
        self._lines.put(None)
        return "\n".join(self.log)

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and self._is_rank(folder, number):
                return int(folder.name)
        raise AssertionError(f"torchrun {self.process.pid} has no rank {number}")

    def _is_rank(self, folder: Path, number: int) -> bool:
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            return parent == str(self.process.pid) and f"RANK={number}".encode() in (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    def wait(self) -> int:
        return self.process.wait(HANG_S)


def _own_terminal() -> None:
    """The terminal at stdin sends its Ctrl-C to this process, as to a program started from a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def torchrun(
    arguments: list[str],
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    launcher: tuple[str, ...] = (str(Path(sys.executable).parent / "torchrun"),),
) -> Iterator[Torchrun]:
    """`torchrun arguments`, on a rendezvous port of its own; nothing of it is left when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    own |= {"PET_MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1", **(environment or {})}
    started = Torchrun([*launcher, *arguments], cwd, own, stdin, stdout)
    ranks: list[int] = []
    try:
        yield started
    finally:
        if started.process.poll() is None:
            ranks = [
                int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _parent(folder) == started.process.pid
            ]
            started.process.kill()
        for rank in ranks:
            try:
                os.kill(rank, signal.SIGKILL)
            except ProcessLookupError:
                pass
        started.process.wait()
        started.reader.join(HANG_S)
        if started.process.stdout is not None:
            started.process.stdout.close()


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1
