"""What the inputs and outputs of an endpoint are: types, defaults and limits, and what a given value becomes by them. Pure.

Decides which value of a parameter is taken, and in AIME's words why another is not; clients of theirs show these words to people. Leaves
to endpoints.py where descriptions stand, and to routes/ what is made of the values.

Images, audio and video are base64 or data URLs and pass through as they are: they are measured, never decoded to pixels or sound.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

import orjson
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

MOST_SHOWN = 30  # characters of a value that an error quotes
DEFAULT_MAX_MEDIA_BYTES = 16 * 2**20
MAX_DEPTH = 64  # of JSON

InputType: TypeAlias = Literal[
    "string", "integer", "float", "bool", "json", "chat_context", "text_context", "selection", "image", "audio", "video"
]
KINDS: Mapping[str, type] = {"integer": int, "float": float, "bool": bool}
"""Python's type of a value; it is a text for every type that is not named here."""
MEDIA = ("image", "audio", "video")
ROLES = ("system", "user", "assistant")


class InputsRefused(Exception):
    """All that is wrong with the parameters, a sentence each."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors


class Input(BaseModel):
    """One parameter of a job."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: InputType
    required: bool = False
    default: Any = None
    minimum: Annotated[float | int | None, Field(validation_alias=AliasChoices("minimum", "min"))] = None
    maximum: Annotated[float | int | None, Field(validation_alias=AliasChoices("maximum", "max"))] = None
    align: Annotated[int | None, Field(ge=1)] = None  # a whole number must be a multiple of it
    auto_convert: bool = False  # what is outside a limit is brought to it instead of refused
    max_length: Annotated[int | None, Field(ge=0)] = None  # characters of a text
    supported: tuple[Any, ...] | None = None  # values of a selection; formats of media
    max_bytes: Annotated[int, Field(ge=1)] = DEFAULT_MAX_MEDIA_BYTES  # of media, decoded

    @model_validator(mode="after")
    def _selection_and_default(self) -> Input:
        if self.type == "selection" and not self.supported:
            raise ValueError("a selection needs supported, the list of its values")
        if self.default is not None and self.type in ("json", "chat_context"):
            _, problem = self.taken("default", self.default)
            if problem:
                raise ValueError(problem)
        return self

    @property
    def usual(self) -> Any:
        """The value where none is given: the default as it stands, also beyond the limits, for it is the operator's word."""
        return self.taken("default", self.default)[0] if self.type in ("json", "chat_context") else self.default

    def described(self) -> dict[str, Any]:
        """As AIME's endpoint files would have it."""
        return {"type": self.type} | self.model_dump(exclude_defaults=True, exclude={"type"}, mode="json")

    def taken(self, name: str, value: object) -> tuple[Any, str | None]:
        """The value as a worker gets it, or what is wrong with it."""
        kind = KINDS.get(self.type, str)
        if self.type == "selection":
            return value, None if value in cast(tuple[Any, ...], self.supported) else _not_supported(name, value, self.supported)
        kinds = (int, float) if kind in (int, float) else (kind,)
        if type(value) not in kinds:  # not isinstance: true is no number
            return None, f"Invalid argument type {name}={shown(value)}. Expected: {kind} but got {type(value)}!"
        if self.type in MEDIA:
            return self._media(name, cast(str, value))
        if self.type in ("json", "chat_context"):
            return self._json(name, cast(str, value))
        if kind in (int, float):
            return self._number(name, kind(cast(float, value)))  # a float for an int is cut, an int for a float is one
        if kind is str and self.max_length is not None and len(cast(str, value)) > self.max_length:
            if not self.auto_convert:
                where = f"Max supported length on this endpoint is {self.max_length}!"
                return None, f"Parameter {name} has {len(cast(str, value)):,} characters. {where}"
            return cast(str, value)[: self.max_length], None
        return value, None

    def _number(self, name: str, value: float) -> tuple[Any, str | None]:
        where = f"supported value for {name} on this endpoint is"
        if self.align is not None and value % self.align:
            if not self.auto_convert:
                return None, f"Parameter {name} = {shown(value)} is not a multiple of {self.align}!"
            value = type(value)(round(value / self.align) * self.align)
        if self.maximum is not None and value > self.maximum:
            if not self.auto_convert:
                return None, f"Parameter {name} = {shown(value)} is too high. Max {where} {self.maximum}!"
            value = type(value)(self.maximum)
        if self.minimum is not None and value < self.minimum:
            if not self.auto_convert:
                return None, f"Parameter {name} = {shown(value)} is too low. Min {where} {self.minimum}!"
            value = type(value)(self.minimum)
        return value, None

    def _json(self, name: str, value: str) -> tuple[Any, str | None]:
        """ "" is as good as null."""
        if not value:
            return None, None
        try:
            parsed = orjson.loads(value)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            return None, f"Input parameter {name}={shown(value)} has invalid json format!"
        if _is_deeper(parsed, MAX_DEPTH):
            return None, f"Input parameter {name} is nested more than {MAX_DEPTH} levels deep"
        if self.type == "chat_context" and not _is_context(parsed):
            return None, (
                f"Input parameter {name} must be a list of messages, each with a role ({', '.join(ROLES)}) and a content, a text or "
                f"a list; got {shown(value)}"
            )
        return parsed, None

    def _media(self, name: str, value: str) -> tuple[Any, str | None]:
        head, comma, data = value.rpartition(",")
        if comma and not (head.startswith("data:") and head.endswith(";base64")):
            return None, f"Input parameter {name} must be base64, or a data URL (data:{self.type}/…;base64,…); got {shown(value)}"
        if len(data) // 4 * 3 > self.max_bytes + 2:
            return (
                None,
                f"Input parameter {name} has {len(data) // 4 * 3:,} bytes. Max supported size on this endpoint is {self.max_bytes:,}!",
            )
        try:
            base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            return None, f"Input parameter {name} is not base64; got {shown(data)}"
        media_format = head.removeprefix("data:").partition(";")[0].rpartition("/")[2].lower()
        if comma and self.supported is not None and media_format not in {str(one).lower() for one in self.supported}:
            return None, _not_supported(f"the format of {name}", media_format, self.supported)
        return value, None


class Output(BaseModel):
    """One thing that a worker answers with. Whatever else describes it goes to the worker as it stands."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]


Inputs: TypeAlias = Mapping[str, Input]


def values_of(given: Mapping[str, object], inputs: Inputs) -> dict[str, Any]:
    """Every parameter with its value, defaults filled in; those without either are left out. null is as good as left out.

    Raises InputsRefused.
    """
    errors = []
    if unknown := [shown(name) for name in given if name not in inputs]:
        errors.append(f"Invalid input parameter(s): {', '.join(unknown)}")
    values = {}
    for name, one in inputs.items():
        value, problem = given.get(name), None
        if value is None and one.required and one.default is None:
            problem = f"Missing required argument: {name}"
        elif value is None and one.default is None:
            continue
        elif value is None:
            value = one.usual
        else:
            value, problem = one.taken(name, value)
        if problem:
            errors.append(problem)
        else:
            values[name] = value
    errors += _conflicts(values, inputs)
    if errors:
        raise InputsRefused(errors)
    return values


def _conflicts(values: Mapping[str, Any], inputs: Inputs) -> Iterable[str]:
    contexts = [name for name, value in values.items() if value and inputs[name].type in ("chat_context", "text_context")]
    if len({inputs[name].type for name in contexts}) > 1:
        yield f"Give one of {' and '.join(contexts)}: a chat and a text to continue exclude each other"


def _not_supported(name: str, value: object, supported: Iterable[Any] | None) -> str:
    return f"Parameter {name} = {shown(value)} is not supported. Supported on this endpoint: {', '.join(map(str, supported or ()))}"


def _is_context(parsed: object) -> bool:
    return isinstance(parsed, list) and all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str | list) for one in parsed
    )


def _is_deeper(parsed: object, levels: int) -> bool:
    level = [parsed]
    for _ in range(levels):
        level = [child for one in level if isinstance(one, dict | list) for child in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in level)


def shown(value: object) -> str:
    return str(value)[:MOST_SHOWN]
