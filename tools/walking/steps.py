"""Steps of `tide walk`: what one stage does to one sample, as facts for people and for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.tables import Column, Table

Fact = str | int | float
EXCERPT = 96
"""Characters shown of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage."""

    title: str
    where: str
    """Module that does it, and the place in the paper or on the format's page."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """What comes out, by name; tensors as `shaped`."""
    missing: str = ""
    """Why there is nothing to show; empty where there is."""

    def table(self, number: int) -> Table:
        rows = [("code", self.where), *((name, _text(value)) for name, value in self.facts.items())]
        if not self.facts:
            rows.append(("not shown", self.missing))
        return Table(
            title=f"{number}  {self.title}",
            columns=(Column(label="", align="left"), Column(label="", align="left")),
            rows=tuple(rows),
        )

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "where": self.where, "facts": dict(self.facts), "missing": self.missing}


def shaped(array: Any, what: str = "") -> str:
    """`[3, 304] float32` of an array or tensor, and what it holds."""
    kind = str(array.dtype).removeprefix("torch.")
    return f"{list(array.shape)} {kind}{f': {what}' if what else ''}"


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The beginning of a text on one line, its white space and controls made visible."""
    shown = repr(text[: length + 1])[1:-1]
    return shown if len(text) <= length else f"{shown[:length]}..."


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}{f' ({part / whole:.0%})' if whole else ''}"


def spans(marked: np.ndarray) -> str:
    """`3-7, 12, 20-31`: the positions that are marked in a boolean array [L], the first few runs of them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    runs = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in edges.reshape(-1, 2)]
    return ", ".join(runs[:12]) + (f", ... ({len(runs)} runs)" if len(runs) > 12 else "") or "none"


def texts(ids: np.ndarray, decode: Callable[[list[int]], str] | None) -> list[str]:
    """Every id as its tokenizer shows it; without one, the numbers."""
    return [excerpt(decode([int(i)])) if decode else str(int(i)) for i in ids]


def _text(value: Fact) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else value
