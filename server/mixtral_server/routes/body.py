"""A request's body: its head checked, read under a limit of size and time, and turned into a model of the wire.

Decides what is refused and with which sentence, and which fields are ignored; never a 500 for what a caller sent. Leaves meaning to
the routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

import orjson
from aiohttp import web
from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

from mixtral_server.errors import BodyTooLarge, BodyTooSlow, RequestRefused, WrongContentType

Body = TypeVar("Body", bound=BaseModel)


IGNORED_FIELDS: web.RequestKey[tuple[str, ...]] = web.RequestKey("ignored_fields", tuple)
"""Fields of the body that nothing is done with: the answer names them in a header."""
MOST_IGNORED_SHOWN = 20
MOST_NAME_CHARS = 40


async def read_model(request: web.Request, kind: type[Body], *, limit_bytes: int, timeout_s: float) -> Body:
    """The body as kind. Raises WrongContentType, BodyTooLarge, BodyTooSlow, RequestRefused."""
    given = object_of(await read_body(request, limit_bytes=limit_bytes, timeout_s=timeout_s))
    body = validated(given, kind)
    if names := tuple(dict.fromkeys(ignored_fields(given, body))):
        request[IGNORED_FIELDS] = names
    return body


def model_of(raw: bytes, kind: type[Body]) -> Body:
    """Raises RequestRefused."""
    return validated(object_of(raw), kind)


def object_of(raw: bytes) -> dict[str, Any]:
    """Raises RequestRefused."""
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestRefused(f"the body must be JSON in UTF-8; {error}") from error
    if not isinstance(parsed, dict):
        raise RequestRefused(f"the body must be a JSON object; got {_kind_of(parsed)}")
    return parsed


def validated(given: Mapping[str, Any], kind: type[Body]) -> Body:
    """Raises RequestRefused."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error


def ignored_fields(given: Mapping[str, Any], body: BaseModel, within: str = "") -> Iterator[str]:
    """Names that the body's model and the models in it have no field for; of a list's items `messages[].name`, and again for each."""
    if isinstance(body, RootModel):
        return
    fields = _fields_of(type(body))
    for name, value in given.items():
        if name not in fields:
            yield within + name
            continue
        of_model = getattr(body, fields[name])
        if isinstance(of_model, BaseModel) and isinstance(value, dict):
            yield from ignored_fields(value, of_model, f"{within}{name}.")
        elif isinstance(of_model, list) and of_model and isinstance(of_model[0], BaseModel):
            for item, of_item in zip(value, of_model, strict=True):
                yield from ignored_fields(item, of_item, f"{within}{name}[].")


@cache
def _fields_of(kind: type[BaseModel]) -> dict[str, str]:
    """A field's name in JSON → its name in Python; both, where either is taken."""
    return {given: name for name, field in kind.model_fields.items() for given in (name, field.alias or name)}


def shown_fields(names: Sequence[str]) -> str:
    """As a header's value: plain ASCII, of bounded length."""
    shown = [quote(name[:MOST_NAME_CHARS], safe="[]") for name in names[:MOST_IGNORED_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more else shown)


def check_head(request: web.Request, limit_bytes: int) -> None:
    """What can be refused before a byte of the body is read."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise WrongContentType(f"the body must be sent uncompressed; got Content-Encoding {encoding[:40]!r}")
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise WrongContentType(f"the body must be JSON, Content-Type: application/json; got {content_type[:60] or 'none'}")
    if request.content_length is not None and request.content_length > limit_bytes:
        raise too_large(limit_bytes, f"{request.content_length:,}")


def too_large(limit_bytes: int, given: str) -> BodyTooLarge:
    return BodyTooLarge(f"the body may be {limit_bytes:,} bytes at most; this one has {given}; shorten it")


async def read_body(request: web.Request, *, limit_bytes: int, timeout_s: float) -> bytes:
    """Raises WrongContentType, BodyTooLarge, BodyTooSlow, RequestRefused."""
    check_head(request, limit_bytes)
    if request.content.is_eof():  # it came with the head, as most do: nothing to wait for
        whole = request.content.read_nowait()
        if len(whole) > limit_bytes:
            raise too_large(limit_bytes, f"{len(whole):,}")
        return whole
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.content.iter_any():
                size += len(part)
                if size > limit_bytes:
                    raise too_large(limit_bytes, f"more than {limit_bytes:,}")
                parts.append(part)
    except TimeoutError as error:
        raise BodyTooSlow(f"the body must arrive within {timeout_s:g} s; {size:,} bytes came") from error
    except web.RequestPayloadError as error:
        raise RequestRefused("the body ended before it was whole; send it again") from error
    return b"".join(parts)


def refusal(error: ValidationError) -> RequestRefused:
    """One sentence for the first thing that is wrong, naming the field, the rule and what was given."""
    problems = error.errors(include_url=False, include_context=False)
    # of a field with alternatives, pydantic lists the problem of each: those that got deepest are the ones meant
    field = [one for one in problems if one["loc"][:1] == problems[0]["loc"][:1]]
    deepest = max(len(one["loc"]) for one in field)
    first, *others = (one for one in field if len(one["loc"]) == deepest)
    param = param_of(first["loc"])
    if first["type"] == "missing":
        return RequestRefused(f"{param} is missing", param=param)
    if first["type"] == "value_error":
        sentence = first["msg"].removeprefix("Value error, ")
        return RequestRefused(f"{param}: {sentence}" if param else sentence, param=param or None)
    rules = [_rule(one) for one in (first, *others) if param_of(one["loc"]) == param]
    return RequestRefused(f"{param} {' or '.join(dict.fromkeys(rules))}; got {_shown(first['input'])}", param=param)


def _rule(problem: ErrorDetails) -> str:
    """pydantic's sentence as ours go: `Input should be …` → `must be …`."""
    if problem["type"] == "int_parsing_size":
        return "must be a whole number within 64 bits"
    return re.sub(r"^\w[\w ]*? should ", "must ", problem["msg"])


def param_of(loc: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') → messages[0].role. Names of alternatives, which pydantic puts in, are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path


def fingerprint(route: str, body: BaseModel) -> str:
    """What an Idempotency-Key is bound to: the route and the body's meaning; whether it is streamed is no part of it."""
    meaning = body.model_dump(mode="json", exclude={"stream", "stream_options"}, exclude_defaults=True)
    return hashlib.sha256(orjson.dumps([route, meaning], option=orjson.OPT_SORT_KEYS)).hexdigest()


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "true or false"}.get(type(value), "a number")


def _shown(value: object) -> str:
    """What was given, short. Lists and objects are named, not quoted: they may hold a whole chat."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
