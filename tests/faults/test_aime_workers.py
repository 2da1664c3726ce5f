"""AIME workers that are killed, and what dies around them: no chat is lost, and nobody is told a text that is not so."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.aime_worker import AimeWorker
from support.house import House, Program
from support.http import state_of, until
from support.native_events import Events
from support.scripted_worker import answer_to

pytestmark = pytest.mark.timeout(90)

HASTY, PATIENT = "hasty", "patient"
"""The one for tests that wait for a lapse, 4 s; the other, with the usual 120 s, for tests that there is none."""
LENGTH = 30


@pytest.fixture(scope="module")
def aime_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("aime")
    house = House(folder)
    (folder / "endpoints" / f"{HASTY}.toml").write_text(f'name = "{HASTY}"\nlease_s = 2\n[worker]\nrequest_timeout_s = 2\n')
    (folder / "endpoints" / f"{PATIENT}.toml").write_text(f'name = "{PATIENT}"\n')
    with house:
        yield house


@pytest.fixture
def house(aime_house: House) -> Iterator[House]:
    aime_house.restore()
    yield aime_house
    aime_house.dismiss()


@pytest.fixture
async def http(house: House) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(house.b.url, headers={"Authorization": f"Bearer {house.key('client')}"}) as session:
        yield session


async def hire(house: House, folder: Path, url: str, name: str, *, token_ms: float = 40, job_type: str = HASTY) -> Program:
    """An AIME worker as a process of its own."""
    words = ["--api_server", url, "--job_type", job_type, "--name", name, "--token_ms", str(token_ms), "--length", str(LENGTH)]
    worker = Program("support.aime_worker", words, folder / f"{name}-{len(house.workers)}.log", MIXTRAL_WORKER_KEY=house.key("worker"))
    house.workers.append(worker)
    worker.start()
    await worker.hears("event=asking")
    return worker


async def ask(http: aiohttp.ClientSession, content: str, model: str = HASTY, **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    async with http.post("/v1/jobs", json=body) as answer:
        assert answer.status == 202, await answer.text()
        job_id: str = (await answer.json())["id"]
        return job_id


@pytest.mark.parametrize("successor", ["aime", "native"])
async def test_killed_aime_worker_costs_no_chat(house: House, http: aiohttp.ClientSession, tmp_path: Path, successor: str) -> None:
    ids = [await ask(http, f"chat {number}", max_tokens=LENGTH) for number in range(4)]
    first = await hire(house, tmp_path, house.a.url, "first")  # now, so that it takes them as one batch
    readers = [Events(http, job_id) for job_id in ids]
    async with readers[0], readers[1], readers[2], readers[3]:
        await until(lambda: all(one.offset >= 5 for one in readers))
        first.kill()
        if successor == "aime":
            await hire(house, tmp_path, house.b.url, "second", token_ms=5)
        else:
            await house.hire(house.b.url, endpoint=HASTY, token_ms=5)
        for number, (job_id, one) in enumerate(zip(ids, readers, strict=True)):
            names = await one.over()
            assert [fields for name, fields in one.all if name == "rewind"] == [{"to": 0}]
            assert (names[-1], names.count("done"), names.count("error"), one.offset) == ("done", 1, 0, LENGTH)
            view = await state_of(http, job_id, "done")
            assert (one.text, view["attempt"]) == (view["text"], 2)
            if successor == "aime":
                assert one.text == answer_to(f"chat {number}", LENGTH)


async def test_worker_that_is_started_again_under_its_name_is_handed_its_chat_at_once(
    house: House, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    first = await hire(house, tmp_path, house.a.url, "one", job_type=PATIENT)
    job_id = await ask(http, "hello", PATIENT, max_tokens=LENGTH)
    async with Events(http, job_id) as reader:
        await until(lambda: reader.offset >= 5)
        first.kill()
        await hire(house, tmp_path, house.b.url, "one", token_ms=5, job_type=PATIENT)
        await reader.over()
        assert reader.text == answer_to("hello", LENGTH)
    assert (await state_of(http, job_id, "done"))["attempt"] == 2


async def test_stream_of_openais_whose_aime_worker_was_killed_ends_with_an_error(
    house: House, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    worker = await hire(house, tmp_path, house.a.url, "one")
    body = {"model": HASTY, "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": LENGTH}
    async with http.post("/v1/chat/completions", json=body) as answer:
        await answer.content.readuntil(b"\n\n")
        worker.kill()
        rest = await answer.text()
    assert '{"error":' in rest.replace(" ", "").splitlines()[-2]
    assert "[DONE]" not in rest


async def test_killed_server_costs_an_aime_workers_chats_nothing(house: House, http: aiohttp.ClientSession, tmp_path: Path) -> None:
    await hire(house, tmp_path, house.a.url, "one", token_ms=60, job_type=PATIENT)
    job_id = await ask(http, "hello", PATIENT, max_tokens=LENGTH)
    async with Events(http, job_id) as reader:
        await until(lambda: reader.offset >= 5)
        house.a.kill()
        house.a.start()
        assert "rewind" not in await reader.over()
        assert reader.text == answer_to("hello", LENGTH)
    assert (await state_of(http, job_id, "done"))["attempt"] == 1


async def test_result_that_comes_while_redis_is_away_is_kept(house: House, http: aiohttp.ClientSession) -> None:
    async with AimeWorker(house.a.url, house.key("worker"), PATIENT, pause_after=4) as worker:
        job_id = await ask(http, "hello", PATIENT, max_tokens=10)
        async with asyncio.timeout(20):
            while (await state_of(http, job_id, "waiting", "leased", "streaming"))["tokens"] < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        house.redis.stop(signal.SIGTERM)
        worker.go.set()
        await asyncio.sleep(0.3)  # the result is on its way, and finds no Redis
        assert worker.answers == []
        house.redis.start()
        await until(lambda: len(worker.answers) == 1)
        assert worker.answers == [{"cmd": "ok"}]
        view = await state_of(http, job_id, "done")
        assert (view["text"], view["attempt"]) == (answer_to("hello"), 1)
        assert not worker.is_deaf
