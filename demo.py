"""Start the whole house on this machine and keep it running: server (with its Redis and SQLite), one CPU worker, the demo model.

Run by `make demo`, or `python demo.py --help`. Decides the order of starting and stopping and what a person sees meanwhile.
Leaves everything else to the commands it starts, which are the ones a user would type: `python -m server …` and
`torchrun --nproc_per_node 1 worker --api_server …`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent
START_LIMIT_S = 180.0  # a cold start on two busy cores takes about 20 s
STOP_LIMIT_S = 40.0  # torchrun gives its ranks 30 s
LEAST_FREE_BYTES = 200 * 2**20
ENDPOINT = "mixtral_chat"


class DemoError(Exception):
    """The demo cannot start or go on; the message is the one sentence a person sees."""


# ---- what must be true before anything starts


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"port {port} on {host} cannot be used ({error.strerror}); start on another one: make demo PORT={port + 1}"
            ) from error


def check_disk(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(data_dir).free
    except OSError as error:
        raise DemoError(f"data folder {data_dir} cannot be made ({error.strerror}); give another: python demo.py --data_dir DIR") from error
    if free < LEAST_FREE_BYTES:
        raise DemoError(
            f"{data_dir} has {free >> 20} MiB free and the demo needs {LEAST_FREE_BYTES >> 20}; free some, or give another: --data_dir DIR"
        )


# ---- children: each in a session of its own, so that Ctrl-C reaches only this program, which ends them in order


def _die_with_parent() -> None:
    """Ask Linux to end this child when the demo is killed outright; elsewhere an orderly stop must do."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def child(name: str, command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run command with its output in log; on leaving, SIGTERM, wait, and SIGKILL its whole session if it does not end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop within {STOP_LIMIT_S:.0f} s; ending it", file=sys.stderr)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind in its session
        except ProcessLookupError:
            pass
        process.wait()


def wait_until(what: str, ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll ready() and show the log's last line meanwhile. Raises DemoError with the log's end when the process dies or takes too long."""
    began = time.monotonic()
    is_terminal = sys.stderr.isatty()
    while not ready():
        waited = time.monotonic() - began
        if process.poll() is not None:
            raise DemoError(f"{what} ended with code {process.returncode}: {last_words(log)}")
        if waited > START_LIMIT_S:
            raise DemoError(f"{what} was not ready after {START_LIMIT_S:.0f} s; the end of {log}:\n{tail(log, 15)}")
        if is_terminal:
            print(f"\r\033[K  {what} … {waited:3.0f} s  {tail(log, 1)[:90]}", end="", file=sys.stderr, flush=True)
        time.sleep(0.1)
    print(f"{chr(13) + chr(27) + '[K' if is_terminal else ''}  {what}: ready after {time.monotonic() - began:.1f} s", file=sys.stderr)


def tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


def last_words(log: Path) -> str:
    """The sentence a component of ours ended with, else the end of its log. torchrun's own traceback comes after ours and says less."""
    sentences = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("mixtral-")]
    return sentences[-1] if sentences else f"the end of {log}:\n{tail(log, 15)}"


def answers(url: str, key: str | None = None) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def read_keys(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in lines}


# ---- the house


@contextmanager
def house(host: str, port: int, data_dir: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Server and worker running and ready: yields (URL, keys); ends both, worker first, on leaving."""
    check_port(host, port)
    check_disk(data_dir)
    url = f"http://{host}:{port}"
    logs = data_dir / "logs"
    logs.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    environment["PYTHONUNBUFFERED"] = "1"
    with ExitStack() as stack:
        command = [sys.executable, "-m", "server", "--host", host, "--port", str(port), "--data_dir", str(data_dir), "--public_page"]
        server = stack.enter_context(child("server", command, logs / "server.log", environment))
        wait_until("server", lambda: answers(f"{url}/livez"), server, logs / "server.log")
        keys = read_keys(data_dir / "keys.env")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "worker", "--api_server", url]
        worker_environment = environment | {"MIXTRAL_WORKER_KEY": keys["MIXTRAL_WORKER_KEY"]}
        worker = stack.enter_context(child("worker", command, logs / "worker.log", worker_environment))
        wait_until("worker with the demo model", lambda: has_worker(url), worker, logs / "worker.log")
        stack.enter_context(watch({"server": server, "worker": worker}, logs))
        yield url, keys


def has_worker(url: str) -> bool:
    return answers(f"{url}/readyz?workers=1")


@contextmanager
def watch(processes: dict[str, subprocess.Popen[bytes]], logs: Path) -> Iterator[None]:
    """Say so at once, by SIGCHLD, when a child ends by itself."""

    def on_child_end(_signal: int, _frame: FrameType | None) -> None:
        for name, process in processes.items():
            if process.poll() is not None:
                raise DemoError(f"the {name} ended with code {process.returncode}: {last_words(logs / f'{name}.log')}")

    before = signal.signal(signal.SIGCHLD, on_child_end)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def greeting(url: str, keys: dict[str, str]) -> str:
    key = keys["MIXTRAL_CLIENT_KEY"]
    body = json.dumps({"model": ENDPOINT, "stream": True, "messages": [{"role": "user", "content": "Tell a long story: Once upon a time"}]})
    return f"""
The page:    {url}/

With curl:
  curl -N {url}/v1/chat/completions -H "Authorization: Bearer {key}" \\
    -H "Content-Type: application/json" -d '{body}'

With the openai package:
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  for chunk in client.chat.completions.create(model="{ENDPOINT}", stream=True,
          messages=[{{"role": "user", "content": "Tell me a story about a brave cat."}}]):
      if chunk.choices:
          print(chunk.choices[0].delta.content or "", end="", flush=True)

Ctrl-C ends all of it."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7777, help="port of the server (%(default)s); 0 takes a free one")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data", help="keys, chats and logs (%(default)s)")
    parser.add_argument("--then", metavar="COMMAND", help="run this command with --api_server and a client key, then end")
    flags = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(ending, _stop)
    try:
        with house(flags.host, flags.port or free_port(flags.host), flags.data_dir.resolve()) as (url, keys):
            if flags.then:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return subprocess.run([*shlex.split(flags.then), "--api_server", url], cwd=ROOT, env=os.environ | keys).returncode
            print(greeting(url, keys), flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 0
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
