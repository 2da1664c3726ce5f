"""What `make demo` promises, on the real thing: python demo.py with its real Redis, server and torchrun worker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import demo

ROOT = Path(demo.__file__).parent
HANG_GUARD_S = 100


class Running(NamedTuple):
    process: subprocess.Popen[str]
    printed: str
    data_dir: Path
    port: int


def processes_naming(text: str) -> list[str]:
    """Command lines of all processes of this machine that hold text; zombies have none."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if text in line:
            lines.append(f"{folder.name} {line}")
    return lines


@contextmanager
def demo_running(data_dir: Path, port: int) -> Iterator[Running]:
    """The demo, from its last line of greeting on; killed on leaving if the test did not stop it."""
    command = [sys.executable, "demo.py", "--port", str(port), "--data_dir", str(data_dir)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as process,
    ):
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "Ctrl-C ends all of it" in line:
                break
        else:
            errors.seek(0)
            raise AssertionError(f"the demo ended with {process.wait()}: {errors.read()}")
        try:
            yield Running(process, printed, data_dir, port)
        finally:
            if process.poll() is None:
                stop(process)


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    return process.wait(HANG_GUARD_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with demo_running(tmp_path_factory.mktemp("demo") / "data", demo.free_port("127.0.0.1")) as house:
        yield house


@pytest.mark.timeout(300)
def test_demo_prints_page_curl_line_and_openai_snippet_that_work_as_they_are(running: Running) -> None:
    assert f"http://127.0.0.1:{running.port}/" in running.printed
    curl = re.search(r"curl -N .*?\\\n.*$", running.printed, re.M)
    assert curl, running.printed
    assert shutil.which("curl"), "this test needs curl: apt-get install curl"
    streamed = subprocess.run(shlex.split(curl[0].replace("\\\n", " ")), capture_output=True, text=True, timeout=HANG_GUARD_S)
    assert streamed.stdout.rstrip().endswith("data: [DONE]"), streamed
    snippet = running.printed.partition("With the openai package:\n")[2].partition("\n\n")[0]
    code = "\n".join(line.removeprefix("  ") for line in snippet.splitlines())
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_GUARD_S)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.split()) > 10


def test_port_taken_is_one_sentence_that_names_another(running: Running, tmp_path: Path) -> None:
    command = [sys.executable, "demo.py", "--port", str(running.port), "--data_dir", str(tmp_path / "second")]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_GUARD_S)
    assert second.returncode == 1
    assert second.stderr.strip() == f"port {running.port} on 127.0.0.1 cannot be used (Address already in use); " + (
        f"start on another one: make demo PORT={running.port + 1}"
    )


def test_keys_file_is_for_its_owner_only(running: Running) -> None:
    assert (running.data_dir / "keys.env").stat().st_mode & 0o777 == 0o600


def test_redis_listens_on_a_private_socket_and_no_port(running: Running) -> None:
    redis = [line for line in processes_naming("redis-server") if _descends_from(int(line.split()[0]), running.process.pid)]
    assert len(redis) == 1, redis
    assert ":0" in redis[0] or "unixsocket" in redis[0]


@pytest.mark.timeout(300)
def test_ctrl_c_ends_all_of_it_and_a_second_start_keeps_the_keys(running: Running) -> None:
    keys = (running.data_dir / "keys.env").read_text()
    family = [pid for pid in _pids() if _descends_from(pid, running.process.pid)]
    assert len(family) >= 4, "demo's server, Redis, torchrun and its rank"
    assert stop(running.process) == 0
    _wait_until_gone(family)
    with demo_running(running.data_dir, running.port) as again:
        assert (again.data_dir / "keys.env").read_text() == keys
        assert stop(again.process) == 0


@pytest.mark.timeout(300)
def test_killing_the_demo_outright_leaves_no_orphan(tmp_path: Path) -> None:
    with demo_running(tmp_path / "data", demo.free_port("127.0.0.1")) as house:
        family = [pid for pid in _pids() if _descends_from(pid, house.process.pid)]
        house.process.kill()
        house.process.wait(HANG_GUARD_S)
        _wait_until_gone(family)


def test_full_disk_is_one_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "LEAST_FREE_BYTES", 2**62)
    with pytest.raises(demo.DemoError, match=r"MiB free and the demo needs \d+; free some, or give another: --data_dir DIR"):
        demo.check_disk(tmp_path)


def test_port_taken_by_another_program_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(demo.DemoError, match="make demo PORT="):
            demo.check_port("127.0.0.1", other.getsockname()[1])


def _pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def _parent(pid: int) -> int:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        pid = _parent(pid)
        if pid == ancestor:
            return True
    return False


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + HANG_GUARD_S
    alive = pids
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _is_alive(pid)]
        time.sleep(0.05)
    assert not alive, [processes_naming(str(pid)) for pid in alive]


def _is_alive(pid: int) -> bool:
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
