"""--chaos: a house of our own, broken while a load runs.

Decides what the house is (two server replicas on one data folder with its Redis, two workers with the demo model), what is killed
when, and what a kill cost: of each chat that was streaming, the longest pause until its next token. Chats are
read by the client that resumes (mixtral_client) and compared with the log, so a lost or doubled token fails its chat. Leaves the load
to load.py.

A kill is SIGKILL, and the killed part is started again at once, as a supervisor would. A replica may take the embedded Redis
with it. Nothing is killed while another part is not back: there is always one replica and one worker.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

from mixtral_benchmark.house import House
from mixtral_benchmark.load import Clock
from mixtral_benchmark.measure import Chat, Failure, distribution
from mixtral_benchmark.prompts import Ask
from mixtral_benchmark.verify import Transcript
from mixtral_benchmark.wires import ChatFailed, NativeWire
from mixtral_client.client import MixtralClient
from mixtral_client.errors import JobFailed

REPLICAS = WORKERS = 2


@dataclass
class Incident:
    """One kill: when, of what, and when that was back."""

    what: str
    at_s: float
    back_s: float | None = None


async def break_things(house: House, clock: Clock, every_s: float, seed: int, incidents: list[Incident]) -> None:
    """Kill a part every every_s, each once before any twice. Runs until cancelled. Raises HouseError if one does not come back."""
    draw = random.Random(seed)
    async with aiohttp.ClientSession() as http:
        while True:
            for part in draw.sample(house.parts, len(house.parts)):
                await clock.sleep_until(clock.now() + every_s)
                incident = Incident(part.name, clock.now())
                incidents.append(incident)
                await part.kill()
                await part.start()
                for each in house.parts:  # a killed replica takes Redis with it, and its worker is away until it is back
                    await each.ready(http)
                incident.back_s = clock.now()


# ---------------------------------------------------------------------------------------------- reading through it


class ResumingWire(NativeWire):
    """The native wire as our own client reads it: over as many connections and replicas as it takes. Always compared with the log."""

    def __init__(self, clients: Sequence[MixtralClient], *more: Any) -> None:
        super().__init__(*more, verify=True)
        self._clients = clients

    async def have(self, ask: Ask, chat: Chat) -> None:
        client = self._clients[chat.index % len(self._clients)]  # half of the readers at each replica
        options = {name: value for name, value in ask.body(self._target.endpoint).items() if name != "messages"}
        transcript = Transcript(keep_text=True)
        async with client.stream(list(ask.messages), **options) as stream:  # type: ignore[arg-type]
            try:
                async for event in stream:
                    self._event(chat, self._now(), event, transcript)
            except JobFailed as failed:
                raise ChatFailed(Failure(failed.code, failed.message)) from failed
            chat.job = stream.job_id
        view = await client.job(chat.job)
        if failure := transcript.compare(view, chat.usage_tokens):
            raise ChatFailed(failure)


@contextlib.asynccontextmanager
async def clients_of(house: House) -> AsyncIterator[list[MixtralClient]]:
    """One client for each replica to begin with; each turns to the others when its own is gone."""
    async with contextlib.AsyncExitStack() as stack:
        turns = [house.urls[i:] + house.urls[:i] for i in range(len(house.urls))]
        yield [await stack.enter_async_context(MixtralClient(urls, house.key)) for urls in turns]


# ---------------------------------------------------------------------------------------------- what it cost


def costs(incidents: Sequence[Incident], chats: Sequence[Chat], started_s: float) -> list[dict[str, Any]]:
    """A row for each kill: how many chats were streaming, and how long each paused for it (its longest wait for a token that began
    before the killed part was back and ended after the kill)."""
    rows = []
    for incident in incidents:
        until_s = incident.at_s if incident.back_s is None else incident.back_s
        pauses = distribution(_pause_s(chat, incident.at_s, until_s) for chat in chats)
        rows.append(
            {
                "what": incident.what,
                "at_s": round(incident.at_s - started_s, 3),
                "back_after_s": None if incident.back_s is None else round(incident.back_s - incident.at_s, 3),
                "streaming": pauses.count if pauses else 0,
                "median_pause_s": pauses and round(pauses.percentiles[50], 3),
                "max_pause_s": pauses and round(pauses.highest, 3),
            }
        )
    return rows


def _pause_s(chat: Chat, from_s: float, until_s: float) -> float | None:
    """None for a chat that was not streaming at from_s."""
    times = [arrival.at_s for arrival in chat.arrivals]
    if not times or times[0] > from_s or times[-1] <= from_s:
        return None
    return max(after - before for before, after in pairwise(times) if after > from_s and before <= until_s)
