"""A training run as a page, with a baseline's drawn over it; all from what `tide train` wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from tools.pages.report import write_report
from tools.pages.texts import texts_widget
from tools.pages.training_figures import figures
from tools.pages.training_run import Run, state_of
from tools.tables import Cell, Column, Table, shown


def write_page(path: Path, run: Run, baseline: Run | None = None, *, now: datetime | None = None) -> Path:
    """Write the page.

    Raises:
        UsageError: plotly is not installed.
    """
    now = now or datetime.now(UTC)
    runs = [run] if baseline is None else [run, baseline]
    intro = f"{run.name}: {state_of(run, now)}."
    if baseline is not None:
        intro += f"\n\nBaseline {baseline.name} (dashed lines): {state_of(baseline, now)}."
    widget = texts_widget([(r.name, r.texts) for r in runs])
    return write_report(
        path,
        title=f"Training run {run.name}",
        intro=intro,
        tables=[t for t in (summary(runs), differences(runs)) if t.rows],
        widgets=[widget] if widget else [],
        figures=figures(runs),
        notes=notes(runs),
    )


def summary(runs: Sequence[Run]) -> Table:
    """A column a run."""
    rows: list[tuple[Cell, ...]] = []

    def row(label: str, value: Callable[[Run], str | None]) -> None:
        values = [value(r) for r in runs]
        if any(v is not None for v in values):
            rows.append((label, *values))

    def over(key: str, combine: Callable[[list[float]], float]) -> Callable[[Run], float | None]:
        def value(r: Run) -> float | None:
            found = [float(x[key]) for x in r.records if x.get(key) is not None]
            return combine(found) if found else None

        return value

    def text(value: Callable[[Run], float | None], pattern: str) -> Callable[[Run], str | None]:
        return lambda r: None if (v := value(r)) is None else pattern.format(v)

    def held_out(r: Run, pick: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> str | None:
        if not r.evaluations:
            return None
        found = pick(r.evaluations)
        return f"{shown(found['heldout_bits_per_byte'], 4)} (step {found['step']:,})"

    def end(key: str) -> Callable[[Run], float | None]:
        return over(key, lambda values: mean(values[-max(1, len(values) // 10) :]))

    row("objective", lambda r: r.objective)
    row("steps", lambda r: f"{r.step:,} of {r.steps:,}")
    row("dataset", lambda r: dataset_of(r)[0])
    row("its training samples", lambda r: dataset_of(r)[1])
    row("packed tokens trained on", text(over("tokens", sum), "{:,.0f}"))
    row("views trained on", text(over("views", sum), "{:,.0f}"))
    row("held-out, first", lambda r: held_out(r, lambda found: found[0]))
    row("held-out, last", lambda r: held_out(r, lambda found: found[-1]))
    row(
        "held-out, best",
        lambda r: held_out(r, lambda found: min(found, key=lambda e: e["heldout_bits_per_byte"])),
    )
    row("cross entropy, last tenth", text(end("ce"), "{:.4f}"))
    row("tokens per second, median", text(over("tokens_per_s", median), "{:,.0f}"))
    row("waiting for data", text(over("data_wait", mean), "{:.1%}"))
    columns = (Column(label="", align="left"), *(Column(label=r.name, align="left") for r in runs))
    note = (
        "Held-out likelihood in bits per byte; cross entropy in nats; waiting as a share of the time. Cross "
        "entropies of runs with other shares of fresh noise are of other masks."
    )
    return Table(title="Summary", columns=columns, rows=tuple(rows), note=note)


def dataset_of(run: Run) -> tuple[str, str | None]:
    """Identity of the dataset and its training samples, as the run's settings name them."""
    named = re.fullmatch(r"(\w+) of (\d+) training samples", str(run.settings.get("dataset")))
    return (named[1], f"{int(named[2]):,}") if named else (str(run.settings.get("dataset")), None)


def differences(runs: Sequence[Run]) -> Table:
    """Settings that the two runs do not share: what else a comparison compares."""
    if len(runs) < 2:
        return Table(title="", columns=(), rows=())
    flat = [dict(_flat(r.settings)) for r in runs]
    names = sorted(n for n in flat[0].keys() | flat[1].keys() if flat[0].get(n) != flat[1].get(n))
    return Table(
        title="Settings that differ",
        columns=(Column(label="setting", align="left"), *(Column(label=r.name, align="left") for r in runs)),
        rows=tuple((n, *(str(f.get(n, "–")) for f in flat)) for n in names),
    )


def _flat(x: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(x, dict) and x:
        return [pair for k, v in x.items() for pair in _flat(v, f"{name}.{k}" if name else str(k))]
    if name == "objective.terms":
        return [(name, "+".join(f"{t['name']}:{t['weight']:g}" for t in x) or "ce")]
    return [(name, x)]


def notes(runs: Sequence[Run]) -> list[str]:
    """What the page does not show, and what a reader might take it for."""
    said = []
    first = runs[0]
    if first.evaluations:
        n = first.settings["config"].get("eval_samples")
        said.append(
            f"Evaluations during training look at the first held-out samples (at most {n}) and have no "
            "interval: whether two students differ, tide compare says on all of them."
        )
    else:
        said.append("No held-out evaluations were kept: tide train --eval-every N does.")
    if not first.texts:
        said.append("No texts were written during training: tide train --sample-every N does.")
    if len(runs) > 1 and all(r.evaluations for r in runs):
        if len({r.settings["config"].get("eval_samples") for r in runs}) > 1:
            said.append("The runs looked at other numbers of held-out samples: their figures do not compare.")
        elif len({r.settings.get("dataset") for r in runs}) > 1:
            said.append(
                "The runs had other datasets: held-out figures compare where these hold the same samples."
            )
    return said
