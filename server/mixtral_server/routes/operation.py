"""What a route says of itself: what it takes, what it answers, and what it may refuse. openapi.py makes the document of it.

Decides the words alone. Leaves to openapi.py what every route of a kind has, such as the errors of a missing key or an unreadable body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel

from mixtral_client.protocol import ErrorBody
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import IdempotencyConflict, LimitReached, ModelNotFound, QueueFull, ServiceError

SchemaOfEndpoints: TypeAlias = Callable[[Sequence[EndpointConfig]], dict[str, Any]]
"""A schema that depends on the endpoint files."""


@dataclass(frozen=True)
class Parameter:
    """A header, or a name in the query. Those in the path are described in openapi.py."""

    name: str
    where: str
    what: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True)
class Answer:
    """A body of JSON, a stream of events, or a body of another type; nothing of these for an answer without a body."""

    what: str
    json: type[BaseModel] | None = None
    events: tuple[type[BaseModel], ...] = ()
    media: str = ""


@dataclass(frozen=True)
class Operation:
    """One route, for people and for openapi.json."""

    tag: str
    summary: str
    answers: Mapping[int, Answer]
    takes: type[BaseModel] | SchemaOfEndpoints | None = None
    """The body of a POST; of a GET that is answered as well, the query."""
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[type[ServiceError], ...] = ()
    refusals: Mapping[int, str] = field(default_factory=dict)
    """Statuses that no error of errors.py has."""
    error_body: type[BaseModel] = ErrorBody
    description: str = ""
    is_job_put: bool = False
    """Its answers say what is left of the caller's rates."""


IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    "a repeat with the same key and body attaches to what the first one started",
    {"type": "string", "minLength": 1, "maxLength": 255},
)
PUT_ERRORS = (ModelNotFound, IdempotencyConflict, LimitReached, QueueFull)
"""Beside those of a body and of a key, what may be said to who queues a job."""
