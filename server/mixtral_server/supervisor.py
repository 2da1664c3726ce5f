"""`--processes N`: server processes that share one port, one embedded Redis, one data folder; each is started again when it dies.

Decides how the port is shared, when a process is started again, and how all of them end. Leaves serving to process.py. The supervisor
itself answers no request: it owns the embedded Redis, so that no process that dies takes it along.

On Linux every process binds the port for itself (SO_REUSEPORT) and the kernel deals connections out evenly; elsewhere that option does
not spread them, and all take from one socket that they inherit. docs/decisions/0008-processes-bind-the-port-each.md has the measurement.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from mixtral_server.app import LAST_CUT_S, Started, make_data_dir, take_port
from mixtral_server.door import hold
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.process import READY, Orders
from mixtral_server.redis_server import Durability, EmbeddedRedis
from mixtral_server.settings import Settings

log = logging.getLogger(__name__)

BINDS_EACH = sys.platform == "linux"
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
STEADY_S = 30.0
"""A process that ran for so long is started again after the first pause; each that did not doubles it."""
START_S = 60.0
END_S = 10.0
"""What a process may take to end beyond its settings' graces; then it is killed."""


class ProcessFailed(Exception):
    """The first process ended before it took requests, and has said why. code: its exit status."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the first server process ended with {code}")
        self.code = code


async def supervise(
    settings: Settings, endpoints: Mapping[str, EndpointConfig], on_started: Callable[[Started], None], *, binds_each: bool = BINDS_EACH
) -> None:
    """Run so many server processes until SIGTERM or SIGINT, then end them in order. Raises StartError, Unavailable, ProcessFailed."""
    async with AsyncExitStack() as stack:
        held = take_port(settings.host, settings.port)  # refused here, once, where somebody else has it
        host, port = held.getsockname()[:2]
        if binds_each:
            held.close()
            held = take_port(settings.host, port, hold)  # it keeps the port ours, and is dealt no connection
        stack.callback(held.close)
        settings = replace(settings, port=port)
        make_data_dir(settings.data_path)
        if not settings.redis_url:
            redis = EmbeddedRedis(settings.data_path, durability=cast(Durability, settings.durability))
            settings = replace(settings, redis_url=(await stack.enter_async_context(redis)).url)
        folder = Path(tempfile.mkdtemp(prefix="mixtral-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        listening = None if binds_each else held.fileno()
        crew = _Crew([Orders(settings, endpoints, folder, index, listening) for index in range(settings.processes)])
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, crew.stop, signum)
        await crew.run(lambda: on_started(Started(host, port, None)))
    log.info("event=ended processes=%d", settings.processes)


class _Crew:
    def __init__(self, orders: list[Orders]) -> None:
        self._members = [_Member(one) for one in orders]
        self._leaving = asyncio.Event()

    def stop(self, signum: int) -> None:
        """Pass an operator's signal on to all."""
        self._leaving.set()
        for member in self._members:
            member.signal(signum)

    async def run(self, on_started: Callable[[], None]) -> None:
        """The first alone: it makes tables and keys, and says for all what is wrong with the settings."""
        first, *others = self._members
        keeping = [asyncio.create_task(first.keep(self._leaving, is_first=True))]
        try:
            await first.until_ready(keeping[0])
            keeping += [asyncio.create_task(one.keep(self._leaving)) for one in others]
            for one, task in zip(others, keeping[1:], strict=True):
                await one.until_ready(task)
            if not self._leaving.is_set():
                on_started()
            await asyncio.gather(*keeping)
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)


class _Member:
    """One process and those that come after it."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._process: asyncio.subprocess.Process | None = None
        self._is_ready = asyncio.Event()

    def signal(self, signum: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signum)

    async def until_ready(self, keeping: asyncio.Task[None]) -> None:
        """Raises what keep() raised, when that is over first."""
        ready = asyncio.create_task(self._is_ready.wait())
        await asyncio.wait((ready, keeping), timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if keeping.done():
            keeping.result()

    async def keep(self, leaving: asyncio.Event, *, is_first: bool = False) -> None:
        """Until leaving. Raises ProcessFailed for a first one that never took requests."""
        pause_s, clock = FIRST_PAUSE_S, asyncio.get_running_loop().time
        while not leaving.is_set():
            began = clock()
            code = await self._live(leaving)
            if leaving.is_set():
                return
            if is_first and not self._is_ready.is_set():
                raise ProcessFailed(code)
            pause_s = FIRST_PAUSE_S if clock() - began >= STEADY_S else pause_s
            log.error("event=process_died process=%d code=%d next_start_s=%.1f", self._orders.index, code, pause_s)
            try:
                async with asyncio.timeout(pause_s):
                    await leaving.wait()
            except TimeoutError:
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _live(self, leaving: asyncio.Event) -> int:
        """One process from its start to its end. Returns its exit status."""
        ours, theirs = socket.socketpair()
        inherited = (theirs.fileno(), *(() if self._orders.listening is None else (self._orders.listening,)))
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mixtral_server.process", str(theirs.fileno())),
                pass_fds=inherited,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # what this process could import
                start_new_session=True,  # Ctrl-C comes to the supervisor alone, which passes it on once
            )
        self._process = process
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            if leaving.is_set():
                process.terminate()
            writer.write(self._orders.line())
            if await reader.readline() == READY:
                self._is_ready.set()
            return await self._end_of(process, leaving)
        finally:
            writer.close()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _end_of(self, process: asyncio.subprocess.Process, leaving: asyncio.Event) -> int:
        """Its exit status; of one that does not end within its graces after leaving, that of being killed."""
        ended, left = asyncio.create_task(process.wait()), asyncio.create_task(leaving.wait())
        await asyncio.wait((ended, left), return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        settings = self._orders.settings
        if not ended.done():
            await asyncio.wait((ended,), timeout=settings.ready_delay_s + settings.shutdown_grace_s + LAST_CUT_S + END_S)
        if not ended.done():
            log.error("event=process_killed process=%d pid=%d", self._orders.index, process.pid)
            process.kill()
        return await ended
