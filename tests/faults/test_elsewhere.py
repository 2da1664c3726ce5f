"""Faults beside the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_server.database import Database
from support.databases import PostgresProcess
from support.history import Readers
from support.house import STEADY, House
from support.http import until

pytestmark = pytest.mark.timeout(240)


async def test_chats_go_on_while_the_database_is_down_and_its_ledger_catches_up(tmp_path: Path) -> None:
    with PostgresProcess() as postgres:
        url = await postgres.emptied()
        database = Database(url)
        await database.migrate()
        await database.close()
        with House(tmp_path, replicas=1, database_url=url) as house:
            async with Readers(house.urls, house.key("client")) as readers:
                await house.hire(endpoint=STEADY)
                postgres.stop()
                await house.a.hears("event=database_away")
                await readers.ended(*(readers.start(f"chat {number}", seed=number, tokens=10, model=STEADY) for number in range(3)))
                assert house.a.readiness() == 200
                await house.a.hears("event=upkeep_failed task=save_history")
                postgres.start()
                await until(lambda: "mixtral_ledger_saved_total 3.0" in house.a.metrics())
