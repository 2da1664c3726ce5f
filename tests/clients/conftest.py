"""Fixtures of the clients' tests: one scripted API per test, and a client that is quick to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from mixtral_client import MixtralClient, Retry
from support.scripted_api import KEY, ScriptedApi


@pytest.fixture
async def api() -> AsyncIterator[ScriptedApi]:
    async with ScriptedApi() as api:
        yield api


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., MixtralClient]]:
    """A client of some servers; closed when the test ends."""
    clients: list[MixtralClient] = []

    def connect(*servers: str, retry: Retry | None = None, **options: float) -> MixtralClient:
        clients.append(MixtralClient(servers, KEY, retry=retry or Retry(first_wait_s=0.001, max_wait_s=0.01), **options))
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()
