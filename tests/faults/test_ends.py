"""Replicas that are told to end while what they use is away: each ends, by itself and with 0."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from mixtral_server.database import Database
from support.databases import PostgresProcess
from support.history import Chat, Readers
from support.house import STEADY, House, Program
from support.http import until
from support.ports import free_port

pytestmark = pytest.mark.timeout(240)

BRIEF = ("--ready_delay_s", "0.1", "--shutdown_grace_s", "2")


@asynccontextmanager
async def in_the_middle_of_chats(house: House) -> AsyncIterator[Readers]:
    """Readers of both wires have some tokens of long answers; the OpenAI call will take all of the grace."""
    async with Readers(house.urls, house.key("client")) as readers:
        await house.hire(endpoint=STEADY, token_ms=20)
        chat = readers.start("native", tokens=900, model=STEADY)
        body = Chat("by OpenAI's route", 1, 900, STEADY).body | {"stream": True}
        async with readers.http.post(f"{house.a.url}/v1/chat/completions", json=body) as answer:
            await answer.content.readuntil(b"data: ")
            await chat.reach(5)
            yield readers


async def ends(house: House) -> None:
    house.a.signal(signal.SIGTERM)
    assert await house.a.ended() == 0
    assert "event=ended" in house.a.said()


async def test_replica_told_to_end_while_redis_stands_still_ends(tmp_path: Path) -> None:
    with House(tmp_path / "house", replicas=1, more_flags=BRIEF) as house:
        async with in_the_middle_of_chats(house):
            os.kill(house.redis.pid, signal.SIGSTOP)
            try:
                await house.a.hears("event=upkeep_failed task=reap")
                await ends(house)
            finally:
                os.kill(house.redis.pid, signal.SIGCONT)


async def test_replica_told_to_end_while_another_holds_the_lock_of_sqlite_ends(tmp_path: Path) -> None:
    """One that stands still in the middle of a write, for example."""
    with House(tmp_path / "house", replicas=1, more_flags=BRIEF) as house:
        async with in_the_middle_of_chats(house) as readers:
            with closing(sqlite3.connect(house.data_dir / "mixtral.sqlite3", timeout=20, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await readers.ended(readers.start("its row waits for the lock", tokens=5, model=STEADY))
                await ends(house)


async def test_replica_told_to_end_while_postgresql_stands_still_ends(tmp_path: Path) -> None:
    with PostgresProcess() as postgres:
        url = await postgres.emptied()
        database = Database(url)
        await database.migrate()
        await database.close()
        with House(tmp_path / "house", replicas=1, database_url=url, more_flags=BRIEF) as house:
            async with in_the_middle_of_chats(house) as readers:
                with postgres.standing_still():
                    await readers.ended(readers.start("its row finds nobody", tokens=5, model=STEADY))
                    await ends(house)


async def test_replica_told_to_end_while_it_waits_for_its_redis_does_not_wait_on(tmp_path: Path) -> None:
    """Another server of this data folder owns Redis, and that does not answer: it would be waited for for 30 s, and then be an error."""
    folder = tmp_path / "data" / "redis"
    folder.mkdir(parents=True)
    starting = Program("server", ["--port", str(free_port()), "--data_dir", str(tmp_path / "data")], tmp_path / "log")
    with (folder / "owner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting.start()
        try:
            await until(lambda: "redis_shared" in starting.said())
            starting.signal(signal.SIGTERM)
            assert await starting.ended() == 0
        finally:
            starting.kill()
    assert "event=ended while=starting" in starting.said()
