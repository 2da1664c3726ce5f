"""openapi.json: every route, what it takes and what it answers, made once at start from the route table and the wire's models. Pure but
for the two routes that serve it.

Decides what all routes of a kind share: the errors of a key, of a body, of a name in the path. Leaves what one route says of itself to its
Operation, and how the document looks to people to docs_page.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeAlias

import orjson
from aiohttp import web
from pydantic import BaseModel, RootModel
from pydantic.json_schema import models_json_schema

from mixtral_client.protocol import ErrorBody
from mixtral_server.auth import COOKIE
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    NotAllowed,
    NotAuthenticated,
    RequestRefused,
    RouteNotFound,
    ServiceError,
    Unavailable,
    WrongContentType,
)
from mixtral_server.routes.docs_page import page_of
from mixtral_server.routes.operation import Answer, Operation
from mixtral_server.routes.pages import CONTENT_SECURITY_POLICY
from mixtral_server.routes.service import PublicRoute, Route, Service

Json: TypeAlias = dict[str, Any]
Mode: TypeAlias = Literal["validation", "serialization"]

ABOUT = """A chat service for Mixtral on one's own GPUs: OpenAI's wire, native jobs with exact resume, AIME's wire, and the workers' own.
Every answer carries `x-request-id`. Fields that are unknown are ignored and named in `x-ignored-fields`. docs/api.md tells more."""

TAGS = {
    "OpenAI": "chat completions, completions and models, as OpenAI's clients speak them",
    "Jobs": "queue a chat, look at it, follow it from any token, cancel it",
    "AIME": "the wire of AIME's clients; a caller names itself in the parameters",
    "Worker": "the wire of workers, who pull jobs and report tokens",
    "Status": "for probes and Prometheus",
    "Page": "the chat page, its files, and this description",
}
PATH_PARAMETERS = {
    "model": "an endpoint's name",
    "id": "a job's id, as the 202 of its POST named it",
    "session": "a worker's session, as its login named it",
    "file": "a file's plain name",
    "endpoint": "an endpoint's name",
}
GUARDED = (NotAuthenticated, NotAllowed, Unavailable)
OF_A_BODY = (RequestRefused, BodyTooSlow, BodyTooLarge, WrongContentType)


class Document(RootModel[dict[str, Any]]):
    """An OpenAPI document."""


DOCUMENT = web.AppKey("openapi_document", bytes)
DOCS_PAGE = web.AppKey("docs_page", bytes)


def document(routes: Sequence[Route | PublicRoute], endpoints: Sequence[EndpointConfig]) -> Json:
    """The routes that say what they are, as OpenAPI 3.1."""
    described = [(route, route.operation) for route in routes if route.operation is not None]
    schemas = Schemas([operation for _, operation in described], endpoints)
    paths: dict[str, Json] = defaultdict(dict)
    for route, operation in described:
        for method in route.method.split(", "):
            paths[route.path][method.lower()] = _operation(route, method, operation, schemas, endpoints)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Mixtral chat",
            "version": _version(),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": what} for name, what in TAGS.items()],
        "paths": dict(paths),
        "components": {
            "schemas": schemas.components,
            "headers": HEADERS,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "a key with the scope that the route names"},
                "visitor": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": COOKIE,
                    "description": "the public page's cookie; scope client",
                },
            },
        },
    }


HEADERS: dict[str, Json] = {
    "x-request-id": {"description": "the caller's own, or a new one", "schema": {"type": "string"}},
    "x-ignored-fields": {"description": "fields of the body that nothing was done with", "schema": {"type": "string"}},
    "Retry-After": {"description": "seconds until it is worth asking again", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    **{
        f"X-RateLimit-{what}-{unit}": {"description": f"of the caller's {unit.lower()} a minute: {meaning}", "schema": {"type": "string"}}
        for unit in ("Requests", "Tokens")
        for what, meaning in (("Limit", "all"), ("Remaining", "those left"), ("Reset", "the time until all are back"))
    },
}
RATE_HEADERS = tuple(name for name in HEADERS if name.startswith("X-RateLimit"))


class Schemas:
    """The models of all operations, each once, and references to them."""

    def __init__(self, operations: Sequence[Operation], endpoints: Sequence[EndpointConfig]) -> None:
        wanted = dict.fromkeys(pair for operation in operations for pair in _models_of(operation))
        self._references, definitions = models_json_schema(list(wanted), ref_template="#/components/schemas/{model}")
        self.components: dict[str, Json] = {name: _plain(schema) for name, schema in definitions.get("$defs", {}).items()}
        self._endpoints = endpoints

    def reference(self, model: type[BaseModel], mode: Mode) -> Json:
        return dict(self._references[model, mode])

    def of_body(self, operation: Operation) -> Json:
        """The schema that a request is held to."""
        takes = operation.takes
        if isinstance(takes, type):
            return self.reference(takes, "validation")
        return takes(self._endpoints) if takes is not None else {}

    def fields_of(self, operation: Operation) -> Json:
        """The same, with its properties at hand."""
        schema = self.of_body(operation)
        return self.components[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _models_of(operation: Operation) -> Iterator[tuple[type[BaseModel], Mode]]:
    if isinstance(operation.takes, type):
        yield operation.takes, "validation"
    for answer in operation.answers.values():
        if answer.json is not None:
            yield answer.json, "serialization"
        for event in answer.events:
            yield event, "validation"
    yield operation.error_body, "serialization"
    yield ErrorBody, "serialization"


def _plain(schema: Any) -> Any:
    """Without the titles that pydantic makes of names."""
    if isinstance(schema, dict):
        return {name: _plain(value) for name, value in schema.items() if not (name == "title" and isinstance(value, str))}
    return [_plain(one) for one in schema] if isinstance(schema, list) else schema


def _operation(
    route: Route | PublicRoute, method: str, operation: Operation, schemas: Schemas, endpoints: Sequence[EndpointConfig]
) -> Json:
    takes_body = operation.takes is not None and method == "POST"
    described: Json = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{method.lower()} {route.path}").strip("_"),
        "parameters": [*_path_parameters(route, endpoints), *_parameters(operation, method, schemas)],
        "responses": {
            **{str(status): _answer(one, operation, schemas, takes_body) for status, one in operation.answers.items()},
            **_refusals(route, operation, schemas, takes_body),
        },
    }
    if operation.description:
        described["description"] = operation.description
    if takes_body:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schemas.of_body(operation)}}}
    if isinstance(route, Route):
        described["security"] = [{"key": []}, *([{"visitor": []}] if route.scope == "client" else [])]
        described["x-scope"] = route.scope
    return described


def _path_parameters(route: Route | PublicRoute, endpoints: Sequence[EndpointConfig]) -> Iterator[Json]:
    for name in re.findall(r"{(\w+)}", route.path):
        schema: Json = {"type": "string", "minLength": 1}
        if name == "endpoint":
            schema = {"type": "string", "enum": [one.name for one in endpoints]}
        yield {"name": name, "in": "path", "required": True, "description": PATH_PARAMETERS.get(name, name), "schema": schema}


def _parameters(operation: Operation, method: str, schemas: Schemas) -> Iterator[Json]:
    for one in operation.parameters:
        yield {"name": one.name, "in": one.where, "description": one.what, "schema": dict(one.schema)}
    if operation.takes is not None and method == "GET":
        fields = schemas.fields_of(operation)
        for name, schema in fields["properties"].items():
            described = {"name": name, "in": "query", "schema": schema, "required": name in fields.get("required", ())}
            yield described | ({"description": schema["description"]} if "description" in schema else {})


def _answer(one: Answer, operation: Operation, schemas: Schemas, takes_body: bool) -> Json:
    content: Json = {}
    if one.json is not None:
        content["application/json"] = {"schema": schemas.reference(one.json, "serialization")}
    if one.events:
        content["text/event-stream"] = {"schema": _event(one, schemas)}
    if one.media:
        content[one.media] = {"schema": {"type": "string"}}
    names = ["x-request-id", *(["x-ignored-fields"] if takes_body else []), *(RATE_HEADERS if operation.is_job_put else ())]
    return {"description": one.what, "headers": _headers(names)} | ({"content": content} if content else {})


def _event(one: Answer, schemas: Schemas) -> Json:
    """Of each event: OpenAPI 3.1 has no other place for it."""
    names = [event.model_fields["event"].default for event in one.events if "event" in event.model_fields]
    data = [schemas.reference(event, "validation") for event in one.events]
    if not names:
        data.append(schemas.reference(ErrorBody, "serialization"))
    fields: Json = {
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": data}},
        "id": {"type": "string"},
    }
    return {"type": "object", "required": ["data"], "properties": fields | ({"event": {"enum": names}} if names else {})}


def _refusals(route: Route | PublicRoute, operation: Operation, schemas: Schemas, takes_body: bool) -> Json:
    """By status, each naming the code words that it may have."""
    errors = [
        *(GUARDED if isinstance(route, Route) else ()),
        *(OF_A_BODY if takes_body else ()),
        *((RouteNotFound,) if "{" in route.path else ()),
        *operation.errors,
        ServiceError,
    ]
    of_status: dict[int, list[str]] = defaultdict(list)
    for error in dict.fromkeys(errors):
        of_status[error.status].append(f"`{error.code}`: {error.when}")
    for status, what in operation.refusals.items():
        of_status[status].append(what)
    said = {status: ". ".join(found) for status, found in of_status.items()}
    described = {}
    for status in sorted(said):
        body = ErrorBody if status in (404, 500) else operation.error_body  # these two are said before a route's own words
        names = [
            "x-request-id",
            *(["Retry-After"] if status in (429, 503) else []),
            *(RATE_HEADERS if status == 429 and operation.is_job_put else ()),
        ]
        content = {"application/json": {"schema": schemas.reference(body, "serialization")}}
        described[str(status)] = {"description": said[status], "headers": _headers(names), "content": content}
    return described


def _headers(names: Sequence[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _version() -> str:
    try:
        return version("mixtral-chat")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"


def describe(app: web.Application, routes: Sequence[Route | PublicRoute], endpoints: Mapping[str, EndpointConfig]) -> None:
    """Make the document and its page, once."""
    made = document(routes, list(endpoints.values()))
    app[DOCUMENT] = orjson.dumps(made)
    app[DOCS_PAGE] = page_of(made).encode()


async def openapi_json(service: Service, request: web.Request) -> web.StreamResponse:
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


async def docs(service: Service, request: web.Request) -> web.StreamResponse:
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return web.Response(body=request.app[DOCS_PAGE], headers=headers)


ROUTES = (
    PublicRoute(
        "GET",
        "/openapi.json",
        openapi_json,
        Operation("Page", "this description, as OpenAPI 3.1", {200: Answer("the document", Document)}),
    ),
    PublicRoute("GET", "/docs", docs, Operation("Page", "this description, as a page", {200: Answer("the page", media="text/html")})),
)
