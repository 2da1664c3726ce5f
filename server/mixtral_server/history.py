"""Finished jobs and the usage ledger in SQL: metadata only, no prompt and no answer.

Decides what is kept of a finished job and that a job counts once, however often and by however many replicas it is saved.
Leaves to upkeep.py to carry jobs here from the queue's outbox.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from sqlalchemy import BigInteger, Column, Date, Float, Index, Integer, String, Table, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from mixtral_server.database import METADATA, Database
from mixtral_server.records import FinishedJob

FINISHED_JOBS = Table(
    "finished_jobs",
    METADATA,
    Column("id", String(200), primary_key=True),
    Column("endpoint", String(40), nullable=False),
    Column("owner", String(40), nullable=False),
    Column("state", String(20), nullable=False),
    Column("finish", String(20)),
    Column("error_code", String(64)),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("finished_s", Float, nullable=False),
    Column("queue_s", Float),
    Column("first_token_s", Float),
    Index("ix_finished_jobs_owner", "owner", "finished_s"),
    Index("ix_finished_jobs_finished_s", "finished_s"),
)
USAGE = Table(
    "usage",
    METADATA,
    Column("day", Date, primary_key=True),
    Column("owner", String(40), primary_key=True),
    Column("endpoint", String(40), primary_key=True),
    Column("jobs", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
EPOCH, DAY_S = date(1970, 1, 1), 86_400
_COUNTS = ("jobs", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class DayOfUsage:
    day: date
    owner: str
    endpoint: str
    jobs: int
    prompt_tokens: int
    completion_tokens: int


class History:
    def __init__(self, database: Database) -> None:
        self._database = database
        insert = (sqlite if database.is_sqlite else postgresql).insert  # both have ON CONFLICT, which SQLAlchemy keeps in their dialects
        self._keep = insert(FINISHED_JOBS).on_conflict_do_nothing().returning(FINISHED_JOBS.c.id)
        usage = insert(USAGE)
        sums = {name: USAGE.c[name] + usage.excluded[name] for name in _COUNTS}
        self._count = usage.on_conflict_do_update(index_elements=["day", "owner", "endpoint"], set_=sums)

    async def save(self, jobs: Sequence[FinishedJob]) -> int:
        """Keep them and add them to the ledger, in one transaction. Returns how many were new; the others change nothing."""
        if not jobs:
            return 0
        async with self._database.writing() as connection:
            new = set((await connection.execute(self._keep, [job._asdict() for job in jobs])).scalars())
            first_of = {job.id: job for job in jobs if job.id in new}
            if first_of:
                await connection.execute(self._count, _usage_of(first_of.values()))
        return len(first_of)

    async def usage(self, owner: str | None = None) -> list[DayOfUsage]:
        """The ledger by day, oldest first."""
        query = select(USAGE).order_by(USAGE.c.day, USAGE.c.owner, USAGE.c.endpoint)
        if owner is not None:
            query = query.where(USAGE.c.owner == owner)
        async with self._database.reading() as connection:
            return [DayOfUsage(**row) for row in (await connection.execute(query)).mappings()]

    async def job(self, job_id: str) -> FinishedJob | None:
        async with self._database.reading() as connection:
            row = (await connection.execute(select(FINISHED_JOBS).where(FINISHED_JOBS.c.id == job_id))).mappings().one_or_none()
        return None if row is None else FinishedJob(**row)

    async def forget_before(self, finished_s: float) -> int:
        """Delete finished jobs older than that; the ledger keeps their sums. Returns how many."""
        async with self._database.writing() as connection:
            return (await connection.execute(delete(FINISHED_JOBS).where(FINISHED_JOBS.c.finished_s < finished_s))).rowcount


def _usage_of(jobs: Iterable[FinishedJob]) -> list[dict[str, Any]]:
    """What they add to each row of the ledger."""
    sums: dict[tuple[int, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for job in jobs:
        total = sums[int(job.finished_s // DAY_S), job.owner, job.endpoint]
        for index, count in enumerate((1, job.prompt_tokens, job.completion_tokens)):
            total[index] += count
    return [
        {"day": EPOCH + timedelta(days), "owner": owner, "endpoint": endpoint, **dict(zip(_COUNTS, counts, strict=True))}
        for (days, owner, endpoint), counts in sorted(sums.items())
    ]
