"""Server replicas that are killed or restarted: readers and workers go on at another, and no token doubles."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from support.chaos_load import NodeReader
from support.fault_proxy import FaultProxy
from support.history import Chat, OpenAIStream, Readers, check, read_openai
from support.house import STEADY, House, Replica
from support.http import until
from support.toy_model import answer_to

pytestmark = pytest.mark.timeout(240)

PARALLEL = 4


async def test_killed_replica_costs_its_readers_a_new_connection_and_no_token(house: House, readers: Readers) -> None:
    """Readers and worker are all at the replica that dies; the worker reaches the other through the same address."""
    async with FaultProxy(*house.urls) as proxy:
        await house.hire(proxy.url, endpoint=STEADY)
        chats = [readers.start(f"chat {number}", seed=number, tokens=40, model=STEADY, by_client=number < 2) for number in range(4)]
        await asyncio.gather(*(chat.reach(5) for chat in chats))
        house.a.kill()
        await readers.ended(*chats)
    assert all(chat.connections >= 2 for chat in chats[2:])
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4


async def test_javascript_client_goes_on_at_another_replica_when_its_own_is_killed(house: House, readers: Readers, tmp_path: Path) -> None:
    async with FaultProxy(*house.urls) as proxy, NodeReader(house.urls, house.key("client"), tmp_path / "node.log") as node:
        await house.hire(proxy.url, endpoint=STEADY)
        chat = Chat("asked from JavaScript", 11, 40, STEADY)
        reading = asyncio.create_task(node.read(chat))
        await chat.reach(5)
        house.a.kill()
        await reading
        check(chat, await readers.view(chat))


async def test_openai_call_cut_by_a_killed_replica_is_taken_up_by_its_idempotency_key(house: House, readers: Readers) -> None:
    async with FaultProxy(*house.urls) as proxy:
        worker = await house.hire(proxy.url, endpoint=STEADY)
        body = Chat("one order", 3, 40, STEADY).body | {"stream": True}
        cut, again = OpenAIStream(), OpenAIStream()
        async with readers.http.post(f"{house.a.url}/v1/chat/completions", json=body, headers={"Idempotency-Key": "order-10"}) as answer:
            reading = asyncio.create_task(read_openai(answer, cut))
            await until(lambda: len(cut.text) > 20)
            house.a.kill()
            with pytest.raises(aiohttp.ClientError):
                await reading
        assert not cut.is_done
        async with readers.http.post(f"{house.b.url}/v1/chat/completions", json=body, headers={"Idempotency-Key": "order-10"}) as answer:
            await read_openai(answer, again)
    expected = answer_to("one order", 3, 40).text
    assert (again.text, again.is_done, again.error) == (expected, True, "")
    assert expected.startswith(cut.text)
    assert worker.said().count("event=taken") == 1, "the same job, not a second one"


async def test_two_hundred_readers_of_a_killed_replica_all_resume_at_another(house: House, readers: Readers) -> None:
    """Most of their chats wait in the queue, some are in the middle of their answer."""
    chats = [readers.start(f"chat {number}", seed=number, tokens=12, model=STEADY) for number in range(200)]
    await until(lambda: all(chat.connections for chat in chats))
    await house.hire(house.b.url, endpoint=STEADY, slots=64, token_ms=50)
    await until(lambda: sum(chat.offset >= 3 for chat in chats) >= 32)
    house.a.kill()
    await readers.ended(*chats)
    assert sum(chat.connections >= 2 for chat in chats) >= 100


async def test_turn_committed_by_a_replica_that_died_before_its_answer_is_repeated_without_a_double_token(house: House) -> None:
    """The replica has answered, so the tokens are committed; the worker never hears of it. The readers are at the other replica."""
    async with FaultProxy(*house.urls) as proxy, Readers([house.b.url], house.key("client")) as elsewhere:
        await house.hire(proxy.url, endpoint=STEADY)
        chats = [elsewhere.start(f"chat {number}", seed=number, tokens=40, model=STEADY) for number in range(3)]
        await asyncio.gather(*(chat.reach(4) for chat in chats))
        proxy.hold_answers()
        await until(lambda: proxy.held >= 1)
        house.a.kill()
        await proxy.reset()
        proxy.heal()
        await elsewhere.ended(*chats)
        assert [(await elsewhere.view(chat)).attempt for chat in chats] == [1] * 3


async def test_rolling_restart_under_load_fails_no_request(house: House, readers: Readers) -> None:
    """Each replica in turn by SIGTERM, behind a balancer that asks /readyz; chats of every kind go on all the while."""
    async with FaultProxy(*house.urls, asks_ready=True) as proxy, Readers([proxy.url], house.key("client")) as load:
        await house.hire(proxy.url, endpoint=STEADY, slots=16)
        async with under_load(load, proxy.url) as served:
            for replica in house.replicas:
                await more(served)
                assert await restarted(replica) == 0
            await more(served)
        chats = [one for one in served if isinstance(one, Chat)]
        await load.ended(*chats)
    streams = [one for one in served if isinstance(one, OpenAIStream)]
    assert len(chats) >= 6
    assert len(streams) >= 6
    assert [one.error for one in streams if one.error or not one.is_done] == []


async def more(served: list[Chat | OpenAIStream]) -> None:
    """Wait until eight more were served."""
    enough = len(served) + 8
    await until(lambda: len(served) >= enough)


async def restarted(replica: Replica) -> int:
    """Its exit status, once it serves again. It must be unready before it is gone."""
    replica.signal(signal.SIGTERM)
    seen = set()
    while replica.is_running:
        seen.add(await asyncio.to_thread(replica.readiness))
    assert 503 in seen
    status = await replica.ended()
    replica.start()
    await replica.ready()
    return status


@asynccontextmanager
async def under_load(readers: Readers, url: str) -> AsyncIterator[list[Chat | OpenAIStream]]:
    """Chats one after another in several tasks, over OpenAI's route and the native one; what was served, in order of its end."""
    served: list[Chat | OpenAIStream] = []
    enough = asyncio.Event()

    async def native(number: int) -> None:
        while not enough.is_set():
            chat = readers.start(f"native {number} {len(served)}", seed=number, tokens=20, model=STEADY)
            await chat.end()
            assert chat.refusals == []
            served.append(chat)

    async def openai(number: int) -> None:
        while not enough.is_set():
            asked = Chat(f"openai {number} {len(served)}", number, 20, STEADY)
            seen = OpenAIStream()
            async with (
                aiohttp.ClientSession(headers=readers.http.headers, connector=aiohttp.TCPConnector(force_close=True)) as http,
                http.post(f"{url}/v1/chat/completions", json=asked.body | {"stream": True}) as answer,
            ):
                assert answer.status == 200, await answer.text()
                await read_openai(answer, seen)
            assert seen.text == answer_to(asked.content, asked.seed, asked.tokens).text
            served.append(seen)

    async with asyncio.TaskGroup() as tasks:
        for number in range(PARALLEL):
            tasks.create_task(native(number) if number % 2 else openai(number))
        try:
            yield served
        finally:
            enough.set()
