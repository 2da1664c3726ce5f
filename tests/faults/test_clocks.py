"""Hosts whose clocks are an hour off: one replica and one worker ahead, the others behind. Redis alone knows what time it is."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_client.protocol import DoneEvent
from support.history import Chat, Readers
from support.house import BRISK, LEASES_S, STEADY, House, Program
from support.parts import PartMissing
from support.redis import RedisProcess, redis_binary

pytestmark = pytest.mark.timeout(240)

SHIM = Path(__file__).parents[1] / "support" / "clock_shim.c"
HOUR_S = 3600


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise PartMissing("clocks are moved by a small C library; install a compiler with 'apt-get install gcc libc6-dev'")
    built = tmp_path_factory.mktemp("shim") / "clock_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(SHIM), "-ldl"], check=True)
    return built


def skew(program: Program, shim: Path, seconds: int) -> None:
    program.environment |= {"LD_PRELOAD": str(shim), "SKEW_S": str(seconds)}


@pytest.fixture
def skewed(shim: Path, tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "house")
    skew(house.a, shim, HOUR_S)
    skew(house.b, shim, -HOUR_S)
    with house:
        yield house


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["ahead", "back"])
async def test_redis_whose_own_clock_jumps_by_an_hour_ends_no_lease_and_no_deadline(shim: Path, tmp_path: Path, jump_s: int) -> None:
    redis = RedisProcess(redis_binary("6.2"), "--appendonly", "yes", environment={"LD_PRELOAD": str(shim), "SKEW_S": "0"})
    with House(tmp_path / "house", replicas=1, on=redis) as house:
        async with Readers(house.urls, house.key("client")) as readers:
            worker = await house.hire(endpoint=STEADY)
            chats = [readers.start(f"chat {number}", seed=number, tokens=60, model=STEADY) for number in range(3)]
            await asyncio.gather(*(chat.reach(5) for chat in chats))
            waiting = Chat("for a worker that comes later", 7, 10, BRISK)
            async with readers.http.post(f"{house.a.url}/v1/jobs", json=waiting.body | {"queue_timeout_s": 1800}) as answer:
                waiting.job_id = (await answer.json())["id"]
            redis.crash()
            redis.environment["SKEW_S"] = str(jump_s)
            redis.start()
            with redis.client() as client:
                assert abs(client.time()[0] - time.time() - jump_s) < HOUR_S / 2
            await readers.ended(*chats)
            assert [(await readers.view(chat)).attempt for chat in chats] == [1] * 3
            assert worker.said().count("event=session_opened") == 1
            assert (await readers.view(waiting)).state == "waiting"
            await house.hire(endpoint=BRISK)
            readers.follow(waiting)
            await readers.ended(waiting)


def hired(house: House, shim: Path, url: str, seconds: int, endpoint: str) -> Program:
    worker = house.engage(url, endpoint=endpoint)
    skew(worker, shim, seconds)
    worker.start()
    return worker


def hours_ahead(worker: Program) -> int:
    """By what it writes before each line of its log."""
    told_s = float(worker.said().partition("time=")[2].split()[0])
    return round((told_s - time.time()) / HOUR_S)


async def test_leases_deadlines_and_answers_are_the_same_on_hosts_an_hour_apart(skewed: House, shim: Path) -> None:
    async with Readers(skewed.urls, skewed.key("client")) as readers:
        ahead = hired(skewed, shim, skewed.b.url, HOUR_S, BRISK)  # the worker ahead is at the server behind
        await ahead.hears("event=session_opened")
        assert hours_ahead(ahead) == 1
        chats = [readers.start(f"chat {number}", seed=number, tokens=300, model=BRISK, by_client=number == 0) for number in range(3)]
        await asyncio.gather(*(chat.reach(5) for chat in chats))
        behind = hired(skewed, shim, skewed.a.url, -HOUR_S, BRISK)
        await behind.hears("event=session_opened")
        assert hours_ahead(behind) == -1
        assert all(chat.moves == 0 for chat in chats), "no lease ended because a clock said so"
        ahead.kill()
        began_s = time.monotonic()
        await readers.ended(*chats)
        assert [chat.moves for chat in chats] == [1] * 3
        assert time.monotonic() - began_s > LEASES_S[BRISK] / 2, "the lease of the dead ran its time"


async def test_deadlines_count_from_redis_and_not_from_who_asks(skewed: House) -> None:
    """At each replica: a job that may wait an hour still waits, one that may wait a second is expired."""
    async with Readers(skewed.urls, skewed.key("client")) as readers:
        for url in skewed.urls:
            body = {"model": STEADY, "messages": [{"role": "user", "content": "?"}], "max_tokens": 5}
            jobs = []
            for timeout_s in (1, 1800):
                async with readers.http.post(f"{url}/v1/jobs", json=body | {"queue_timeout_s": timeout_s}) as answer:
                    jobs.append((await answer.json())["id"])
            async with asyncio.timeout(30):
                events = [event async for event in readers.client.events(jobs[0])]
            assert isinstance(events[-1], DoneEvent)
            assert events[-1].finish == "expired"
            waiting = await readers.client.job(jobs[1])
            assert waiting.state == "waiting"
            assert abs(waiting.created - time.time()) < 60, "the time that is told is Redis's"
