"""The soak: a service under even load for a long time; its memory must not grow with the chats that it has served.

Decides how long, what is measured and what growth is too much. Leaves the load to support/chaos_load.py. No fault is done here.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from support.chaos_load import Load, Tally
from support.history import Readers
from support.house import House
from support.memory import rss_mb

ABOUT = """\
Runs two servers, two workers with a toy model, and a Redis under readers of every kind, each chat checked to the token, and looks at
the resident memory of every process all the while. Results are kept for a few seconds only, so that a service in balance holds still.
After the first third of the time, in which caches fill, no process may grow by more than a tenth and 6 MB."""

MODEL = "brisk"
KEEP_S = 3.0
FINISH_S = 240.0
ALLOWED_SHARE, ALLOWED_MB = 0.10, 6.0


@dataclass
class Soaked:
    tally: Tally
    samples: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)  # (seconds, chats so far, process → MB)
    open: int = 0

    def grown(self) -> dict[str, tuple[float, float]]:
        """Process → MB after the first third, MB at the end; each the middle of three samples."""
        third = next(at for at, (seconds, _, _) in enumerate(self.samples) if seconds >= self.samples[-1][0] / 3)
        return {name: (self._middle(name, third), self._middle(name, len(self.samples) - 3)) for name in self.samples[0][2]}

    def too_large(self) -> list[str]:
        """Processes that grew beyond what is allowed."""
        return [
            f"{name} grew from {was:.1f} to {is_now:.1f} MB"
            for name, (was, is_now) in self.grown().items()
            if is_now > was * (1 + ALLOWED_SHARE) + ALLOWED_MB
        ]

    def _middle(self, name: str, at: int) -> float:
        return sorted(memory[name] for _, _, memory in self.samples[at : at + 3])[1]


def soak(folder: Path, seconds: float) -> Soaked:
    with House(folder / "house", leases_s={MODEL: 10.0}, keep_s=KEEP_S) as house:
        return asyncio.run(_soak(folder, house, seconds))


async def _soak(folder: Path, house: House, seconds: float) -> Soaked:
    async with AsyncExitStack() as stack:
        for replica in house.replicas:
            await house.hire(replica.url, endpoint=MODEL, slots=16, token_ms=15)
        readers = await stack.enter_async_context(Readers(house.urls, house.key("client")))
        load = Load(readers, house.a.url, house.key("client"), MODEL, 1, folder / "node.log")
        soaked, enough, began = Soaked(load.tally), asyncio.Event(), time.monotonic()
        loading = asyncio.create_task(load.run(enough))
        while (now_s := time.monotonic() - began) < seconds and not loading.done():
            soaked.samples.append((now_s, load.tally.chats, _memory(house)))
            await asyncio.sleep(max(0.5, seconds / 60))
        enough.set()
        await asyncio.wait([loading], timeout=FINISH_S)
        soaked.open = len(load.tally.open)
        loading.cancel()
        for result in await asyncio.gather(loading, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return soaked


def _memory(house: House) -> dict[str, float]:
    pids = {f"server {number}": one.pid for number, one in enumerate(house.replicas)}
    pids |= {f"worker {number}": one.pid for number, one in enumerate(house.workers)} | {"redis": house.redis.pid}
    return {name: rss_mb(pid) for name, pid in pids.items()}


def tell(soaked: Soaked) -> None:
    print(
        f"\n{soaked.tally.chats:,} chats, {soaked.tally.tokens:,} tokens, {len(soaked.tally.broken)} broken, {soaked.open} open at the end"
    )
    names = list(soaked.samples[0][2])
    print("".join(f"{name:>10}" for name in ("seconds", "chats", *names)))
    for seconds, chats, memory in soaked.samples[:: max(1, len(soaked.samples) // 12)]:
        print(f"{seconds:10.0f}{chats:10,}" + "".join(f"{memory[name]:10.1f}" for name in names))
    for sentence in [*soaked.too_large(), *map(str, soaked.tally.broken[:10])]:
        print(sentence)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m faults.soak", description=ABOUT, formatter_class=form)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (%(default)g; an hour by hand)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mixtral-soak-") as folder:
        soaked = soak(Path(folder), given.seconds)
    tell(soaked)
    return 1 if soaked.too_large() or soaked.tally.broken or soaked.open else 0


if __name__ == "__main__":
    sys.exit(main())
