"""The scripted server and its stage, one of each per test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from mixtral_benchmark.wires import Target, open_http
from support.scripted_server import ENDPOINT, KEY, ScriptedServer, Stage


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    runner = web.AppRunner(scripted.app(), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield scripted
    scripted.release()
    await runner.cleanup()


@pytest.fixture
async def stage(server: ScriptedServer) -> AsyncIterator[Stage]:
    async with open_http(Target(server.url, ENDPOINT, KEY)) as http:
        yield Stage(server, http)
