"""From a client's request to the jobs that workers get, one for each answer: defaults filled in, limits kept, roles in order. Pure.

Leaves to the worker what only the model can tell: the length in tokens, and whether it takes a last message of the assistant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import cast

from mixtral_client.protocol import (
    MAX_CHOICES,
    ChatFields,
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

_SAMPLING = frozenset(Sampling.model_fields)


def chat_specs(wanted: ChatRequest, endpoint: EndpointConfig, new_seed: Callable[[], int]) -> list[JobSpec]:
    """A job for each of the n answers."""
    check_messages(wanted.messages, wanted)
    old, new = wanted.max_tokens, wanted.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestRefused(
            f"max_tokens and max_completion_tokens are two names of one limit; got {old} and {new}: give one", param="max_completion_tokens"
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    first = _spec(
        wanted,
        endpoint,
        new_seed(),
        old if new is None else new,
        name,
        messages=wanted.messages,
        top_logprobs=_top_logprobs(wanted.logprobs, wanted.top_logprobs),
        truncate=wanted.truncate,
    )
    return _one_for_each_answer(first, wanted.n)


def completion_specs(wanted: CompletionRequest, endpoint: EndpointConfig, new_seed: Callable[[], int]) -> list[JobSpec]:
    """A job for each of the n answers to the first prompt, then to the second, and so on."""
    n = wanted.n or 1
    if wanted.best_of not in (None, n):
        raise RequestRefused(
            f"best_of must be n, {n} here, for no answer is made that is not sent; got {wanted.best_of}: leave it out", param="best_of"
        )
    prompts = prompts_of(wanted)
    if len(prompts) * n > MAX_CHOICES:
        raise RequestRefused(
            f"a request may ask for {MAX_CHOICES} answers at most; got {len(prompts)} prompts with n {n}: send fewer at once",
            param="prompt",
        )
    firsts = (
        _spec(wanted, endpoint, new_seed(), wanted.max_tokens, "max_tokens", prompt=prompt, top_logprobs=wanted.logprobs)
        for prompt in prompts
    )
    return [spec for first in firsts for spec in _one_for_each_answer(first, n)]


def prompts_of(wanted: CompletionRequest) -> list[str | list[int]]:
    """One or many."""
    prompt = wanted.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str | list[int]]", prompt)


def _one_for_each_answer(first: JobSpec, n: int | None) -> list[JobSpec]:
    return [first, *(first.model_copy(update={"seed": seed_of(first.seed, index)}) for index in range(1, n or 1))]


def seed_of(seed: int, index: int) -> int:
    """Of the answer with that index: the first 63 bits of SHA-256 of `<seed>.<index>`; the first answer has the request's own."""
    return int.from_bytes(hashlib.sha256(f"{seed}.{index}".encode()).digest()[:8]) >> 1 if index else seed


def job_spec(wanted: JobRequest, endpoint: EndpointConfig, new_seed: int) -> JobSpec:
    if wanted.messages is not None:
        check_messages(wanted.messages, wanted)
    elif name := next(
        (name for name in ChatFields.model_fields.keys() - SamplingFields.model_fields if getattr(wanted, name) is not None), None
    ):
        raise RequestRefused(f"{name} is about the messages of a chat, and a prompt has none; give messages or no {name}", param=name)
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
    messages: Sequence[ChatMessage] | None = None,
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
    if (wanted.min_tokens or 0) > max_tokens:
        raise RequestRefused(
            f"min_tokens may be as high as {max_tokens_name} at most, {max_tokens:,} here; got {wanted.min_tokens:,}", param="min_tokens"
        )
    asked = {name: value for name in wanted.model_fields_set & _SAMPLING if (value := getattr(wanted, name)) is not None}
    return JobSpec(
        messages=None if messages is None else list(messages),
        prompt=prompt,
        sampling=Sampling(**endpoint.sampling | asked),
        max_tokens=max_tokens,
        min_tokens=wanted.min_tokens or 0,
        stop=wanted.stop,
        stop_token_ids=wanted.stop_token_ids or [],
        ignore_eos=bool(wanted.ignore_eos),
        seed=new_seed if wanted.seed is None else wanted.seed,
        has_own_seed=wanted.seed is not None,
        top_logprobs=top_logprobs,
        response_format=wanted.response_format if wanted.response_format and wanted.response_format.type != "text" else None,
        truncate=truncate,
    )


def check_messages(messages: Sequence[ChatMessage], wanted: ChatFields) -> None:
    """Their order, and that the last one is of the role that the request says it is. Raises RequestRefused."""
    check_roles(messages)
    continues, begins = wanted.continue_final_message, wanted.add_generation_prompt
    is_answer = messages[-1].role == "assistant"
    if continues and begins:
        raise RequestRefused(
            "continue_final_message and add_generation_prompt are opposites, and both are true; leave one out",
            param="add_generation_prompt",
        )
    if continues and not is_answer:
        raise RequestRefused(
            f"continue_final_message needs a last message of role assistant; it is of role {messages[-1].role}: "
            "add the beginning of the answer, or leave continue_final_message out",
            param="continue_final_message",
        )
    if is_answer and (begins or continues is False):
        name = "continue_final_message" if continues is False else "add_generation_prompt"
        raise RequestRefused(
            f"{name} is {str(bool(begins)).lower()}, but the model has no form for a second answer after the assistant's message; "
            f"add a user message, or leave {name} out to have the last message continued",
            param=name,
        )


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
