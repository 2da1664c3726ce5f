"""Jobs on their way to an AIME worker and back: which it can serve, what it is handed, and what of its words is kept. Pure.

Decides what an AIME worker cannot honour: such a job is for native workers alone, never served with a part of it ignored. Leaves leases to
aime_queue.py and the calls to aime_workers.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import orjson
from pydantic import BaseModel

from mixtral_client.protocol import ChatMessage, ErrorDetail, JobSpec, Sampling
from mixtral_server.aime_queue import AimeJob, Post
from mixtral_server.descriptions import Output
from mixtral_server.endpoints import DEFAULT_MAX_GEN_TOKENS, EndpointConfig
from mixtral_server.records import JobContent, Parameters

MAX_ERROR_CHARS = 4000
MAX_WORD_CHARS = 200
WORKER_TIMES = ("arrival_time", "finished_time", "preprocessing_duration", "pending_duration")

CHAT_OUTPUTS: Mapping[str, Output] = {
    "text": Output(type="string"),
    "num_generated_tokens": Output(type="integer"),
    "model_name": Output(type="string"),
    "max_seq_len": Output(type="integer"),
    "current_context_length": Output(type="integer"),
    "error": Output(type="string"),
}
CHAT_PROGRESS: Mapping[str, Output] = {"text": Output(type="string"), "num_generated_tokens": Output(type="integer")}

_TOLD_SAMPLING = ("temperature", "top_p", "top_k")
_TOLD = (*_TOLD_SAMPLING, "max_gen_tokens")
MAX_HONOURED = 1000


def _defaults(model: type[BaseModel], *told: str) -> dict[str, Any]:
    return {name: one.get_default(call_default_factory=True) for name, one in model.model_fields.items() if name not in told}


_UNTOLD = _defaults(JobSpec, "messages", "prompt", "sampling", "max_tokens", "seed")
_UNTOLD_SAMPLING = _defaults(Sampling, *_TOLD_SAMPLING)
"""What an AIME worker is never told, and what it is where nobody asked for it. A seed that was drawn is no wish of anybody's."""

_untold, _NOTHING_UNTOLD = attrgetter(*_UNTOLD), tuple(_UNTOLD.values())  # of every job that is put: it must be quick
_told_sampling = attrgetter(*_TOLD_SAMPLING)
_untold_sampling, _NOTHING_SAMPLED = attrgetter(*_UNTOLD_SAMPLING), tuple(_UNTOLD_SAMPLING.values())


def outputs_of(endpoint: EndpointConfig) -> Mapping[str, Output]:
    return endpoint.outputs or CHAT_OUTPUTS


def progress_outputs_of(endpoint: EndpointConfig) -> Mapping[str, Output]:
    """An endpoint that declares outputs and no progress has none."""
    return endpoint.progress_outputs or ({} if endpoint.outputs else CHAT_PROGRESS)


# ---------------------------------------------------------------------------------------------- to the worker


def needs_native(content: JobContent, endpoint: EndpointConfig) -> bool:
    """Whether it asks for something that no AIME worker of this endpoint is told: anything but the endpoint's own inputs, within their
    limits."""
    if isinstance(content, Parameters):
        return False
    if isinstance(content.prompt, list) or _untold(content) != _NOTHING_UNTOLD or _untold_sampling(content.sampling) != _NOTHING_SAMPLED:
        return True
    if content.prompt is not None and not _is_honoured("prompt_input", content.prompt, endpoint):
        return True
    if content.messages is not None and not _is_honoured("chat_context", content.messages, endpoint):
        return True
    told = (*_told_sampling(content.sampling), content.max_tokens)
    known = endpoint.honoured.get(told)
    if known is None:
        if len(endpoint.honoured) >= MAX_HONOURED:
            endpoint.honoured.clear()
        known = endpoint.honoured[told] = all(_is_honoured(name, value, endpoint) for name, value in zip(_TOLD, told, strict=True))
    return not known


def _is_honoured(name: str, value: object, endpoint: EndpointConfig) -> bool:
    """Of an input that is not declared, the worker has a default of its own: that of the endpoint, it is taken to be."""
    one = endpoint.job_inputs.get(name)
    if one is None and name == "max_gen_tokens":
        return value == min(DEFAULT_MAX_GEN_TOKENS, endpoint.max_tokens)
    if one is None:
        return name in _TOLD_SAMPLING and value == getattr(endpoint, name)
    return name == "chat_context" or one.taken(name, value)[1] is None


def job_data_of(job: AimeJob, worker_job_id: str, endpoint: EndpointConfig, now: float) -> dict[str, Any]:
    """The job as AIME's library hands it to a worker."""
    given = job.content.parameters if isinstance(job.content, Parameters) else _chat_data(job.content)
    own = {name: value for name, value in given.items() if name in endpoint.job_inputs}
    return {**own, "job_id": worker_job_id, "start_time": job.created, "start_time_compute": now}


def _chat_data(spec: JobSpec) -> dict[str, Any]:
    return {
        "prompt_input": spec.prompt if isinstance(spec.prompt, str) else "",
        "chat_context": _context(spec.messages) if spec.messages is not None else None,
        **_told(spec),
    }


def _told(spec: JobSpec) -> dict[str, Any]:
    return dict(zip(_TOLD, (*_told_sampling(spec.sampling), spec.max_tokens), strict=True))


def _context(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """AIME knows one system message, the first, and no developer: all that stand there become it."""
    instructions = [one.content for one in messages if one.role in ("system", "developer")]
    chat = [{"role": one.role, "content": one.content} for one in messages if one.role in ("user", "assistant")]
    return [{"role": "system", "content": "\n\n".join(instructions)}, *chat] if instructions else chat


# ---------------------------------------------------------------------------------------------- from the worker


def progress_post(job_id: str, attempt: int, given: Mapping[str, Any], endpoint: EndpointConfig) -> Post:
    """A half of a character at the text's end, which a later post mends, waits for that post. What is too large waits too: progress may be
    lost."""
    told = given.get("progress_data")
    declared = progress_outputs_of(endpoint)
    data = {name: value for name, value in told.items() if name in declared and value is not None} if isinstance(told, dict) else {}
    text = data.pop("text", None)
    number = given.get("progress")
    tokens = data.get("num_generated_tokens", number if endpoint.is_chat else None)
    said = {"progress": number if isinstance(number, int | float) else 0, "progress_data": data}
    if size_of(said, text) > endpoint.max_output_bytes:
        return Post(job_id, attempt)
    return Post(job_id, attempt, text=text.rstrip("\ufffd") if isinstance(text, str) else None, tokens=_count(tokens), said=said)


def result_post(job_id: str, attempt: int, given: Mapping[str, Any], endpoint: EndpointConfig) -> Post:
    declared = outputs_of(endpoint)
    outputs = {name: value for name, value in given.items() if name in declared and value is not None}
    error = given.get("error")
    text = outputs.pop("text", None)
    outputs.pop("error", None)
    tokens = _count(outputs.get("num_generated_tokens"))
    context = _count(outputs.get("current_context_length"))
    times = {name: given[name] for name in WORKER_TIMES if isinstance(given.get(name), int | float)}
    worker = {"auth": _word(given.get("auth")), "worker_interface_version": _word(given.get("version"))}
    said = {"outputs": outputs, "times": times, "worker": worker}
    if (size := size_of(said, text)) > endpoint.max_output_bytes:
        what = f"{size:,} bytes" if isinstance(size, int) else "nested deeper than JSON is written here"
        message = f"the worker's result is {what}; {endpoint.max_output_bytes:,} bytes at most at {endpoint.name}"
        return _failed(job_id, attempt, "result_too_large", message)
    if error:
        return _failed(
            job_id, attempt, "worker_failed", error if isinstance(error, str) else orjson.dumps(error, default=str).decode(), said
        )
    return Post(
        job_id,
        attempt,
        text=text if isinstance(text, str) else "",
        tokens=tokens,
        prompt_tokens=max(0, context - tokens) if context is not None and tokens is not None else None,
        said=said,
        ending="stop",
    )


def _failed(job_id: str, attempt: int, code: str, message: str, said: Mapping[str, Any] | None = None) -> Post:
    detail = ErrorDetail(message=message[:MAX_ERROR_CHARS], type="server_error", code=code)
    return Post(job_id, attempt, ending="error", error=detail, said=said)


def size_of(*values: object) -> float:
    """Bytes as JSON; infinite for what cannot be written as such."""
    try:
        return len(orjson.dumps(values))
    except orjson.JSONEncodeError:
        return math.inf


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _word(value: object) -> str:
    return str(value)[:MAX_WORD_CHARS] if value is not None else ""
