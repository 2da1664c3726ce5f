"""MixtralClient against a server that goes wrong on purpose: whatever is cut, refused or lost, the caller sees one whole answer."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_client import JobStream, MixtralClient, Retry
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
    Unavailable,
)
from mixtral_client.protocol import DoneEvent, ErrorDetail, JobEvent, MovedEvent, RewindEvent, TokenEvent, event_id, ids_crc
from support.scripted_api import KEY, Cut, Fault, ScriptedApi, World, id_of

Connect = Callable[..., MixtralClient]
TEXTS = ["Once", " üpon", " a"]
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


def asked(world: World, kind: str) -> list[dict[str, Any]]:
    return [request for request in world.requests if request["kind"] == kind]


def states(world: World) -> list[str]:
    return list(world.history()["jobs"].values())


# ------------------------------------------------------------------------------------------------ answers


async def test_chat_gives_text_finish_usage_and_timings(api: ScriptedApi, connect: Connect) -> None:
    answer = await connect(api.script(logs=[TEXTS]).url).chat("Tell a story")
    assert (answer.text, answer.finish, answer.usage.total_tokens) == ("Once üpon a", "stop", 7)
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
    }
    await connect(world.url).chat("Hello", model="other", **options)
    assert asked(world, "POST")[0]["body"] == {"model": "other", "messages": [{"role": "user", "content": "Hello"}], **options}


async def test_option_left_out_is_not_sent_so_that_the_endpoint_decides(api: ScriptedApi, connect: Connect) -> None:
    world = api.script()
    await connect(world.url).complete([1, 2, 3])
    assert asked(world, "POST")[0]["body"] == {"model": "mixtral_chat", "prompt": [1, 2, 3]}


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
    client = connect(api.script(logs=[TEXTS]).url)
    accepted = await client.submit("Hello")
    view = await client.job(accepted.id)
    assert (accepted.position, view.id, view.tokens, view.text) == (1, accepted.id, 3, "Once üpon a")


async def test_models_are_listed(api: ScriptedApi, connect: Connect) -> None:
    assert [model.id for model in await connect(api.script().url).models()] == ["mixtral_chat"]


async def test_cancelled_job_ends_a_stream_with_done_and_makes_chat_raise(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
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


@pytest.mark.parametrize("how", ["close", "end"])
async def test_connection_cut_at_any_byte_costs_no_token_and_repeats_none(api: ScriptedApi, connect: Connect, how: str) -> None:
    world = api.script(logs=[TEXTS])
    total = 0
    async for piece in world.body(world.submit("key", {"model": "mixtral_chat"}), ""):
        assert isinstance(piece, bytes)
        total += len(piece)
    assert total > 400
    for at in range(total):
        client = connect((world := api.script(logs=[TEXTS], cuts=[Cut(at=at, how=how)])).url)
        assert_whole(await read(client.stream("Hello")), TEXTS)
        assert len(asked(world, "POST")) == 1
        await client.close()


cuts = st.lists(st.builds(Cut, at=st.integers(0, 900), how=st.sampled_from(["close", "abort", "end"])), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=3), max_size=8), cuts=cuts, write_bytes=st.sampled_from([1, 7, 1 << 16]))
async def test_any_cuts_give_offsets_once_in_order_and_one_end(
    api: ScriptedApi, connect: Connect, texts: list[str], cuts: list[Cut], write_bytes: int
) -> None:
    world = api.script(logs=[texts], cuts=cuts, write_bytes=write_bytes)
    assert_whole(await read(connect(world.url).stream("Hello")), texts)
    assert states(world) == ["streaming"], "a job that ended is not cancelled"


async def test_resume_names_the_last_token_with_its_crc(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[[*TEXTS[:2], {"cut": "abort"}], TEXTS])
    stream = connect(world.url).stream("Hello")
    assert_whole(await read(stream), TEXTS)
    ids = [id_of(text) for text in TEXTS]
    assert [request.get("Last-Event-ID") for request in asked(world, "EVENTS")] == [None, event_id(2, ids_crc(ids[:2]))]
    assert stream.last_id == event_id(3, ids_crc(ids))


async def test_events_after_an_id_or_an_offset_go_on_there(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script(logs=[TEXTS]).url)
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
    world = api.script(logs=[TEXTS], cuts=[Cut(at=250, how="silence")])
    assert_whole(await read(connect(world.url, silence_timeout_s=0.05).stream("Hello")), TEXTS)
    assert world.connections >= 2


async def test_skipped_offset_is_fetched_by_a_new_connection(api: ScriptedApi, connect: Connect) -> None:
    gap = {"event": "token", "offset": 3, "text": "?"}
    world = api.script(logs=[[TEXTS[0], gap], TEXTS])
    assert_whole(await read(connect(world.url).stream("Hello")), TEXTS)


async def test_log_that_lost_its_end_rewinds_and_goes_on_from_there(api: ScriptedApi, connect: Connect) -> None:
    logs = [["a", "b", "c", {"cut": "close"}], ["a", {"cut": "close"}], ["a", "d", "e"]]
    client = connect(api.script(logs=logs).url)
    events = await read(client.stream("Hello"))
    assert [event for event in events if isinstance(event, RewindEvent)] == [RewindEvent(to=1)]
    assert tokens(events) == [(1, "a"), (2, "b"), (3, "c"), (2, "d"), (3, "e")]
    assert (await connect(api.script(logs=logs).url).chat("Hello")).text == "ade"


async def test_log_that_differs_rewinds_to_its_start_and_never_forks(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["a", "b", {"cut": "end"}], ["x", "y", "z", "!"]])
    assert (await connect(world.url).chat("Hello")).text == "xyz!"


async def test_rewind_without_an_id_of_its_own_resumes_by_offset(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["a", "b", {"event": "rewind", "to": 1}, {"cut": "end"}], ["a", "c"]])
    assert (await connect(world.url).chat("Hello")).text == "ac"
    assert asked(world, "EVENTS")[1]["Last-Event-ID"] == "1"


async def test_move_to_another_worker_is_told_once(api: ScriptedApi, connect: Connect) -> None:
    moved = {"event": "moved", "attempt": 2}
    world = api.script(logs=[["a", moved, "b", {"cut": "end"}], ["a", moved, "b", {"event": "moved", "attempt": 3}, "c"]])
    events = await read(connect(world.url).stream("Hello"))
    assert [event.attempt for event in events if isinstance(event, MovedEvent)] == [2, 3]
    assert_whole(events, ["a", "b", "c"])


async def test_comments_and_unknown_events_change_nothing(api: ScriptedApi, connect: Connect) -> None:
    log = [{"comment": "ping"}, "Once", {"event": "weather", "sun": True}, " üpon", {"comment": "ping"}, " a"]
    world = api.script(logs=[log], preamble="\ufeffretry: 1\n: hello\n\n")
    assert_whole(await read(connect(world.url).stream("Hello")), TEXTS)


async def test_stream_gives_up_when_nobody_can_be_reached_for_long(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(cuts=[Cut(at=0)] * 100)
    retry = Retry(resume_for_s=0.05, first_wait_s=0.01)
    with pytest.raises(ConnectionLost, match=r"ended before the job did|broke"):
        await read(connect(world.url, retry=retry).stream("Hello"))
    assert 1 < world.connections < 20


async def test_event_without_end_is_refused(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(EventTooLarge):
        await read(connect(api.script(logs=[["x" * (2 << 20)]]).url).stream("Hello"))


async def test_event_that_does_not_fit_the_wire_is_refused(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(BadAnswer, match="does not fit the wire"):
        await read(connect(api.script(logs=[[{"event": "token", "offset": "soon"}]]).url).stream("Hello"))


async def test_more_than_a_hundred_streams_run_at_once(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    client = connect(world.url)
    streams = [client.stream("Hello") for _ in range(120)]
    chats = [asyncio.create_task(read(stream)) for stream in streams]
    await until(lambda: world.connections == 120)
    await asyncio.gather(*(client.cancel(stream.job_id) for stream in streams))
    assert [tokens(events) for events in await asyncio.gather(*chats)] == [[(1, "Once")]] * 120


# ------------------------------------------------------------------------------------------------ refusals, lost answers, replicas


async def test_submit_whose_answer_is_lost_makes_one_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(faults=[Fault(on="POST", lose=True), Fault(on="POST", lose=True)])
    job = await connect(world.url).submit("Hello")
    assert world.history()["jobs"] == {job.id: "streaming"}
    assert len({request["Idempotency-Key"] for request in asked(world, "POST")}) == 1
    assert len(asked(world, "POST")) == 3


async def test_two_submits_make_two_jobs_unless_they_share_a_key(api: ScriptedApi, connect: Connect) -> None:
    client = connect(api.script().url)
    ids = [(await client.submit("Hello", idempotency_key=key)).id for key in (None, None, "k", "k")]
    assert len(set(ids)) == 3
    assert ids[2] == ids[3]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_passing_refusals_are_tried_again(api: ScriptedApi, connect: Connect, status: int) -> None:
    faults = [Fault(on=kind, status=status, code="busy") for kind in ("POST", "EVENTS", "POST", "EVENTS")]
    assert (await connect(api.script(faults=faults, logs=[TEXTS]).url).chat("Hello")).text == "Once üpon a"


async def test_wait_longer_than_our_patience_is_told_at_once(api: ScriptedApi, connect: Connect) -> None:
    full = Fault(on="POST", status=429, code="queue_full", message="the queue is full", headers={"Retry-After": "3600"})
    world = api.script(faults=[full])
    with pytest.raises(LimitReached) as caught:
        await connect(world.url).submit("Hello")
    assert (caught.value.code, caught.value.retry_after_s, caught.value.message) == ("queue_full", 3600, "the queue is full")
    assert len(world.requests) == 1


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (413, RequestRefused), (500, ServerFailed)])
async def test_refusals_that_will_not_pass_are_told_at_once(
    api: ScriptedApi, connect: Connect, status: int, kind: type[MixtralError]
) -> None:
    world = api.script(faults=[Fault(on="POST", status=status, code="word", message="a sentence")])
    with pytest.raises(kind, match="a sentence") as caught:
        await connect(world.url).submit("Hello")
    error = caught.value
    assert (error.code, error.status, error.kind, error.request_id) == ("word", status, "server_error", "req-7")
    assert len(world.requests) == 1


async def test_proxy_that_answers_in_html_is_quoted(api: ScriptedApi, connect: Connect) -> None:
    page = Fault(on="GET", status=502, code=None, message="<h1>Bad Gateway</h1>")
    with pytest.raises(Unavailable, match="was answered 502: <h1>Bad Gateway</h1>") as caught:
        await connect(api.script(faults=[page]).url, retry=Retry(give_up_after_s=0)).models()
    assert caught.value.code == "http_502"


async def test_answer_of_another_service_is_named_as_such(api: ScriptedApi, connect: Connect) -> None:
    with pytest.raises(BadAnswer, match="does the address belong to this service"):
        await connect(api.script(faults=[Fault(on="GET", status=200, code=None, message="It works!")]).url).models()


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
    assert asked(world, "GET")[0]["path"] == "/v1/jobs/../models?x#y", "the server sees the id as one part of the path"


async def test_failed_job_is_raised_with_the_workers_words_and_never_tried_again(api: ScriptedApi, connect: Connect) -> None:
    detail = ErrorDetail(message="prompt is 9 tokens too long", type="invalid_request_error", code="context_length_exceeded")
    world = api.script(logs=[["Once"]], end={"event": "error", "error": detail.model_dump()})
    stream = connect(world.url).stream("Hello")
    await first_token(stream)
    with pytest.raises(JobFailed, match="9 tokens too long") as caught:
        await read(stream)
    assert (caught.value.code, caught.value.job_id) == ("context_length_exceeded", "mixtral_chat.0-1")
    assert (world.connections, states(world)) == (1, ["streaming"])


async def test_next_replica_is_tried_when_one_is_gone_or_away(api: ScriptedApi, connect: Connect) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}"
        away = api.script(faults=[Fault(on="POST", code="redis_unavailable")] * 50)
        world = api.script(logs=[TEXTS])
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
    world = api.script(faults=[Fault(on="POST", hold=True)] * 100)
    with pytest.raises(ConnectionLost, match=r"got no answer within 0\.02 s"):
        await connect(world.url, answer_timeout_s=0.02, retry=Retry(give_up_after_s=0.05, first_wait_s=0.001)).submit("Hello")
    world.release.set()


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


async def test_stream_closed_early_has_cancelled_its_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    async with connect(world.url).stream("Hello") as stream:
        await first_token(stream)
    assert states(world) == ["cancelled"]


async def test_stream_dropped_by_break_is_cancelled(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    client = connect(world.url)
    async for event in client.stream("Hello"):
        if isinstance(event, TokenEvent):
            break
    await until(lambda: states(world) == ["cancelled"])


async def test_stream_left_open_is_cancelled_when_the_client_closes(api: ScriptedApi) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    async with MixtralClient(world.url, KEY) as client:
        stream = client.stream("Hello")
        await first_token(stream)
    assert states(world) == ["cancelled"]
    await stream.aclose()
    assert len(asked(world, "DELETE")) == 1


async def test_cancelled_task_has_cancelled_its_job(api: ScriptedApi, connect: Connect) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    chat = asyncio.create_task(connect(world.url).chat("Hello"))
    await until(lambda: world.connections == 1)
    chat.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chat
    assert states(world) == ["cancelled"]


async def test_task_cancelled_before_the_job_has_an_id_cancels_it_all_the_same(api: ScriptedApi) -> None:
    world = api.script(faults=[Fault(on="POST", hold=True)])
    async with MixtralClient(world.url, KEY) as client:
        chat = asyncio.create_task(client.chat("Hello"))
        await until(lambda: len(asked(world, "POST")) == 1)
        chat.cancel()
        with pytest.raises(asyncio.CancelledError):
            await chat
        world.release.set()
    assert states(world) == ["cancelled"]


async def test_detached_stream_and_mere_reader_leave_the_job_running(api: ScriptedApi) -> None:
    world = api.script(logs=[["Once", {"hold": True}]])
    async with MixtralClient(world.url, KEY) as client:
        async with client.stream("Hello", detach=True) as stream:
            await first_token(stream)
        async with client.events(stream.job_id) as reader:
            await first_token(reader)
    assert (states(world), asked(world, "DELETE")) == (["streaming"], [])


async def test_cancel_that_fails_is_logged_and_raises_nothing(api: ScriptedApi, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    world = api.script(logs=[["Once", {"hold": True}]], faults=[Fault(on="DELETE", status=500, message="the disk is full")])
    async with connect(world.url).stream("Hello") as stream:
        await first_token(stream)
    assert 'job=mixtral_chat.0-1 event=cancel_failed reason="the disk is full"' in caplog.text


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
