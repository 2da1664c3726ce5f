"""From a client's request to the job that a worker gets: defaults filled in, limits kept, roles in order. Pure.

Leaves to the worker what only the model can tell: the length in tokens, and whether it takes a last message of the assistant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtral_client.protocol import (
    MAX_TOKEN_ID,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    JobRequest,
    JobSpec,
    Sampling,
    SamplingFields,
    Truncate,
)
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import RequestRefused


def chat_spec(wanted: ChatRequest, endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    check_roles(wanted.messages)
    old, new = wanted.max_tokens, wanted.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestRefused(
            f"max_tokens and max_completion_tokens are two names of one limit; got {old} and {new}: give one", param="max_completion_tokens"
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    return _spec(
        wanted,
        endpoint,
        new_seed,
        old if new is None else new,
        name,
        messages=wanted.messages,
        top_logprobs=_top_logprobs(wanted.logprobs, wanted.top_logprobs),
        truncate=wanted.truncate,
    )


def completion_spec(wanted: CompletionRequest, endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    check_ids(wanted.prompt)
    return _spec(wanted, endpoint, new_seed, wanted.max_tokens, "max_tokens", prompt=wanted.prompt, top_logprobs=wanted.logprobs)


def job_spec(wanted: JobRequest, endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    if wanted.messages is not None:
        check_roles(wanted.messages)
    if wanted.prompt is not None:
        check_ids(wanted.prompt)
        if wanted.truncate is not None:
            raise RequestRefused(
                "truncate leaves turns of a chat out, and a prompt has none; give messages or no truncate", param="truncate"
            )
    return _spec(
        wanted,
        endpoint,
        new_seed,
        wanted.max_tokens,
        "max_tokens",
        messages=wanted.messages,
        prompt=wanted.prompt,
        top_logprobs=_top_logprobs(wanted.logprobs, wanted.top_logprobs),
        truncate=wanted.truncate,
    )


def _top_logprobs(logprobs: bool | None, top_logprobs: int | None) -> int | None:
    """JobSpec's number: None without logprobs."""
    if top_logprobs is not None and not logprobs:
        raise RequestRefused("top_logprobs needs logprobs to be true; set it, or leave top_logprobs out", param="top_logprobs")
    return (top_logprobs or 0) if logprobs else None


def _spec(
    wanted: SamplingFields,
    endpoint: EndpointConfig,
    new_seed: int,
    max_tokens: int | None,
    max_tokens_name: str,
    *,
    messages: list[ChatMessage] | None = None,
    prompt: str | list[int] | None = None,
    top_logprobs: int | None = None,
    truncate: Truncate | None = None,
) -> JobSpec:
    if max_tokens is None:
        max_tokens = endpoint.default_max_tokens
    if max_tokens > endpoint.max_tokens:
        raise RequestRefused(
            f"{max_tokens_name} may be {endpoint.max_tokens:,} at most for {endpoint.name}; got {max_tokens:,}; ask for less",
            param=max_tokens_name,
        )
    if wanted.min_tokens > max_tokens:
        raise RequestRefused(
            f"min_tokens may be as high as {max_tokens_name} at most, {max_tokens:,} here; got {wanted.min_tokens:,}", param="min_tokens"
        )
    asked = {name: value for name in Sampling.model_fields if (value := getattr(wanted, name)) is not None}
    return JobSpec(
        messages=messages,
        prompt=prompt,
        sampling=Sampling(**default_sampling(endpoint) | asked),
        max_tokens=max_tokens,
        min_tokens=wanted.min_tokens,
        stop=wanted.stop,
        stop_token_ids=wanted.stop_token_ids,
        ignore_eos=wanted.ignore_eos,
        seed=new_seed if wanted.seed is None else wanted.seed,
        top_logprobs=top_logprobs,
        response_format=wanted.response_format if wanted.response_format and wanted.response_format.type != "text" else None,
        truncate=truncate,
    )


def default_sampling(endpoint: EndpointConfig) -> dict[str, Any]:
    """Fields of Sampling as the endpoint would have them."""
    return {name: getattr(endpoint, name) for name in Sampling.model_fields if hasattr(endpoint, name)}


def check_roles(messages: Sequence[ChatMessage]) -> None:
    """System and developer messages first, then user and assistant in turn, the user first. Raises RequestRefused."""
    first = next((index for index, message in enumerate(messages) if message.role in ("user", "assistant")), None)
    if first is None:
        raise RequestRefused("messages must hold at least one message of role user; got none", param="messages")
    for index, message in enumerate(messages[first:], first):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if message.role != expected:
            raise RequestRefused(
                "messages must be system or developer messages first, then user and assistant in turn, user first; "
                f"messages[{index}] must be of role {expected}; got {message.role}",
                param=f"messages[{index}].role",
            )


def check_ids(prompt: str | Sequence[int]) -> None:
    """Raises RequestRefused for a token id that no tokenizer has."""
    if isinstance(prompt, str):
        return
    for index, token in enumerate(prompt):
        if token > MAX_TOKEN_ID:
            raise RequestRefused(f"prompt[{index}] must be a token id of 0 to {MAX_TOKEN_ID:,}; got {token}", param=f"prompt[{index}]")
