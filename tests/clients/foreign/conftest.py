"""One real server on a real Redis for all clients that others wrote, and a worker whose answers are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.scripted_worker import ScriptedWorker
from support.worker_thread import WorkerThread


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with (
        RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis,
        LiveServer(tmp_path_factory.mktemp("server"), redis.url) as server,
    ):
        yield server


@pytest.fixture
def worker(server: LiveServer) -> Iterator[ScriptedWorker]:
    with WorkerThread(server) as worker:
        yield worker
