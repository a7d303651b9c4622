"""Figures of training runs, one or two over one another: likelihood, losses, schedules, speed.

The second run's lines are dashed; where a figure shows several things, each has a colour of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from tools.pages.report import Figure, Series, line_chart
from tools.pages.training_run import Run

POINTS = 120
"""A line has about this many points: means of so many neighbouring records."""
LOW = 300
"""Height in pixels of the figures that one looks at last."""
SHARES = {
    "both": "λ_train; at timestep t the teacher's share of the target is λ_train · (1 − t).",
    "training_only": "The teacher's share of the target, whatever the timestep.",
    "timestep_only": "Not used here: at timestep t the teacher's share of the target is λ_max · (1 − t).",
}
"""What the logged lambda means, by the axes of its schedule."""
Points = list[tuple[float, float]]
Lines = Mapping[str, Callable[[Run], Points]]
"""What a figure shows: a label (may be empty where there is one), and its points in a run."""


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Those that the runs' records can fill."""
    objective = runs[0].settings["objective"]
    added = list(dict.fromkeys(t["name"] for r in runs for t in r.terms if t["name"] != "ce"))
    weights = "".join(f" + {t['weight']:g} × {t['name']}" for t in runs[0].terms if t["name"] != "ce")
    times = sorted({t for r in runs for e in r.evaluations for t in e.get("by_t", {})}, key=float)
    losses: Lines = {"total": logged("loss"), "cross entropy": logged("ce")} if added else {"": logged("ce")}
    made = [
        chart(
            "Held-out likelihood",
            runs,
            {"": partial(evaluated, value=lambda e: e["heldout_bits_per_byte"])},
            y="bits per byte",
            caption="Lower is better. The same samples and masks every time, unseen in training.",
        ),
        chart(
            "Held-out likelihood by timestep",
            runs,
            {f"t = {t}": partial(evaluated, value=partial(_at, t)) for t in times},
            y="bits per byte",
            caption="NLL at t = (1/t) × masked cross entropy; its mean over t is the bound above.",
        ),
        chart(
            "Loss" if added else "Cross entropy",
            runs,
            losses,
            y="nats",
            caption="Masked cross entropy with its timestep weight"
            + (f"; total = {objective.get('ce_weight', 1):g} × ce{weights}" if weights else "")
            + f". {_smoothed(runs)}",
        ),
        *(chart(f"Added term: {name}", runs, {"": logged(name)}, y="nats", height=LOW) for name in added),
        chart(
            "λ over training",
            runs,
            {"": logged("lambda")},
            y="λ",
            caption=SHARES.get(str(objective.get("schedule", {}).get("axes")), ""),
            height=LOW,
        ),
        chart("Learning rate", runs, {"": logged("learning_rate")}, y="learning rate", height=LOW),
        chart(
            "Gradient norm",
            runs,
            {"": logged("grad_norm")},
            y="norm",
            caption="Before clipping, of the steps that were logged.",
            log_y=True,
            height=LOW,
        ),
        chart(
            "Throughput",
            runs,
            {"": logged("tokens_per_s")},
            y="packed tokens per second",
            caption="Evaluations and samples are not counted.",
            height=LOW,
        ),
        chart(
            "Waiting for data",
            runs,
            {"": logged("data_wait")},
            y="share of the time",
            caption="Of the main process, between steps.",
            height=LOW,
        ),
    ]
    return [figure for figure in made if figure is not None]


def chart(
    title: str,
    runs: Sequence[Run],
    lines: Lines,
    *,
    y: str,
    caption: str = "",
    log_y: bool = False,
    height: int | None = None,
) -> Figure | None:
    """The lines of all runs over steps; None where no run has a point."""
    drawn: list[Series] = []
    places: dict[str, int] = {}
    baseline: list[bool] = []
    for run in runs:
        for label, points_of in lines.items():
            if points := points_of(run):
                name = ", ".join(filter(None, (label, run.name if not label or label in places else "")))
                x, values = [p[0] for p in points], [p[1] for p in points]
                like = places.get(label) if len(lines) > 1 else None
                drawn.append(Series(name=name, x=x, y=values, like=like))
                places.setdefault(label, len(drawn) - 1)
                baseline.append(run is not runs[0])
    if not drawn:
        return None
    few = max(len(line.x) for line in drawn) <= POINTS // 4
    figure = line_chart(title, drawn, x_label="step", y_label=y, caption=caption, markers=few, log_y=log_y)
    layout = figure.layout if height is None else {**figure.layout, "height": height}
    data = [
        {**trace, "line": {**trace["line"], "dash": "dash"}} if dashed else trace
        for trace, dashed in zip(figure.data, baseline, strict=True)
    ]
    if any(line.like is not None for line in drawn):
        # Twice the entries would say it no better than a word does.
        data = [{**trace, "showlegend": line.like is None} for trace, line in zip(data, drawn, strict=True)]
        caption = f"{caption} Dashed: {runs[-1].name}."
    return replace(figure, data=data, layout=layout, caption=caption)


def logged(key: str) -> Callable[[Run], Points]:
    """An entry of the training records, neighbours averaged where there are many."""

    def points(run: Run) -> Points:
        found = [(float(r["step"]), float(r[key])) for r in run.records if r.get(key) is not None]
        width = _width(run)
        groups = [found[i : i + width] for i in range(0, len(found), width)]
        return [(mean(p[0] for p in g), mean(p[1] for p in g)) for g in groups]

    return points


def evaluated(run: Run, value: Callable[[dict[str, Any]], float | None]) -> Points:
    """A value of the evaluations."""
    return [(float(e["step"]), v) for e in run.evaluations if (v := value(e)) is not None]


def _at(t: str, evaluation: dict[str, Any]) -> float | None:
    return evaluation.get("by_t", {}).get(t)


def _width(run: Run) -> int:
    return max(1, round(len(run.records) / POINTS))


def _smoothed(runs: Sequence[Run]) -> str:
    width = max(map(_width, runs))
    return f"Points are means of {width} logged records." if width > 1 else ""
