"""Events as bytes: read back by the Python client's own decoder."""

from __future__ import annotations

import json

import pytest

from mixtral_client.protocol import DoneEvent, JobEvent, MovedEvent, QueuedEvent, RewindEvent, TokenEvent, Usage
from mixtral_client.sse import SseDecoder
from mixtral_server import sse

EVENTS: list[JobEvent] = [
    QueuedEvent(position=3, eta_s=1.5),
    TokenEvent(offset=1, text="one\ntwo\r\n: not a comment\n\ndata: nor this\u2028"),
    MovedEvent(attempt=2),
    RewindEvent(to=0),
    DoneEvent(finish="stop", usage=Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_event_is_read_back_whole_with_its_name_and_id(event: JobEvent) -> None:
    (read,) = SseDecoder().feed(sse.encode(event, "7.0000abcd"))
    assert (read.event, read.id) == (event.event, "7.0000abcd")
    assert type(event).model_validate(json.loads(read.data)) == event


def test_event_without_id_leaves_the_readers_last_id_alone() -> None:
    first, second = SseDecoder().feed(sse.encode(EVENTS[1], "1.00000000") + sse.encode(EVENTS[2]))
    assert (first.id, second.id) == ("1.00000000", "1.00000000")


def test_comment_and_retry_make_no_event() -> None:
    assert list(SseDecoder().feed(sse.PING + sse.retry(1000))) == []
