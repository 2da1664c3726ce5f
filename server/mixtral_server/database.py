"""The SQL database: one engine, one kind of exclusive transaction, and the schema brought up to date.

Decides how SQLite and PostgreSQL are opened and locked, and when migrations run: SQLite is migrated at start, since the file is
the server's own; any other database only by `mixtral-server migrate`, since an operator decides when a shared one changes.
Leaves the tables to accounts.py and history.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from sqlite3 import OperationalError
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

T = TypeVar("T")

WAIT_FOR_SWITCH_S = 5.0
SWITCH_AGAIN_S = 0.02

METADATA = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "uq": "uq_%(table_name)s_%(column_0_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s"}
)

DatabaseError = (SQLAlchemyError, OSError, TimeoutError)
"""What a database that is away raises; asyncpg shows a refused connection as OSError."""

_ADVISORY_LOCK = 0x6D69_7874_7261_6C  # "mixtral"


class SchemaError(Exception):
    """The database's tables are not those this server needs; the message says what to run."""


class Database:
    """An engine with the rules above. Close it when done."""

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self._shown_url = make_url(url).render_as_string(hide_password=True)
        arguments: dict[str, Any] = {"timeout": timeout_s} if self.is_sqlite else {"timeout": timeout_s, "command_timeout": timeout_s}
        if self.is_sqlite and (path := make_url(url).database):
            Path(path).touch(mode=0o600)  # it holds the secret that signs cookies; SQLite's other files take after it
        self.engine: AsyncEngine = create_async_engine(url, connect_args=arguments, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        async with asyncio.timeout(self.timeout_s), self.engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self, timeout_s: float | None = None) -> AsyncIterator[AsyncConnection]:
        """A transaction that no other writer of any replica overlaps: SQLite's one write lock, PostgreSQL's advisory lock."""
        engine = self.engine.execution_options(is_writing=True)
        async with asyncio.timeout(timeout_s or self.timeout_s), engine.begin() as connection:
            if not self.is_sqlite:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
            yield connection

    async def migrate(self) -> tuple[str | None, str]:
        """Bring the tables up to date, atomically and safely beside other replicas. Returns (revision before, revision now)."""
        async with self.writing(timeout_s=120.0) as connection:
            return await connection.run_sync(_upgrade)

    async def make_ready(self) -> None:
        """At start: migrate SQLite, check any other. Raises SchemaError when an operator has to act."""
        if self.is_sqlite:
            await self.migrate()
            return
        async with self.reading() as connection:
            found = await connection.run_sync(_revision)
        head = _head()
        if found != head:
            raise SchemaError(
                f"database {self._shown_url} is at revision {found or 'none'} and this server needs {head}; "
                f"run once: mixtral-server migrate --database_url …"
            )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _head() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None  # the first revision is shipped with this file
    return head


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection) -> tuple[str | None, str]:
    before, head = _revision(connection), _head()
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if before is not None and before not in known:
        raise SchemaError(f"database is at revision {before}, made by a newer server; this one knows up to {head}: install the newer one")
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, head


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.driver_connection.stop = _once(connection.driver_connection.stop)
    connection.isolation_level = None  # the driver must not begin or commit by itself: _begin_sqlite does, DDL included
    _keep_log_ahead(connection)
    cursor = connection.cursor()
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _keep_log_ahead(connection: Any) -> None:
    """Once for each file. While another process writes, SQLite refuses to switch without waiting, whatever the timeout: replicas that start
    together on a new file meet there."""
    until = time.monotonic() + WAIT_FOR_SWITCH_S
    cursor = connection.cursor()
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except OperationalError:
            if time.monotonic() > until:
                raise
            connection.run_async(lambda _: asyncio.sleep(SWITCH_AGAIN_S))
    cursor.close()


def _once(stop: Callable[[], T]) -> Callable[[], T]:
    """A stop() that its callers share. aiosqlite's own, called again, gives a future that nobody is left to resolve: its thread has ended.
    Two cancellations of one call are enough for that, and the event loop would wait for that future until the process is killed."""
    stopped: list[T] = []

    def once() -> T:
        if not stopped:
            stopped.append(stop())
        return stopped[0]

    return once


def _begin_sqlite(connection: Connection) -> None:
    # A writer that begins as a reader fails at once when another writer came between; IMMEDIATE waits instead.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("is_writing") else "BEGIN")


def first_line(error: BaseException) -> str:
    """What a driver's error says, without the statement and the links that SQLAlchemy adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]
