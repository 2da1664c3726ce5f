"""Three replicas behind a real nginx with the file that users copy: restarts and kills that clients without any retries do not notice."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import openai
import pytest

from support.history import Chat, Readers
from support.house import STEADY, House, Replica
from support.http import until
from support.nginx import Nginx
from support.ports import free_port
from support.toy_model import answer_to

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def one_house_of_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("three"), replicas=3) as house:
        yield house


@pytest.fixture
def three(one_house_of_three: House) -> Iterator[House]:
    one_house_of_three.restore()
    yield one_house_of_three
    one_house_of_three.dismiss()


@pytest.fixture(scope="module")
def nginx(one_house_of_three: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx") / "nginx", free_port(), one_house_of_three.urls) as nginx:
        yield nginx


@asynccontextmanager
async def plain_client(house: House, nginx: Nginx) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{nginx.url}/v1", api_key=house.key("client"), max_retries=0, timeout=60.0) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, content: str, seed: int, *, tokens: int = 20) -> None:
    answer = await client.chat.completions.create(
        model=STEADY, messages=[{"role": "user", "content": content}], max_tokens=tokens, seed=seed
    )
    assert answer.choices[0].message.content == answer_to(content, seed, tokens).text


async def ask_for_a_stream(client: openai.AsyncOpenAI, content: str, seed: int, *, tokens: int = 20) -> None:
    stream = await client.chat.completions.create(
        model=STEADY, messages=[{"role": "user", "content": content}], max_tokens=tokens, seed=seed, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer_to(content, seed, tokens).text


async def test_rolling_restart_behind_nginx_fails_no_request_of_any_client(three: House, nginx: Nginx) -> None:
    served = dict.fromkeys(("native", "by client", "whole", "streamed"), 0)
    enough = asyncio.Event()

    async def again_and_again(kind: str, number: int, readers: Readers, client: openai.AsyncOpenAI) -> None:
        while not enough.is_set():
            content = f"{kind} {number} {served[kind]}"
            match kind:
                case "whole":
                    await ask(client, content, number)
                case "streamed":
                    await ask_for_a_stream(client, content, number)
                case _:
                    chat = readers.start(content, seed=number, tokens=20, model=STEADY, by_client=kind == "by client")
                    await readers.ended(chat)
                    assert chat.refusals == []
            served[kind] += 1

    async with Readers([nginx.url], three.key("client")) as readers, plain_client(three, nginx) as client:
        await three.hire(nginx.url, endpoint=STEADY, slots=16)
        async with asyncio.TaskGroup() as tasks:
            for kind in served:
                for number in range(2):
                    tasks.create_task(again_and_again(kind, number, readers, client))
            for replica in three.replicas:
                await more(served)
                assert await restarted(replica) == 0
            await more(served)
            enough.set()


async def more(served: dict[str, int]) -> None:
    """Wait until each kind of client was served twice more."""
    enough = {kind: count + 2 for kind, count in served.items()}
    await until(lambda: all(served[kind] >= enough[kind] for kind in served))


async def restarted(replica: Replica) -> int:
    """Its exit status, once it serves again."""
    replica.signal(signal.SIGTERM)
    status = await replica.ended()
    replica.start()
    await replica.ready()
    return status


async def test_killed_replica_costs_a_plain_call_that_waits_for_its_answer_nothing_but_time(three: House, nginx: Nginx) -> None:
    async with plain_client(three, nginx) as client:
        worker = await three.hire(nginx.url, endpoint=STEADY, slots=32)
        async with asyncio.TaskGroup() as tasks:
            for number in range(12):
                tasks.create_task(ask(client, f"whole {number}", number, tokens=60))
            await worker.hears("event=taken", times=12)
            three.a.kill()


async def test_stream_is_passed_on_token_by_token(three: House, nginx: Nginx) -> None:
    """What nginx held back would come in one piece at the end."""
    async with Readers([nginx.url], three.key("client")) as readers:
        await three.hire(nginx.url, endpoint=STEADY, token_ms=100)
        chat: Chat = readers.start("slowly", tokens=30, model=STEADY)
        await chat.reach(5)
        assert (await readers.view(chat)).state == "streaming", "the reader has tokens of an answer that is not whole"
        await readers.ended(chat)
