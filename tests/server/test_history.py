"""Finished jobs and the ledger: each job counts once, on the day it ended, for its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import date

import pytest

from mixtral_server.database import Database
from mixtral_server.history import DayOfUsage, FinishedJob, History
from mixtral_server.metrics import Metrics
from mixtral_server.queue import USAGE_BATCH
from mixtral_server.upkeep import save_history
from support.http import PATIENCE_S, state_of, text_of
from support.live_server import LiveServer
from support.queue_bench import ENDPOINT, Bench
from support.scripted_worker import ScriptedWorker

NOON = 1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 43_200
JOB = FinishedJob(
    id="mixtral_chat.0-1",
    endpoint="mixtral_chat",
    owner="u1",
    state="done",
    finish="stop",
    error_code=None,
    prompt_tokens=5,
    completion_tokens=7,
    attempts=1,
    created_s=NOON - 9,
    finished_s=NOON,
    queue_s=1.5,
    first_token_s=2.5,
)


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


async def test_saved_job_is_read_back_whole(history: History) -> None:
    assert await history.save([JOB]) == 1
    assert await history.job(JOB.id) == JOB
    assert await history.job("another") is None


async def test_ledger_adds_up_by_day_owner_and_endpoint(history: History) -> None:
    days = [NOON, NOON, NOON + 86_400, NOON]
    owners = ["u1", "u1", "u1", "u2"]
    await history.save(
        [JOB._replace(id=str(n), finished_s=day, owner=owner) for n, (day, owner) in enumerate(zip(days, owners, strict=True))]
    )
    first = date.fromtimestamp(NOON)
    rows = [
        (row.day.toordinal() - first.toordinal(), row.owner, row.jobs, row.prompt_tokens, row.completion_tokens)
        for row in await history.usage()
    ]
    assert rows == [(0, "u1", 2, 10, 14), (0, "u2", 1, 5, 7), (1, "u1", 1, 5, 7)]
    assert [row.owner for row in await history.usage("u2")] == ["u2"]


async def test_job_saved_again_counts_once(history: History) -> None:
    assert await history.save([JOB]) == 1
    assert await history.save([JOB, JOB._replace(id="new"), JOB]) == 1
    assert [row.jobs for row in await history.usage()] == [2]


async def test_jobs_saved_by_two_servers_at_once_count_once(database: Database) -> None:
    jobs = [JOB._replace(id=str(n)) for n in range(300)]
    saved = await asyncio.gather(*(History(database).save(jobs) for _ in range(4)))
    assert sum(saved) == 300
    assert [row.jobs for row in await History(database).usage()] == [300]


async def test_old_jobs_are_forgotten_and_their_sums_stay(history: History) -> None:
    await history.save([JOB, JOB._replace(id="young", finished_s=NOON + 1)])
    assert await history.forget_before(NOON + 0.5) == 1
    assert await history.job(JOB.id) is None
    assert await history.job("young") is not None
    assert [row.jobs for row in await history.usage()] == [2]


async def test_finished_chats_reach_the_ledger(server: LiveServer) -> None:
    database = Database(server.settings.sql_url)
    before = sum(row.jobs for row in await History(database).usage())
    async with server.http() as session, ScriptedWorker(server.url, server.worker_key):
        ids = []
        for content in ("a", "b"):
            body = {"model": "mixtral_chat", "messages": [{"role": "user", "content": content}]}
            async with session.post("/v1/jobs", json=body) as answer:
                ids.append((await answer.json())["id"])
        for job_id in ids:
            await state_of(session, job_id, "done")
    try:
        await until_saved(History(database), ids)
        usage: list[DayOfUsage] = await History(database).usage()
        assert sum(row.jobs for row in usage) == before + 2
        job = await History(database).job(ids[0])
        assert job is not None
        assert (job.state, job.finish, job.completion_tokens, job.prompt_tokens) == ("done", "stop", 10, 2)
    finally:
        await database.close()


async def test_chats_go_on_while_the_database_fails_and_the_ledger_catches_up(server: LiveServer) -> None:
    """Tables taken away under a running server stand for a database that is down."""
    database = Database(server.settings.sql_url)
    body = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}
    try:
        async with server.http() as session, ScriptedWorker(server.url, server.worker_key):
            await rename(database, "keys", "keys_away")
            await rename(database, "finished_jobs", "jobs_away")
            async with session.post("/v1/jobs", json=body) as answer:
                job_id = (await answer.json())["id"]
            await state_of(session, job_id, "done")
            async with asyncio.timeout(PATIENCE_S):
                while 'mixtral_upkeep_failures_total{task="save_history"}' not in await text_of(session, "/metrics"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            async with session.post("/v1/chat/completions", json=body) as answer:
                assert answer.status == 200
            await rename(database, "keys_away", "keys")
            await rename(database, "jobs_away", "finished_jobs")
            await until_saved(History(database), [job_id])
    finally:
        await database.close()


async def test_jobs_that_end_while_others_are_saved_wait_for_the_next_time(bench: Bench, history: History, database: Database) -> None:
    """A busy server would else spend a transaction on each few jobs."""
    for _ in range(USAGE_BATCH + 2):
        await bench.queue.cancel(await bench.put())
    late: list[str] = []

    class Meanwhile(History):
        async def save(self, jobs: Sequence[FinishedJob]) -> int:
            late.append(await bench.put())
            await bench.queue.cancel(late[-1])
            return await history.save(jobs)

    await save_history(bench.queue, Meanwhile(database), Metrics(), ENDPOINT)
    assert [row.jobs for row in await history.usage()] == [USAGE_BATCH + 3]  # with the one that ended during the first, full batch
    assert [row.id for row in (await bench.queue.usage_batch(ENDPOINT)).values()] == late[1:]
    await save_history(bench.queue, history, Metrics(), ENDPOINT)
    assert sum(row.jobs for row in await history.usage()) == USAGE_BATCH + 4


async def rename(database: Database, before: str, after: str) -> None:
    async with database.writing() as connection:
        await connection.exec_driver_sql(f"ALTER TABLE {before} RENAME TO {after}")


async def until_saved(history: History, ids: list[str]) -> None:
    async with asyncio.timeout(20):
        for job_id in ids:
            while await history.job(job_id) is None:  # noqa: ASYNC110 - another thread saves it
                await asyncio.sleep(0.02)
