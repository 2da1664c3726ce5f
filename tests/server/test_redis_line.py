"""One connection for many calls: each has its own answer, whatever becomes of the others and of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import exceptions as redis_errors

from mixtral_server.redis_client import RedisClient
from support.fault_proxy import FaultProxy
from support.http import until
from support.ports import free_port
from support.redis import RedisProcess, connect, redis_binary

ECHO = "return ARGV[1]"


@pytest.fixture
async def proxied() -> AsyncIterator[tuple[FaultProxy, RedisClient]]:
    port = free_port()
    with RedisProcess(redis_binary("6.2"), "--port", str(port), "--bind", "127.0.0.1") as server:
        async with FaultProxy(f"http://127.0.0.1:{port}") as proxy, connect(proxy.url.replace("http", "redis")) as client:
            yield proxy, client
        assert server.pid


async def script(client: RedisClient, text: str) -> str:
    return str(await client.script_load(text))


async def run(client: RedisClient, sha: str, *args: str | bytes) -> object:
    return await client.execute_command("EVALSHA", sha, 0, *args)


async def connections(client: RedisClient) -> int:
    return sum(one["cmd"] == "evalsha" for one in await client.client_list())


async def test_calls_at_once_share_a_connection_and_each_has_its_own_answer(proxied: tuple[FaultProxy, RedisClient]) -> None:
    _, client = proxied
    echo = await script(client, ECHO)
    answers = await asyncio.gather(*(run(client, echo, str(number)) for number in range(500)))
    assert answers == [str(number) for number in range(500)]
    assert await connections(client) == 1


async def test_call_that_is_given_up_leaves_its_answer_to_nobody(proxied: tuple[FaultProxy, RedisClient]) -> None:
    proxy, client = proxied
    echo = await script(client, ECHO)
    await run(client, echo, "before")
    proxy.hold_answers()
    given_up, other = (asyncio.create_task(run(client, echo, word)) for word in ("given up", "other"))
    await until(lambda: proxy.held > 0)
    given_up.cancel()
    proxy.heal()
    assert await other == "other"
    assert await run(client, echo, "after") == "after"
    assert given_up.cancelled()


async def test_broken_connection_has_its_calls_asked_again_on_a_new_one(proxied: tuple[FaultProxy, RedisClient]) -> None:
    proxy, client = proxied
    echo = await script(client, ECHO)
    await run(client, echo, "before")
    proxy.hold_answers()
    calls = [asyncio.create_task(run(client, echo, str(number))) for number in range(50)]
    await until(lambda: proxy.held > 0)
    await proxy.reset()
    proxy.heal()
    assert await asyncio.gather(*calls) == [str(number) for number in range(50)]


async def test_refusal_and_an_answer_that_is_no_text_are_their_own_calls_alone(proxied: tuple[FaultProxy, RedisClient]) -> None:
    _, client = proxied
    echo, failing = await script(client, ECHO), await script(client, "return redis.error_reply('ERR no')")
    mixed = [run(client, echo, "before"), run(client, failing), run(client, echo, b"\xff\xfe"), run(client, echo, "after")]
    before, refused, undecodable, after = await asyncio.gather(*mixed, return_exceptions=True)
    assert (before, after) == ("before", "after")
    assert isinstance(refused, redis_errors.ResponseError)
    assert isinstance(undecodable, UnicodeDecodeError)
