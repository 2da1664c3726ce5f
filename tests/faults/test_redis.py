"""Redis that goes away, comes back, or comes back with less: streams are held, nothing is sent twice, and a lost end is said aloud."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable

import pytest
import redis

from support.history import Chat, OpenAIStream, Readers, read_openai
from support.house import BRISK, LEASES_S, STEADY, House, Program
from support.http import until
from support.redis import RedisProcess
from support.toy_model import answer_to

pytestmark = pytest.mark.timeout(240)


async def started(readers: Readers, count: int, *, model: str, tokens: int = 48) -> list[Chat]:
    """Chats of which each reader has some tokens."""
    chats = [readers.start(f"chat {number}", seed=number, tokens=tokens, model=model) for number in range(count)]
    await asyncio.gather(*(chat.reach(5) for chat in chats))
    return chats


@pytest.mark.parametrize("end", [RedisProcess.stop, RedisProcess.crash], ids=["stopped", "killed"])
async def test_restarted_redis_costs_a_pause_and_new_work_is_asked_to_come_again(
    house: House, readers: Readers, end: Callable[[RedisProcess], None]
) -> None:
    await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY)
    connections, comments = [chat.connections for chat in chats], [chat.comments for chat in chats]
    end(house.redis)
    for url, body in (("/v1/jobs", chats[0].body), ("/v1/chat/completions", chats[0].body)):
        async with readers.http.post(house.a.url + url, json=body) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "redis_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
    await until(lambda: all(chat.comments > was for chat, was in zip(chats, comments, strict=True)))
    house.redis.start()
    await readers.ended(*chats)
    assert [chat.connections for chat in chats] == connections, "open streams are held, not broken"
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3


@pytest.mark.parametrize("gone", ["redis", "every server"])
async def test_outage_longer_than_the_lease_takes_no_chat_from_its_worker(house: House, readers: Readers, gone: str) -> None:
    worker = await house.hire(endpoint=STEADY, token_ms=100)
    chats = await started(readers, 3, model=STEADY, tokens=60)
    pids = [house.redis.pid] if gone == "redis" else [replica.pid for replica in house.replicas]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        if gone == "redis":
            for url, body in (("/v1/jobs", chats[0].body), ("/v1/chat/completions", chats[0].body)):
                async with asyncio.timeout(9), readers.http.post(house.a.url + url, json=body) as answer:  # three times what is promised
                    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "redis_unavailable")
                    assert int(answer.headers["Retry-After"]) >= 1
        await asyncio.sleep(LEASES_S[STEADY] + 1.0)  # what is tested is that so much time does nothing
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3
    assert worker.said().count("event=session_opened") == 1


@pytest.mark.parametrize("torn_bytes", [0, 7], ids=["between two writes", "in the middle of a write"])
async def test_log_that_lost_its_end_gets_it_again_from_the_worker_that_made_it(house: House, readers: Readers, torn_bytes: int) -> None:
    """An append-only file cut short: Redis comes back with what it had at an earlier moment."""
    worker = await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY)
    await lose_what_follows(house, chats, torn_bytes=torn_bytes)
    await readers.ended(*chats)
    assert worker.said().count("event=log_rewound") == 3, "the log asks each time for the offset that it lacks"
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3


async def test_log_that_lost_its_end_with_its_worker_is_made_again_to_the_same_letter(house: House, readers: Readers) -> None:
    worker = await house.hire()
    chats = await started(readers, 3, model=BRISK)
    body = Chat("an OpenAI stream", 5, 48, BRISK).body | {"stream": True}
    forked = OpenAIStream()
    async with readers.http.post(f"{house.b.url}/v1/chat/completions", json=body) as answer:
        reading = asyncio.create_task(read_openai(answer, forked))
        await until(lambda: len(forked.text) > 20)
        await lose_what_follows(house, chats, worker)
        await house.hire()
        await readers.ended(*chats)
        await reading
    assert all(chat.rewinds == 1 for chat in chats)
    assert answer_to("an OpenAI stream", 5, 48).text.startswith(forked.text)
    assert (forked.is_done, forked.error) == (False, "unavailable"), "OpenAI's stream cannot take tokens back, so it ends in an error"


async def lose_what_follows(house: House, chats: list[Chat], *killed: Program, torn_bytes: int = 0) -> None:
    """Let the readers get more tokens, kill Redis (and what is named), and bring back the Redis of before."""
    log = house.redis.folder / "appendonly.aof"
    kept_bytes = log.stat().st_size
    reached = [chat.offset for chat in chats]
    await until(lambda: all(chat.offset >= was + 8 for chat, was in zip(chats, reached, strict=True)))
    for program in killed:
        program.kill()
    house.redis.crash()
    os.truncate(log, kept_bytes - torn_bytes)
    house.redis.start()


async def test_full_disk_refuses_new_work_and_costs_running_chats_a_pause(house: House, readers: Readers) -> None:
    """A limit on the size of its files is to Redis what a full disk is: its log cannot grow."""
    await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY)
    log = house.redis.folder / "appendonly.aof"
    resource.prlimit(house.redis.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
    with redis.Redis(unix_socket_path=str(house.redis.socket)) as client:
        await until(lambda: client.info("persistence")["aof_last_write_status"] == "err")
    async with readers.http.post(house.a.url + "/v1/jobs", json=chats[0].body) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "redis_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    resource.prlimit(house.redis.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    chats.append(readers.start("when there is room again", tokens=10, model=STEADY))
    await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4


async def test_flushed_scripts_are_loaded_again_while_chats_run(house: House, readers: Readers) -> None:
    await house.hire(endpoint=STEADY)
    chats = await started(readers, 3, model=STEADY)
    with redis.Redis(unix_socket_path=str(house.redis.socket)) as client:
        for offset in (8, 14, 20):
            client.script_flush()
            await asyncio.gather(*(chat.reach(offset) for chat in chats))
    chats.append(readers.start("after the flush", tokens=10, model=STEADY))
    await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4
