"""What AIME's client routes say of themselves in openapi.json: loose models of answers, and parameters as the endpoint files have them.

Leaves what is checked to aime_inputs.py and what is answered to aime_views.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    IdempotencyConflict,
    LimitReached,
    QueueFull,
    RequestRefused,
    Unavailable,
    WrongContentType,
)
from mixtral_server.routes.aime_inputs import inputs_of
from mixtral_server.routes.operation import IDEMPOTENCY_KEY, Answer, Operation, Parameter

TYPES = {"integer": "integer", "float": "number", "bool": "boolean"}
"""AIME's word for a parameter's type → JSON's; it is a text for every other word."""


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class AimeRefusal(Loose):
    """error is a sentence or a list of them; a job that lapsed has its job_state and last progress too."""

    success: bool = False
    error: str | list[str]
    ep_version: int | None = None


class AimeProgress(Loose):
    progress: float = Field(description="tokens so far, or what the worker counts by")
    progress_data: dict[str, Any] = Field(description="text and num_generated_tokens, or what else the endpoint declares")
    queue_position: int
    estimate: float = Field(description="seconds; -1 without a worker, 0 where nothing is known")
    num_workers_online: int


class AimeResult(Loose):
    """What became of a job: the outputs that its endpoint declares, its times, and an error where it failed."""

    success: bool
    job_id: str
    ep_version: int
    text: str | None = None
    num_generated_tokens: int | None = None
    error: str | None = None


class AimeSubmitted(Loose):
    """A job's id; with wait_for_result also all fields of its result."""

    success: bool
    job_id: str
    ep_version: int


class AimeJob(Loose):
    success: bool
    job_id: str
    ep_version: int
    job_state: Literal["queued", "processing", "done"]
    progress: AimeProgress | None = None
    job_result: AimeResult | None = None


class AimeAsked(BaseModel):
    """Body of a question for a job; its other fields are not looked at."""

    job_id: str = Field(description="as the submit named it")


class AimeLogin(Loose):
    success: bool
    ep_version: int | None = None
    client_session_auth_key: str | None = None
    error: str | None = None


class AimeKey(Loose):
    success: bool
    error: str | None


class AimeEndpoints(Loose):
    endpoints: list[str]


class AimeEndpoint(Loose):
    """An endpoint, its workers and its parameters."""

    name: str
    title: str
    description: str
    workers: list[dict[str, Any]]
    parameter_description: dict[str, Any]


def inputs_schema(endpoints: Sequence[EndpointConfig]) -> dict[str, Any]:
    """Every parameter that an endpoint has, with the widest limits that one of them allows."""
    of_name: dict[str, list[dict[str, Any]]] = {}
    for endpoint in endpoints:
        for name, one in inputs_of(endpoint).items():
            of_name.setdefault(name, []).append(one.described())
    return {"type": "object", "properties": {name: _property(found) for name, found in of_name.items()}}


def _property(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    words = [*dict.fromkeys(one["type"] for one in found)]
    schema: dict[str, Any] = {"type": [*dict.fromkeys(TYPES.get(word, "string") for word in words), "null"]}
    for limit, widest in (("minimum", min), ("maximum", max)):
        given = [one[limit] for one in found if one.get(limit) is not None]
        if len(given) == len(found):
            schema[limit] = widest(given)
    if "default" in found[0]:
        schema["default"] = found[0]["default"]
    own = [word for word in words if word not in TYPES and word != "string"]
    return schema | ({"description": f"{' or '.join(own)}, as a text"} if own else {})


KEY = Parameter("key", "query", "an API key with scope client")
NOT_KNOWN = {401: "the key or session key is unknown", 402: "it is not for this endpoint, or the job id is unknown"}
OF_A_BODY = (RequestRefused, BodyTooSlow, BodyTooLarge, WrongContentType, Unavailable)

OPERATIONS = {
    "/{endpoint}": Operation(
        "AIME",
        "submit a job of that endpoint, and wait for its result or not",
        {200: Answer("the job's id, or its result", json=AimeSubmitted)},
        takes=inputs_schema,
        parameters=(IDEMPOTENCY_KEY,),
        errors=(*OF_A_BODY, IdempotencyConflict, LimitReached, QueueFull),
        refusals=NOT_KNOWN,
        error_body=AimeRefusal,
        is_job_put=True,
    ),
    "/{endpoint}/progress": Operation(
        "AIME",
        "the job as it stands, its text so far or its result",
        {200: Answer("the job", json=AimeJob)},
        takes=AimeAsked,
        errors=OF_A_BODY,
        refusals=NOT_KNOWN,
        error_body=AimeRefusal,
    ),
    "/{endpoint}/login": Operation(
        "AIME",
        "a session key for an API key",
        {200: Answer("the session key, or that the key is unknown", json=AimeLogin)},
        parameters=(KEY,),
        errors=(Unavailable,),
        error_body=AimeRefusal,
    ),
    "/api/validate_key": Operation(
        "AIME",
        "whether a key may be used",
        {200: Answer("whether it may", json=AimeKey)},
        parameters=(KEY,),
        errors=(Unavailable,),
        error_body=AimeRefusal,
    ),
    "/api/endpoints": Operation(
        "AIME",
        "the endpoints, all or those of a key",
        {200: Answer("their names", json=AimeEndpoints)},
        parameters=(KEY,),
        errors=(Unavailable,),
        refusals={401: "the key is unknown"},
        error_body=AimeRefusal,
    ),
}
OPERATIONS |= dict.fromkeys(
    ("/api/endpoints/{endpoint}", "/api/{endpoint}"),
    Operation(
        "AIME",
        "one endpoint, its workers and parameters",
        {200: Answer("the endpoint", json=AimeEndpoint)},
        errors=(Unavailable,),
        error_body=AimeRefusal,
    ),
)
"""By path."""
