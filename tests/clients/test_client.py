"""MixtralClient against a server that goes wrong on purpose: whatever is cut, refused or lost, the caller sees one whole answer."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_client import JobStream, MixtralClient, Retry, Timeouts
from mixtral_client.errors import (
    BadAnswer,
    ConnectionLost,
    EventTooLarge,
    JobFailed,
    JobStopped,
    LimitReached,
    MixtralError,
    NotAuthenticated,
    NotFound,
    RequestRefused,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from mixtral_client.protocol import DoneEvent, ErrorDetail, JobEvent, MovedEvent, RewindEvent, TokenEvent
from mixtral_client.testing import Cut, FakeServer, Fault
from support.scripted_api import KEY, ScriptedApi

Connect = Callable[..., MixtralClient]
TEXTS = ["Once", " üpon", " a"]
HELD: list[Any] = ["Once", {"hold": True}]
DEADLINE_S = 10.0


async def read(stream: JobStream) -> list[JobEvent]:
    return [event async for event in stream]


def tokens(events: list[JobEvent]) -> list[tuple[int, str]]:
    return [(event.offset, event.text) for event in events if isinstance(event, TokenEvent)]


def numbered(texts: list[str]) -> list[tuple[int, str]]:
    return list(enumerate(texts, start=1))


def assert_whole(events: list[JobEvent], texts: list[str]) -> None:
    """Offsets 1..n once each and in order, then exactly one end."""
    assert tokens(events) == numbered(texts)
    assert [isinstance(event, DoneEvent) for event in events].count(True) == 1
    assert isinstance(events[-1], DoneEvent)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110 (what the server sees has no event of ours)
            await asyncio.sleep(0.002)


# ------------------------------------------------------------------------------------------------ answers


async def test_chat_gives_text_finish_usage_and_timings(api: ScriptedApi, connect: Connect) -> None:
    answer = await connect(api.script(TEXTS).url).chat("Tell a story")
    assert (answer.text, answer.finish, answer.usage.total_tokens) == ("Once üpon a", "stop", 6)
    assert answer.timings is not None
    assert answer.timings.first_token_s == 0.2


async def test_bare_string_is_one_user_message_and_options_travel_as_given(api: ScriptedApi, connect: Connect) -> None:
    world = api.script()
    options: Any = {
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": -7,
        "stop": ["x"],
        "priority": 2,
        "queue_timeout_s": 1.5,
        "min_p": 0.1,
        "min_tokens": 1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 2.5},
        "stop_token_ids": [2],
        "ignore_eos": True,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "logprobs": True,
        "top_logprobs": 3,
        "truncate": "oldest_turns",
    }
    await connect(world.url).chat("Hello", model="other", **options)
    assert world.asked("submit")[0].body == {"model": "other", "messages": [{"role": "user", "content": "Hello"}], **options}


async def test_option_left_out_is_not_sent_so_that_the_endpoint_decides(api: ScriptedApi, connect: Connect) -> None:
    world = api.script()
    await connect(world.url).complete([1, 2, 3])
    assert world.asked("submit")[0].body == {"model": "mixtral_chat", "prompt": [1, 2, 3]}


async def test_option_that_does_not_exist_is_named(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(TypeError, match="no option 'temprature'"):
        connect(api.script().url).stream("Hello", temprature=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("request_fields", "param"),
    [
        ({"messages": "Hello", "temperature": 3.0}, "temperature"),
        ({}, None),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
    ],
)
async def test_request_the_wire_does_not_allow_is_refused_before_it_is_sent(
    api: ScriptedApi, connect: Connect, request_fields: dict[str, Any], param: str | None
) -> None:
    world = api.script()
    with pytest.raises(RequestRefused) as caught:
        await connect(world.url).submit(**request_fields)
    assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_request", param, None)
    assert world.requests == []


async def test_job_is_seen_by_its_id(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script(TEXTS).url)
    accepted = await client.submit("Hello")
    view = await client.job(accepted.id)
    assert (accepted.position, view.id, view.tokens, view.text) == (1, accepted.id, 3, "Once üpon a")


async def test_models_are_listed(api: ScriptedApi, connect: Connect) -> None:
    assert [model.id for model in await connect(api.script().url).models()] == ["mixtral_chat"]


async def test_cancelled_job_ends_a_stream_with_done_and_makes_chat_raise(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["Once", {"hold": True}])
    client = connect(world.url)
    events: list[JobEvent] = []
    async for event in (stream := client.stream("Hello")):
        events.append(event)
        if isinstance(event, TokenEvent):
            await client.cancel(stream.job_id)
    assert isinstance(events[-1], DoneEvent)
    assert events[-1].finish == "cancelled"
    chat = asyncio.create_task(client.chat("Hello"))
    await until(lambda: world.connections == 2)
    assert (await client.cancel("mixtral_chat.0-2")).state == "cancelled"
    with pytest.raises(JobStopped) as caught:
        await chat
    assert (caught.value.finish, caught.value.text) == ("cancelled", "Once")


# ------------------------------------------------------------------------------------------------ broken connections


async def stream_bytes(world: FakeServer) -> int:
    """Size of a whole stream of that world."""
    async with aiohttp.ClientSession(world.url + "/", headers={"Authorization": f"Bearer {KEY}"}) as http:
        job = await (await http.post("v1/jobs", json={"model": "mixtral_chat", "prompt": "Hello"})).json()
        total = len(await (await http.get(f"v1/jobs/{job['id']}/events")).read())
    assert total > 400
    return total


@pytest.mark.parametrize("how", ["close", "end"])
async def test_connection_cut_at_any_byte_costs_no_token_and_repeats_none(api: ScriptedApi, connect: Connect, how: str) -> None:
    for at in range(await stream_bytes(api.script(TEXTS))):
        client = connect((world := api.script(TEXTS, cuts=[Cut(at=at, how=how)])).url)
        assert_whole(await read(client.stream("Hello")), TEXTS)
        assert len(world.asked("submit")) == 1
        await client.close()


cuts = st.lists(st.builds(Cut, at=st.integers(0, 900), how=st.sampled_from(["close", "abort", "end"])), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=3), max_size=8), cuts=cuts, write_bytes=st.sampled_from([1, 7, 1 << 16]))
async def test_any_cuts_give_offsets_once_in_order_and_one_end(
    api: ScriptedApi, connect: Connect, texts: list[str], cuts: list[Cut], write_bytes: int
) -> None:
    world = api.script(texts, cuts=cuts, write_bytes=write_bytes)
    assert_whole(await read(connect(world.url).stream("Hello")), texts)
    assert world.states == ["done"], "a job that ended is not cancelled"


async def test_resume_names_the_last_token_with_its_crc(api: ScriptedApi, connect: Connect) -> None:
    world = api.script([*TEXTS[:2], {"cut": "abort"}, *TEXTS[2:]])
    stream = connect(world.url).stream("Hello")
    assert_whole(await read(stream), TEXTS)
    (job,) = world.jobs.values()
    assert [request.headers.get("Last-Event-ID") for request in world.asked("events")] == [None, job.id_at(2)]
    assert stream.last_id == job.id_at(3)


async def test_events_after_an_id_or_an_offset_go_on_there(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script(TEXTS).url)
    job = await client.submit("Hello")
    first = client.events(job.id)
    async with first:
        async for event in first:
            if isinstance(event, TokenEvent):
                break
    assert tokens(await read(client.events(job.id, first.last_id))) == numbered(TEXTS)[1:]
    assert tokens(await read(client.events(job.id, 2))) == numbered(TEXTS)[2:]


async def test_id_that_is_none_is_refused_with_the_form_expected(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(ValueError, match=r"'<offset>\.<crc32 in hex>'"):
        connect(api.script().url).events("job", "soon")


async def test_silent_connection_is_replaced(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(TEXTS, cuts=[Cut(at=250, how="silence")])
    assert_whole(await read(connect(world.url, timeouts=Timeouts(silence_s=0.05)).stream("Hello")), TEXTS)
    assert world.connections >= 2


async def test_skipped_offset_is_fetched_by_a_new_connection(api: ScriptedApi, connect: Connect) -> None:
    gap = {"event": "token", "offset": 3, "text": "?"}
    world = api.script([TEXTS[0], gap, *TEXTS[1:]])
    assert_whole(await read(connect(world.url).stream("Hello")), TEXTS)


async def test_log_that_lost_its_end_rewinds_and_goes_on_from_there(api: ScriptedApi, connect: Connect) -> None:
    steps = ["a", "b", "c", {"cut": "close"}, {"rewind": 1}, {"cut": "close"}, "d", "e"]
    client = connect(api.script(steps).url)
    events = await read(client.stream("Hello"))
    assert [event for event in events if isinstance(event, RewindEvent)] == [RewindEvent(to=1)]
    assert tokens(events) == [(1, "a"), (2, "b"), (3, "c"), (2, "d"), (3, "e")]
    assert (await connect(api.script(steps).url).chat("Hello")).text == "ade"


async def test_log_that_differs_rewinds_to_its_start_and_never_forks(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["a", "b", {"cut": "end"}, {"rewind": 0}, "x", "y", "z", "!"])
    assert (await connect(world.url).chat("Hello")).text == "xyz!"


async def test_rewind_without_an_id_of_its_own_resumes_by_offset(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["a", "b", {"event": "rewind", "to": 1}, {"cut": "end"}, {"rewind": 1}, "c"])
    assert (await connect(world.url).chat("Hello")).text == "ac"
    assert world.asked("events")[1].headers["Last-Event-ID"] == "1"


async def test_move_to_another_worker_is_told_once(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["a", {"moved": 2}, "b", {"cut": "end"}, {"moved": 3}, "c"])
    events = await read(connect(world.url).stream("Hello"))
    assert [event.attempt for event in events if isinstance(event, MovedEvent)] == [2, 3]
    assert_whole(events, ["a", "b", "c"])


async def test_comments_and_unknown_events_change_nothing(api: ScriptedApi, connect: Connect) -> None:
    log = [{"comment": "ping"}, "Once", {"event": "weather", "sun": True}, " üpon", {"comment": "ping"}, " a"]
    world = api.script(log, preamble="\ufeffretry: 1\n: hello\n\n")
    assert_whole(await read(connect(world.url).stream("Hello")), TEXTS)


async def test_stream_gives_up_when_nobody_can_be_reached_for_long(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(cuts=[Cut(at=0)] * 100)
    retry = Retry(resume_for_s=0.05, first_wait_s=0.01)
    with pytest.raises(ConnectionLost, match=r"ended before the job did|broke"):
        await read(connect(world.url, retry=retry).stream("Hello"))
    assert 1 < world.connections < 20


async def test_event_without_end_is_refused(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(EventTooLarge):
        await read(connect(api.script(["x" * (2 << 20)]).url).stream("Hello"))


async def test_event_that_does_not_fit_the_wire_is_refused(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(BadAnswer, match="does not fit the wire"):
        await read(connect(api.script([{"event": "token", "offset": "soon"}]).url).stream("Hello"))


async def test_more_than_a_hundred_streams_run_at_once(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["Once", {"hold": True}])
    client = connect(world.url)
    streams = [client.stream("Hello") for _ in range(120)]
    chats = [asyncio.create_task(read(stream)) for stream in streams]
    await until(lambda: world.connections == 120)
    await asyncio.gather(*(client.cancel(stream.job_id) for stream in streams))
    assert [tokens(events) for events in await asyncio.gather(*chats)] == [[(1, "Once")]] * 120


# ------------------------------------------------------------------------------------------------ refusals, lost answers, replicas


async def test_submit_whose_answer_is_lost_makes_one_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(faults=[Fault(on="submit", lose=True), Fault(on="submit", lose=True)])
    job = await connect(world.url).submit("Hello")
    assert list(world.jobs) == [job.id]
    assert len({request.headers["Idempotency-Key"] for request in world.asked("submit")}) == 1
    assert len(world.asked("submit")) == 3


async def test_two_submits_make_two_jobs_unless_they_share_a_key(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script().url)
    ids = [(await client.submit("Hello", idempotency_key=key)).id for key in (None, None, "k", "k")]
    assert len(set(ids)) == 3
    assert ids[2] == ids[3]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_passing_refusals_are_tried_again(api: ScriptedApi, connect: Connect, status: int) -> None:
    faults = [Fault(kind, status=status, code="busy") for kind in ("submit", "events", "submit", "events")]
    assert (await connect(api.script(TEXTS, faults=faults).url).chat("Hello")).text == "Once üpon a"


async def test_wait_longer_than_our_patience_is_told_at_once(api: ScriptedApi, connect: Connect) -> None:
    full = Fault(on="submit", status=429, code="queue_full", message="the queue is full", retry_after="3600")
    world = api.script(faults=[full])
    with pytest.raises(LimitReached) as caught:
        await connect(world.url).submit("Hello")
    assert (caught.value.code, caught.value.retry_after_s, caught.value.message) == ("queue_full", 3600, "the queue is full")
    assert len(world.requests) == 1


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (413, RequestRefused), (500, ServerFailed)])
async def test_refusals_that_will_not_pass_are_told_at_once(
    api: ScriptedApi, connect: Connect, status: int, kind: type[MixtralError]
) -> None:
    world = api.script(faults=[Fault(on="submit", status=status, code="word", message="a sentence")])
    with pytest.raises(kind, match="a sentence") as caught:
        await connect(world.url).submit("Hello")
    error = caught.value
    assert (error.code, error.status, error.kind, error.request_id) == ("word", status, "server_error", "req-1")
    assert len(world.requests) == 1


async def test_proxy_that_answers_in_html_is_quoted(api: ScriptedApi, connect: Connect) -> None:
    page = Fault(on="models", status=502, code=None, message="<h1>Bad Gateway</h1>")
    with pytest.raises(Unavailable, match="was answered 502: <h1>Bad Gateway</h1>") as caught:
        await connect(api.script(faults=[page]).url, retry=Retry(give_up_after_s=0)).models()
    assert caught.value.code == "http_502"


async def test_answer_of_another_service_is_named_as_such(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(BadAnswer, match="does the address belong to this service"):
        await connect(api.script(faults=[Fault(on="models", status=200, code=None, message="It works!")]).url).models()


async def test_unknown_job_is_not_found(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script().url)
    for question in (client.job("no"), client.cancel("no"), read(client.events("no"))):
        with pytest.raises(NotFound) as caught:
            await question
        assert (caught.value.code, caught.value.status) == ("job_not_found", 404)


async def test_job_id_cannot_lead_to_another_path(api: ScriptedApi, connect: Connect) -> None:
    world = api.script()
    with pytest.raises(NotFound):
        await connect(world.url).job("../models?x#y")
    assert world.asked("job")[0].path == "/v1/jobs/../models?x#y", "the server sees the id as one part of the path"


async def test_failed_job_is_raised_with_the_workers_words_and_never_tried_again(api: ScriptedApi, connect: Connect) -> None:
    detail = ErrorDetail(message="prompt is 9 tokens too long", type="invalid_request_error", code="context_length_exceeded")
    world = api.script(["Once", {"error": detail.model_dump()}])
    stream = connect(world.url).stream("Hello")
    await first_token(stream)
    with pytest.raises(JobFailed, match="9 tokens too long") as caught:
        await read(stream)
    error = caught.value
    assert (error.code, error.job_id, error.request_id) == ("context_length_exceeded", "mixtral_chat.0-1", "req-2")
    assert (world.connections, world.states, world.asked("cancel")) == (1, ["failed"], [])


async def test_next_replica_is_tried_when_one_is_gone_or_away(api: ScriptedApi, connect: Connect) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}"
        away = api.script(faults=[Fault(on="submit", code="redis_unavailable")] * 50)
        world = api.script(TEXTS)
        client = connect(gone, away.url, world.url)
        assert (await client.chat("Hello")).text == "Once üpon a"
        assert (await client.chat("Hello")).text == "Once üpon a"
        assert len(away.requests) == 1, "a replica that answered is stayed with"


async def test_server_that_is_not_there_is_named_with_its_address(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionLost, match=f"GET {url}/v1/models got no answer: .*is the server running there"):
            await connect(url, retry=Retry(give_up_after_s=0.01, first_wait_s=0.001)).models()


async def test_answer_that_does_not_come_is_not_waited_for_forever(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(faults=[Fault(on="submit", hold=True)] * 100)
    with pytest.raises(ConnectionLost, match=r"got no answer within answer_s, 0\.02 s"):
        await connect(world.url, timeouts=Timeouts(answer_s=0.02), retry=Retry(give_up_after_s=0.05, first_wait_s=0.001)).submit("Hello")
    world.release()


async def test_wrong_key_is_told_and_no_key_never_leaves_the_client(api: ScriptedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    world = api.script()
    async with MixtralClient(world.url, "wrong") as client:
        with pytest.raises(NotAuthenticated, match="not known here"):
            await client.chat("Hello")
    monkeypatch.delenv("MIXTRAL_CLIENT_KEY", raising=False)
    with pytest.raises(NotAuthenticated, match="set MIXTRAL_CLIENT_KEY"):
        MixtralClient(world.url)
    monkeypatch.setenv("MIXTRAL_CLIENT_KEY", f"{KEY}\n")
    async with MixtralClient(world.url) as client:
        assert (await client.chat("Hello")).finish == "stop"


@pytest.mark.parametrize("address", ["", "localhost:7777", "ftp://host", "http://", []])
def test_address_that_is_none_is_refused_with_an_example(address: Any) -> None:
    with pytest.raises(ValueError, match=r"such as http://127\.0\.0\.1:7777"):
        MixtralClient(address, KEY)


# ------------------------------------------------------------------------------------------------ leaving


async def first_token(stream: JobStream) -> None:
    async for event in stream:
        if isinstance(event, TokenEvent):
            return


async def test_leaving_a_stream_by_break_by_error_or_with_its_client_leaves_the_job_running(api: ScriptedApi) -> None:
    world = api.script(HELD)
    async with MixtralClient(world.url, KEY) as client:
        async with client.stream("Hello") as stream:
            await first_token(stream)
        async for event in client.stream("Hello"):
            if isinstance(event, TokenEvent):
                break
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.suppress(ZeroDivisionError))
            await first_token(await stack.enter_async_context(client.stream("Hello")))
            raise ZeroDivisionError
        open_stream = client.stream("Hello")
        await first_token(open_stream)
    await open_stream.aclose()
    assert (world.states, world.asked("cancel")) == (["streaming"] * 4, [])


async def test_stream_cancels_its_job_when_asked_to(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(HELD)
    async with connect(world.url).stream("Hello") as stream:
        await stream.cancel()
        assert world.jobs == {}, "there is none yet"
        await first_token(stream)
        await stream.cancel()
        (done,) = await read(stream)
        assert isinstance(done, DoneEvent)
        assert done.finish == "cancelled"
    assert world.states == ["cancelled"]


async def test_task_cancelled_between_two_events_has_cancelled_its_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(HELD)
    has_token = asyncio.Event()

    async def slow_reader() -> None:
        async with connect(world.url).stream("Hello") as stream:
            await first_token(stream)
            has_token.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(slow_reader())
    await has_token.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.states == ["cancelled"]


async def test_cancelled_task_has_cancelled_its_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["Once", {"hold": True}])
    chat = asyncio.create_task(connect(world.url).chat("Hello"))
    await until(lambda: world.connections == 1)
    chat.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chat
    assert world.states == ["cancelled"]


async def test_task_cancelled_before_the_job_has_an_id_cancels_it_all_the_same(api: ScriptedApi) -> None:
    world = api.script(faults=[Fault(on="submit", hold=True)])
    async with MixtralClient(world.url, KEY) as client:
        chat = asyncio.create_task(client.chat("Hello"))
        await until(lambda: len(world.asked("submit")) == 1)
        chat.cancel()
        with pytest.raises(asyncio.CancelledError):
            await chat
        world.release()
    assert world.states == ["cancelled"]


async def test_cancelled_task_leaves_a_detached_job_and_one_it_merely_reads_running(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(HELD)
    client = connect(world.url)
    job = await client.submit("Hello")
    for stream in (client.stream("Hello", detach=True), client.events(job.id)):
        task = asyncio.create_task(read(stream))
        before = world.connections
        await until(lambda before=before: world.connections > before)  # type: ignore[misc]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (world.states, world.asked("cancel")) == (["streaming"] * 2, [])


async def test_cancel_that_fails_is_logged_and_raises_nothing(api: ScriptedApi, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    world = api.script(HELD, faults=[Fault("cancel", status=500, message="the disk is full")])
    chat = asyncio.create_task(connect(world.url).chat("Hello"))
    await until(lambda: world.states == ["streaming"])
    chat.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chat
    assert 'job=mixtral_chat.0-1 event=cancel_failed reason="the disk is full"' in caplog.text


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("script", "limits", "limit"),
    [
        ([{"hold": True}], Timeouts(first_token_s=1), "first_token"),
        ([{"hold": True}], Timeouts(first_token_s=60, total_s=1), "total"),
        (HELD, Timeouts(first_token_s=60, total_s=1.5), "total"),
    ],
)
async def test_limit_of_a_whole_answer_is_named_and_cancels_the_job(
    api: ScriptedApi, connect: Connect, script: list[Any], limits: Timeouts, limit: str
) -> None:
    world = api.script(script)
    with pytest.raises(TimedOut, match=rf"job mixtral_chat\.0-1 .* within {limit}_s, [\d.]+ s") as caught:
        await connect(world.url, timeouts=limits).chat("Hello")
    assert (caught.value.limit, caught.value.code, caught.value.job_id) == (limit, f"{limit}_timeout", "mixtral_chat.0-1")
    assert world.states == ["cancelled"]


async def test_limit_that_passes_before_the_job_has_an_id_cancels_it_all_the_same(api: ScriptedApi) -> None:
    world = api.script(faults=[Fault("submit", hold=True)])
    async with MixtralClient(world.url, KEY, timeouts=Timeouts(total_s=0.05)) as client:
        with pytest.raises(TimedOut, match="has no id yet"):
            await client.chat("Hello")
        world.release()
    assert world.states == ["cancelled"]


async def test_limit_of_a_mere_reader_leaves_the_job_running(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(HELD)
    client = connect(world.url)
    stream = client.with_options(timeouts=Timeouts(total_s=1)).events((await client.submit("Hello")).id)
    with pytest.raises(TimedOut):
        await read(stream)
    assert (stream.text, world.states) == ("Once", ["streaming"])


async def test_first_token_that_came_ends_that_limit(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(["a", {"hold": True}, "b"])
    stream = connect(world.url, timeouts=Timeouts(first_token_s=30)).stream("Hello")
    await first_token(stream)
    assert stream._next_limit() == (None, None)
    world.release()
    assert (await stream.answer()).text == "ab"


async def test_connection_that_cannot_be_made_is_named_as_that(connect: Connect) -> None:
    with socket.socket() as full:  # its one place is taken, and nobody accepts
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as takers:
            for _ in range(4):
                taker = takers.enter_context(socket.socket())
                taker.setblocking(False)
                taker.connect_ex(full.getsockname())
            client = connect(f"http://127.0.0.1:{full.getsockname()[1]}", retry=Retry(max_tries=1), timeouts=Timeouts(connect_s=0.05))
            with pytest.raises(ConnectionLost, match=r"no connection within connect_s, 0\.05 s") as caught:
                await client.models()
    assert caught.value.code == "connect_timeout"


async def test_silences_of_a_stream_and_of_an_answer_have_codes_of_their_own(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script(HELD, faults=[Fault("submit", hold=True)]).url, retry=Retry(max_tries=1), timeouts=Timeouts(answer_s=0.05))
    with pytest.raises(ConnectionLost) as caught:
        await client.submit("Hello")
    assert caught.value.code == "answer_timeout"
    with pytest.raises(ConnectionLost, match=r"was silent for 0\.05 s") as caught:
        await client.with_options(timeouts=Timeouts(silence_s=0.05)).chat("Hello")
    assert caught.value.code == "silence_timeout"


async def test_tries_are_counted_and_the_last_error_is_told(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(faults=[Fault("submit")] * 10)
    client = connect(world.url)
    with pytest.raises(Unavailable):
        await client.with_options(retry=Retry(max_tries=3, first_wait_s=0.001)).submit("Hello")
    assert len(world.requests) == 3
    await client.submit("Hello")
    assert len(world.requests) == 3 + 7 + 1, "the client itself is as patient as it was"


# ------------------------------------------------------------------------------------------ what a stream keeps


async def test_answer_of_a_stream_holds_what_was_read_before(api: ScriptedApi, connect: Connect) -> None:
    stream = connect(api.script(["a", "b", {"rewind": 1}, "c"]).url).stream("Hello")
    await first_token(stream)
    assert stream.text == "a"
    answer = await stream.answer()
    assert (answer.text, stream.text, answer.job_id) == ("ac", "ac", "mixtral_chat.0-1")


@pytest.mark.parametrize(("to", "text"), [(2, "xy"), (1, "xy"), (0, "xy"), (3, "cxy")])
async def test_text_of_a_resumed_stream_begins_after_its_id_and_honours_rewinds_before_it(
    api: ScriptedApi, connect: Connect, to: int, text: str
) -> None:
    client = connect(api.script(["a", "b", {"hold": True}, "c", {"rewind": to}, "x", "y"]).url)
    job = await client.submit("Hello")
    await client.job(job.id)
    world_released = client.events(job.id, after=2)
    api.worlds[-1].release()
    assert (await world_released.answer()).text == text


async def test_logprobs_are_kept_with_the_answer(api: ScriptedApi, connect: Connect) -> None:
    chance = {"id": 7, "text": "a", "bytes": "61", "logprob": -0.5, "top": []}
    world = api.script([{"event": "token", "offset": 1, "text": "a", "logprobs": chance}])
    answer = await connect(world.url).chat("Hello", logprobs=True, top_logprobs=0)
    assert [one.logprob for one in answer.logprobs] == [-0.5]
    assert world.asked("submit")[0].body["top_logprobs"] == 0


# ------------------------------------------------------------------------------------------------ what it needs


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mixtral_client.client", {"torch", "redis", "sqlalchemy", "numpy", "rich"}),
        ("mixtral_client.cli", {"torch", "redis", "sqlalchemy", "numpy"}),
        ("mixtral_client.protocol", {"torch", "redis", "sqlalchemy", "aiohttp", "asyncio"}),
    ],
)
def test_module_imports_without_what_it_does_not_need(module: str, absent: set[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "clients/python"
    script = f"import json, sys; sys.path.insert(0, {str(path)!r}); import {module}; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout))
    assert module in loaded
    assert absent & loaded == set()


def test_package_names_what_it_offers_and_its_version() -> None:
    import mixtral_client

    assert set(mixtral_client.__all__) <= set(dir(mixtral_client))
    assert [getattr(mixtral_client, name).__name__ for name in mixtral_client.__all__[:-1]] == mixtral_client.__all__[:-1]
    assert mixtral_client.__version__ == importlib.metadata.version("mixtral-chat")
    with pytest.raises(AttributeError, match="'mixtral_client' has no attribute 'Client'"):
        _ = mixtral_client.Client  # type: ignore[attr-defined]
