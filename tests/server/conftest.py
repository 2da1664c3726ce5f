"""A real Redis in both versions, empty for every test, and a queue on it with workers to drive it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from mixtral_server.queue import JobQueue, QueueLimits
from support.queue_bench import ENDPOINT, Bench
from support.redis import VERSIONS, RedisProcess, connect, redis_binary
from support.server_fixtures import *  # noqa: F403 - its fixtures


@pytest.fixture(scope="session", params=VERSIONS)
def redis_process(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    with RedisProcess(redis_binary(request.param), "--appendonly", "no") as server:
        yield server


@pytest.fixture
async def redis(redis_process: RedisProcess) -> AsyncIterator[Redis]:
    client = connect(redis_process.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def queue(redis: Redis) -> JobQueue:
    queue = JobQueue(redis, {ENDPOINT: QueueLimits()})
    await queue.start()
    return queue


@pytest.fixture
def bench(queue: JobQueue, redis: Redis) -> Bench:
    return Bench(queue, redis)
