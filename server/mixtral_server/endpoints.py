"""Endpoint files: one TOML file describes one named queue, its defaults and its limits.

Decides what may stand in such a file and what holds where it says nothing. Leaves to queue.py how the limits are kept and to
routes/ how the defaults fill a request. The endpoint's name is also the model id that clients name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MIXTRAL_RELEASED = 1_702_252_800  # 2023-12-11, unix seconds


class EndpointError(ValueError):
    """An endpoint file that cannot be used; the message names file, field, limit and what was given."""


class EndpointConfig(BaseModel):
    """One endpoint. Frozen; a field that the file lacks has the default below."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="queue name and model id")]
    title: Annotated[str, Field(max_length=100, description="shown on the page")] = "Mixtral"
    description: Annotated[str, Field(max_length=1000, description="one sentence for people")] = ""
    created: Annotated[int, Field(ge=0, description="unix seconds, shown by /v1/models")] = MIXTRAL_RELEASED

    default_max_tokens: Annotated[int, Field(ge=1, description="answer length where a request names none, in tokens")] = 512
    max_tokens: Annotated[int, Field(ge=1, description="longest answer a request may ask for, in tokens")] = 32_768
    temperature: Annotated[float, Field(ge=0, le=2, description="where a request names none")] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1, description="where a request names none")] = 0.9
    top_k: Annotated[int, Field(ge=0, le=1000, description="where a request names none; 0 keeps every token")] = 40
    min_p: Annotated[float, Field(ge=0, le=1, description="where a request names none; 0 keeps every token")] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, description="where a request names none; 1 = none")] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="where a request names none; 0 = none")] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="where a request names none; 0 = none")] = 0.0

    max_waiting: Annotated[int, Field(ge=1, description="waiting jobs in all; then users above an equal share are answered 429")] = 10_000
    max_waiting_per_user: Annotated[int, Field(ge=1, description="waiting jobs of one user; one more is answered 429")] = 1_000
    max_waiting_tokens: Annotated[int, Field(ge=1, description="as max_waiting, in estimated tokens of prompts and answers")] = 50_000_000
    max_waiting_tokens_per_user: Annotated[int, Field(ge=1, description="as max_waiting_per_user, in estimated tokens")] = 5_000_000
    ageing_s: Annotated[float, Field(ge=0, le=1_000_000, description="so long a wait lifts a job by one priority; 0 switches it off")] = (
        60.0
    )
    batch_wait_ms: Annotated[
        int, Field(ge=0, le=60_000, description="how long a worker that takes whole batches waits for one to fill")
    ] = 50
    requests_per_minute: Annotated[int, Field(ge=0, le=10**9, description="requests of one key whose own limit is unset; 0 = no limit")] = 0
    tokens_per_minute: Annotated[
        int, Field(ge=0, le=10**12, description="tokens of one visitor, or of one key whose own limit is unset; 0 = no limit")
    ] = 0
    max_running: Annotated[
        int,
        Field(ge=0, le=10**9, description="jobs of one visitor, or of one key whose own limit is unset, that run at once; 0 = no limit"),
    ] = 0
    queue_timeout_s: Annotated[float, Field(gt=0, description="a job that no worker began by then expires")] = 3600.0
    keep_s: Annotated[float, Field(ge=1, description="how long a finished job can be read, in seconds")] = 3600.0
    keep_dead_s: Annotated[float, Field(ge=1, description="how long a job that was given up can be looked at and retried, in seconds")] = (
        604_800.0
    )
    lease_s: Annotated[float, Field(ge=1, le=300, description="a worker silent for so long loses its jobs")] = 10.0
    report_interval_ms: Annotated[int, Field(ge=1, le=5000, description="how often a busy worker reports")] = 20
    sessions_per_key: Annotated[int, Field(ge=1, description="workers logged in with one key at a time")] = 64
    coalesce_ms: Annotated[int, Field(ge=0, le=1000, description="tokens gathered into one chunk for so long; 0 = a chunk per token")] = 0

    @model_validator(mode="after")
    def _default_within_limit(self) -> EndpointConfig:
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"default_max_tokens is {self.default_max_tokens}, above max_tokens {self.max_tokens}; lower the one or raise the other"
            )
        return self


BUILT_IN = EndpointConfig(name="mixtral_chat", title="Mixtral chat", description="Chat with Mixtral on your own machines.")
"""What the shipped file says, for an installation without it."""


def read_endpoint(path: Path) -> EndpointConfig:
    """Raises EndpointError with one sentence for a file that is unreadable, not TOML, or holds a wrong value."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EndpointError(f"endpoint file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EndpointError(f"endpoint file {path} is not TOML: {error}") from error
    try:
        return EndpointConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Value error, ")
        raise EndpointError(f"endpoint file {path}: {field + ': ' if field else ''}{rule}; got {first['input']!r:.80}") from error


def read_endpoints(folder: Path) -> Mapping[str, EndpointConfig]:
    """Every *.toml of the folder by endpoint name. Raises EndpointError when there is none, or a name stands twice."""
    if not folder.is_dir():
        raise EndpointError(f"endpoint_dir {folder} is not a folder; name one that holds at least one endpoint file (*.toml)")
    found: dict[str, EndpointConfig] = {}
    for path in sorted(folder.glob("*.toml")):
        endpoint = read_endpoint(path)
        if endpoint.name in found:
            raise EndpointError(f"endpoint file {path}: the name {endpoint.name} is taken by another file of this folder; rename one")
        found[endpoint.name] = endpoint
    if not found:
        raise EndpointError(f"endpoint_dir {folder} holds no endpoint file (*.toml); add one or name another folder")
    return found
