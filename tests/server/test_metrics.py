"""Numbers that no request shows: the event loop, the ledger's way, tasks that fail and come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mixtral_server.errors import RedisUnavailable
from mixtral_server.metrics import Metrics, QueueNumbers, WorkerNumbers
from mixtral_server.tasks import end
from mixtral_server.upkeep import every, watch_loop
from support.http import until


def value(metrics: Metrics, name: str) -> float:
    lines = metrics.render({}).decode().splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")))


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await end([task])


async def test_event_loop_that_stood_still_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    async with running(watch_loop(metrics)):
        await asyncio.sleep(0)  # the watch has begun its nap of 100 ms
        time.sleep(0.35)  # noqa: ASYNC251 - blocking the loop is what is tested
        await until(lambda: value(metrics, "mixtral_loop_blocked_total") >= 1)
    assert "event=loop_blocked ms=" in caplog.text


async def test_task_beside_the_requests_outlives_a_store_that_is_away_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    rounds: list[int] = []

    async def work() -> None:
        rounds.append(len(rounds))
        if 2 <= len(rounds) <= 5:
            raise RedisUnavailable("Redis does not answer")

    caplog.set_level("INFO")
    async with running(every(0.001, "reap", work, metrics)) as task:
        await until(lambda: len(rounds) > 6)
        assert not task.done()
    assert value(metrics, 'mixtral_upkeep_failures_total{task="reap"}') == 4
    assert caplog.text.count("event=upkeep_failed task=reap") == 1
    assert caplog.text.count("event=upkeep_back task=reap") == 1


async def test_mistake_in_a_task_beside_the_requests_is_not_swallowed() -> None:
    async def work() -> None:
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        await every(0.001, "reap", work, Metrics())


def test_queue_numbers_are_those_of_this_scrape_alone() -> None:
    metrics = Metrics()
    numbers = QueueNumbers(
        waiting=3,
        waiting_tokens=30,
        running=1,
        workers=1,
        users_waiting=2,
        unsaved_usage=0,
        dead_letters=0,
        tokens=5,
        ended={"done": 4},
        eta_errors_within={0.5: 2, math.inf: 3},
        eta_errors_sum_s=7.5,
        eta_late=1,
    )
    shown = metrics.render({"mixtral_chat": numbers}).decode()
    assert 'mixtral_queue_waiting{endpoint="mixtral_chat"} 3.0' in shown
    assert 'mixtral_jobs_ended_total{endpoint="mixtral_chat",state="done"} 4.0' in shown
    assert 'mixtral_queue_waiting_tokens{endpoint="mixtral_chat"} 30.0' in shown
    assert 'mixtral_queue_eta_error_seconds_bucket{endpoint="mixtral_chat",le="0.5"} 2.0' in shown
    assert 'mixtral_queue_eta_error_seconds_count{endpoint="mixtral_chat"} 3.0' in shown
    assert 'mixtral_queue_eta_error_seconds_sum{endpoint="mixtral_chat"} 7.5' in shown
    assert 'mixtral_queue_eta_late_total{endpoint="mixtral_chat"} 1.0' in shown
    assert "mixtral_chat" not in metrics.render({}).decode()


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.readers_dropped.inc()
    assert value(second, "mixtral_readers_dropped_total") == 0


def test_a_workers_words_are_shown_only_where_they_are_known_numbers() -> None:
    said = {
        "running": 3,
        "bandwidth_share": 0.5,
        "tokens_total": float("inf"),
        "jobs_total": "many",
        "slots": True,
        "steps_total": 10**400,
        "expert_imbalance": None,
        "waiting": [],
        "their_own_idea": 1,
        "forward_s_total": 2.5,
    }
    text = Metrics().render({}, [WorkerNumbers("mixtral_chat", 'a "box"\n', said)]).decode()
    shown = [line for line in text.splitlines() if line.startswith("mixtral_worker_")]
    labels = 'endpoint="mixtral_chat",worker="a \\"box\\"\\n"'
    assert shown == [
        f"mixtral_worker_running{{{labels}}} 3.0",
        f"mixtral_worker_bandwidth_share{{{labels}}} 0.5",
        'mixtral_worker_step_seconds_total{endpoint="mixtral_chat",part="forward",worker="a \\"box\\"\\n"} 2.5',
    ]


def test_workers_of_one_name_are_told_apart_and_never_by_their_session() -> None:
    workers = [WorkerNumbers(endpoint, "box", {"running": i}) for i, endpoint in enumerate(("a", "b", "a"))]
    text = Metrics().render({}, workers).decode()
    assert [line for line in text.splitlines() if line.startswith("mixtral_worker_running{")] == [
        'mixtral_worker_running{endpoint="a",worker="box"} 0.0',
        'mixtral_worker_running{endpoint="b",worker="box"} 1.0',
        'mixtral_worker_running{endpoint="a",worker="box #2"} 2.0',
    ]
