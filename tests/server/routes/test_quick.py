"""The quick reader of a turn takes nothing that the model would not, and changes nothing of what it takes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator

from mixtral_client.protocol import MAX_COUNT, Frame, FrameError, TurnRequest
from mixtral_server.errors import RequestRefused
from mixtral_server.routes.body import model_of
from mixtral_server.routes.quick import QuickReader

READER = QuickReader(TurnRequest)
FRAME: dict[str, Any] = {"job": "chat.0-aa", "attempt": 1, "offset": 4, "ids": [5, 6], "texts": ["a", "ü"]}
TURN: dict[str, Any] = {
    "session": "chat.0-bb",
    "turn": 7,
    "holding": [["chat.0-aa", 1]],
    "frames": [FRAME],
    "room": 3,
    "telemetry": {"a": [1.5]},
}

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, MAX_COUNT, MAX_COUNT + 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, 1.5, -0.0]
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["", "stop", "length", "7", "x" * 200, "x" * 201, "ü" * 200, "\x00"]))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXTS, some, max_size=2),
    max_leaves=5,
)


def changed(whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields are others, some are new, some are gone."""
    names = st.sampled_from([*whole, "finish", "error", "release", "prompt_tokens", "dropped_messages", "logprobs", "other"])
    likely = st.one_of(
        ANYTHING, NUMBERS, TEXTS, st.just({"code": "a", "message": "b"}), st.lists(NUMBERS, max_size=2), st.lists(TEXTS, max_size=2)
    )
    return st.builds(
        lambda new, gone: {name: value for name, value in (whole | new).items() if name not in gone},
        st.dictionaries(names, likely, max_size=2),
        st.frozensets(st.sampled_from([*whole, ""]), max_size=1),
    )


TURNS = st.builds(
    lambda turn, frames: {**turn, "frames": frames} if "frames" in turn else turn, changed(TURN), st.lists(changed(FRAME), max_size=2)
)


def plain(value: object) -> object:
    """A model or what stands in for it, as JSON would have it, types of numbers included."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [type(value), *map(plain, value)]
    return type(value), value


def quick(raw: bytes) -> object | None:
    """What the reader takes by itself."""
    try:
        return READER._decoder.decode(raw)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


@given(TURNS)
def test_what_it_takes_is_what_the_model_would_have_read(turn: dict[str, Any]) -> None:
    raw = json.dumps(turn).encode()
    taken = quick(raw)
    if taken is not None:
        assert plain(taken) == plain(model_of(raw, TurnRequest))


@given(TURNS)
def test_what_it_does_not_take_is_read_or_refused_by_the_model(turn: dict[str, Any]) -> None:
    raw = json.dumps(turn).encode()
    try:
        expected: object = plain(model_of(raw, TurnRequest))
    except RequestRefused as refusal:
        expected = str(refusal)
    try:
        read: object = plain(READER.read(raw))
    except RequestRefused as refusal:
        read = str(refusal)
    assert read == expected


@given(st.binary(max_size=12), st.integers(0, 200))
def test_bytes_that_are_no_json_are_refused_like_by_the_model(junk: bytes, at: int) -> None:
    good = orjson.dumps(TURN)
    raw = good[: at % len(good)] + junk + good[at % len(good) :]
    taken = quick(raw)
    if taken is not None:
        assert plain(taken) == plain(model_of(raw, TurnRequest))


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00", r"\ud800A", r"\udc00\ud800", r"\ud800\ud800"])
def test_half_of_a_character_is_refused(text: str) -> None:
    raw = orjson.dumps(TURN).replace(b'"a"', f'"{text}"'.encode())
    with pytest.raises(RequestRefused):
        READER.read(raw)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(job="chat.0-aa", attempt=0, offset=1),
        Frame(job="chat.0-aa", attempt=MAX_COUNT, offset=MAX_COUNT, ids=[0, 2**31 - 1], texts=["", "\U0001f600"]),
        Frame(job="chat.0-aa", attempt=1, offset=1, ids=[3], texts=["a"], finish="length", prompt_tokens=10, dropped_messages=2),
        Frame(job="chat.0-aa", attempt=1, offset=1, error=FrameError(code="prompt_too_long", message="too long")),
        Frame(job="chat.0-aa", attempt=1, offset=1, release=True),
    ],
)
def test_turns_as_workers_write_them_are_taken(frame: Frame) -> None:
    for exclude_defaults in (True, False):
        turn = TurnRequest(session="chat.0-bb", turn=1, holding=[("chat.0-aa", 1)], frames=[frame], room=1, telemetry={"running": 1})
        raw = turn.model_dump_json(exclude_defaults=exclude_defaults).encode()
        assert plain(quick(raw)) == plain(turn)


def test_model_with_a_rule_that_is_not_known_is_refused_when_the_reader_is_made() -> None:
    class OfAField(BaseModel):
        one: int

        @field_validator("one")
        @classmethod
        def _rule(cls, one: int) -> int:
            return one

    class OfAnotherKind(BaseModel):
        one: bytes

    class OfAPattern(BaseModel):
        one: str = Field(pattern="a")

    for model in (OfAField, OfAnotherKind, OfAPattern):
        with pytest.raises(TypeError, match="known here"):
            QuickReader(model)
