"""Fixtures of the clients' tests: one scripted API per test, and a client that is quick to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from mixtral_client import MixtralClient, Retry, Timeouts
from support.live_server import LiveServer
from support.redis import RedisProcess, redis_binary
from support.scripted_api import KEY, ScriptedApi


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A real one, for those who need more than a script."""
    with (
        RedisProcess(redis_binary("6.2"), "--appendonly", "no") as redis,
        LiveServer(tmp_path_factory.mktemp("server"), redis.url) as server,
    ):
        yield server


@pytest.fixture
async def api() -> AsyncIterator[ScriptedApi]:
    async with ScriptedApi() as api:
        yield api


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., MixtralClient]]:
    """A client of some servers; closed when the test ends."""
    clients: list[MixtralClient] = []

    def connect(*servers: str, retry: Retry | None = None, timeouts: Timeouts | None = None) -> MixtralClient:
        retry = retry or Retry(first_wait_s=0.001, max_wait_s=0.01)
        clients.append(MixtralClient(servers, KEY, retry=retry, timeouts=timeouts))
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()
