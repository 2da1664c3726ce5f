"""FakeServer, which users test with: it keeps to the wire, plays its scripts, and says what is wrong with a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from mixtral_client import MixtralClient, SyncClient
from mixtral_client.errors import LimitReached, NotAuthenticated, RequestRefused
from mixtral_client.protocol import DoneEvent, JobEvent, JobView, MovedEvent, RewindEvent, TokenEvent
from mixtral_client.resume import EVENTS
from mixtral_client.sse import SseDecoder
from mixtral_client.testing import FakeServer

Connect = Callable[..., MixtralClient]


def test_plain_with_serves_scripts_that_are_not_asynchronous() -> None:
    with FakeServer("Hello there, friend.") as server, SyncClient(server.url, server.api_key) as client:
        answer = client.chat("Hi")
    assert (answer.text, answer.usage.completion_tokens) == ("Hello there, friend.", 3)
    assert server.requests[0].body["messages"] == [{"role": "user", "content": "Hi"}]


async def test_jobs_are_answered_by_the_scripts_in_order_and_then_by_the_last() -> None:
    async with FakeServer("one", "two") as server, MixtralClient(server.url, server.api_key) as client:
        assert [(await client.chat("Hi")).text for _ in range(3)] == ["one", "two", "two"]
        server.answer("three")
        assert (await client.chat("Hi")).text == "three"


async def test_every_event_has_the_form_of_the_wire() -> None:
    """Strictly: a field too many would hide that the service sends none of that name."""
    steps = ["a", {"moved": 2}, "b", {"rewind": 1}, "c", {"done": {"finish": "length"}}]
    async with FakeServer(steps, [{"error": {"code": "x", "message": "y"}}]) as server, aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        raw = b""
        for _ in range(2):
            async with http.post(f"{server.url}/v1/jobs", json={"model": "m", "prompt": "p"}, headers=headers) as answer:
                job = await answer.json()
            async with http.get(f"{server.url}/v1/jobs/{job['id']}/events", headers=headers) as answer:
                raw += await answer.read()
            async with http.get(f"{server.url}/v1/jobs/{job['id']}", headers=headers) as answer:
                JobView.model_validate(await answer.json(), extra="forbid")
    events = SseDecoder().feed(raw)
    assert [event.event for event in events] == ["queued", "token", "moved", "token", "rewind", "token", "done", "queued", "error"]
    for event in events:
        EVENTS[event.event].model_validate_json(event.data, extra="forbid")


async def test_job_runs_on_unread_up_to_a_hold_and_release_ends_it() -> None:
    async with FakeServer(["a", {"hold": True}, "b"]) as server, MixtralClient(server.url, server.api_key) as client:
        job = await client.submit("Hi")
        view = await client.job(job.id)
        assert (view.state, view.text) == ("streaming", "a")
        server.release()
        view = await client.job(job.id)
        assert (view.state, view.text, view.finish) == ("done", "ab", "stop")
        assert (await client.events(job.id).answer()).text == "ab"


async def test_two_readers_of_one_job_see_the_same(connect: Connect) -> None:
    async with FakeServer(["a", {"hold": True}, "b", {"rewind": 0}, "c"]) as server:
        client = connect(server.url)
        job = await client.submit("Hi")
        readers = [client.events(job.id) for _ in range(2)]
        for reader in readers:
            while not isinstance(await anext(reader), TokenEvent):
                pass
        server.release()
        for reader in readers:
            rest: list[JobEvent] = [event async for event in reader]
            assert [type(event) for event in rest] == [TokenEvent, RewindEvent, TokenEvent, DoneEvent]
            assert reader.text == "c"


async def test_faults_are_met_in_order_and_once_each() -> None:
    async with FakeServer() as server, MixtralClient(server.url, server.api_key) as client:
        server.fail("submit", 429, "queue_full", "the queue is full", retry_after="3600")
        server.lose_answer("submit", times=2)
        with pytest.raises(LimitReached, match="the queue is full") as caught:
            await client.submit("Hi")
        assert caught.value.retry_after_s == 3600
        await client.submit("Hi")
        assert (len(server.asked("submit")), len(server.jobs)) == (4, 1)


async def test_wrong_key_wrong_body_and_a_key_used_twice_are_refused_as_the_service_does() -> None:
    async with FakeServer() as server, MixtralClient(server.url, server.api_key) as client:
        async with MixtralClient(server.url, "other") as stranger:
            with pytest.raises(NotAuthenticated):
                await stranger.models()
        await client.submit("Hi", idempotency_key="k")
        with pytest.raises(RequestRefused) as caught:
            await client.submit("Ho", idempotency_key="k")
        assert (caught.value.code, caught.value.status) == ("idempotency_conflict", 422)
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {server.api_key}"}) as http:
            statuses = []
            for method, path, body in (("POST", "/v1/jobs", b"{"), ("POST", "/v1/jobs", b'{"model": "m"}'), ("GET", "/v1/chat", b"")):
                async with http.request(method, server.url + path, data=body) as answer:
                    statuses.append((answer.status, (await answer.json())["error"]["code"]))
    assert statuses == [(400, "invalid_request"), (400, "invalid_request"), (404, "route_not_found")]


async def test_move_is_told_to_a_reader_that_comes_later(connect: Connect) -> None:
    async with FakeServer(["a", {"moved": 2}, {"cut": "end"}, "b"]) as server:
        events = [event async for event in connect(server.url).stream("Hi")]
    assert [event.attempt for event in events if isinstance(event, MovedEvent)] == [2]


@pytest.mark.parametrize(
    ("script", "words"),
    [([{"hodl": True}], "a step is a token's text or has one of cut, hold"), ([{"cut": "softly"}], "a cut is one of close, abort, end")],
)
def test_step_that_is_none_is_refused_when_it_is_written(script: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FakeServer(script)
