"""Dataclasses from JSON that anyone may have written: types are checked, and what is wrong is named."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shards.errors import ManifestError, UsageError

T = TypeVar("T")


MAX_JSON_BYTES = 1 << 28
MAX_CONTAINERS = 1 << 22
MAX_VALUES = 1 << 25
"""A manifest has eight values per record batch."""
MAX_DEPTH = 32


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object: no NaN or infinities, no key twice, bounded in size, number of values and depth.

    Raises:
        ManifestError: `text` is something else.
    """
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    # Counted before anything is built of it: two bytes of JSON can become a hundred of memory.
    counts = {
        "bytes": (len(raw), MAX_JSON_BYTES),
        "lists and objects": (raw.count(b"[") + raw.count(b"{"), MAX_CONTAINERS),
        "values": (raw.count(b",") + 1, MAX_VALUES),
    }
    for what, (n, limit) in counts.items():
        if n > limit:
            raise ManifestError(
                f"{where} has {n} {what}, at most {limit} are allowed; fetch the dataset again"
            )
    try:
        data = json.loads(
            raw, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_key_once
        )
    except (ValueError, RecursionError) as e:
        raise ManifestError(f"{where} is not valid JSON: {e}; fetch the dataset again") from e
    if not isinstance(data, dict):
        raise ManifestError(
            f"{where} must be a JSON object, got {type(data).__name__}; fetch the dataset again"
        )
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        values = (v for x in level for v in (x.values() if isinstance(x, dict) else x))
        level = [v for v in values if isinstance(v, dict | list)]
    if level:
        raise ManifestError(f"{where} is nested more than {MAX_DEPTH} levels deep; fetch the dataset again")
    return data


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    return value if math.isfinite(value := float(digits)) else _no_number(digits)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ValueError(f"key {_short(twice)} occurs twice in one object")
    return found


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
