"""The golden fixtures that both clients share: the server writes this wire, the Python client reads it so. Twin: fixtures.test.mjs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mixtral_client import MixtralClient
from mixtral_client.errors import PASSING, MixtralError, refusal, retry_after_s
from mixtral_client.protocol import DoneEvent, JobAccepted, JobEvent, JobView, MovedEvent, RewindEvent, TokenEvent, parse_event_id
from mixtral_client.resume import EVENTS, LogPosition
from mixtral_client.sse import SseDecoder
from mixtral_client.testing import Fault
from mixtral_server import sse
from support.scripted_api import ScriptedApi

FIXTURES = Path(__file__).parent / "fixtures"
WIRE = json.loads((FIXTURES / "wire.json").read_text())
CHATS = json.loads((FIXTURES / "chats.json").read_text())["cases"]
NOW = datetime.fromisoformat(WIRE["now"])


def name_of(case: dict[str, Any]) -> str:
    return str(case["name"]).replace(" ", "-")


def read(chunks: list[bytes]) -> list[dict[str, Any]]:
    """What a reader of one connection is given, each event with the id that resumes after it."""
    decoder, position = SseDecoder(), LogPosition("job")
    events = [(position.take(raw), position.id) for chunk in chunks for raw in decoder.feed(chunk)]
    return [event.model_dump(mode="json") | {"id": id} for event, id in events if event is not None]


def test_stream_is_what_the_server_writes() -> None:
    """To the byte: the fixture's events, encoded by the server, are the fixture's text."""
    raw = sse.retry(1000) + sse.PING
    for fields in WIRE["stream"]["events"]:
        event = EVENTS[fields["event"]].model_validate(fields)
        has_id = isinstance(event, TokenEvent | RewindEvent | DoneEvent)
        raw += sse.encode(event, fields["id"] if has_id else None)
    assert raw.decode() == WIRE["stream"]["text"]


def test_stream_is_read_the_same_when_split_in_two_anywhere() -> None:
    raw = WIRE["stream"]["text"].encode()
    for at in range(len(raw) + 1):
        assert read([raw[:at], raw[at:]]) == WIRE["stream"]["events"], f"split at {at}"
    assert read([raw[at : at + 1] for at in range(len(raw))]) == WIRE["stream"]["events"]


@pytest.mark.parametrize(("model", "name"), [(JobAccepted, "accepted"), (JobView, "view")])
def test_body_has_every_field_of_the_wire_and_no_other(model: type[JobAccepted | JobView], name: str) -> None:
    assert model.model_validate(WIRE[name], extra="forbid").model_dump(mode="json") == WIRE[name]


@pytest.mark.parametrize("case", WIRE["errors"], ids=name_of)
def test_answer_becomes_the_error_that_the_fixture_says(case: dict[str, Any]) -> None:
    error = refusal("GET http://x/", case["status"], case["headers"], case["body"].encode())
    error.retry_after_s = retry_after_s(case["headers"].get("retry-after"), now=NOW)
    facts = {name: getattr(error, name) for name in case["error"] if name != "is_passing"}
    assert facts | {"is_passing": isinstance(error, PASSING)} == case["error"]


def told(event: JobEvent) -> dict[str, Any] | None:
    match event:
        case TokenEvent():
            return {"token": [event.offset, event.text]}
        case MovedEvent():
            return {"moved": event.attempt}
        case RewindEvent():
            return {"rewind": event.to}
        case DoneEvent():
            return {"done": event.finish}
    return None


@pytest.mark.parametrize("case", CHATS, ids=name_of)
async def test_chat_that_goes_wrong_is_read_as_the_fixture_says(
    api: ScriptedApi, connect: Callable[..., MixtralClient], case: dict[str, Any]
) -> None:
    world = api.script(case["script"], faults=[Fault(**fault) for fault in case["faults"]])
    events: list[JobEvent] = []
    code = None
    stream = connect(world.url).stream("Hello")
    try:
        async for event in stream:
            events.append(event)  # noqa: PERF401 (what came before the error counts)
    except MixtralError as error:
        code = error.code
    assert [one for one in map(told, events) if one] == case["events"]
    assert (stream.text, code) == (case["text"], case["error"])
    ids = [request.headers.get("Last-Event-ID") for request in world.asked("events")]
    assert [None if id is None else parse_event_id(id)[0] for id in ids] == case["after"]
    assert len(world.jobs) <= 1
