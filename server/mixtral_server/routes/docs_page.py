"""openapi.json as a page: plain HTML with nothing to run, so that it reads offline and in any browser. Pure.

Decides what of the document is shown, and in which order. Leaves the document to openapi.py and the look to frontend/docs.css.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]

RANGES = (
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " items"),
    ("", "maxProperties", " entries"),
)


def page_of(document: Json) -> str:
    info = document["info"]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])}: API</title>",
            '<link rel="icon" href="/page/favicon.svg"><link rel="stylesheet" href="/page/docs.css"></head><body><main>',
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{_prose(info['description'])}</p>",
            '<p>The same for programs: <a href="/openapi.json">openapi.json</a>.</p>',
            *(part for tag in document["tags"] for part in _section(tag, document)),
            "<h2>Bodies</h2>",
            *(_schema(name, schema) for name, schema in document["components"]["schemas"].items()),
            "</main></body></html>",
        ]
    )


def _section(tag: Json, document: Json) -> Iterator[str]:
    yield f"<h2>{escape(tag['name'])}</h2><p>{_prose(tag['description'])}</p>"
    for path, of_path in document["paths"].items():
        for method, operation in of_path.items():
            if tag["name"] in operation["tags"]:
                yield _operation(method, path, operation)


def _operation(method: str, path: str, operation: Json) -> str:
    scope = f"scope {operation['x-scope']}" if "x-scope" in operation else "no key"
    parts = [
        f"<details><summary><code>{method.upper()} {escape(path)}</code> {_prose(operation['summary'])}</summary>",
        f"<p>{escape(scope)}. {_prose(operation.get('description', ''))}</p>",
    ]
    if operation["parameters"]:
        rows = (
            (f"<code>{escape(one['name'])}</code>", escape(one["in"]), kind_of(one["schema"]), _prose(one.get("description", "")))
            for one in operation["parameters"]
        )
        parts.append(_table(("parameter", "in", "type", "meaning"), rows))
    if "requestBody" in operation:
        parts.append(f"<p>Body: {kind_of(operation['requestBody']['content']['application/json']['schema'])}</p>")
    parts.append(_table(("status", "body", "meaning"), (_response(*one) for one in operation["responses"].items())))
    return "".join([*parts, "</details>"])


def _response(status: str, response: Json) -> tuple[str, str, str]:
    bodies = []
    for media, content in response.get("content", {}).items():
        if media == "text/event-stream":
            bodies.append(f"events of {kind_of(content['schema']['properties']['data']['contentSchema'])}")
        else:
            bodies.append(kind_of(content["schema"]) if media == "application/json" else escape(media))
    return escape(status), "<br>".join(bodies), _prose(response["description"])


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = (
        (
            f"<code>{escape(field)}</code>{' (required)' if field in required else ''}",
            kind_of(one),
            _prose(one.get("description", "")),
        )
        for field, one in sorted(schema.get("properties", {}).items(), key=lambda field: field[0] not in required)
    )
    fields = _table(("field", "type", "meaning"), rows) if schema.get("properties") else f"<p>{kind_of(schema)}</p>"
    about = _prose(schema.get("description", ""))
    # the id stands within: a browser that is sent to it opens what is around it
    return f'<details><summary><code>{escape(name)}</code></summary><p id="{escape(name)}">{about}</p>{fields}</details>'


def kind_of(schema: Json) -> str:
    """A schema in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape('null' if one is None else repr(one))}</code>" for one in schema["enum"])
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(kind_of(one) for one in schema[word]))
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array":
        items = schema.get("items") or schema.get("prefixItems") or {}
        kind = f"list of {'(' + ', '.join(map(kind_of, items)) + ')' if isinstance(items, list) else kind_of(items)}"
    limits = ", ".join(_limits(schema))
    return f"{kind} ({limits})" if limits else kind


def _limits(schema: Json) -> Iterator[str]:
    for least, most, unit in RANGES:
        low, high = schema.get(least), schema.get(most)
        if "exclusiveMinimum" in schema and least == "minimum":
            yield f"above {schema['exclusiveMinimum']:,}" + ("" if high is None else f" to {high:,}")
        elif low is not None and high is not None:
            yield f"{low:,} to {high:,}{unit}"
        elif low is not None:
            yield f"{low:,}{unit} or more"
        elif high is not None:
            yield f"{high:,}{unit} at most"


def _table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _prose(text: str) -> str:
    """Text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
