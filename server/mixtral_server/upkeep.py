"""The work beside the requests: leases reaped, finished jobs carried to the database, keys kept fresh, the event loop watched.

Decides how often each is done and what is said when a store is away. Leaves what is done to queue.py, history.py and auth.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from mixtral_server.answers import word
from mixtral_server.auth import KeyRing
from mixtral_server.database import DatabaseError
from mixtral_server.errors import ServiceError
from mixtral_server.history import History
from mixtral_server.metrics import Metrics
from mixtral_server.queue import USAGE_BATCH, JobQueue
from mixtral_server.routes.service import Service

log = logging.getLogger(__name__)

LONGEST_STALL_S = 0.1


def upkeep_of(service: Service, history: History, ring: KeyRing) -> list[Coroutine[Any, Any, None]]:
    """The work that goes on as long as the server does."""
    days = service.settings.history_days

    async def forget() -> None:
        if days:
            await history.forget_before(service.now_s() - days * 86_400)

    return [
        ring.keep_fresh(),
        watch_loop(service.metrics),
        # Each endpoint by itself: in a Cluster, the node of one may be away while the others answer.
        *(every(1.0, "reap", partial(reap, service, endpoint), service.metrics) for endpoint in service.endpoints),
        *(
            every(1.0, "save_history", partial(save_history, service.queue, history, service.metrics, endpoint), service.metrics)
            for endpoint in service.endpoints
        ),
        every(3600.0, "forget_history", forget, service.metrics),
    ]


async def every(period_s: float, name: str, work: Callable[[], Awaitable[None]], metrics: Metrics) -> None:
    """Do work again and again. A store that is away is said once when it goes and once when it is back."""
    is_away = False
    while True:
        try:
            await work()
        except (ServiceError, *DatabaseError) as error:
            metrics.upkeep_failures.labels(name).inc()
            if not is_away:
                log.warning("event=upkeep_failed task=%s error=%s", name, word(str(error) or type(error).__name__))
            is_away = True
        else:
            if is_away:
                log.info("event=upkeep_back task=%s", name)
            is_away = False
        await asyncio.sleep(period_s)


async def reap(service: Service, endpoint: str) -> None:
    more = True
    while more:
        reaped = await service.queue.reap(endpoint)
        more = reaped.more
        if reaped.lapsed_sessions or reaped.dead or reaped.shifted_s:
            log.warning(
                "event=reaped endpoint=%s lapsed_sessions=%d requeued=%d dead=%d expired=%d shifted_s=%.1f",
                endpoint,
                reaped.lapsed_sessions,
                reaped.requeued,
                reaped.dead,
                reaped.expired,
                reaped.shifted_s,
            )


async def save_history(queue: JobQueue, history: History, metrics: Metrics, endpoint: str) -> None:
    """Carry finished jobs from the queue's outbox to the database, and only then take them out of the outbox.

    What ends meanwhile stays for the next time: a transaction for each few jobs would cost more than the jobs.
    """
    while True:
        batch = await queue.usage_batch(endpoint)
        saved = await history.save(list(batch.values()))
        await queue.usage_ack(endpoint, batch.keys())
        metrics.ledger_saved.inc(saved)
        if len(batch) < USAGE_BATCH:
            return


async def watch_loop(metrics: Metrics) -> None:
    """Notice when the event loop stands still: every stream of this server stands still with it."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + 0.1
        await asyncio.sleep(0.1)
        late_s = max(0.0, clock() - due)
        metrics.loop_lag_seconds.set(late_s)
        if late_s > LONGEST_STALL_S:
            metrics.loop_blocked.inc()
            log.warning("event=loop_blocked ms=%.0f", late_s * 1000)
