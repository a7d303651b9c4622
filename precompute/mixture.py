"""The language of `--corpus`: several sources, their weights and filters, and the order of their rows.

    SPEC    = TERM + TERM + ...
    TERM    = [WEIGHT*] NAME [:CONFIG] [#SPLIT] [ '[' FIELD:VALUE, FIELD:VALUE|VALUE, ... ']' ]

as in `2*allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk:all#train+OpenCoder-LLM/opc-sft-stage1[lang:c]`.
NAME is a path, a `datasets` id, `builtin:stdlib` or `builtin:stdlib-tests`; whatever exists as a path, in
whole or as a term, is that path, whatever its characters. A row passes a filter when its FIELD is one of the
VALUEs (letter case apart); all filters must pass. `lang` of a row without such a field: VALUE occurs in its
first answer, as the paper's loader of OpenCoder's data has it.

WEIGHT (default 1) is a rate: of the first N rows of a mixture, each source gives its share of the weights. A
source that ends leaves the mixture; no row comes twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from precompute.sample import Message
from shards.errors import UsageError

T = TypeVar("T")

FORM = "[WEIGHT*]NAME[:CONFIG][#SPLIT][[FIELD:VALUE,...]], terms joined by +"
_WEIGHTED = re.compile(r"(?P<weight>\d+(?:\.\d*)?|\.\d+)\*(?P<rest>.*)")
_TERM = re.compile(
    r"(?P<name>builtin:[^:#\[\]]*|[^:#\[\]]+)"
    r"(?::(?P<config>[^:#\[\]]+))?(?:#(?P<split>[^:#\[\]]+))?(?:\[(?P<filters>[^\[\]]+)\])?"
)
LANGUAGE = "lang"
"""The field that is looked for in the answer where a row does not have it."""


@dataclass(frozen=True, slots=True)
class Filter:
    field: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}:{'|'.join(self.values)}"

    def passes(self, row: Mapping[str, Any], messages: Sequence[Message]) -> bool:
        found = row.get(self.field)
        if found is not None:
            text = found if isinstance(found, str) else json.dumps(found)
            return text.casefold() in (v.casefold() for v in self.values)
        if self.field != LANGUAGE:
            return False
        answer = next((m.content for m in messages if m.role == "assistant"), "")
        return any(v in answer for v in self.values)


@dataclass(frozen=True, slots=True)
class Term:
    """One source of a mixture."""

    name: str
    weight: float = 1.0
    config: str | None = None
    split: str | None = None
    filters: tuple[Filter, ...] = ()

    def written(self, name: str) -> str:
        """The term, with another name for its source, in the one form that all its spellings share."""
        filters = f"[{','.join(map(str, self.filters))}]" if self.filters else ""
        weight = f"{self.weight:g}*" if self.weight != 1 else ""
        config, split = (f"{mark}{x}" if x else "" for mark, x in ((":", self.config), ("#", self.split)))
        return f"{weight}{name}{config}{split}{filters}"


def parse_mixture(spec: str) -> list[Term]:
    """
    Raises:
        UsageError: not of the form above (names the term).
    """
    if _is_path(spec):
        return [Term(spec)]
    return [_term(part.strip(), spec) for part in re.split(r"\+(?![^\[\]]*\])", spec)]


def _term(text: str, spec: str) -> Term:
    weight = 1.0
    if not _is_path(text) and (found := _WEIGHTED.fullmatch(text)):
        weight, text = float(found["weight"]), found["rest"].strip()
        if not 0 < weight < float("inf"):
            raise UsageError(f"corpus {spec}: a weight must be positive, got {found['weight']} for {text}")
    if _is_path(text):
        return Term(text, weight)
    match = _TERM.fullmatch(text)
    if match is None:
        raise UsageError(f"corpus {spec}: cannot read {text or '(an empty term)'!r}; the form is {FORM}")
    filters = []
    for one in (match["filters"] or "").split(",") if match["filters"] else ():
        field, _, value = one.partition(":")
        values = tuple(v.strip() for v in value.split("|"))
        if not field.strip() or not all(values):
            raise UsageError(f"corpus {spec}: cannot read the filter {one.strip()!r}; write [FIELD:VALUE]")
        filters.append(Filter(field.strip(), values))
    return Term(match["name"], weight, match["config"], match["split"], tuple(filters))


def _is_path(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home, a NUL: no path
        return False


def interleave(streams: Sequence[Iterator[T]], weights: Sequence[float]) -> Iterator[T]:
    """Items of several streams, at every moment as near to their weights as whole items allow.

    The order depends on weights and stream lengths alone, so that the first N are the same however many are
    read. Each stream keeps its own order and is read no further than its items are given out.
    """
    taken = [0] * len(streams)
    left = set(range(len(streams)))
    while left:
        at = min(left, key=lambda i: ((taken[i] + 0.5) / weights[i], i))
        try:
            item = next(streams[at])
        except StopIteration:
            left.remove(at)
            continue
        taken[at] += 1
        yield item
