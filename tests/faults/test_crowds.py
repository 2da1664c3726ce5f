"""Many at once: idle connections that would take every place, and readers that all come back in one moment."""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mixtral_client import Retry
from mixtral_client.errors import ConnectionLost
from mixtral_client.protocol import event_id, ids_crc
from mixtral_client.resume import Patience
from support.history import Chat, Readers
from support.house import STEADY, House, Replica
from support.http import until
from support.toy_model import answer_to

ENOUGH_FILES = 12_000


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """As many open files as this account may have, for this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= ENOUGH_FILES, f"this account may open {hard:,} files; these tests need {ENOUGH_FILES:,}: raise 'ulimit -Hn'"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------------------------------------- idle connections


def metric(replica: Replica, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)} ([\d.e+]+)$", replica.metrics(), re.M))


def idle(replica: Replica, address: str, count: int) -> list[socket.socket]:
    """So many connections from one address that say nothing."""
    place = (urlsplit(replica.url).hostname or "", replica.port)
    return [socket.create_connection(place, timeout=60, source_address=(address, 0)) for _ in range(count)]


@pytest.mark.timeout(180)
async def test_ten_thousand_idle_connections_are_capped_per_address_and_in_all_and_others_are_served(tmp_path: Path) -> None:
    flags = ("--max_connections", "8500", "--max_connections_per_address", "2000", "--header_timeout_s", "120")
    refused = 'mixtral_connections_refused_total{why="%s"}'
    with House(tmp_path / "house", replicas=1, more_flags=flags) as house:
        held: list[socket.socket] = []
        try:
            await house.hire(endpoint=STEADY)
            async with Readers(house.urls, house.key("client")) as readers:
                for number in (2, 3, 4, 5):  # the readers and the worker are at 127.0.0.1
                    held += await asyncio.to_thread(idle, house.a, f"127.0.0.{number}", 2500)
                await until(lambda: metric(house.a, refused % "max_connections_per_address") == 4 * 500)
                assert metric(house.a, "mixtral_connections") < 4 * 2000 + 50
                await readers.ended(*(readers.start(f"chat {number}", tokens=10, model=STEADY) for number in range(3)))
                late = readers.start("begun before the last place was taken", tokens=60, model=STEADY)
                await late.reach(3)
                held += await asyncio.to_thread(idle, house.a, "127.0.0.6", 1500)
                await until(lambda: metric_by_held_connection(readers, house, refused % "max_connections") > 900)
                await readers.ended(late)
        finally:
            for one in held:
                one.close()
        async with Readers(house.urls, house.key("client")) as readers:
            await readers.ended(readers.start("when they are gone", tokens=10, model=STEADY))


def metric_by_held_connection(readers: Readers, house: House, name: str) -> float:
    try:
        return metric(house.a, name)
    except OSError:  # every place is taken, this asker's too: that is what is waited for
        return float("inf")


# ---------------------------------------------------------------------------------------------- readers that come back


@dataclass
class Follower:
    """One reader of a chat over a bare socket; comes back as our clients do. Keeps the ids of what it was told."""

    chat: Chat
    ids: list[str] = field(default_factory=list)
    is_done: bool = False
    connections: int = 0
    was_in: bool = False  # it has had an answer
    cut_at_s: float = 0.0
    back_at_s: float = 0.0

    async def follow(self, urls: list[str], key: str) -> None:
        patience = Patience(Retry(first_wait_s=1.0), CROWD_HANGS_S)
        while not self.is_done:
            try:
                await self._connection(urls[self.connections % len(urls)], key)
            except (OSError, EOFError):
                if self.was_in:  # else its replica was too busy to take it: it asks there again
                    self.cut_at_s = self.cut_at_s or time.monotonic()
                    self.connections += 1
                await asyncio.sleep(patience.wait_s(ConnectionLost("cut")))

    async def _connection(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            head = f"GET /v1/jobs/{self.chat.job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            writer.write(f"{head}Last-Event-ID: {self.ids[-1]}\r\n\r\n".encode() if self.ids else f"{head}\r\n".encode())
            async for line in reader:
                if line.startswith(b"retry:"):
                    self.was_in = True
                    if self.cut_at_s:
                        self.back_at_s = self.back_at_s or time.monotonic()
                elif line.startswith(b"id: "):
                    self.ids.append(line[4:].decode().strip())
                elif line.startswith(b"event: done"):
                    self.is_done = True
                    return
            raise EOFError
        finally:
            writer.transport.abort()


READERS, CHATS, TOKENS, CUT_AFTER = 5_000, 50, 8, 3
CROWD_HANGS_S = 240.0


@pytest.mark.timeout(600)
async def test_five_thousand_readers_of_a_killed_replica_all_resume_at_another(tmp_path: Path) -> None:
    """They have some tokens; then their replica dies, and nobody but its readers is at the other when they come."""
    flags = ("--max_connections", "20000", "--max_connections_per_address", "20000", "--ping_s", "30")
    with House(tmp_path / "house", more_flags=flags) as house:
        key = house.key("client")
        async with Readers(house.urls, key) as readers:
            chats = [Chat(f"chat {number}", number, TOKENS, STEADY) for number in range(CHATS)]
            for chat in chats:
                await readers.put(chat)
            crowd = [Follower(chats[number % CHATS]) for number in range(READERS)]
            tasks = [asyncio.create_task(one.follow(house.urls, key)) for one in crowd]
            await eventually(lambda: metric(house.a, 'mixtral_open_streams{wire="native"}') == READERS)
            worker = await house.hire(house.b.url, endpoint=STEADY, slots=CHATS, token_ms=400)
            await eventually(lambda: all(len(one.ids) >= CUT_AFTER for one in crowd))
            worker.kill()
            house.a.kill()
            await eventually(lambda: all(one.back_at_s for one in crowd))
            await house.hire(house.b.url, endpoint=STEADY, slots=CHATS, token_ms=400)
            async with asyncio.timeout(CROWD_HANGS_S):
                await asyncio.gather(*tasks)
    for one in crowd:
        ids = answer_to(one.chat.content, one.chat.seed, TOKENS).ids
        assert one.ids == [event_id(offset, ids_crc(ids[:offset])) for offset in range(1, TOKENS + 1)]
    took_s = sorted(one.back_at_s - one.cut_at_s for one in crowd)
    p99 = statistics.quantiles(took_s, n=100)[98]
    print(f"\n{READERS:,} readers resumed, the waits of their jitter included: p50 {took_s[READERS // 2]:.2f} s, p99 {p99:.2f} s")


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(CROWD_HANGS_S):
        # In a thread: it may ask a busy server, and the crowd reads on meanwhile.
        while not await asyncio.to_thread(is_so):  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.2)
