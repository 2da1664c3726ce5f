"""The parameters of a job on AIME's client wire, and the job that they ask for. Pure.

Decides which parameters a request may have beside the endpoint's own, and what a chat's parameters mean to a worker of ours. Leaves types
and limits to descriptions.py and the order of roles to specs.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from mixtral_client.protocol import MAX_MESSAGES, ChatMessage, JobSpec, Sampling
from mixtral_server.descriptions import KINDS, Input, Inputs, InputsRefused
from mixtral_server.endpoints import DEFAULT_MAX_GEN_TOKENS, EndpointConfig
from mixtral_server.errors import RequestRefused
from mixtral_server.records import JobContent, Parameters
from mixtral_server.routes.body import refusal
from mixtral_server.routes.specs import check_roles

CREDENTIALS = ("key", "client_session_auth_key")
WAIT = "wait_for_result"
IMPLICIT: Inputs = {**{name: Input(type="string") for name in reversed(CREDENTIALS)}, WAIT: Input(type="bool", default=True)}
"""What every endpoint takes beside the inputs of its own; no worker hears of it."""

_CONTEXT = TypeAdapter(Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)])


def inputs_of(endpoint: EndpointConfig) -> Inputs:
    return {**endpoint.job_inputs, **IMPLICIT}


def from_query(query: Mapping[str, str], inputs: Inputs) -> dict[str, object]:
    """A query's texts, with numbers and booleans read where the parameter is one."""
    return {name: _typed(text, inputs[name]) if name in inputs else text for name, text in query.items()}


def _typed(text: str, one: Input) -> object:
    if one.type not in KINDS:
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def content_of_values(values: Mapping[str, Any], endpoint: EndpointConfig, new_seed: int) -> JobContent:
    """The job that these parameters ask for. Raises InputsRefused."""
    own = {name: value for name, value in values.items() if name not in IMPLICIT}
    if endpoint.is_chat:
        return _chat(own, endpoint, new_seed)
    asked = own.get("max_gen_tokens")
    likely = asked if isinstance(asked, int) else endpoint.default_max_tokens
    return Parameters(parameters=own, max_tokens=endpoint.max_tokens, likely_tokens=min(likely, endpoint.max_tokens))


def _chat(values: Mapping[str, Any], endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    """A chat, its last message from prompt_input if given; without a chat_context a text to continue."""
    prompt: str = values.get("prompt_input") or ""
    messages = _messages(values.get("chat_context"))
    if messages:
        if prompt:
            messages.append(ChatMessage(role="user", content=prompt))
        try:
            check_roles(messages)
        except RequestRefused as error:
            raise InputsRefused([f"Input parameter chat_context with prompt_input as its last user message: {error.message}"]) from error
    elif not prompt:
        raise InputsRefused(["Missing required argument: prompt_input (or chat_context with at least one message)"])
    asked = {name: values[name] for name in ("temperature", "top_p", "top_k") if values.get(name) is not None}
    if asked.get("top_p") == 0:  # AIME's way to say: only the best token
        asked |= {"top_p": 1.0, "top_k": 1}
    return JobSpec(
        messages=messages or None,
        prompt=None if messages else prompt,
        sampling=Sampling(**endpoint.sampling | asked),
        max_tokens=max(1, min(values.get("max_gen_tokens", _usual_max_gen_tokens(endpoint)), endpoint.max_tokens)),
        seed=new_seed,
    )


def _usual_max_gen_tokens(endpoint: EndpointConfig) -> int:
    """Where neither request nor endpoint names any."""
    described = endpoint.job_inputs.get("max_gen_tokens")
    most = described.maximum if described is not None and described.maximum is not None else DEFAULT_MAX_GEN_TOKENS
    return min(DEFAULT_MAX_GEN_TOKENS, int(most))


def _messages(context: object) -> list[ChatMessage]:
    if context is None:
        return []
    try:
        return _CONTEXT.validate_python(context)
    except ValidationError as error:
        raise InputsRefused([f"Input parameter chat_context: {refusal(error).message.strip()}"]) from error
