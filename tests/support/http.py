"""What tests over HTTP wait for, each wait with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

PATIENCE_S = 60.0  # a hang guard


async def until(is_so: Callable[[], bool]) -> None:
    """Raises TimeoutError when it does not become so."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 - what is waited for happens in another thread or process
            await asyncio.sleep(0.01)


async def state_of(http: aiohttp.ClientSession, job_id: str, *wanted: str) -> dict[str, Any]:
    """GET /v1/jobs/{id}, once it is in one of the states. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"/v1/jobs/{job_id}") as answer:
                job: dict[str, Any] = await answer.json()
            if job["state"] in wanted:
                return job
            await asyncio.sleep(0.01)


async def text_of(http: aiohttp.ClientSession, path: str) -> str:
    async with http.get(path) as answer:
        return await answer.text()
