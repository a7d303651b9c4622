"""Plots of a question as SVG files that a page shows. Same results, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UsageError

if TYPE_CHECKING:
    from studies.report import Judged

WIDTH, ROW = 8.0, 0.27
"""Inches: of a plot, and of a line of the forest plot."""
FAR = 0.1
"""Bits per byte from where on differences are drawn on a logarithmic scale, if any is far larger."""
MARKERS = "os^Dv<>"
"""Lines are told apart without colours too."""


def write_plots(folder: Path, result: dict[str, Any], arms: Sequence[Judged]) -> list[Path]:
    """`QUESTION.svg`: every arm's difference with its interval; `QUESTION-curves.svg`: likelihood while
    training, where it was measured.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError("plots need matplotlib, which is missing: pip install 'tide[study]'") from e
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    style: Any = {
        "svg.hashsalt": "tide",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        against = [(j.name, d) for j in arms if (d := j.difference) is not None]
        if against:
            figure = Figure(figsize=(WIDTH, 0.9 + ROW * len(against)), layout="constrained")
            axes = figure.subplots()
            for row, (_, d) in enumerate(against):
                sure = d.high < 0 or d.low > 0
                axes.plot((d.low, d.high), (row, row), color="#5f7d8c", lw=1.5)
                axes.plot(d.value, row, "o", ms=5, color="#2f7ed8", mfc="#2f7ed8" if sure else "white")
            axes.axvline(0, color="#888888", lw=0.8)
            if max(abs(d.value) for _, d in against) > 3 * FAR:
                axes.set_xscale("symlog", linthresh=FAR, linscale=2)
                axes.set_xticks([-FAR, 0, FAR, 1], ["−0.1", "0", "0.1", "1"])
            axes.set_yticks(range(len(against)), [name for name, _ in against])
            axes.invert_yaxis()
            several = any(j.other != result["baseline"] for j in arms)
            other = "the arm of its kind" if several else result["baseline"]
            axes.set_xlabel(
                f"bits per byte against {other}, 95 % (left is better; hollow: cannot be told apart)"
            )
            written.append(_save(figure, folder / f"{result['question']}.svg"))
        curves = [(j.name, j.arm["curve"]) for j in arms if j.arm["curve"]]
        if curves:
            figure = Figure(figsize=(WIDTH, 4), layout="constrained")
            axes = figure.subplots()
            for (name, points), marker in zip(curves, MARKERS * len(curves)):
                axes.plot(*zip(*points), marker=marker, ms=4, lw=1.2, label=name)
            axes.set_xlabel("step")
            axes.set_ylabel("validation bits per byte, mean over seeds")
            axes.legend(frameon=False)
            written.append(_save(figure, folder / f"{result['question']}-curves.svg"))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path
