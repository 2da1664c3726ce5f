"""Our own clients in the faults that readers over the raw wire meet in the other tests: each resumes by itself, and what it read is the one
right answer. Then their programs die too, and another program reads on, at another replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from faults.test_redis import lose_what_follows
from mixtral_client.resume import EVENTS
from support.chaos_load import NodeReader
from support.fault_proxy import FaultProxy
from support.history import Chat, Readers, check
from support.house import BRISK, ROOT, STEADY, House, Program
from support.node import find_node
from support.toy_model import answer_to

pytestmark = pytest.mark.timeout(90)

DEADLINE_S = 30.0
FOLDER = Path(__file__).parent
PYTHON = [sys.executable, str(FOLDER / "read_on.py")]
COUNT = 2

Break = Callable[[House, FaultProxy, Program, list[Chat]], Awaitable[object]]


async def kill_worker(house: House, proxy: FaultProxy, worker: Program, chats: list[Chat]) -> None:
    worker.kill()
    await house.hire(house.b.url, endpoint=BRISK)


async def restart_redis(house: House, proxy: FaultProxy, worker: Program, chats: list[Chat]) -> None:
    house.redis.stop()
    house.redis.start()


async def kill_replica(house: House, proxy: FaultProxy, worker: Program, chats: list[Chat]) -> None:
    house.a.kill()


async def reset_connections(house: House, proxy: FaultProxy, worker: Program, chats: list[Chat]) -> None:
    for chat in chats:
        await proxy.reset()
        await chat.reach(chat.offset + 5)


async def lose_end_of_log(house: House, proxy: FaultProxy, worker: Program, chats: list[Chat]) -> None:
    await lose_what_follows(house, chats, worker)
    await house.hire(proxy.url, endpoint=BRISK)


@pytest.mark.parametrize(
    ("fault", "moves", "rewinds"),
    [(kill_worker, 1, 0), (restart_redis, 0, 0), (kill_replica, 0, 0), (reset_connections, 0, 0), (lose_end_of_log, 1, 1)],
    ids=["worker killed", "redis restarted", "replica killed", "connections reset", "log lost its end"],
)
async def test_both_clients_resume_by_themselves(
    house: House, readers: Readers, tmp_path: Path, fault: Break, moves: int, rewinds: int
) -> None:
    endpoint = BRISK if moves else STEADY
    async with FaultProxy(*house.urls) as proxy, contextlib.AsyncExitStack() as stack:
        through_proxy = await stack.enter_async_context(Readers([proxy.url], house.key("client")))
        node = await stack.enter_async_context(NodeReader([proxy.url], house.key("client"), tmp_path / "node.log"))
        worker = await house.hire(proxy.url, endpoint=endpoint)
        chats = [through_proxy.start(f"Python {number}", seed=number, tokens=60, model=endpoint, by_client=True) for number in range(COUNT)]
        for number in range(COUNT):
            chat = Chat(f"JavaScript {number}", number, 60, endpoint)
            chat.task = asyncio.create_task(node.read(chat))
            chats.append(chat)
        await asyncio.gather(*(chat.reach(5) for chat in chats))
        await fault(house, proxy, worker, chats)
        await readers.ended(*chats)
    assert [chat.moves >= moves for chat in chats] == [True] * len(chats)
    assert [chat.rewinds for chat in chats] == [rewinds] * len(chats)


@contextlib.asynccontextmanager
async def reading(command: list[str], house: House, chat: Chat, order: dict[str, Any]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that reads the chat into its history for as long as it lives; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        *(",".join(house.urls), house.key("client"), json.dumps(order)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "clients/python")},
    )
    assert process.stdout is not None
    taking = asyncio.create_task(take(process.stdout, chat))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await taking


async def take(lines: asyncio.StreamReader, chat: Chat) -> None:
    async for line in lines:
        if not line.endswith(b"\n"):
            return  # the program died in the middle of it
        fields = json.loads(line)
        if "job" in fields:
            chat.job_id = fields["job"]
        else:
            chat.events.append((fields.pop("id"), EVENTS[fields.pop("event")].model_validate(fields)))


@pytest.mark.parametrize("language", ["python", "javascript"])
async def test_answer_of_a_killed_program_is_read_on_by_another_from_its_last_id_at_another_replica(
    house: House, readers: Readers, language: str
) -> None:
    command = PYTHON if language == "python" else [str(find_node()), str(FOLDER / "read_on.mjs")]
    chat = Chat(f"read on in {language}", 5, 60, STEADY)
    async with FaultProxy(*house.urls) as proxy:
        await house.hire(proxy.url, endpoint=STEADY)
        async with reading(command, house, chat, {"request": chat.body}):
            await chat.reach(6)
        house.a.kill()
        async with reading(command, house, chat, {"job": chat.job_id, "after": chat.last_id}) as process:
            async with asyncio.timeout(DEADLINE_S):
                await process.wait()
        view = await readers.view(chat)
        check(chat, view)
        assert view.attempt == 1


async def test_killed_terminal_chat_is_resumed_whole_at_another_replica(house: House, tmp_path: Path) -> None:
    expected = answer_to("tell me of the sea", 3, 60).text
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients/python"), "XDG_STATE_HOME": str(tmp_path)}
    environment["MIXTRAL_CLIENT_KEY"] = house.key("client")
    chat = [sys.executable, "-m", "mixtral_client.cli", "--endpoint_name", STEADY, "--max_tokens", "60", "--seed", "3"]
    servers = [word for url in house.urls for word in ("--api_server", url)]
    pipes: dict[str, Any] = {"stdin": asyncio.subprocess.DEVNULL, "stdout": asyncio.subprocess.PIPE, "env": environment}
    async with FaultProxy(*house.urls) as proxy:
        await house.hire(proxy.url, endpoint=STEADY)
        cut = await asyncio.create_subprocess_exec(*chat, *servers, "tell me of the sea", **pipes)
        assert cut.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            begun = await cut.stdout.readexactly(40)
        cut.kill()
        await cut.wait()
        house.a.kill()
        again = await asyncio.create_subprocess_exec(*chat, "--resume", **pipes)
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await again.communicate()
    assert (again.returncode, out.decode()) == (0, expected + "\n")
    assert out.startswith(begun)
