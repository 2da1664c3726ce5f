"""A quick reader of JSON bodies, made of the pydantic model that says what may stand in them.

A busy worker's turn holds a frame for each of its chats, a hundred times a second, and pydantic takes four times as long to check it as
msgspec does. So msgspec reads it, by the model's own fields, limits and validators; and whatever it does not take, for whatever reason, the
model itself reads again, and says what is wrong if anything is. The model stays the one place where rules and refusals are written.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec
from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mixtral_server.routes.body import model_of

M = TypeVar("M", bound=BaseModel)

LEAST, MOST = -(2**63), 2**63 - 1
"""Whole numbers as orjson takes them."""
_NOT_TAKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class QuickReader(Generic[M]):
    """`read(raw)` is model_of(raw, model), but what it returns may be a stand-in: the model's fields, and nothing else of it."""

    def __init__(self, model: type[M]) -> None:
        """Raises TypeError for a model with a kind of field or rule that is not known here."""
        self._model = model
        self._decoder = msgspec.json.Decoder(_stand_in(model))

    def read(self, raw: bytes) -> M:
        """Raises RequestRefused."""
        try:
            return cast(M, self._decoder.decode(raw))
        except _NOT_TAKEN:
            return model_of(raw, self._model)


def _stand_in(model: type[BaseModel]) -> type[msgspec.Struct]:
    """It takes no field that the model has not: what is ignored may be anything, text that is not UTF-8 too."""
    rules = model.__pydantic_decorators__
    checks = [one.func for one in rules.model_validators.values() if one.info.mode == "after"]
    if len(checks) < len(rules.model_validators) or len(checks) > 1 or rules.field_validators:
        raise TypeError(f"{model.__name__}: of validators, one of the whole model, after its fields, is known here")
    return msgspec.defstruct(
        model.__name__,
        [_field(name, info) for name, info in model.model_fields.items()],
        namespace={"__post_init__": checks[0]} if checks else None,  # it looks at fields alone
        forbid_unknown_fields=True,
        kw_only=True,
    )


def _field(name: str, info: FieldInfo) -> Any:
    kind = _kind(info.annotation, info.metadata)
    if kind is None:
        raise TypeError(f"{name} has a rule of its own, and may not be null: that is not known here")
    if info.is_required():
        return name, kind
    if info.default_factory is not None:
        return name, kind, msgspec.field(default_factory=cast("Callable[[], Any]", info.default_factory))
    return name, kind, info.default


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> Any:
    """msgspec's type for pydantic's; None for one with a rule that msgspec does not know."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0], (*args[1:], *metadata))
    if origin in (Union, types.UnionType):
        kinds = [one if one is types.NoneType else _kind(one, metadata) for one in args]
        return Union[tuple(one for one in kinds if one is not None)]  # noqa: UP007 - null is what stays of one that is not known
    limits: dict[str, Any] = {"ge": LEAST, "le": MOST} if annotation is int else {}
    for rule in _rules(metadata):
        match rule:
            case Ge(ge):
                limits["ge"] = ge
            case Le(le):
                limits["le"] = le
            case MaxLen(length):
                limits["max_length"] = length
            case _:
                return None
    if annotation in (str, int, bool, Any) or origin is Literal:
        kind = annotation
    elif origin in (list, tuple, dict):
        kinds = [_kind(one) for one in args]
        if None in kinds:
            return None
        kind = origin[tuple(kinds)]
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = _stand_in(annotation)
    else:
        raise TypeError(f"{annotation!r} is a kind of field that is not known here")
    return Annotated[kind, msgspec.Meta(**limits)] if limits else kind


def _rules(metadata: Sequence[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from one.metadata if isinstance(one, FieldInfo) else (one,)
