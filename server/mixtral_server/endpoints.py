"""Endpoint files: one TOML file describes one named queue, its defaults and its limits, and what it takes and gives if it is no plain chat.

Decides what may stand in such a file and what holds where it says nothing. Leaves to queue.py how the limits are kept, to routes/ how the
defaults fill a request, to descriptions.py what an input may be, and to aime_files.py how a file of AIME's is read. The endpoint's name is
also the model id that clients name.
"""

from __future__ import annotations

import hashlib
import logging
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixtral_client.protocol import Sampling
from mixtral_server.aime_files import FILE_NAME, table_of
from mixtral_server.descriptions import Input, Inputs, Output

log = logging.getLogger(__name__)

MIXTRAL_RELEASED = 1_702_252_800  # 2023-12-11, unix seconds


class EndpointError(ValueError):
    """An endpoint file that cannot be used; the message names file, field, limit and what was given."""


PUBLISHED_KEYS = frozenset(
    {
        "45ab63d0b5df7358ec2578dfb9045691f881c57998f0ee454afb5179b0eb6ad8",
        "e75630b1c4761b25ba4d263dc9d4dcb8b7959ef5f20f7631128281dd309d4f52",
    }
)
"""SHA-256 of the keys that AIME's files are shipped with: the world knows them."""

CHAT_INPUTS = frozenset({"prompt_input", "chat_context", "top_k", "top_p", "temperature", "max_gen_tokens"})
DEFAULT_MAX_GEN_TOKENS = 2000  # AIME's own, where a request names none


class WorkerTerms(BaseModel):
    """What AIME workers of an endpoint are held to; native ones know nothing of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    job_type: Annotated[str, Field(max_length=100)] = ""
    auth_key_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    request_timeout_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    job_silence_s: Annotated[float, Field(ge=1)] = 360.0

    @model_validator(mode="before")
    @classmethod
    def _hash_the_key(cls, table: Any) -> Any:
        if not isinstance(table, dict) or "auth_key" not in table:
            return table
        return {name: value for name, value in table.items() if name != "auth_key"} | {"auth_key_sha256": sha256_of(table["auth_key"])}


class ClientTerms(BaseModel):
    """Which keys AIME's clients may use beside those of the database, and what they are told of a job's worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_names: Mapping[str, str] = {}
    provide_worker_meta_data: bool = False

    @model_validator(mode="before")
    @classmethod
    def _hash_the_keys(cls, table: Any) -> Any:
        if not isinstance(table, dict) or "authorization_keys" not in table:
            return table
        keys = table["authorization_keys"]
        if not isinstance(keys, dict):
            raise ValueError("authorization_keys must be a table of names and keys")
        hashed = {sha256_of(key): name for name, key in keys.items()}
        return {name: value for name, value in table.items() if name != "authorization_keys"} | {"key_names": hashed}


def sha256_of(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError("a key must be a text that is not empty")
    return hashlib.sha256(key.encode()).hexdigest()


Alias: TypeAlias = Annotated[str, Field(min_length=1, max_length=100)]


class EndpointConfig(BaseModel):
    """One endpoint. Frozen; a field that the file lacks has the default below."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="queue name and model id")]
    aliases: Annotated[tuple[Alias, ...], Field(description="other model ids that clients may name")] = ()
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

    version: Annotated[int, Field(ge=0, description="`ep_version` on AIME's wire")] = 2
    category: Annotated[str, Field(max_length=100, description="for people, on AIME's wire")] = "chat"
    max_output_bytes: Annotated[int, Field(ge=1024, description="largest result, and largest progress, that an AIME worker may send")] = (
        16 * 2**20
    )
    worker: Annotated[WorkerTerms, Field(description="table: which AIME workers serve it and how long they may be silent")] = WorkerTerms()
    clients: Annotated[ClientTerms, Field(description="table: keys for AIME's clients alone")] = ClientTerms()
    inputs: Annotated[Mapping[str, Input], Field(description="tables: the parameters of a job; none = those of a chat")] = {}
    outputs: Annotated[Mapping[str, Output], Field(description="tables: what a result holds; none = that of a chat")] = {}
    progress_outputs: Annotated[Mapping[str, Output], Field(description="tables: what progress holds; none = that of a chat")] = {}

    @property
    def is_chat(self) -> bool:
        """Whether its jobs are chats, which native workers serve and OpenAI's clients ask for."""
        names = self.inputs.keys()
        return not names or (names <= CHAT_INPUTS and not names.isdisjoint(("prompt_input", "chat_context")))

    @cached_property
    def job_inputs(self) -> Inputs:
        """What its jobs are made of: what the file declares, else the parameters of AIME's own chat."""
        if self.inputs:
            return self.inputs
        most = self.max_tokens
        return {
            "prompt_input": Input(type="string", default=""),
            "chat_context": Input(type="json", default=""),
            "top_k": Input(type="integer", default=min(1000, max(1, self.top_k)), minimum=1, maximum=1000),
            "top_p": Input(type="float", default=self.top_p, minimum=0, maximum=1),
            "temperature": Input(type="float", default=min(1.0, self.temperature), minimum=0, maximum=1),
            "max_gen_tokens": Input(type="integer", default=min(DEFAULT_MAX_GEN_TOKENS, most), minimum=1, maximum=most),
        }

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """Fields of the protocol's Sampling as the endpoint would have them."""
        return {name: getattr(self, name) for name in Sampling.model_fields if hasattr(self, name)}

    @cached_property
    def honoured(self) -> dict[tuple[float, ...], bool]:
        """What aime_jobs.py found out of sampling and length that jobs asked for: it is looked up for every job that is put."""
        return {}

    @property
    def job_types(self) -> frozenset[str]:
        """By which AIME workers name it."""
        return frozenset({self.name, self.worker.job_type or self.name})

    @property
    def known_keys(self) -> bool:
        """Whether a key that AIME publishes lets somebody in."""
        return not PUBLISHED_KEYS.isdisjoint({self.worker.auth_key_sha256, *self.clients.key_names})

    @model_validator(mode="after")
    def _default_within_limit(self) -> EndpointConfig:
        if self.default_max_tokens > self.max_tokens:
            raise ValueError(
                f"default_max_tokens is {self.default_max_tokens}, above max_tokens {self.max_tokens}; lower the one or raise the other"
            )
        return self


BUILT_IN = EndpointConfig(
    name="mixtral_chat",
    title="Mixtral chat",
    description="Chat with Mixtral on your own machines.",
    aliases=("mixtral-chat",),
    worker=WorkerTerms(job_type="mixtral"),
)
"""What the shipped file says, for an installation without it."""


def read_endpoint(path: Path) -> EndpointConfig:
    """Raises EndpointError with one sentence for a file that is unreadable, not TOML, or holds a wrong value."""
    unserved: list[str] = []
    try:
        text = path.read_text(encoding="utf-8")
        table, unserved = table_of(text) if path.name == FILE_NAME else (tomllib.loads(text), [])
    except OSError as error:
        raise EndpointError(f"endpoint file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EndpointError(f"endpoint file {path} is not TOML: {error}") from error
    if unserved:
        log.warning("event=endpoint_file_in_part file=%s not_served=%s", path, ", ".join(unserved))
    try:
        endpoint = EndpointConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Value error, ")
        got = "" if first["loc"][:1] in (("worker",), ("clients",)) else f"; got {first['input']!r:.80}"  # a key may stand there
        raise EndpointError(f"endpoint file {path}: {field + ': ' if field else ''}{rule}{got}") from error
    if endpoint.known_keys:
        log.warning("event=published_key file=%s: it has a key that AIME's files are shipped with, which anybody knows; replace it", path)
    return endpoint


def read_endpoints(folder: Path) -> Mapping[str, EndpointConfig]:
    """Every *.toml of the folder and every */aime_api_endpoint.cfg by endpoint name.

    Raises EndpointError when there is none, or a name stands twice.
    """
    if not folder.is_dir():
        raise EndpointError(f"endpoint_dir {folder} is not a folder; name one that holds at least one endpoint file (*.toml)")
    found: dict[str, EndpointConfig] = {}
    for path in sorted((*folder.glob("*.toml"), *folder.glob(f"*/{FILE_NAME}"))):
        endpoint = read_endpoint(path)
        taken = {name for one in found.values() for name in (one.name, *one.aliases)}
        if both := taken & {endpoint.name, *endpoint.aliases}:
            raise EndpointError(f"endpoint file {path}: the name {min(both)} is taken by another file of this folder; rename one")
        found[endpoint.name] = endpoint
    if not found:
        raise EndpointError(f"endpoint_dir {folder} holds no endpoint file (*.toml, */{FILE_NAME}); add one or name another folder")
    return found
