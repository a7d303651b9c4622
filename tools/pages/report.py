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
from tools.pages.frame import PAGE
from tools.tables import Column, Table, interval

__all__ = [
    "Bar",
    "Column",
    "Columns",
    "Figure",
    "Series",
    "Table",
    "Widget",
    "bar_chart",
    "column_chart",
    "heatmap",
    "interval",
    "line_chart",
    "plotly_script",
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
    like: int | None = None
    """A second line of the same thing: drawn dashed, in the colour of this place among the lines."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with the interval of its value."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """One set of upright bars, a height for each place on the x axis."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float]


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
        place = i if s.like is None else s.like
        colour = COLOURS[place % len(COLOURS)]
        dash = DASHES[place // len(COLOURS) % len(DASHES)] if s.like is None else "dash"
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
                "line": {"color": colour, "width": 2, "dash": dash},
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
    data: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "x": _floats([b.value for b in bars]),
        "y": names,
        "marker": {"color": COLOURS[0]},
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }
    if any(b.low is not None or b.high is not None for b in bars):
        data["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if b.high is None else b.high - b.value for b in bars],
            "arrayminus": [0.0 if b.low is None else b.value - b.low for b in bars],
            "thickness": 1.5,
            "width": 5,
        }
    layout = {
        "xaxis": {"title": {"text": html.escape(x_label)}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "height": 110 + 34 * len(bars),
        "bargap": 0.35,
    }
    return Figure(title=title, data=[data], layout=layout, caption=caption)


def column_chart(
    title: str, sets: Sequence[Columns], *, x_label: str, y_label: str, caption: str = ""
) -> Figure:
    """Upright bars side by side: counted distributions. Text on the x axis keeps its order."""
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "x": [html.escape(x) if isinstance(x, str) else x for x in s.x],
            "y": _floats(s.y),
            "name": html.escape(s.name),
            "marker": {"color": COLOURS[i % len(COLOURS)]},
        }
        for i, s in enumerate(sets)
    ]
    # Plotly would take text that looks like numbers for numbers.
    words = any(isinstance(x, str) for s in sets for x in s.x)
    layout = {
        "xaxis": {"title": {"text": html.escape(x_label)}, "type": "category" if words else "linear"},
        "yaxis": {"title": {"text": html.escape(y_label)}},
        "hovermode": "x unified",
        "showlegend": len(sets) > 1,
        "barmode": "group",
        "bargap": 0.12,
        "height": 380,
    }
    return Figure(title=title, data=data, layout=layout, caption=caption)


def heatmap(
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    z: Sequence[Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    z_label: str,
    caption: str = "",
) -> Figure:
    """A value over two axes, `z[row of y][column of x]`, from 0 to at least 1 in colour, with contour lines
    that tell it without."""
    common = {"x": _floats(x), "y": _floats(y), "z": [_floats(row) for row in z]}
    bounds = {"start": 0.1, "end": 0.9, "size": 0.1}
    data: list[dict[str, Any]] = [
        {
            "type": "contour",
            **common,
            "zmin": 0.0,
            "zmax": 1.0,
            "colorscale": "Viridis",
            "contours": {**bounds, "coloring": "heatmap", "showlabels": True, "labelfont": {"color": "#fff"}},
            "line": {"color": "rgba(255,255,255,.55)", "width": 1},
            "colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": ".1f"},
            "hovertemplate": f"{html.escape(x_label)} %{{x:.2f}}<br>{html.escape(y_label)} %{{y:.2f}}<br>"
            f"{html.escape(z_label)} %{{z:.3f}}<extra></extra>",
        }
    ]
    layout = {
        "xaxis": {"title": {"text": html.escape(x_label)}},
        "yaxis": {"title": {"text": html.escape(y_label)}},
        "showlegend": False,
        "height": 420,
    }
    return Figure(title=title, data=data, layout=layout, caption=caption)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widget:
    """A section that people work with: our own markup and script, and data that may be anyone's.

    The script finds its data, parsed, in `data`, and its section in `root`; it must put text from the data
    into the page as text (`textContent`), never as markup.
    """

    title: str
    markup: str
    script: str
    style: str
    data: Any


def plotly_script() -> str:
    """The library's source.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise UsageError("the HTML report needs plotly: pip install 'tide[report]'") from e
    return str(get_plotlyjs())


def write_report(
    path: Path,
    *,
    title: str,
    intro: str,
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    widgets: Sequence[Widget] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page: heading and introduction, tables, widgets, figures, notes. All text is plain and
    escaped here.

    Raises:
        UsageError: plotly is not installed.
    """
    plotly = plotly_script()
    sections = [
        *map(_table, tables),
        *(_widget(w, i) for i, w in enumerate(widgets)),
        *(_figure(f, i) for i, f in enumerate(figures)),
        _notes(notes),
    ]
    page = PAGE.substitute(
        title=html.escape(title),
        intro="".join(f"<p>{html.escape(p)}</p>" for p in intro.split("\n\n") if p.strip()),
        sections="\n".join(filter(None, sections)),
        figures=_script_json([{"data": f.data, "layout": f.layout} for f in figures]),
        plotly=plotly if figures else "",
        widgets="\n".join(_widget_script(w, i) for i, w in enumerate(widgets)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" class="{c.align}">{html.escape(c.label)}</th>' for c in table.columns)
    kinds = [f"{c.align} wrap" if c.wrap else c.align for c in table.columns]
    body = ""
    for row in table.texts():
        cells = (f'<td class="{kind}">{html.escape(v)}</td>' for kind, v in zip(kinds, row))
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


def _widget(widget: Widget, index: int) -> str:
    return (
        f'<section id="widget-{index}"><style>{widget.style}</style><h2>{html.escape(widget.title)}</h2>'
        f"{widget.markup}</section>"
    )


def _widget_script(widget: Widget, index: int) -> str:
    """Data and script, each in an element of its own: the script cannot be ended by the data."""
    return (
        f'<script type="application/json" id="widget-data-{index}">{_script_json(widget.data)}</script>\n'
        f'<script>((root, data) => {{{widget.script}}})(document.getElementById("widget-{index}"), '
        f'JSON.parse(document.getElementById("widget-data-{index}").textContent));</script>'
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
