"""A scripted worker with a thread and a loop of its own, beside tests that block theirs, as clients without async do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker

PATIENCE_S = 20.0


class WorkerThread:
    """`with WorkerThread(server, slots=4) as worker:`; the script is the ScriptedWorker's, or that of `kind`."""

    def __init__(self, server: LiveServer, kind: Callable[..., ScriptedWorker] = ScriptedWorker, **script: Any) -> None:
        self._make = lambda: kind(server.url, server.worker_key, **script)
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), name="scripted worker")

    def __enter__(self) -> ScriptedWorker:
        self._thread.start()
        if not self._is_up.wait(PATIENCE_S):
            raise TimeoutError(f"the worker was not logged in within {PATIENCE_S:g} s")
        return self._worker

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE_S)

    async def _work(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with self._make() as self._worker:
            self._is_up.set()
            await self._over.wait()
