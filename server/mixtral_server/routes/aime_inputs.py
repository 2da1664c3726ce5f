"""The parameters of AIME's chat endpoints: their types, defaults and limits, and from them to the job that a worker gets. Pure.

Decides what is refused, in AIME's words and all of it at once. Leaves to specs.py the order of roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from mixtral_client.protocol import MAX_MESSAGES, ChatMessage, JobSpec, Sampling
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import RequestRefused
from mixtral_server.routes.body import refusal
from mixtral_server.routes.specs import check_roles, default_sampling

DEFAULT_MAX_GEN_TOKENS = 2000  # AIME's own, where a request names none
MOST_SHOWN = 30  # characters of a value that an error quotes

TYPE_NAMES = {str: "string", int: "integer", float: "float", bool: "bool"}
_CONTEXT = TypeAdapter(Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)])


class InputsRefused(Exception):
    """All that is wrong with the parameters, a sentence each."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors


@dataclass(frozen=True)
class Input:
    """One parameter. is_json: a string that holds JSON."""

    kind: type
    default: object = None
    least: float | None = None
    most: float | None = None
    is_json: bool = False

    def described(self) -> dict[str, object]:
        limits = {"minimum": self.least, "maximum": self.most, "default": self.default}
        return {"type": "json" if self.is_json else TYPE_NAMES[self.kind]} | {k: v for k, v in limits.items() if v is not None}


def inputs_of(endpoint: EndpointConfig) -> dict[str, Input]:
    return {
        "prompt_input": Input(str, ""),
        "chat_context": Input(str, "", is_json=True),
        "top_k": Input(int, endpoint.top_k, 1, 1000),
        "top_p": Input(float, endpoint.top_p, 0, 1),
        "temperature": Input(float, endpoint.temperature, 0, 1),
        "max_gen_tokens": Input(int, min(DEFAULT_MAX_GEN_TOKENS, endpoint.max_tokens), 1, endpoint.max_tokens),
        "client_session_auth_key": Input(str),
        "key": Input(str),
        "wait_for_result": Input(bool, True),
    }


def from_query(query: Mapping[str, str], inputs: Mapping[str, Input]) -> dict[str, object]:
    """A query's texts, with numbers and booleans read where the parameter is one."""
    return {name: _typed(text, inputs[name].kind) if name in inputs else text for name, text in query.items()}


def _typed(text: str, kind: type) -> object:
    if kind is str:
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def values_of(given: Mapping[str, object], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Every parameter with its value, defaults filled in. null is as good as left out. Raises InputsRefused."""
    errors = []
    if unknown := [_shown(name) for name in given if name not in inputs]:
        errors.append(f"Invalid input parameter(s): {', '.join(unknown)}")
    values = {name: one.default for name, one in inputs.items()}
    for name, one in inputs.items():
        if (value := given.get(name)) is None:
            continue
        problem = _problem(name, value, one)
        if problem:
            errors.append(problem)
        else:
            values[name] = one.kind(value)  # a float for an int is cut, an int for a float is one
    if errors:
        raise InputsRefused(errors)
    return values


def _problem(name: str, value: object, one: Input) -> str | None:
    kinds = (int, float) if one.kind in (int, float) else (one.kind,)
    if type(value) not in kinds:  # not isinstance: true is no number
        return f"Invalid argument type {name}={_shown(value)}. Expected: {one.kind} but got {type(value)}!"
    where = f"supported value for {name} on this endpoint is"
    if one.most is not None and cast(float, value) > one.most:
        return f"Parameter {name} = {_shown(value)} is too high. Max {where} {one.most}!"
    if one.least is not None and cast(float, value) < one.least:
        return f"Parameter {name} = {_shown(value)} is too low. Min {where} {one.least}!"
    return None


def spec_of(values: Mapping[str, Any], endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    """A chat, its last message from prompt_input if given; without a chat_context a text to continue. Raises InputsRefused."""
    prompt: str = values["prompt_input"]
    messages = _messages(values["chat_context"])
    if messages:
        if prompt:
            messages.append(ChatMessage(role="user", content=prompt))
        try:
            check_roles(messages)
        except RequestRefused as error:
            raise InputsRefused([f"Input parameter chat_context with prompt_input as its last user message: {error.message}"]) from error
    elif not prompt:
        raise InputsRefused(["Missing required argument: prompt_input (or chat_context with at least one message)"])
    # top_p 0 is AIME's way to say: only the best token
    top_p, top_k = (values["top_p"], values["top_k"]) if values["top_p"] else (1.0, 1)
    return JobSpec(
        messages=messages or None,
        prompt=None if messages else prompt,
        sampling=Sampling(**default_sampling(endpoint) | {"temperature": values["temperature"], "top_p": top_p, "top_k": top_k}),
        max_tokens=values["max_gen_tokens"],
        seed=new_seed,
    )


def _messages(context: str) -> list[ChatMessage]:
    if not context:
        return []
    try:
        return _CONTEXT.validate_json(context)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise InputsRefused([f"Input parameter chat_context={_shown(context)} has invalid json format!"]) from error
        raise InputsRefused([f"Input parameter chat_context: {refusal(error).message.strip()}"]) from error


def _shown(value: object) -> str:
    return str(value)[:MOST_SHOWN]
