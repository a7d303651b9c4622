"""Dataclasses from JSON that anyone may have written: types are checked, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shards.errors import ManifestError, UsageError

T = TypeVar("T")


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object, without NaN or infinities.

    Raises:
        ManifestError: `text` is something else.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        data = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ManifestError(f"{where} is not valid JSON: {e}; fetch the dataset again") from e
    if not isinstance(data, dict):
        raise ManifestError(
            f"{where} must be a JSON object, got {type(data).__name__}; fetch the dataset again"
        )
    return data


def build(cls: type[T], data: Any, where: str, *, ignore_unknown: bool = False) -> T:
    """`cls(**data)` with every field's type checked first; nested values are left to the caller.

    Args:
        where: what `data` is, for messages, such as `manifest.json: student`.
        ignore_unknown: leave out keys that `cls` has no field for (provenance); by default they are refused,
            because a setting that this program does not know may change the meaning of the others.

    Raises:
        ManifestError: a field is missing, unknown, of another type, or refused by `cls` itself.
    """
    if not isinstance(data, dict):
        raise ManifestError(f"{where} must be a JSON object, got {_short(data)}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if not ignore_unknown and (unknown := sorted(data.keys() - known.keys())):
        raise ManifestError(
            f"{where}: unknown setting {unknown[0]!r}; a newer tide made this dataset: update tide"
        )
    values = {}
    for name, f in known.items():
        if name not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ManifestError(f"{where}: {name!r} is missing; fetch the dataset again")
            continue
        if not _is(data[name], hints[name]):
            raise ManifestError(f"{where}: {name} must be {_words(hints[name])}, got {_short(data[name])}")
        values[name] = tuple(data[name]) if isinstance(data[name], list) else data[name]
    try:
        return cls(**values)
    except UsageError as e:
        raise ManifestError(f"{where}: {e}") from e


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is(value, h) for h in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is tuple:  # tuple[X, ...]
        return isinstance(value, list | tuple) and all(_is(v, get_args(hint)[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):  # bool is an int to Python, not to us
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "an object"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        NoneType: "null",
    }
    return names.get(hint, str(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
