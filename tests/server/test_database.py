"""One SQL database: its connections end, whatever becomes of the calls that used them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event, text

from mixtral_server.database import Database


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mixtral.sqlite3"


@pytest.fixture
def lock(file: Path) -> Iterator[None]:
    """Another process writes all the while."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("BEGIN IMMEDIATE")
        yield


def test_write_that_is_cancelled_twice_while_it_waits_for_the_lock_keeps_no_event_loop_from_ending(file: Path, lock: None) -> None:
    """The first cancel closes its connection, the second breaks that off; asyncio.run() then waits for all that is left."""

    async def write() -> None:
        async with database.writing() as connection:
            await connection.execute(text("SELECT 1"))

    async def cancelled_twice() -> None:
        asked = asyncio.Event()
        event.listen(database.engine.sync_engine, "before_cursor_execute", lambda *_: asked.set())
        writing = asyncio.create_task(write())
        await asked.wait()  # for the lock
        for _ in range(2):
            writing.cancel()
            await asyncio.wait((writing,), timeout=0.1)
        assert writing.cancelled()
        await database.close()

    database = Database(f"sqlite+aiosqlite:///{file}", timeout_s=1.0)
    asyncio.run(cancelled_twice())


async def test_new_file_that_another_process_writes_is_waited_for(file: Path) -> None:
    """As replicas that start together meet it: SQLite's own timeout does not hold for the switch of a file to WAL."""
    database = Database(f"sqlite+aiosqlite:///{file}")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = asyncio.Event()

        async def let_go() -> None:
            await refused.wait()
            other.execute("COMMIT")

        def look(dbapi_connection: object, _record: object) -> None:
            asyncio.get_running_loop().call_later(0.1, refused.set)

        event.listen(database.engine.sync_engine, "connect", look, insert=True)
        letting_go = asyncio.create_task(let_go())
        assert (await database.migrate())[0] is None
        await letting_go
    await database.close()
