"""Workers that die, stop, fall silent or talk nonsense: chats go on at the next token, and nobody else notices."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal

import aiohttp
import pytest

from mixtral_client.protocol import PROTOCOL_VERSION, ErrorEvent
from support.fault_proxy import FaultProxy
from support.history import Chat, Readers
from support.house import BRISK, STEADY, House, Program
from support.http import until

pytestmark = pytest.mark.timeout(240)


async def reach(chats: list[Chat], offset: int) -> None:
    await asyncio.gather(*(chat.reach(offset) for chat in chats))


def resumed_at(worker: Program) -> list[int]:
    """Offsets at which the worker went on with chats that it took."""
    return [int(offset) for offset in re.findall(r"event=taken .*from_offset=(\d+)", worker.said())]


async def test_killed_worker_costs_a_pause_and_no_token(house: House, readers: Readers) -> None:
    first = await house.hire()
    chats = [readers.start(f"chat {number}", seed=number, tokens=48, by_client=number == 0) for number in range(4)]
    await reach(chats, 5)
    first.kill()
    second = await house.hire(house.b.url)
    await readers.ended(*chats)
    assert [chat.moves for chat in chats] == [1] * 4
    assert sorted(resumed_at(second))[0] > 5, "the second worker goes on, it does not begin again"


async def test_stopped_worker_that_wakes_after_its_lease_is_refused_and_logs_in_anew(house: House, readers: Readers) -> None:
    stopped = await house.hire()
    chats = [readers.start(f"chat {number}", seed=number, tokens=48) for number in range(3)]
    await reach(chats, 5)
    stopped.signal(signal.SIGSTOP)
    other = await house.hire()
    await readers.ended(*chats)
    assert [chat.moves for chat in chats] == [1] * 3
    stopped.signal(signal.SIGCONT)
    await stopped.hears("event=session_lost")
    await stopped.hears("event=session_opened", times=2)
    other.kill()
    await readers.ended(readers.start("to the one that woke", tokens=10))
    assert stopped.said().count("event=taken") == len(chats) + 1


async def test_silent_connection_loses_its_chats_to_another_worker_and_comes_back(house: House, readers: Readers) -> None:
    async with FaultProxy(house.a.url) as proxy:
        cut_off = await house.hire(proxy.url)
        chats = [readers.start(f"chat {number}", seed=number, tokens=40) for number in range(3)]
        await reach(chats, 5)
        proxy.black_hole()
        other = await house.hire()
        await readers.ended(*chats)
        assert [chat.moves for chat in chats] == [1] * 3
        other.kill()
        proxy.heal()
        await proxy.reset()
        await cut_off.hears("event=session_opened", times=2)
        await readers.ended(readers.start("to the one that was cut off", tokens=10))


async def test_answers_lost_on_their_way_leak_no_chat_and_double_no_token(house: House, readers: Readers) -> None:
    async with FaultProxy(house.a.url, latency_s=0.002) as proxy:
        await house.hire(proxy.url, endpoint=STEADY, token_ms=15)
        proxy.lose_every = 5
        chats = [readers.start(f"chat {number}", seed=number, tokens=40, model=STEADY) for number in range(4)]
        await readers.ended(*chats)
        assert proxy.lost >= 3
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 4


async def test_half_closed_connection_costs_no_token_and_no_lease(house: House, readers: Readers) -> None:
    async with FaultProxy(house.a.url) as proxy:
        await house.hire(proxy.url, endpoint=STEADY)
        chats = [readers.start(f"chat {number}", seed=number, model=STEADY) for number in range(3)]
        for offset in (5, 12, 19):
            await reach(chats, offset)
            proxy.half_close()
        await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3


async def test_sigterm_lets_running_chats_finish_and_claims_no_more(house: House, readers: Readers) -> None:
    leaving = await house.hire(endpoint=STEADY)
    chats = [readers.start(f"chat {number}", seed=number, tokens=40, model=STEADY) for number in range(3)]
    await reach(chats, 3)
    leaving.signal(signal.SIGTERM)
    await leaving.hears("event=draining")
    late = readers.start("comes while the worker leaves", tokens=10, model=STEADY)
    await readers.ended(*chats)
    assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3
    assert await leaving.ended() == 0
    assert (await readers.view(late)).state == "waiting"
    await house.hire(endpoint=STEADY)
    await readers.ended(late)


async def test_worker_that_hands_its_chats_back_costs_a_pause_and_counts_no_death(house: House, readers: Readers) -> None:
    leaving = await house.hire(endpoint=STEADY)
    chats = [readers.start(f"chat {number}", seed=number, tokens=40, model=STEADY) for number in range(3)]
    await reach(chats, 5)
    leaving.signal(signal.SIGINT)
    assert await leaving.ended() == 0
    assert [(await readers.view(chat)).state for chat in chats] == ["waiting"] * 3, "at once, not when the lease of 8 s ends"
    successor = await house.hire(endpoint=STEADY)
    await readers.ended(*chats)
    assert min(resumed_at(successor)) > 5


async def test_chat_that_kills_its_workers_is_given_up_and_its_batch_mates_finish(house: House, readers: Readers) -> None:
    poison = readers.start("drink the hemlock", tokens=10)
    mates = [readers.start(f"mate {number}", seed=number, tokens=12) for number in range(2)]
    for _ in range(3):
        victim = await house.hire(poison="hemlock")
        await until(lambda victim=victim: not victim.is_running)  # type: ignore[misc]
    await poison.end()
    error = poison.events[-1][1]
    assert isinstance(error, ErrorEvent)
    assert error.error.code == "workers_died"
    await house.hire(poison="hemlock")
    await readers.ended(*mates)


async def test_chat_that_was_given_up_is_retried_by_an_operator_and_goes_on_at_its_next_token(house: House, readers: Readers) -> None:
    first = await house.hire()
    chat = readers.start("the hemlock again", tokens=30)
    await chat.reach(5)
    first.kill()
    for _ in range(2):
        victim = await house.hire(poison="hemlock")
        await until(lambda victim=victim: not victim.is_running)  # type: ignore[misc]
    await chat.end()
    assert isinstance(chat.events[-1][1], ErrorEvent)
    (letter,) = json.loads(await house.command("dead", "list", "--json"))
    assert (letter["job_id"], letter["tokens"], letter["worker"]) == (chat.job_id, chat.offset, "toy-3")
    assert "30" in await house.command("dead", "show", chat.job_id)
    assert await house.command("dead", "retry", "--all") == "retried 1 of 1 jobs\n"
    healthy = await house.hire()
    readers.follow_again(chat)
    await readers.ended(chat)
    assert resumed_at(healthy) == [letter["tokens"] + 1]
    assert json.loads(await house.command("dead", "list", "--json")) == []


def turn_with(frame: bytes) -> bytes:
    return b'{"session": "SESSION", "turn": 2, "frames": [{"job": "JOB", "attempt": 1, ' + frame + b"}]}"


GARBLED = {
    "bad json": b'{"session": ',
    "bad utf-8": b'{"session": "\xff\xfe", "turn": 2}',
    "a million tokens": turn_with(b'"offset": 1, "texts": [], "ids": [' + b"1," * 999_999 + b"1]"),
    "ids that are none": turn_with(b'"offset": 1, "texts": [""], "ids": [-1]'),
    "offset 0": turn_with(b'"offset": 0, "texts": ["x"], "ids": [1]'),
}


async def test_what_a_worker_garbles_is_refused_and_touches_no_chat(house: House, readers: Readers) -> None:
    """The chat runs at an honest worker; the garbling one has a good key and a session of its own."""
    await house.hire(endpoint=BRISK)
    chat = readers.start("an honest worker's", tokens=60)
    await chat.reach(3)
    login = {"endpoint": BRISK, "name": "odd", "protocol": PROTOCOL_VERSION, "version": "", "model": "", "device": "", "max_slots": 1}
    headers = {"Authorization": f"Bearer {house.key('worker')}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(house.a.url, headers=headers) as http:
        async with http.post("/v1/worker/sessions", json=login | {"max_seq_len": 100}) as answer:
            session = (await answer.json())["session"]
        for name, body in GARBLED.items():
            body = body.replace(b"SESSION", session.encode()).replace(b"JOB", chat.job_id.encode())
            async with http.post("/v1/worker/turn", data=io.BytesIO(body)) as answer:
                assert answer.status in (400, 413), f"{name}: {answer.status}"
        forged = {"job": chat.job_id, "attempt": 1, "offset": 4, "ids": [1], "texts": ["forged"], "finish": "stop"}
        async with http.post("/v1/worker/turn", json={"session": session, "turn": 2, "frames": [forged]}) as answer:
            assert (await answer.json())["drops"] == [{"job": chat.job_id, "attempt": 1}]
    await readers.ended(chat)
    assert (await readers.view(chat)).attempt == 1
