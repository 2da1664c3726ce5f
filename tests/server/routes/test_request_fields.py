"""Fields of a request beside its sampling: which are ignored and said to be, which are refused by name, and null as good as nothing."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from mixtral_client.protocol import ChatRequest, CompletionRequest, JobRequest, Wire
from support.scripted_worker import ScriptedWorker

CHAT: dict[str, Any] = {"model": "mixtral_chat", "messages": [{"role": "user", "content": "hello"}]}
PROMPT: dict[str, Any] = {"model": "mixtral_chat", "prompt": "hello"}
WIRES: dict[str, tuple[dict[str, Any], type[Wire]]] = {
    "/v1/chat/completions": (CHAT, ChatRequest),
    "/v1/completions": (PROMPT, CompletionRequest),
    "/v1/jobs": (CHAT, JobRequest),
}


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    assert answer.status == 400, await answer.text()
    error: dict[str, Any] = (await answer.json())["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    return error


# ---------------------------------------------------------------------------------------------- ignored


@pytest.mark.parametrize("path", WIRES)
async def test_ignored_fields_are_named_in_a_header(http: aiohttp.ClientSession, worker: ScriptedWorker, path: str) -> None:
    body = WIRES[path][0] | {
        "service_tier": "auto",
        "store": True,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "safe_prompt": True,
    }
    async with http.post(path, json=body) as answer:
        assert answer.status in (200, 202), await answer.text()
        assert answer.headers["x-ignored-fields"] == "service_tier, store, metadata, parallel_tool_calls, safe_prompt"


async def test_ignored_fields_of_messages_and_options_are_named_once(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    messages = [{"role": role, "content": "x", "name": "Ann", "refusal": None} for role in ("user", "assistant", "user")]
    body = CHAT | {"messages": messages, "stream": True, "stream_options": {"include_obfuscation": False}}
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-ignored-fields"] == "messages[].name, messages[].refusal, stream_options.include_obfuscation"


async def test_request_without_ignored_fields_has_no_such_header(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "x-own": 1}}}
    async with http.post("/v1/chat/completions", json=CHAT | {"response_format": schema}) as answer:
        assert answer.status == 200
        assert "x-ignored-fields" not in answer.headers


async def test_header_of_ignored_fields_is_short_and_plain_whatever_they_are_called(http: aiohttp.ClientSession) -> None:
    strange = {"a\r\nset-cookie: x=1": 1, "ü" * 500: 1, "": 1, "a, b": 1}
    async with http.post("/v1/jobs", json=CHAT | strange | {f"field_{number}": 1 for number in range(5000)}) as answer:
        assert answer.status == 202
        shown = answer.headers["x-ignored-fields"]
    assert shown.startswith("a%0D%0Aset-cookie%3A%20x%3D1, %C3%BC%C3%BC")
    assert "a%2C%20b, field_0, field_1, " in shown
    assert shown.endswith(", and 4984 more")
    assert len(shown) < 1000


async def test_ignored_fields_are_named_also_where_the_request_is_refused_later(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"model": "gpt-4", "store": True}) as answer:
        assert (answer.status, answer.headers["x-ignored-fields"]) == (404, "store")


# ---------------------------------------------------------------------------------------------- null


@pytest.mark.parametrize("path", WIRES)
async def test_null_is_as_good_as_a_field_left_out(http: aiohttp.ClientSession, worker: ScriptedWorker, path: str) -> None:
    body, model = WIRES[path]
    key = {"Idempotency-Key": f"null {path}"}
    nothing = {name: None for name in model.model_fields if name not in body}
    async with http.post(path, json=body | nothing, headers=key) as answer:
        assert answer.status in (200, 202), await answer.text()
        assert "x-ignored-fields" not in answer.headers
    async with http.post(path, json=body, headers=key) as answer:
        assert answer.status == 200, await answer.text()  # the same meaning: the key is taken
    assert len(worker.seen) <= 1


# ---------------------------------------------------------------------------------------------- refused by name

NO_TOOLS = "the model calls no tools; describe them in a message and ask for JSON by response_format"
TEXT_ONLY = "the model reads and writes text only; leave this out"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("path", "field", "words"),
    [
        ("/v1/chat/completions", {"tools": [TOOL]}, NO_TOOLS),
        ("/v1/chat/completions", {"tool_choice": "required"}, NO_TOOLS),
        ("/v1/chat/completions", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, NO_TOOLS),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, NO_TOOLS),
        ("/v1/chat/completions", {"function_call": {"name": "f"}}, NO_TOOLS),
        ("/v1/chat/completions", {"web_search_options": {}}, NO_TOOLS),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, TEXT_ONLY),
        ("/v1/chat/completions", {"audio": {"voice": "x", "format": "mp3"}}, TEXT_ONLY),
        ("/v1/completions", {"echo": True}, "the answer holds no prompt; put the two together yourself"),
        ("/v1/completions", {"echo": 0}, "the answer holds no prompt"),
        ("/v1/completions", {"suffix": "the end"}, "the model writes on from a prompt's end"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(
    http: aiohttp.ClientSession, path: str, field: dict[str, Any], words: str
) -> None:
    async with http.post(path, json=WIRES[path][0] | field) as answer:
        error = await error_of(answer)
    assert error["param"] == next(iter(field))
    assert error["message"].startswith(f"{error['param']}: is not supported: {words}")


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [TOOL]}, "messages[1].tool_calls", NO_TOOLS),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "messages[1].function_call", NO_TOOLS),
        ({"role": "assistant", "content": None, "audio": {"id": "x"}}, "messages[1].audio", TEXT_ONLY),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "messages[1].content", "must be of type 'text'"),
        ({"role": "assistant", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[1].content", "got 'input_audio'"),
    ],
)
async def test_what_is_no_text_in_a_message_is_refused_by_name(
    http: aiohttp.ClientSession, message: dict[str, Any], param: str, words: str
) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"messages": [*CHAT["messages"], message]}) as answer:
        error = await error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"tools": [], "tool_choice": "none", "functions": [], "function_call": "auto", "modalities": ["text"]}),
        ("/v1/completions", {"echo": False, "suffix": "", "best_of": 1}),
    ],
)
async def test_values_that_ask_for_nothing_are_taken(
    http: aiohttp.ClientSession, worker: ScriptedWorker, path: str, fields: dict[str, Any]
) -> None:
    async with http.post(path, json=WIRES[path][0] | fields) as answer:
        assert answer.status == 200, await answer.text()
        assert "x-ignored-fields" not in answer.headers


async def test_messages_reach_the_worker_with_role_and_content_alone(http: aiohttp.ClientSession, worker: ScriptedWorker) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "text"}]
    messages = [{"role": "developer", "content": "be short"}, {"role": "user", "content": parts, "name": "Ann", "tool_calls": []}]
    async with http.post("/v1/chat/completions", json=CHAT | {"messages": messages}) as answer:
        assert answer.status == 200
    got = worker.seen[0].spec.messages
    assert got is not None
    assert [one.model_dump() for one in got] == [{"role": "developer", "content": "be short"}, {"role": "user", "content": "one text"}]


# ---------------------------------------------------------------------------------------------- the last message

ANSWERED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Once"}]
TWICE = "the model has no form for a second answer after the assistant's message; add a user message, or leave"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs"])
@pytest.mark.parametrize(
    ("messages", "flags", "param", "words"),
    [
        (
            CHAT["messages"],
            {"continue_final_message": True},
            "continue_final_message",
            "needs a last message of role assistant; it is of role user",
        ),
        (ANSWERED, {"continue_final_message": False}, "continue_final_message", f"continue_final_message is false, but {TWICE}"),
        (ANSWERED, {"add_generation_prompt": True}, "add_generation_prompt", f"add_generation_prompt is true, but {TWICE}"),
        (
            ANSWERED,
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "are opposites, and both are true; leave one out",
        ),
    ],
)
async def test_flags_that_the_last_message_contradicts_are_refused(
    http: aiohttp.ClientSession, path: str, messages: Any, flags: dict[str, bool], param: str, words: str
) -> None:
    async with http.post(path, json=CHAT | {"messages": messages} | flags) as answer:
        error = await error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("messages", "flags"),
    [
        (ANSWERED, {}),
        (ANSWERED, {"continue_final_message": True}),
        (ANSWERED, {"continue_final_message": True, "add_generation_prompt": False}),
        (CHAT["messages"], {"continue_final_message": False, "add_generation_prompt": True}),
        (CHAT["messages"], {"add_generation_prompt": False}),
    ],
)
async def test_flags_that_agree_with_the_last_message_change_nothing(
    http: aiohttp.ClientSession, worker: ScriptedWorker, messages: Any, flags: dict[str, bool]
) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"messages": messages} | flags) as answer:
        assert answer.status == 200, await answer.text()
    got = worker.seen[0].spec.messages
    assert got is not None
    assert [one.model_dump() for one in got] == messages


@pytest.mark.parametrize("field", [{"continue_final_message": True}, {"add_generation_prompt": True}, {"truncate": "oldest_turns"}])
async def test_what_is_about_messages_is_refused_for_a_prompt(http: aiohttp.ClientSession, field: dict[str, Any]) -> None:
    async with http.post("/v1/jobs", json=PROMPT | field) as answer:
        error = await error_of(answer)
    assert error["param"] == next(iter(field))
    assert "is about the messages of a chat, and a prompt has none" in error["message"]
