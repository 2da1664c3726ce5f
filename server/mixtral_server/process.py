"""One server process: its signals, what it says at the start, and its life beside others under a supervisor.

Decides how an operator's signals become the stages of stopping. Leaves starting and stopping to app.py, and how many processes there
are, and what becomes of one that dies, to supervisor.py, which runs this file as a program: `python -m mixtral_server.process FD`, with a
socket to itself at FD. On it come the settings; `ready` goes back; its end means that the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from mixtral_server.apikeys import Scope
from mixtral_server.app import Started, StartError, serve, take_port
from mixtral_server.database import SchemaError
from mixtral_server.door import listen
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import ServiceError
from mixtral_server.routes.service import Stages
from mixtral_server.settings import ENVIRONMENT_PREFIX, Settings
from mixtral_server.siblings import Siblings
from mixtral_server.tasks import end

log = logging.getLogger(__name__)

READY = b"ready\n"
GARBAGE_THRESHOLDS = (100_000, 50, 100)
"""Requests and tokens make objects without cycles: to look for cycles at every 700, Python's default, takes a tenth of the time."""


async def run_process(
    settings: Settings,
    endpoints: Mapping[str, EndpointConfig],
    on_started: Callable[[Started], None],
    *,
    listening: socket.socket | None = None,
    siblings: Siblings | None = None,
    stages: Stages | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; one that comes before requests are taken breaks the start off. Raises what serve() raises."""
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    stages = stages or Stages()
    is_started = False

    def started(one: Started) -> None:
        nonlocal is_started
        is_started = True
        on_started(one)

    def stop(signum: int) -> None:
        if stages.leaving.is_set():
            stages.draining.set()
            stages.closing.set()  # asked twice: now
        elif signum == signal.SIGINT:
            stages.draining.set()  # a person at the keyboard: no balancer has to notice first
        stages.leaving.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop, signum)
    serving = asyncio.create_task(serve(settings, endpoints, stages, started, listening=listening, siblings=siblings))
    leaving = asyncio.create_task(stages.leaving.wait())
    try:
        await asyncio.wait((serving, leaving), return_when=asyncio.FIRST_COMPLETED)
        if is_started:
            await asyncio.wait((serving,))
    finally:
        await end((serving, leaving))
    if not serving.cancelled():
        serving.result()
    log.info("event=ended%s", "" if is_started else " while=starting")


def tell_first_keys(settings: Settings, started: Started) -> None:
    """Printed and written by the process that made them, at the very first start."""
    if started.first_keys is None:
        return
    path = write_keys_env(settings.data_path, started.first_keys)
    print(f"The first keys, shown this once and written to {path}:")
    for scope, key in started.first_keys.items():
        print(f"  {variable_of(scope)}={key}", flush=True)


def variable_of(scope: Scope) -> str:
    return f"{ENVIRONMENT_PREFIX}{scope.upper()}_KEY"


def write_keys_env(folder: Path, keys: Mapping[Scope, str]) -> Path:
    """Readable by this user alone from its first byte on; replaces what an earlier database left."""
    path, fresh = folder / "keys.env", folder / f".keys.env.{os.getpid()}"
    text = "# Made by the first start of mixtral-server. A shell reads it with: . ./keys.env\n"
    text += "".join(f"{variable_of(scope)}={key}\n" for scope, key in keys.items())
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)
    return path


class _Line(logging.Formatter):
    """Its time is to the second, and made once for all lines of that second."""

    _second, _shown = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        if int(record.created) != self._second:
            self._second, self._shown = int(record.created), super().formatTime(record, datefmt)
        return self._shown


def log_to_stderr(level: str, process: int | None = None) -> None:
    which = "" if process is None else f" process={process}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(f"time=%(asctime)s level=%(levelname)s{which} %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # No line shows who wrote it, and asking takes as long as writing: "Optimization" in Python's logging HOWTO.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined,unused-ignore]  # Python 3.12
    logging._srcfile = None
    for noisy in ("aiohttp", "alembic", "aiosqlite", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


# ---------------------------------------------------------------------------------------------- under a supervisor


@dataclass(frozen=True)
class Orders:
    """What a supervisor tells a process. listening: the number of a socket to take connections from; None: bind one beside the others'."""

    settings: Settings
    endpoints: Mapping[str, EndpointConfig]
    folder: Path
    index: int
    listening: int | None

    def line(self) -> bytes:
        return orjson.dumps(
            {
                "settings": vars(self.settings),
                "endpoints": [one.model_dump(mode="json") for one in self.endpoints.values()],
                "folder": str(self.folder),
                "index": self.index,
                "listening": self.listening,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


def read_orders(line: bytes) -> Orders:
    told: dict[str, Any] = orjson.loads(line)
    endpoints = [EndpointConfig.model_validate(one) for one in told["endpoints"]]
    return Orders(
        Settings(**told["settings"]), {one.name: one for one in endpoints}, Path(told["folder"]), told["index"], told["listening"]
    )


async def run_under_supervisor(supervisor: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=supervisor, limit=2**24)
    orders = read_orders(await reader.readline())
    settings = orders.settings
    log_to_stderr(settings.log_level, orders.index)
    if orders.listening is None:
        listening = take_port(settings.host, settings.port, partial(listen, is_shared=True))
    else:
        listening = socket.socket(fileno=orders.listening)
    stages = Stages()

    async def leave_when_alone() -> None:
        await reader.read()
        log.warning("event=supervisor_gone")
        stages.draining.set()
        stages.leaving.set()

    def started(one: Started) -> None:
        tell_first_keys(settings, one)
        log.info("event=started host=%s port=%d pid=%d", one.host, one.port, os.getpid())
        writer.write(READY)

    watching = asyncio.create_task(leave_when_alone())
    siblings = Siblings(orders.folder, orders.index, settings.processes)
    await run_process(settings, orders.endpoints, started, listening=listening, siblings=siblings, stages=stages)
    watching.cancel()
    writer.close()


def main(words: list[str]) -> None:
    try:
        asyncio.run(run_under_supervisor(socket.socket(fileno=int(words[0]))))
    except (StartError, SchemaError, ServiceError) as error:
        print(f"mixtral-server: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
