"""Dataclasses from JSON, with the types that their fields say: a file may hold anything."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def made(kind: type[T], said: Any) -> T:
    """The dataclass of these fields.

    Raises `TypeError` for what is no object, for a field that it has not or that is missing, and
    for a value of another type than the field's. Of lists only the outermost type is looked at,
    of objects their values too; of classes of ours nothing.
    """
    if not isinstance(said, Mapping):
        raise TypeError(f"{type(said).__name__} where an object belongs")
    check_fields(kind, said)
    return kind(**said)


def check_fields(kind: type, said: Mapping[str, Any]) -> None:
    """Raise `TypeError` for values that are not of their fields' types, see `made`."""
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in said and not _fits(said[field.name], hints[field.name]):
            raise TypeError(f"{field.name} is {type(said[field.name]).__name__}")


class _Anything:
    """Stands for a name that is imported for type checkers alone."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self) -> None:  # `typing` takes only what is callable for a type
        """Nothing."""


def _hints(kind: type) -> dict[str, Any]:
    """The types of a class's fields."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(kind, localns=unknown)
        except NameError as error:
            name = str(error.name)
            if name in unknown:
                raise
            unknown[name] = _Anything()


def texts(said: Any) -> list[str]:
    """A list of texts. Raises `TypeError`."""
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise TypeError("a list of texts is something else")
    return list(said)


def mapping(said: Any) -> dict[str, Any]:
    """A JSON object. Raises `TypeError`."""
    if not isinstance(said, dict):
        raise TypeError(f"{type(said).__name__} where an object belongs")
    return said


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is dict and isinstance(value, dict):
        return all(_fits(one, get_args(hint)[1]) for one in value.values())
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
