"""What a long queue costs: time of each step of the queue at every depth, and Redis's memory by chat.

Decides how the queue is filled and which steps are timed. All of it goes through JobQueue, as a server's own requests do.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mixtral_client.protocol import ChatMessage, Frame, JobSpec, SessionRequest, TurnRequest
from mixtral_server.bench.house import ENDPOINT, MOST_WAITING, open_redis
from mixtral_server.bench.measures import Row, Say, in_child, percentile
from mixtral_server.queue import JobQueue, QueueLimits
from mixtral_server.records import LeasedJob
from mixtral_server.redis_nodes import open_url

USERS = 1000
FILLERS = 2
AT_ONCE = 32  # puts of one filler
TIMED = 300  # of each step at each depth
SPEC = JobSpec(messages=[ChatMessage(role="user", content="Tell a long story: Once upon a time")], max_tokens=500, seed=1)
LOGIN = SessionRequest(
    endpoint=ENDPOINT, name="bench", protocol=1, version="1", model="none", device="none", max_slots=10_000, max_seq_len=1 << 20
)


@asynccontextmanager
async def open_queue(url: str) -> AsyncIterator[tuple[JobQueue, Any]]:
    limits = QueueLimits(
        max_waiting=MOST_WAITING,
        max_waiting_per_user=MOST_WAITING,
        max_waiting_tokens=10**12,
        max_waiting_tokens_per_user=10**12,
        lease_s=300,
    )
    async with open_url(url) as redis:
        queue = JobQueue(redis, {ENDPOINT: limits})
        await queue.start()
        yield queue, redis


def fill(url: str, count: int) -> list[str]:
    """Put so many jobs of USERS users, AT_ONCE at a time. Returns a sample of their ids."""
    return asyncio.run(_fill(url, count))


async def _fill(url: str, count: int) -> list[str]:
    sample: list[str] = []
    numbers = iter(range(count))

    async def put(queue: JobQueue) -> None:
        for number in numbers:
            job = await queue.put(ENDPOINT, f"user-{number % USERS}", SPEC)
            if number % max(1, count // TIMED) == 0:
                sample.append(job.job_id)

    async with open_queue(url) as (queue, _):
        await asyncio.gather(*(put(queue) for _ in range(AT_ONCE)))
    return sample


async def depth(say: Say, *, most: int) -> list[Row]:
    """Time of put, position, claim and cancel by one caller with 1,000, 10,000, … waiting jobs, as the caller sees it."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="mixtral-bench-") as folder:
        async with open_redis(Path(folder)) as process, open_queue(process.url) as (queue, redis):
            empty = await used_memory(redis)
            waiting = 0
            for wanted in (size for size in (1000, 10_000, 100_000, 1_000_000) if size <= most):
                say(f"depth: filling to {wanted:,} waiting jobs")
                began = time.monotonic()
                share = (wanted - waiting) // FILLERS
                samples = await asyncio.gather(*(in_child(fill, process.url, share) for _ in range(FILLERS)))
                seconds = time.monotonic() - began
                waiting += share * FILLERS
                memory = await used_memory(redis) - empty
                row: Row = {"waiting": waiting, "filled_jobs_per_s": round(share * FILLERS / seconds)}
                row |= await _times(queue, [job for sample in samples for job in sample])
                rows.append(row | {"redis_bytes_per_waiting_job": round(memory / waiting)})
                waiting = (await queue.depth(ENDPOINT)).waiting
    return rows


async def _times(queue: JobQueue, sample: list[str]) -> Row:
    session = (await queue.open_session(LOGIN, "bench")).session
    turns = iter(range(1, 1 << 30))
    held: list[tuple[str, int]] = []

    async def claim() -> None:
        answer = await queue.turn(TurnRequest(session=session, turn=next(turns), holding=held, room=1), "bench")
        held.extend((job.id, job.attempt) for job in answer.jobs)
        assert len(answer.jobs) == 1

    random.Random(1).shuffle(sample)
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: queue.put(ENDPOINT, f"user-{random.randrange(USERS)}", SPEC),
        "position": lambda: queue.position(random.choice(sample)),
        "claim": claim,
        "cancel": lambda: queue.cancel(sample.pop()),
    }
    row: Row = {}
    for name, step in steps.items():
        times = []
        for _ in range(min(TIMED, len(sample)) if name == "cancel" else 50 if name == "claim" else TIMED):
            began = time.perf_counter()
            await step()
            times.append((time.perf_counter() - began) * 1e6)
        row |= {f"{name}_p50_us": round(percentile(times, 0.5)), f"{name}_p99_us": round(percentile(times, 0.99))}
    await queue.close_session(session, "bench")
    return row


# ---------------------------------------------------------------------------------------------- finished chats


async def finished(say: Say, *, chats: int, tokens: int) -> list[Row]:
    """Redis's memory for a chat that has ended, prompt, record and log together, while its result is kept."""
    rows = []
    for per_frame in (1, 8):
        say(f"memory: {chats:,} finished chats of {tokens} tokens, {per_frame} a frame")
        with tempfile.TemporaryDirectory(prefix="mixtral-bench-") as folder:
            async with open_redis(Path(folder)) as process, open_queue(process.url) as (queue, redis):
                empty = await used_memory(redis)
                await _finish(queue, chats, tokens, per_frame)
                while batch := await queue.usage_batch(ENDPOINT):
                    await queue.usage_ack(ENDPOINT, batch)
                memory = await used_memory(redis) - empty
        rows.append({"tokens": tokens, "tokens_per_frame": per_frame, "redis_bytes_per_finished_chat": round(memory / chats)})
    return rows


async def _finish(queue: JobQueue, chats: int, tokens: int, per_frame: int) -> None:
    session = (await queue.open_session(LOGIN, "bench")).session
    for number in range(chats):
        await queue.put(ENDPOINT, f"user-{number % USERS}", SPEC)
    turn, left = 0, chats
    jobs: Sequence[LeasedJob] = ()
    while left:
        turn += 1
        holding = [(job.id, job.attempt) for job in jobs]
        jobs = (await queue.turn(TurnRequest(session=session, turn=turn, holding=holding, room=min(100, left)), "bench")).jobs
        left -= len(jobs)
        for offset in range(1, tokens + 1, per_frame):
            turn += 1
            count = min(per_frame, tokens + 1 - offset)
            is_last = offset + count > tokens
            frames = [
                Frame(
                    job=job.id,
                    attempt=job.attempt,
                    offset=offset,
                    ids=[12_345] * count,
                    texts=[" word"] * count,
                    finish="stop" if is_last else None,
                )
                for job in jobs
            ]
            holding = [] if is_last else [(job.id, job.attempt) for job in jobs]
            await queue.turn(TurnRequest(session=session, turn=turn, holding=holding, frames=frames), "bench")
        jobs = []


async def used_memory(redis: Any) -> int:
    return int((await redis.info("memory"))["used_memory"])
