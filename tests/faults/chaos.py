"""The chaos run: a whole service under load, its parts killed, stopped and cut off in random order, every chat checked to the token.

Decides what runs, how long, and what is said at the end; `run` is the whole of it. Leaves faults to support/chaos_faults.py, readers to
support/chaos_load.py and the judgement of each chat to support/history.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_worker.settings import KEY_VARIABLE
from support.chaos_faults import LEASE_S, REPLICAS, WORKERS, Chaos, schedule
from support.chaos_load import GivenUp, Load, Tally
from support.fault_proxy import FaultProxy
from support.history import Readers
from support.house import House
from support.memory import rss_mb
from support.nginx import Nginx
from support.ports import free_port
from support.redis import RedisProcess, redis_binary
from support.torchrun import ROOT, Torchrun, torchrun

ABOUT = """\
Runs a whole service for a while and breaks it on purpose: three server replicas behind a real nginx (docs/nginx.conf), four workers
with the real link and step loop and a toy model whose every answer is known in advance, a real Redis with an append-only file. Six
kinds of readers ask for chats all the while: the raw native wire, the Python client, the JavaScript client, OpenAI's route streamed
and whole with an Idempotency-Key, and readers that cancel. By a schedule drawn from the seed, workers, replicas and Redis are killed
with -9, stopped and told to end, and the wires between workers and nginx are reset, half closed, silenced, delayed, or lose answers.
Redis is killed at any moment with --durability strict, and between two syncs of its log at standard, which promises no more.

At the end everything is healed, every chat is waited for, and each was compared with the model and with the log, token by token. Then
comes a table, and as the last line one JSON object. The exit status is 0 only if no chat was lost, repeated, reordered, wrong, stuck,
or given up without three proven deaths of its workers; otherwise the logs are kept and named."""

EXAMPLES = """\
examples:
  make chaos                              40 s with seed 1
  make chaos SEED=7 SECONDS=600           ten minutes of another schedule
  python -m faults.chaos --seed 7 --plan  only what seed 7 would do, and when (with PYTHONPATH=tests:server:worker:clients/python)

One seed is one schedule of faults. What they meet depends on the machine, so a run that failed is worth running again with its seed."""

MODEL, DEMO = "brisk", "mixtral_chat"
SLOTS, TOKEN_MS = 8, 20.0
FINISH_S = 240.0  # after the last fault is healed: a chat that is open then is stuck
DEMO_PROMPT = {"model": DEMO, "messages": [{"role": "user", "content": "Tell a long story: Once upon a time"}], "max_tokens": 48, "seed": 3}


@dataclass
class Outcome:
    """What a run found. `as_promised` is the exit status."""

    seed: int
    seconds: float
    tally: Tally
    faults: Counter[str]
    unproven: list[str] = field(default_factory=list)  # dead letters without three deaths
    stuck: list[str] = field(default_factory=list)
    demo_chats: int = 0
    memory: list[tuple[str, float, float]] = field(default_factory=list)  # (process, MB at the start, MB at the end)

    def counts(self) -> dict[str, object]:
        tally, broken = self.tally, Counter(one.fault for one in self.tally.broken)
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "chats": tally.chats,
            "chats_by_reader": dict(tally.by_kind),
            "demo_chats": self.demo_chats,
            "tokens": tally.tokens,
            "faults": dict(sorted(self.faults.items())),
            "kills": sum(count for fault, count in self.faults.items() if fault.endswith("kill -9")),
            "moves": tally.moves,
            "resumes": tally.resumes,
            "refusals_met": tally.refusals,
            "rewinds": tally.rewinds,
            "lost": broken["lost"],
            "repeated": broken["repeated"],
            "reordered": broken["reordered"],
            "wrong_text": broken["wrong text"],
            "failed": broken["failed"],
            "dead_lettered": len(tally.dead) - len(self.unproven),
            "dead_lettered_without_proof": len(self.unproven),
            "stuck": len(self.stuck),
        }

    @property
    def as_promised(self) -> bool:
        return not (self.tally.broken or self.unproven or self.stuck) and self.tally.chats > 0


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m faults.chaos", description=ABOUT, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--seed", type=int, default=1, help="of the schedule of faults and of the chats (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long chats are begun and faults done (%(default)g)")
    parser.add_argument("--every_s", type=float, default=1.0, help="mean time between two faults (%(default)g)")
    parser.add_argument("--durability", choices=("standard", "strict"), default="standard", help="of Redis (%(default)s)")
    parser.add_argument("--with_demo", action="store_true", help="a real `torchrun worker` with the demo model beside the toy workers")
    parser.add_argument("--plan", action="store_true", help="print the schedule of the seed and end")
    parser.add_argument("--logs", type=Path, help="keep all logs in this new folder, whatever the outcome")
    given = parser.parse_args(arguments)
    if given.plan:
        for fault in schedule(given.seed, given.seconds, given.every_s):
            print(f"{fault.at_s:7.2f} s  {fault}" + (f" for {fault.lasts_s:g} s" if fault.lasts_s else ""))
        return 0
    folder = given.logs or Path(tempfile.mkdtemp(prefix="mixtral-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run(folder, given.seed, given.seconds, given.every_s, given.durability, given.with_demo)
    tell(outcome)
    if outcome.as_promised and given.logs is None:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}", file=sys.stderr)
    return 0 if outcome.as_promised else 1


def run(folder: Path, seed: int, seconds: float, every_s: float = 1.0, durability: str = "standard", with_demo: bool = False) -> Outcome:
    """A house of its own in the folder, from its first process to its last."""
    fsync = {"standard": "everysec", "strict": "always"}[durability]
    redis = RedisProcess(redis_binary("6.2"), "--appendonly", "yes", "--appendfsync", fsync)
    with (
        House(folder / "house", replicas=REPLICAS, leases_s={MODEL: LEASE_S, DEMO: 10.0}, on=redis) as house,
        Nginx(folder / "nginx", free_port(), house.urls) as nginx,
    ):
        return asyncio.run(_run(folder, house, nginx, seed, seconds, every_s, durability == "strict", with_demo))


async def _run(
    folder: Path, house: House, nginx: Nginx, seed: int, seconds: float, every_s: float, kills_in_a_sync: bool, with_demo: bool
) -> Outcome:
    key = house.key("client")
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(FaultProxy(nginx.url)) for _ in range(WORKERS)]
        workers = [await house.hire(wire.url, endpoint=MODEL, slots=SLOTS, token_ms=TOKEN_MS) for wire in wires]
        readers = await stack.enter_async_context(Readers([nginx.url], key))
        demo = stack.enter_context(_demo_worker(house, nginx)) if with_demo else None
        load = Load(readers, nginx.url, key, MODEL, seed, folder / "node.log")
        chaos = Chaos(house, workers, wires, kills_in_a_sync)
        before = _memory(house, nginx)
        enough, began = asyncio.Event(), time.monotonic()
        tasks = [asyncio.create_task(load.run(enough)), asyncio.create_task(_tell_progress(load.tally, chaos, began, seconds))]
        demo_task = asyncio.create_task(_demo_chats(readers, nginx.url, demo, enough)) if demo else None
        tasks += [demo_task] if demo_task else []
        await chaos.run(schedule(seed, seconds, every_s), began + seconds)
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        ran_s = time.monotonic() - began
        enough.set()
        await asyncio.wait([tasks[0], *tasks[2:]], timeout=FINISH_S)
        stuck = [f"{content}: job {chat.job_id}, {chat.offset} of {chat.tokens} tokens" for content, chat in load.tally.open.items()]
        stuck += chaos.stuck
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        unproven = [dead.job_id for dead in load.tally.dead if not _is_proven(dead, chaos)]
        after = _memory(house, nginx)
        demo_chats = demo_task.result() if demo_task and not demo_task.cancelled() else 0
        memory = [(name, was, after.get(name, 0.0)) for name, was in before.items()]
        return Outcome(seed, ran_s, load.tally, chaos.done, unproven, stuck, demo_chats, memory)


def _is_proven(dead: GivenUp, chaos: Chaos) -> bool:
    """Whether the job had three leases, and workers were struck three times at least while it lived."""
    return dead.state == "dead" and dead.attempts >= 3 and sum(dead.created_s <= hit <= dead.told_s for hit in chaos.hurt) >= 3


def _memory(house: House, nginx: Nginx) -> dict[str, float]:
    """Process → MB, of those that run."""
    programs = [*house.replicas, *house.workers]
    names = [f"server {number}" for number in range(REPLICAS)] + [f"worker {number}" for number in range(WORKERS)]
    pids = {name: one.pid for name, one in zip(names, programs, strict=True) if one.is_running}
    pids |= {"redis": house.redis.pid, "nginx": nginx.pid, "this run": 0}
    return {name: rss_mb(pid) for name, pid in pids.items()}


# ---------------------------------------------------------------------------------------------- the demo model beside


def _demo_worker(house: House, nginx: Nginx):  # type: ignore[no-untyped-def]
    arguments = ["--nproc_per_node", "1", str(ROOT / "worker"), "--api_server", nginx.url]
    return torchrun(arguments, environment={KEY_VARIABLE: house.key("worker")})


async def _demo_chats(readers: Readers, url: str, worker: Torchrun, enough: asyncio.Event) -> int:
    """One chat again and again: its first answer is what each later one must be. How many there were."""
    await asyncio.to_thread(worker.log_line, "event=ready")
    answers: list[str] = []
    while not enough.is_set():
        answer = await readers.client.chat(**DEMO_PROMPT)
        answers.append(answer.text)
        assert answer.text == answers[0], f"the demo model answered {answer.text!r} after {answers[0]!r}"
    return len(answers)


# ---------------------------------------------------------------------------------------------- what is said


async def _tell_progress(tally: Tally, chaos: Chaos, began: float, seconds: float) -> None:
    """A live line on a terminal; elsewhere a line every ten seconds."""
    is_terminal = sys.stderr.isatty()
    while True:
        now_s = time.monotonic() - began
        line = (
            f"{now_s:5.0f} of {seconds:g} s  {tally.chats:6,} chats  {tally.tokens:8,} tokens  {sum(chaos.done.values()):4} faults  "
            f"{tally.moves:5,} moves  {tally.resumes:5,} resumes  {len(tally.broken)} broken  {len(tally.open):3} open  {chaos.last:<26}"
        )
        print(f"\r{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5 if is_terminal else 10.0)


def tell(outcome: Outcome) -> None:
    counts = outcome.counts()
    print(file=sys.stderr)
    for name, value in counts.items():
        for row, (part, count) in enumerate(value.items() if isinstance(value, dict) else [("", value)]):
            shown = f"{count:,}" if isinstance(count, int | float) else count
            print(f"{name.replace('_', ' ') if row == 0 else '':28} {part:22} {shown:>10}")
    print(f"\n{'memory, MB':28} {'at the start':>22} {'at the end':>10}")
    for name, was, is_now in outcome.memory:
        print(f"{name:28} {was:22.1f} {is_now:10.1f}")
    for broken in outcome.tally.broken[:20]:
        print(f"{broken.fault}: {broken}")
    for job in outcome.unproven:
        print(f"given up without three deaths: job {job}")
    for stuck in outcome.stuck[:20]:
        print(f"stuck: {stuck}")
    print(json.dumps(counts | {"as_promised": outcome.as_promised}))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
