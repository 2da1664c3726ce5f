"""openapi.json: valid, complete, and a page that shows all of it. What it promises is tried in tests/server/test_schemathesis.py."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import validate

from mixtral_client import protocol
from mixtral_server import errors
from mixtral_server.app import ROUTES, methods_of
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.routes.docs_page import kind_of, page_of
from mixtral_server.routes.openapi import document
from mixtral_server.routes.service import Route

ENDPOINTS = [EndpointConfig(name="mixtral_chat"), EndpointConfig(name="small", max_tokens=64, default_max_tokens=8)]
DOCUMENT = document(ROUTES, ENDPOINTS)
OPERATIONS: list[dict[str, Any]] = [operation for of_path in DOCUMENT["paths"].values() for operation in of_path.values()]
VOID = ("meta", "link", "br")


def all_classes(kind: type[errors.ServiceError]) -> list[type[errors.ServiceError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in all_classes(child))]


def test_document_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_every_route_says_what_it_takes_and_answers() -> None:
    assert [f"{route.method} {route.path} needs an Operation" for route in ROUTES if route.operation is None] == []


def test_every_route_and_method_is_described_and_no_other() -> None:
    # HEAD is GET without its body, OPTIONS a browser's question before another one
    routes = {(method, route.path) for route in ROUTES for method in methods_of(route) if method not in ("HEAD", "OPTIONS")}
    assert {(method.upper(), path) for path, of_path in DOCUMENT["paths"].items() for method in of_path} == routes


def test_every_path_parameter_is_described() -> None:
    for path, of_path in DOCUMENT["paths"].items():
        for operation in of_path.values():
            named = [one for one in operation["parameters"] if one["in"] == "path"]
            assert [one["name"] for one in named] == re.findall(r"{(\w+)}", path)
            assert all(one["required"] and one["description"] != one["name"] for one in named)


def test_every_error_stands_at_some_route_with_its_status() -> None:
    said = {
        (int(status), code)
        for operation in OPERATIONS
        for status, response in operation["responses"].items()
        if int(status) >= 400
        for code in re.findall(r"`(\w+)`: ", response["description"])
    }
    # a method that no route has is at no route; a job that failed has the worker's own word
    nowhere = (errors.MethodNotAllowed, errors.JobFailed)
    assert said == {(one.status, one.code) for one in all_classes(errors.ServiceError) if one not in nowhere}


def test_routes_that_need_a_key_say_so_and_may_refuse_it() -> None:
    for route in ROUTES:
        for operation in DOCUMENT["paths"][route.path].values():
            if isinstance(route, Route):
                assert operation["x-scope"] == route.scope
                assert {"401", "403", "503"} <= operation["responses"].keys()
            else:
                assert "security" not in operation


def test_every_body_is_a_named_model_and_every_model_is_of_use() -> None:
    text = str(DOCUMENT["paths"]) + str(DOCUMENT["components"]["schemas"])
    used = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert used == set(DOCUMENT["components"]["schemas"])
    bodies = (protocol.ChatRequest, protocol.CompletionRequest, protocol.JobRequest, protocol.SessionRequest, protocol.TurnRequest)
    for body in bodies:
        assert set(DOCUMENT["components"]["schemas"][body.__name__]["properties"]) == set(body.model_fields)


def test_parameters_of_aimes_routes_are_those_of_the_endpoint_files() -> None:
    submit = DOCUMENT["paths"]["/{endpoint}"]
    fields = submit["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["max_gen_tokens"]["maximum"] == 32_768  # the widest of the endpoints
    assert fields["temperature"]["type"] == ["number", "null"]
    names = [one["name"] for one in submit["get"]["parameters"] if one["in"] == "query"]
    assert names == list(fields)
    assert submit["get"]["parameters"][0]["schema"]["enum"] == ["mixtral_chat", "small"]


async def test_document_is_served_as_it_is_made(http: aiohttp.ClientSession) -> None:
    async with http.get("/openapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await answer.json() == document(ROUTES, [EndpointConfig(name="mixtral_chat")])


# ---------------------------------------------------------------------------------------------- the page


class Tags(HTMLParser):
    """Whether every tag is closed, what is linked, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_page_shows_every_operation_and_model_and_needs_nothing_from_elsewhere() -> None:
    page = read(page_of(DOCUMENT))
    for path, of_path in DOCUMENT["paths"].items():
        for method in of_path:
            assert f"{method.upper()} {path}" in page.text
    assert sorted(page.ids) == sorted(DOCUMENT["components"]["schemas"])
    assert {link for link in page.links if link.startswith("#")} <= {f"#{name}" for name in page.ids}
    assert {link for link in page.links if not link.startswith("#")} == {"/openapi.json", "/page/docs.css", "/page/favicon.svg"}


def test_page_shows_what_it_is_given_as_text() -> None:
    evil = "<script>alert(1)</script>\"'&"
    told = {"name": evil, "in": "query", "description": evil, "schema": {"enum": [evil]}}
    operation = {"tags": [evil], "summary": evil, "parameters": [told], "responses": {"200": {"description": evil}}}
    made = {
        "info": {"title": evil, "version": evil, "description": evil},
        "tags": [{"name": evil, "description": evil}],
        "paths": {evil: {"get": operation}},
        "components": {"schemas": {evil: {"description": evil, "properties": {evil: {"type": evil}}}}},
    }
    assert read(page_of(made)).text.count(evil) >= 12


async def test_page_is_served_with_its_look_and_may_run_nothing(http: aiohttp.ClientSession) -> None:
    async with http.get("/docs") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        links = read(await answer.text()).links
    for link in {link for link in links if not link.startswith("#")}:
        async with http.get(link) as answer:
            assert answer.status == 200, link


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 1000}, "integer (0 to 1,000)"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        (
            {"type": "array", "items": {"$ref": "#/components/schemas/Frame"}, "maxItems": 3},
            'list of <a href="#Frame">Frame</a> (3 items at most)',
        ),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}, "list of (string, integer)"),
        ({"enum": [None, []]}, "<code>null</code> or <code>[]</code>"),
        ({"const": "ok"}, "<code>&#x27;ok&#x27;</code>"),
        ({}, "anything"),
    ],
)
def test_kinds_are_shown_in_words(schema: dict[str, Any], shown: str) -> None:
    assert kind_of(schema) == shown
