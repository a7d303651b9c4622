"""One self-contained HTML page from tables and figures, for light and dark screens; a pure function of data.

Plotly's script is written into the page once, and a content security policy forbids any load, so the file can
be mailed and opened offline. Needs the extra `tide[report]` (plotly).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UsageError
from tools.report_page import PAGE
from tools.tables import Column, Table, interval

__all__ = [
    "Bar",
    "Column",
    "Figure",
    "Series",
    "Table",
    "bar_chart",
    "interval",
    "line_chart",
    "write_report",
]

COLOURS = ("#2f7ed8", "#e2711d", "#2a9d6f", "#c2459a", "#8a6fd1", "#b08900", "#d1495b", "#5f7d8c")
"""Distinct under the common colour-vision deficiencies, and legible on white and on near-black."""
DASHES = ("solid", "dash", "dot")
"""Lines beyond the last colour begin again with the first, dashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. Equal lengths; `low` and `high` bound the interval at each x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with the interval of its value."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A Plotly figure (`data`, `layout`) with the heading and caption the page sets around it."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    caption: str = "",
    markers: bool = True,
    log_y: bool = False,
) -> Figure:
    """Lines over a common x axis, each with a shaded interval where it has one."""
    data: list[dict[str, Any]] = []
    for i, s in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        group, name = f"s{i}", html.escape(s.name)
        x = _floats(s.x)
        if s.low is not None and s.high is not None:
            band = {
                "type": "scatter",
                "x": [*x, *reversed(x)],
                "y": [*_floats(s.high), *reversed(_floats(s.low))],
                "fill": "toself",
                "fillcolor": _translucent(colour, 0.18),
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": group,
                "name": name,
            }
            data.append(band)
        data.append(
            {
                "type": "scatter",
                "x": x,
                "y": _floats(s.y),
                "mode": "lines+markers" if markers else "lines",
                "line": {"color": colour, "width": 2, "dash": DASHES[i // len(COLOURS) % len(DASHES)]},
                "marker": {"size": 6},
                "name": name,
                "legendgroup": group,
            }
        )
    layout = {
        "xaxis": {"title": {"text": html.escape(x_label)}},
        "yaxis": {"title": {"text": html.escape(y_label)}, "type": "log" if log_y else "linear"},
        "hovermode": "x unified",
        "showlegend": len(series) > 1,
        "height": 420,
    }
    return Figure(title=title, data=data, layout=layout, caption=caption)


def bar_chart(title: str, bars: Sequence[Bar], *, x_label: str, caption: str = "") -> Figure:
    """Horizontal bars from zero, first on top, with error bars where they have an interval."""
    names = [html.escape(b.name) for b in bars]
    data = {
        "type": "bar",
        "orientation": "h",
        "x": _floats([b.value for b in bars]),
        "y": names,
        "marker": {"color": COLOURS[0]},
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if b.high is None else b.high - b.value for b in bars],
            "arrayminus": [0.0 if b.low is None else b.value - b.low for b in bars],
            "thickness": 1.5,
            "width": 5,
        },
    }
    layout = {
        "xaxis": {"title": {"text": html.escape(x_label)}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "height": 110 + 34 * len(bars),
        "bargap": 0.35,
    }
    return Figure(title=title, data=[data], layout=layout, caption=caption)


def write_report(
    path: Path,
    *,
    title: str,
    intro: str,
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page: heading and introduction, tables, figures, notes. All text is plain and escaped here.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise UsageError("the HTML report needs plotly: pip install 'tide[report]'") from e
    sections = [
        *map(_table, tables),
        *(_figure(f, i) for i, f in enumerate(figures)),
        _notes(notes),
    ]
    page = PAGE.substitute(
        title=html.escape(title),
        intro="".join(f"<p>{html.escape(p)}</p>" for p in intro.split("\n\n") if p.strip()),
        sections="\n".join(filter(None, sections)),
        figures=_script_json([{"data": f.data, "layout": f.layout} for f in figures]),
        plotly=get_plotlyjs() if figures else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" class="{c.align}">{html.escape(c.label)}</th>' for c in table.columns)
    body = ""
    for row in table.texts():
        cells = (f'<td class="{c.align}">{html.escape(v)}</td>' for c, v in zip(table.columns, row))
        body += f"<tr>{''.join(cells)}</tr>"
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2>"
        f'<div class=scroll tabindex=0 role=region aria-label="{html.escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</section>"
    )


def _figure(figure: Figure, index: int) -> str:
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>" if figure.caption else ""
    height = int(figure.layout.get("height", 420))
    return (
        f"<section><h2>{html.escape(figure.title)}</h2><figure>"
        f'<div id="figure-{index}" class=plot style="min-height:{height}px" role=img '
        f'aria-label="{html.escape(figure.title)}"></div>{caption}</figure></section>'
    )


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return f"<section><h2>Notes</h2><ul class=notes>{items}</ul></section>" if items else ""


def _floats(values: Sequence[float]) -> list[float | None]:
    """Plain numbers for JSON; a gap where a value is not finite."""
    return [float(v) if math.isfinite(v) else None for v in values]


def _translucent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` can end it or open a comment."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
