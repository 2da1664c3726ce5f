"""Fixtures: one server with one Redis for all tests over HTTP; Redis is emptied before each, so that no job or rate outlives its test.

tests/server/conftest.py takes them in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import redis as sync_redis

from mixtral_server.database import Database
from support.databases import KINDS, PostgresProcess
from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.scripted_worker import ScriptedWorker

__all__ = ["database", "database_url", "empty_redis", "http", "one_redis", "postgres", "server", "shared_server", "worker"]


@pytest.fixture(scope="session")
def one_redis() -> Iterator[RedisProcess]:
    with RedisProcess(redis_binary("6.2"), "--appendonly", "no") as server:
        yield server


@pytest.fixture
def empty_redis(one_redis: RedisProcess) -> str:
    with sync_redis.Redis(unix_socket_path=str(one_redis.socket)) as client:
        client.flushall()
    return one_redis.url


@pytest.fixture(scope="session")
def shared_server(one_redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("server"), one_redis.url, public_page=True, body_timeout_s=1.0) as server:
        yield server


@pytest.fixture
def server(shared_server: LiveServer, empty_redis: str) -> LiveServer:
    return shared_server


@pytest.fixture
async def http(server: LiveServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with server.http() as session:
        yield session


@pytest.fixture
async def worker(server: LiveServer) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker(server.url, server.worker_key) as worker:
        yield worker


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresProcess]:
    with PostgresProcess() as server:
        yield server


@pytest.fixture(params=KINDS)
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that this machine has."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.sqlite3'}"
    cluster: PostgresProcess = request.getfixturevalue("postgres")
    return await cluster.emptied()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    await database.migrate()
    yield database
    await database.close()
