"""Which value of a parameter is taken by its description, and in which words another one is refused."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mixtral_server.descriptions import Input, InputsRefused, Output, values_of

PIXEL = base64.b64encode(b"pixel").decode()
CHAT = '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]'


@pytest.mark.parametrize(
    ("described", "given_value", "taken"),
    [
        ({"type": "string"}, "x", "x"),
        ({"type": "string", "max_length": 3}, "abc", "abc"),
        ({"type": "string", "max_length": 3}, "abcd", "Parameter it has 4 characters. Max supported length on this endpoint is 3!"),
        ({"type": "string", "max_length": 3, "auto_convert": True}, "abcd", "abc"),
        ({"type": "string"}, 5, "Invalid argument type it=5. Expected: <class 'str'> but got <class 'int'>!"),
        ({"type": "integer"}, 5, 5),
        ({"type": "integer"}, 5.9, 5),
        ({"type": "integer"}, True, "Invalid argument type it=True. Expected: <class 'int'> but got <class 'bool'>!"),
        ({"type": "integer", "min": 0}, -1, "Parameter it = -1 is too low. Min supported value for it on this endpoint is 0!"),
        ({"type": "integer", "max": 0}, 1, "Parameter it = 1 is too high. Max supported value for it on this endpoint is 0!"),
        ({"type": "integer", "minimum": 1, "maximum": 9, "auto_convert": True}, 12, 9),
        ({"type": "integer", "minimum": 1, "maximum": 9, "auto_convert": True}, -12, 1),
        ({"type": "integer", "align": 8}, 20, "Parameter it = 20 is not a multiple of 8!"),
        ({"type": "integer", "align": 8, "auto_convert": True}, 21, 24),
        ({"type": "float"}, 5, 5.0),
        ({"type": "float", "maximum": 1}, 1.5, "Parameter it = 1.5 is too high. Max supported value for it on this endpoint is 1!"),
        ({"type": "bool"}, False, False),
        ({"type": "bool"}, 0, "Invalid argument type it=0. Expected: <class 'bool'> but got <class 'int'>!"),
        ({"type": "json"}, '{"a": [1, null]}', {"a": [1, None]}),
        ({"type": "json"}, "", None),
        ({"type": "json"}, "[" * 64 + "]" * 64, orjson.loads("[" * 64 + "]" * 64)),
        ({"type": "json"}, "[" * 65 + "]" * 65, "Input parameter it is nested more than 64 levels deep"),
        ({"type": "json"}, "{bad", "Input parameter it={bad has invalid json format!"),
        ({"type": "json"}, '"\ud800"', 'Input parameter it="\ud800" has invalid json format!'),
        ({"type": "chat_context"}, '[{"role": "robot", "content": ""}]', "Input parameter it must be a list of messages"),
        ({"type": "chat_context"}, "{}", "Input parameter it must be a list of messages"),
        ({"type": "text_context"}, "Once", "Once"),
        ({"type": "selection", "supported": ["a", 0, ""]}, 0, 0),
        ({"type": "selection", "supported": ["a", 0, ""]}, "b", "Parameter it = b is not supported. Supported on this endpoint: a, 0, "),
        ({"type": "image"}, PIXEL, PIXEL),
        ({"type": "image"}, f"data:image/png;base64,{PIXEL}", f"data:image/png;base64,{PIXEL}"),
        ({"type": "audio", "supported": ["WAV"]}, f"data:audio/wav;base64,{PIXEL}", f"data:audio/wav;base64,{PIXEL}"),
        ({"type": "image", "supported": ["png"]}, f"data:image/gif;base64,{PIXEL}", "Parameter the format of it = gif is not supported."),
        ({"type": "image"}, "data:image/png,abc", "Input parameter it must be base64, or a data URL"),
        ({"type": "image"}, "not base64!", "Input parameter it is not base64; got not base64!"),
        ({"type": "image"}, "ä", "Input parameter it is not base64; got ä"),
        ({"type": "image", "max_bytes": 3}, PIXEL, "Input parameter it has 6 bytes. Max supported size on this endpoint is 3!"),
    ],
)
def test_value_is_taken_or_refused_by_its_description(described: dict[str, Any], given_value: object, taken: Any) -> None:
    one = Input.model_validate(described)
    value, problem = one.taken("it", given_value)
    if problem is None:
        assert (value, type(value)) == (taken, type(taken))
    else:
        assert problem.startswith(taken)


def test_chat_context_is_a_list_of_messages() -> None:
    value, problem = Input(type="chat_context").taken("it", CHAT)
    assert problem is None
    assert [one["role"] for one in value] == ["user", "assistant"]


def test_what_is_left_out_or_null_takes_its_default_and_without_one_is_no_value() -> None:
    inputs = {
        "a": Input(type="integer", default=0),
        "b": Input(type="string"),
        "c": Input(type="selection", supported=("", "x"), default=""),
    }
    assert values_of({}, inputs) == values_of({"a": None, "b": None}, inputs) == {"a": 0, "c": ""}


def test_default_is_taken_as_it_stands_and_json_is_read() -> None:
    inputs = {"seed": Input(type="integer", minimum=0, default=-1), "parts": Input(type="json", default="[1]")}
    assert values_of({}, inputs) == {"seed": -1, "parts": [1]}
    with pytest.raises(InputsRefused, match="seed = -1 is too low"):
        values_of({"seed": -1}, inputs)


def test_required_parameter_must_be_there_unless_it_has_a_default() -> None:
    with pytest.raises(InputsRefused, match="Missing required argument: a"):
        values_of({"a": None}, {"a": Input(type="string", required=True)})
    assert values_of({}, {"a": Input(type="string", required=True, default="x")}) == {"a": "x"}


def test_chat_and_text_to_continue_exclude_each_other() -> None:
    inputs = {"chat": Input(type="chat_context"), "text": Input(type="text_context")}
    assert values_of({"chat": CHAT, "text": ""}, inputs)["text"] == ""
    with pytest.raises(InputsRefused, match="Give one of chat and text"):
        values_of({"chat": CHAT, "text": "Once"}, inputs)


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ({"type": "picture"}, "Input should be 'string'"),
        ({"type": "integer", "maxmum": 5}, "Extra inputs are not permitted"),
        ({"type": "selection"}, "a selection needs supported"),
        ({"type": "json", "default": "{"}, "Input parameter default={ has invalid json format!"),
        ({"type": "integer", "align": 0}, "greater than or equal to 1"),
    ],
)
def test_description_that_makes_no_sense_is_refused(described: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Input.model_validate(described)


def test_description_is_shown_as_it_was_given() -> None:
    assert Input.model_validate({"type": "integer", "min": 0, "default": 0}).described() == {"type": "integer", "minimum": 0, "default": 0}
    assert Output.model_validate({"type": "image", "format": "png"}).model_dump() == {"type": "image", "format": "png"}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda of: st.lists(of) | st.dictionaries(st.text(), of)
)


@given(st.sampled_from(["string", "integer", "float", "bool", "json", "chat_context", "text_context", "image"]), anything)
def test_any_value_at_all_is_taken_or_refused_in_a_sentence(kind: Any, value: object) -> None:
    one = Input(type=kind, minimum=0, maximum=5, align=2) if kind in ("integer", "float") else Input(type=kind)
    _, problem = one.taken("it", value)
    assert problem is None or "it" in problem
