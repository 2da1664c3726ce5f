"""A worker for all clients that others wrote, whose answers are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.live_server import LiveServer
from support.scripted_worker import ScriptedWorker
from support.worker_thread import WorkerThread


@pytest.fixture
def worker(server: LiveServer) -> Iterator[ScriptedWorker]:
    with WorkerThread(server) as worker:
        yield worker
