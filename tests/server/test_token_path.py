"""What a turn of a worker costs the server on its way to a reader: how often it asks Redis, and how often it parses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest

from mixtral_client.protocol import PROTOCOL_VERSION, TurnAnswer
from mixtral_server.routes import worker
from support.http import until
from support.live_server import LiveServer
from support.redis import connect

HANG_S = 30.0
CHAT = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}], "stream": True}
LOGIN = {"endpoint": "mixtral_chat", "name": "box", "protocol": PROTOCOL_VERSION, "version": "1", "model": "m", "device": "cpu"}
MARK = "parsed once"


class OneJob:
    """A worker that holds one job, turn by turn."""

    def __init__(self, server: LiveServer) -> None:
        self._http = aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {server.worker_key}"})
        self.session = ""
        self.job = ""
        self._turn = 0

    async def __aenter__(self) -> OneJob:
        async with self._http.post("/v1/worker/sessions", json=LOGIN | {"max_slots": 1, "max_seq_len": 4096}) as answer:
            self.session = (await answer.json())["session"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def take(self) -> None:
        [job] = (await self.turn(room=1)).jobs
        self.job = job.id

    async def say(self, offset: int, *texts: str, **more: object) -> None:
        frame = {"job": self.job, "attempt": 1, "offset": offset, "ids": [7] * len(texts), "texts": texts}
        await self.turn(holding=[] if more else [(self.job, 1)], frames=[frame | more])

    async def turn(self, **body: Any) -> TurnAnswer:
        self._turn += 1
        async with self._http.post("/v1/worker/turn", json={"session": self.session, "turn": self._turn} | body) as answer:
            return TurnAnswer.model_validate(await answer.json())


class Reading:
    """An OpenAI stream, read as it comes."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.text = b""
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._server.http() as http, http.post("/v1/chat/completions", json=CHAT) as answer:
            async for part in answer.content.iter_any():
                self.text += part

    async def until(self, text: bytes) -> None:
        await until(lambda: text in self.text)

    async def end(self) -> None:
        async with asyncio.timeout(HANG_S):
            await self._task


@pytest.fixture
async def other(server: LiveServer, tmp_path: Path) -> AsyncIterator[LiveServer]:
    """Another server on the same Redis."""
    with LiveServer(tmp_path, server.settings.redis_url) as one:
        yield one


async def test_a_turn_is_one_round_trip_to_redis(server: LiveServer) -> None:
    client = connect(server.settings.redis_url)
    reading = Reading(server)
    async with OneJob(server) as box:
        await box.take()
        await box.say(1, "a")
        await reading.until(b'"a"')
        async with client.monitor() as monitor:
            await box.say(2, "b")
            await box.say(3, "c", finish="stop")
            await reading.end()
            await client.execute_command("ECHO", "over")
            seen = []
            async with asyncio.timeout(HANG_S):
                while (command := await monitor.next_command())["command"] != "ECHO over":
                    seen.append(command)
    await client.aclose()
    asked = [one["command"] for one in seen if one["client_type"] != "lua" and (box.session in str(one) or box.job in str(one))]
    assert [command.split()[0].upper() for command in asked] == ["EVALSHA", "EVALSHA"]  # nor does the reader ask for the job's end
    assert not [one for one in seen if one["command"].upper().startswith("PUBLISH") and ":live" in one["command"]]


def count_parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is parsed from now on and has the mark in it."""
    parsed: list[str] = []

    def counting(parse: Callable[[bytes | str], Any]) -> Callable[[bytes | str], Any]:
        def counted(text: bytes | str) -> Any:
            said = text if isinstance(text, str) else bytes(text).decode()
            if MARK in said:
                parsed.append(said)
            return parse(text)

        return counted

    monkeypatch.setattr(orjson, "loads", counting(orjson.loads))
    monkeypatch.setattr(worker, "TURN", SimpleNamespace(read=counting(worker.TURN.read)))  # a turn that it hands on is counted again
    return parsed


async def parses_of_a_token(read_at: LiveServer, made_at: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the middle one of three tokens is parsed anywhere, with its reader at one server and its worker at another or the same."""
    reading = Reading(read_at)
    async with OneJob(made_at) as box:
        await box.take()
        await box.say(1, "a")
        await reading.until(b'"a"')
        parsed = count_parses(monkeypatch)
        await box.say(2, MARK)
        await reading.until(MARK.encode())
        await box.say(3, "c", finish="stop")
        await reading.end()
    return parsed


async def test_json_of_a_token_is_parsed_once_where_turn_and_reader_are_of_one_process(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = await parses_of_a_token(server, server, monkeypatch)
    assert [text[:12] for text in parsed] == ['{"session": ']


async def test_json_of_a_token_is_parsed_once_by_each_of_two_processes(
    server: LiveServer, other: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader is at one, the worker at the other, which does not parse what it has published itself."""
    parsed = await parses_of_a_token(server, other, monkeypatch)
    assert [text.startswith('{"session": ') for text in sorted(parsed, reverse=True)] == [True, False]
