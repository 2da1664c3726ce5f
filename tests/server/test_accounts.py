"""Users, keys and shared secrets on real databases, also when two servers ask at once."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

import mixtral_server.history  # noqa: F401 - its tables are part of the schema
from mixtral_server.accounts import Accounts, KeyNotFound
from mixtral_server.apikeys import NO_LIMITS, SCOPES, KeyLimits, hash_of, new_secret, prefix_of
from mixtral_server.database import METADATA, Database, SchemaError, _config

HEAD = "0002"


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return Accounts(database)


def test_key_shows_its_scope_and_holds_256_random_bits() -> None:
    keys = [new_secret("client") for _ in range(100)]
    assert len(set(keys)) == 100
    assert all(key.startswith("mx-c-") and len(key) == 5 + 43 for key in keys)
    assert prefix_of(keys[0]) == keys[0][:11]


async def test_first_keys_are_one_of_each_scope_and_made_once(accounts: Accounts) -> None:
    first = await accounts.create_first_keys(1.0)
    assert first is not None
    assert set(first) == set(SCOPES)
    assert await accounts.create_first_keys(2.0) is None
    assert {key.sha256 for key in await accounts.keys()} == {hash_of(secret) for secret in first.values()}


async def test_first_keys_are_made_once_however_many_ask_at_once(database_url: str, database: Database) -> None:
    others = [Database(database_url) for _ in range(8)]
    made = await asyncio.gather(*(Accounts(one).create_first_keys(1.0) for one in others))
    for one in others:
        await one.close()
    assert sum(keys is not None for keys in made) == 1
    assert len(await Accounts(database).keys()) == 3


async def test_first_keys_are_not_made_again_after_all_were_revoked(accounts: Accounts) -> None:
    await accounts.create_first_keys(1.0)
    for key in await accounts.keys():
        await accounts.revoke_key(key.id, 2.0)
    assert await accounts.create_first_keys(3.0) is None


async def test_key_is_stored_as_hash_and_prefix_alone(accounts: Accounts, database: Database) -> None:
    secret = await accounts.create_key(user="alice", name="laptop", scopes=["client"], now_s=1.0)
    async with database.reading() as connection:
        stored = str((await connection.exec_driver_sql("SELECT * FROM keys")).all())
    assert prefix_of(secret) in stored
    assert hash_of(secret) in stored
    assert secret not in stored
    assert secret[11:] not in stored


async def test_keys_of_one_user_share_owner_and_weight(accounts: Accounts) -> None:
    await accounts.create_key(user="alice", name="a", scopes=["client"], weight=2.5, now_s=1.0)
    await accounts.create_key(user="alice", name="b", scopes=["client", "worker"], endpoints=["one", "two"], now_s=2.0)
    first, second = await accounts.keys()
    assert first.user_id == second.user_id
    assert (first.weight, second.weight) == (2.5, 2.5)
    assert (second.scopes, second.endpoints) == (frozenset({"client", "worker"}), frozenset({"one", "two"}))


@pytest.mark.parametrize("by", ["id", "prefix", "name"])
async def test_revoked_key_is_gone_from_the_live_ones_and_kept_in_the_table(accounts: Accounts, by: str) -> None:
    await accounts.create_key(user="alice", name="laptop", scopes=["client"], now_s=1.0)
    (key,) = await accounts.keys()
    await accounts.revoke_key(getattr(key, by), 2.0)
    assert await accounts.keys() == []
    assert [one.revoked_s for one in await accounts.keys(with_revoked=True)] == [2.0]


async def test_revoke_of_no_key_or_of_several_is_refused(accounts: Accounts) -> None:
    for name in ("same", "same", "other"):
        await accounts.create_key(user="alice", name=name, scopes=["client"], now_s=1.0)
    with pytest.raises(KeyNotFound, match="'unknown'; found none"):
        await accounts.revoke_key("unknown", 2.0)
    with pytest.raises(KeyNotFound, match="exactly one live key must have the id, prefix or name 'same'; found k"):
        await accounts.revoke_key("same", 2.0)
    assert len(await accounts.keys()) == 3


async def test_shared_secret_is_the_same_for_every_server(database_url: str, database: Database) -> None:
    others = [Database(database_url) for _ in range(4)]
    found = await asyncio.gather(*(Accounts(one).shared_secret("visitor_cookie") for one in others))
    for one in others:
        await one.close()
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    assert await Accounts(database).shared_secret("another") != found[0]


async def test_migrations_make_exactly_the_tables_that_the_code_declares(database: Database) -> None:
    async with database.reading() as connection:
        difference = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync, opts={"compare_type": True}), METADATA)
        )
    assert difference == []


async def test_migrations_run_once_however_many_servers_start_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(6)]
    ran = await asyncio.gather(*(one.migrate() for one in databases))
    for one in databases:
        await one.close()
    assert sorted(ran, key=str)[-1] == (None, HEAD)
    assert ran.count((HEAD, HEAD)) == 5


def test_migrations_of_processes_that_start_at_once_all_succeed(tmp_path: Path) -> None:
    """Processes, not tasks: SQLite's own locks stand between them, on a file that is not there yet."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'shared.sqlite3'}"
    program = "import asyncio, sys; from mixtral_server.database import Database\nasyncio.run(Database(sys.argv[1]).make_ready())"
    running = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [one.communicate(timeout=60)[1] for one in running]
    assert [one.returncode for one in running] == [0] * 3, errors


async def test_database_of_a_newer_server_is_refused_with_a_sentence(database: Database) -> None:
    async with database.writing() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match="revision 9999"):
        await database.migrate()


async def test_shared_database_is_migrated_by_an_operator_only(database_url: str) -> None:
    """SQLite is the server's own and is migrated at start; any other is refused until someone runs the command."""
    database = Database(database_url)
    try:
        if database.is_sqlite:
            await database.make_ready()
        else:
            with pytest.raises(SchemaError, match=rf"revision none and this server needs {HEAD}; run once: mixtral-server migrate"):
                await database.make_ready()
            await database.migrate()
            await database.make_ready()
        assert await Accounts(database).keys() == []
    finally:
        await database.close()


async def test_sqlite_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        database = Database(f"sqlite+aiosqlite:///{tmp_path / 'one.sqlite3'}")
        await database.make_ready()
        modes = modes_in(tmp_path)
    finally:
        os.umask(before)
        await database.close()
    assert set(modes.values()) == {0o600}, modes


def modes_in(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


async def test_keys_of_an_older_database_have_no_limits_after_its_migration(database_url: str) -> None:
    database = Database(database_url)
    try:
        async with database.writing() as connection:
            await connection.run_sync(lambda sync: migrate_to("0001", sync))
            await connection.exec_driver_sql("INSERT INTO users VALUES ('u1', 'alice', 1, 1)")
            await connection.exec_driver_sql(
                "INSERT INTO keys (id, user_id, name, prefix, sha256, scopes, endpoints, created_s) "
                "VALUES ('k1', 'u1', 'laptop', 'mx-c-123456', 'x', 'client', '', 1)"
            )
        assert await database.migrate() == ("0001", HEAD)
        (key,) = await Accounts(database).keys()
        assert key.limits == NO_LIMITS
    finally:
        await database.close()


def migrate_to(revision: str, connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


async def test_limits_are_kept_changed_one_by_one_and_unset(accounts: Accounts) -> None:
    await accounts.create_key(user="alice", name="laptop", scopes=["client"], now_s=1.0, limits=KeyLimits(60, 20_000_000_000, 4, 2))
    (key,) = await accounts.keys()
    assert key.limits == KeyLimits(60, 20_000_000_000, 4, 2)
    changed = await accounts.set_key("laptop", {"tokens_per_minute": 0, "max_running": None}, weight=2.5)
    assert (changed.limits, changed.weight) == (KeyLimits(60, 0, None, 2), 2.5)
    assert await accounts.keys() == [changed]
    with pytest.raises(KeyNotFound, match="'unknown'; found none"):
        await accounts.set_key("unknown", {"max_running": 1})
