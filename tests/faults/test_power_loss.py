"""The table of what we promise (docs/reliability.md), word for word: Redis killed, and its host without power, at each durability.

Clients, a worker and readers of the relay write down what they were answered; then Redis dies, its files are cut to what a power loss
leaves, it starts again, and what was acknowledged is looked for in it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from mixtral_client.protocol import ErrorEvent, JobEvent, QueuedEvent
from mixtral_server.cursor import Tokens
from mixtral_server.errors import JobNotFound, RedisUnavailable, SessionLapsed
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.redis_server import Durability, EmbeddedRedis
from mixtral_server.relay import Relay
from support.http import PATIENCE_S, until
from support.power_loss import PowerLoss
from support.queue_bench import ENDPOINT, Bench, frame
from support.redis import VERSIONS, connect, redis_binary

TOKENS = 40_000


@dataclass
class Acknowledged:
    """What someone outside has been told."""

    jobs: list[str] = field(default_factory=list)  # 202 to a client
    tokens: dict[str, int] = field(default_factory=dict)  # job → last offset whose turn was answered to the worker
    shown: dict[str, int] = field(default_factory=dict)  # job → last offset that a reader has
    told: list[JobEvent] = field(default_factory=list)  # to readers, beside tokens and places in the queue

    def copy(self) -> Acknowledged:
        return Acknowledged(list(self.jobs), dict(self.tokens), dict(self.shown))

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


@dataclass
class Scene:
    embedded: EmbeddedRedis
    bench: Bench
    relay: Relay
    seen: Acknowledged
    power: PowerLoss
    folder: Path

    async def work(self) -> None:
        """Jobs put, their tokens appended in turns, until Redis is gone."""
        try:
            worker = await self.bench.worker()
            for _ in range(3):
                self.seen.jobs.append(await self.bench.put(max_tokens=TOKENS))
            jobs = await worker.take(3)
            for offset in range(1, TOKENS, 2):
                await worker.turn(*(frame(job, offset, "ab") for job in jobs))
                self.seen.tokens |= {job.id: offset + 1 for job in jobs}
                if offset % 20 == 1:
                    self.seen.jobs.append(await self.bench.put(f"user{offset}"))
        except (RedisUnavailable, SessionLapsed):
            pass

    async def read(self, number: int) -> None:
        await until(lambda: len(self.seen.jobs) > number)
        job = self.seen.jobs[number]

        def show(tokens: Tokens) -> bool:
            self.seen.shown[job] = tokens.offset + len(tokens) - 1
            return True

        with self.relay.follow(job) as follower:
            follower.sink = lambda tokens: partial(show, tokens)
            while not follower.is_over:
                for told in await follower.batch(1.0):
                    if isinstance(told, Tokens):
                        show(told)
                    elif not isinstance(told.event, QueuedEvent):
                        self.seen.told.append(told.event)

    async def reach(self, more_tokens: int) -> None:
        """Until the worker has been answered for so many more."""
        total = self.seen.total
        await until(lambda: self.seen.total >= total + more_tokens)

    async def between_syncs(self) -> None:
        """Until nothing that was answered waits for a background sync to end."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                facts = await self.bench.redis.info("persistence")
                if not facts["aof_pending_bio_fsync"] and not facts["aof_buffer_length"]:
                    return

    def end_redis(self, *, power: bool, forgets_renames: bool = True) -> None:
        """kill -9; with power, its files keep what was synced. In one step of the event loop: nobody starts it again meanwhile."""
        pid = self.embedded.pid
        assert pid is not None
        self.power.slow(0)  # for the Redis that comes after it
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while is_alive(pid):
            assert time.monotonic() < deadline
        if power:
            self.power.cut(self.folder, forgets_renames=forgets_renames)

    async def found(self, wanted: Acknowledged) -> tuple[int, int, int]:
        """How much of what was acknowledged is no more: jobs, tokens answered to the worker, tokens shown to readers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self.bench.queue.depth(ENDPOINT)
                    break
                except RedisUnavailable:
                    await asyncio.sleep(0.05)
        lengths: dict[str, int] = {}
        for job in wanted.jobs:
            try:
                lengths[job] = (await self.bench.queue.read(job)).n
            except JobNotFound:
                continue
        lost_tokens, lost_shown = (
            sum(max(0, offset - lengths.get(job, 0)) for job, offset in told.items()) for told in (wanted.tokens, wanted.shown)
        )
        return len(wanted.jobs) - len(lengths), lost_tokens, lost_shown


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability, version: str) -> AsyncIterator[Scene]:
    (tmp_path / "shim").mkdir()
    power = PowerLoss(tmp_path / "shim")
    for name, value in power.environment.items():
        monkeypatch.setenv(name, value)
    async with (
        EmbeddedRedis(tmp_path, durability=durability, binary=redis_binary(version)) as embedded,
        connect(embedded.url) as redis,
        Relay(redis, queue := JobQueue(redis, {ENDPOINT: QueueLimits(lease_s=60)})) as relay,
    ):
        await queue.start()
        one = Scene(embedded, Bench(queue, redis), relay, Acknowledged(), power, tmp_path / "redis")
        tasks = [asyncio.create_task(work) for work in (one.work(), *map(one.read, range(3)))]
        try:
            await one.reach(200)
            await until(lambda: len(one.seen.shown) == 3)
            yield one
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    said: str = request.param
    return said


@pytest.mark.parametrize("durability", ["standard", "strict"])
async def test_killed_redis_loses_nothing_that_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, durability: Durability
) -> None:
    """At standard: outside of the moment, once a second, in which the log is synced."""
    async with scene(tmp_path, monkeypatch, durability, version) as one:
        if durability == "standard":
            await one.between_syncs()
        one.end_redis(power=False)
        assert await one.found(one.seen.copy()) == (0, 0, 0)


async def test_at_strict_a_kill_in_the_middle_of_a_sync_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    async with scene(tmp_path, monkeypatch, "strict", version) as one:
        one.power.slow(60)
        await one.reach(12)
        one.end_redis(power=False)
        assert await one.found(one.seen.copy()) == (0, 0, 0)


async def test_at_standard_a_kill_in_the_middle_of_a_sync_loses_at_most_what_came_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Redis answers meanwhile, and writes nothing to its log."""
    async with scene(tmp_path, monkeypatch, "standard", version) as one:
        one.power.slow(1500)  # the next sync begins as soon as one has ended
        syncs = one.power.syncs
        await until(lambda: one.power.syncs >= syncs + 2)
        safe, syncs = one.seen.copy(), one.power.syncs
        await until(lambda: one.power.syncs > syncs)
        await one.reach(30)
        one.end_redis(power=False)
        after = one.seen.copy()
        assert await one.found(safe) == (0, 0, 0)
        assert (await one.found(after))[1] > 0, "a kill that loses nothing shows that no sync was on its way"


async def test_at_standard_a_kill_loses_2_s_at_most_however_long_a_sync_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    async with scene(tmp_path, monkeypatch, "standard", version) as one:
        one.power.slow(60_000)
        await asyncio.sleep(2 * 1.0)  # a sync that will not end has begun
        safe = one.seen.copy()
        await asyncio.sleep(2 * 2.0)  # what is tested is that so much time is enough, twice over
        one.end_redis(power=False)
        assert await one.found(safe) == (0, 0, 0)


async def test_at_strict_a_power_loss_loses_nothing_that_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    async with scene(tmp_path, monkeypatch, "strict", version) as one:
        one.end_redis(power=True)
        assert await one.found(one.seen.copy()) == (0, 0, 0)


async def test_at_strict_a_log_that_was_just_rewritten_is_as_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """A new file takes the old one's name. Redis 7 syncs the folder then; 6.2 leaves that to the file system's journal."""
    async with scene(tmp_path, monkeypatch, "strict", version) as one:
        redis = one.bench.redis
        await redis.bgrewriteaof()
        is_done = False
        async with asyncio.timeout(PATIENCE_S):
            while not is_done:
                facts = await redis.info("persistence")
                is_done = not facts["aof_rewrite_in_progress"] and facts["aof_last_bgrewrite_status"] == "ok"
        await one.reach(60)
        one.end_redis(power=True, forgets_renames=version != "6.2")
        assert await one.found(one.seen.copy()) == (0, 0, 0)


async def test_at_standard_a_power_loss_loses_at_most_what_came_after_the_last_sync_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    async with scene(tmp_path, monkeypatch, "standard", version) as one:
        safe, syncs = one.seen.copy(), one.power.syncs
        await until(lambda: one.power.syncs >= syncs + 2)  # the first may have begun before we looked
        await one.reach(30)
        one.end_redis(power=True)
        after = one.seen.copy()
        assert await one.found(safe) == (0, 0, 0)
        assert (await one.found(after))[1] > 0, "a power loss that loses nothing at standard shows that none was simulated"


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
async def test_at_memory_a_redis_that_ends_loses_all_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, power: bool
) -> None:
    async with scene(tmp_path, monkeypatch, "memory", version) as one:
        one.end_redis(power=power)
        wanted = one.seen.copy()
        assert (await one.found(wanted))[:2] == (len(wanted.jobs), wanted.total)
        await until(lambda: len(one.seen.told) == 3)  # its readers hear of it
        assert {(event.event, event.error.code) for event in one.seen.told if isinstance(event, ErrorEvent)} == {("error", "job_not_found")}
        assert await one.bench.put()


async def test_at_strict_no_answer_and_no_token_leaves_redis_before_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Each sync takes a while, so power is lost in the middle of one: what left before its end would be missed afterwards."""
    async with scene(tmp_path, monkeypatch, "strict", version) as one:
        one.power.slow(60)
        await one.reach(12)
        one.end_redis(power=True)
        assert await one.found(one.seen.copy()) == (0, 0, 0)
