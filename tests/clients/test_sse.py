"""The Python SSE decoder: every golden case, at every split position, within its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_client.errors import EventTooLarge
from mixtral_client.sse import SseDecoder

CASES = json.loads((Path(__file__).parent / "fixtures/sse.json").read_text())["cases"]
each_case = pytest.mark.parametrize("case", CASES, ids=[case["name"].replace(" ", "-") for case in CASES])


def decoded(chunks: list[bytes]) -> dict[str, Any]:
    decoder = SseDecoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return {"events": [{"event": one.event, "data": one.data, "id": one.id} for one in events], "retry_ms": decoder.retry_ms}


def expected(case: dict[str, Any]) -> dict[str, Any]:
    return {"events": case["events"], "retry_ms": case["retry_ms"]}


@each_case
def test_case_decodes_as_the_rules_say(case: dict[str, Any]) -> None:
    assert decoded([case["bytes"].encode("latin-1")]) == expected(case)


@each_case
def test_case_decodes_the_same_when_split_in_two_anywhere(case: dict[str, Any]) -> None:
    stream = case["bytes"].encode("latin-1")
    for at in range(len(stream) + 1):
        assert decoded([stream[:at], stream[at:]]) == expected(case), f"split at {at}"


@each_case
def test_case_decodes_the_same_byte_by_byte(case: dict[str, Any]) -> None:
    stream = case["bytes"].encode("latin-1")
    assert decoded([stream[at : at + 1] for at in range(len(stream))]) == expected(case)


@given(
    st.lists(st.sampled_from(["data", ":", " ", "\r", "\n", "id", "event", "retry", "7", "\0", "\xe2", "\x82", "\xac", "\xef\xbb\xbf"])),
    st.data(),
)
def test_any_stream_decodes_the_same_in_any_three_pieces(parts: list[str], data: st.DataObject) -> None:
    stream = "".join(parts).encode("latin-1")
    first = data.draw(st.integers(0, len(stream)))
    second = data.draw(st.integers(first, len(stream)))
    assert decoded([stream[:first], stream[first:second], stream[second:]]) == decoded([stream])


def test_an_event_is_given_with_the_bytes_that_end_it_and_not_later() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: 1\r") == []
    assert [event.data for event in decoder.feed(b"\r")] == ["1"], "a CR ends a line whether an LF follows or not"


@pytest.mark.parametrize("head", [b"", b"data: 1\n\n"], ids=["first-event", "later-event"])
def test_endless_line_is_refused_at_the_limit(head: bytes) -> None:
    decoder = SseDecoder(max_event_bytes=100)
    decoder.feed(head + b"data: " + b"x" * 94)
    with pytest.raises(EventTooLarge, match="larger than 100 bytes"):
        decoder.feed(b"x")


def decoded_within(decoder: SseDecoder, chunks: list[bytes]) -> int:
    return sum(len(decoder.feed(chunk)) for chunk in chunks)


def test_endless_data_lines_are_refused_at_the_limit() -> None:
    decoder = SseDecoder(max_event_bytes=100)
    with pytest.raises(EventTooLarge, match="larger than 100 bytes"):
        decoded_within(decoder, [b"data: xyz\n"] * 12)


def test_endless_comments_and_events_within_the_limit_are_never_refused() -> None:
    decoder = SseDecoder(max_event_bytes=100)
    assert decoded_within(decoder, [b": ping\ndata: " + b"x" * 80 + b"\n\n"] * 1000) == 1000
    assert decoded_within(decoder, [b": ping\n"] * 1000) == 0
