"""Events as bytes: read back by the Python client's own decoder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_client.protocol import DoneEvent, JobEvent, MovedEvent, QueuedEvent, RewindEvent, TokenEvent, Usage, event_id
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


@given(st.lists(st.tuples(st.integers(1, 2**31), st.integers(0, 2**32 - 1), st.text()), max_size=5), st.text())
def test_a_tokens_event_made_from_a_pattern_is_what_is_made_one_by_one(rows: list[tuple[int, int, str]], name: str) -> None:
    def body(text: str) -> dict[str, object]:
        return {"id": name.replace(sse.HOLE, ""), "choices": [{"delta": {"content": text}, "logprobs": None}], "share": "100 %d"}

    one_by_one = b"".join(sse.chunk(body(text), event_id(offset, crc)) for offset, crc, text in rows)
    assert sse.token_events(sse.token_pattern(body(sse.HOLE)), rows) == one_by_one
    natively = b"".join(sse.encode(TokenEvent(offset=offset, text=text), event_id(offset, crc)) for offset, crc, text in rows)
    assert sse.native_token_events(rows) == natively
