"""Which fault strikes what and when in a chaos run, from its seed alone, and how each is done and healed.

Decides the schedule (`schedule` is pure: one seed, one schedule) and what a fault does to a house. Leaves the load to chaos_load.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from support.fault_proxy import FaultProxy
from support.house import House, Program, Replica

WORKERS, REPLICAS = 4, 3
LEASE_S = 3.0
END_S = 120.0  # a process that was asked to end and is still there then is stuck
KINDS: dict[tuple[str, str], tuple[int, float, float]] = {
    # (what, how) → (how often against others, shortest, longest time in s that it lasts or its victim stays away)
    ("worker", "kill -9"): (4, 0.0, 1.0),
    ("worker", "stop"): (3, 0.3, 1.5 * LEASE_S),
    ("worker", "sigterm"): (2, 0.0, 0.5),
    ("replica", "kill -9"): (4, 0.0, 1.5),
    ("replica", "stop"): (2, 0.3, 4.0),
    ("replica", "sigterm"): (2, 0.0, 0.5),
    ("redis", "kill -9"): (2, 0.0, 2.0),
    ("redis", "stop"): (1, 0.3, 4.0),
    ("redis", "sigterm"): (1, 0.0, 2.0),
    ("network", "reset"): (2, 0.0, 0.0),
    ("network", "half-close"): (1, 0.0, 0.0),
    ("network", "black hole"): (2, 0.3, 1.5 * LEASE_S),
    ("network", "lost answers"): (2, 1.0, 4.0),
    ("network", "latency"): (1, 1.0, 4.0),
}
COUNTS = {"worker": WORKERS, "replica": REPLICAS, "redis": 1, "network": WORKERS}


@dataclass(frozen=True)
class Fault:
    at_s: float  # since the start of the run
    what: str
    how: str
    which: int
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.what} {self.which}: {self.how}"


def schedule(seed: int, seconds: float, every_s: float) -> list[Fault]:
    """One fault about every_s until shortly before the end."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    faults, at_s = [], 1.0
    while at_s < seconds - 2.0:
        what, how = draw.choices(kinds, weights=[KINDS[kind][0] for kind in kinds])[0]
        _, shortest_s, longest_s = KINDS[what, how]
        faults.append(Fault(round(at_s, 2), what, how, draw.randrange(COUNTS[what]), round(draw.uniform(shortest_s, longest_s), 2)))
        at_s += draw.uniform(0.4, 1.6) * every_s
    return faults


@dataclass
class Chaos:
    """Strikes a house by schedule. One victim bears one fault at a time."""

    house: House
    workers: list[Program]
    wires: list[FaultProxy]  # one between each worker and the balancer
    kills_in_a_sync: bool = False  # Redis at any moment, which `strict` alone survives without a loss
    done: Counter[str] = field(default_factory=Counter)
    last: str = ""
    hurt: list[float] = field(default_factory=list)
    """When (unix time) faults struck that may cost a worker its lease: at workers, at their wires, and at replicas that stood still."""
    stuck: list[str] = field(default_factory=list)
    _locks: dict[tuple[str, int], asyncio.Lock] = field(default_factory=dict)

    async def run(self, faults: list[Fault], until: float) -> None:
        """Until every fault has struck and is healed, or until (time.monotonic) is over.

        A fault whose victim is not well yet holds up all that follow: on a slow machine there are fewer of them, but they never pile up
        until nobody is left to serve.
        """
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                await asyncio.sleep(max(0.0, began + fault.at_s - time.monotonic()))
                victim = self._locks.setdefault((fault.what, fault.which), asyncio.Lock())
                await victim.acquire()
                if time.monotonic() > until:
                    victim.release()
                    return
                tasks.create_task(self._strike(fault, victim))

    async def _strike(self, fault: Fault, victim: asyncio.Lock) -> None:
        try:
            self.last = str(fault)
            self.done[f"{fault.what} {fault.how}"] += 1
            if fault.what in ("worker", "network") or (fault.what, fault.how) == ("replica", "stop"):
                self.hurt.append(time.time())
            match fault.what:
                case "worker":
                    await self._program(self.workers[fault.which], fault)
                case "replica":
                    await self._program(self.house.replicas[fault.which], fault)
                case "redis":
                    await self._redis(fault)
                case "network":
                    await self._network(self.wires[fault.which], fault)
        finally:
            victim.release()

    async def _program(self, program: Program, fault: Fault) -> None:
        if fault.how == "stop":
            await stopped_for(program.pid, fault.lasts_s)
            return
        if fault.how == "kill -9":
            program.kill()
        else:
            await self._ended(program, fault)
        await asyncio.sleep(fault.lasts_s)
        await self._started(program)

    async def _ended(self, program: Program, fault: Fault) -> None:
        program.signal(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while program.is_running:
            if time.monotonic() > deadline:
                self.stuck.append(f"{fault} did not end within {END_S:g} s; where it stood is in its log")
                program.signal(signal.SIGABRT)
                await program.ended()
            await asyncio.sleep(0.05)

    async def _started(self, program: Program) -> None:
        """Running, and for a replica also serving; it may take its time while Redis is away."""
        while True:
            program.start()
            while program.is_running:
                if not isinstance(program, Replica) or await asyncio.to_thread(program.readiness) != 0:
                    return
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)  # it ended: a replica that finds no Redis says so and leaves, as under any supervisor

    async def _redis(self, fault: Fault) -> None:
        redis = self.house.redis
        if fault.how == "stop":
            await stopped_for(redis.pid, fault.lasts_s)
            return
        if fault.how == "kill -9" and not self.kills_in_a_sync:
            await asyncio.to_thread(redis.crash)
        else:
            await asyncio.to_thread(redis.stop, signal.SIGKILL if fault.how == "kill -9" else signal.SIGTERM)
        await asyncio.sleep(fault.lasts_s)
        await asyncio.to_thread(redis.start)

    async def _network(self, wire: FaultProxy, fault: Fault) -> None:
        match fault.how:
            case "reset":
                await wire.reset()
            case "half-close":
                wire.half_close()
            case "black hole":
                wire.black_hole()
                await asyncio.sleep(fault.lasts_s)
                wire.heal()
                await wire.reset()
            case "lost answers":
                wire.lose_every = 7
                await asyncio.sleep(fault.lasts_s)
                wire.lose_every = 0
            case "latency":
                wire.latency_s = 0.05
                await asyncio.sleep(fault.lasts_s)
                wire.latency_s = 0.0


async def stopped_for(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
