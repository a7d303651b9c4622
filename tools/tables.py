"""Tables as data: one description for the terminal (`tools.console`) and the page (`tools.pages.report`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Align = Literal["left", "right"]
Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    label: str
    align: Align = "right"
    digits: int = 4
    """Decimals of float cells."""
    wrap: bool = False
    """On a page, long texts break into lines; without, the table scrolls sideways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """One cell per column; None (not measured, not applicable) shows as a dash."""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: {len(self.columns)} columns, row of {len(row)}: {row}"
                )

    def texts(self) -> list[list[str]]:
        """The cells as people read them, row by row."""
        return [[shown(cell, c.digits) for c, cell in zip(self.columns, row)] for row in self.rows]


def shown(value: Cell, digits: int) -> str:
    """A cell's text: separators in thousands, a true minus sign, a dash for what is missing or not finite."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return text.replace("-", "−")


def interval(value: float, low: float, high: float, *, digits: int = 4) -> str:
    """`0.0123 [0.0100, 0.0145]`."""
    return f"{shown(value, digits)} [{shown(low, digits)}, {shown(high, digits)}]"
