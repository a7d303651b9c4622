"""What the demo found, as tables for the terminal and as a page: computed from `demo.json`, nothing
assumed."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student.evaluate import EvalResult, bootstrap, paired_bootstrap
from tools.commands.precompute import above_half
from tools.pages.report import (
    Bar,
    Column,
    Series,
    Table,
    Widget,
    bar_chart,
    interval,
    line_chart,
    write_report,
)
from tools.pages.run import write_page as write_run_page
from tools.pages.training_run import read_run

BASELINE, CONTROL = "ce", "ce-uniform"
"""Objectives that arms of their pipeline are compared with, where it has them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One arm, judged."""

    name: str
    pipeline: str
    objective: str
    dataset: str
    bits: tuple[float, float, float]
    """Bits per byte with its 95 % interval over held-out samples."""
    against_ce: tuple[float, float, float] | None
    """Paired difference to the CE arm of the same pipeline; None for that arm itself."""
    against_control: tuple[float, float, float] | None
    """The same to the re-weighted CE control; None where the pipeline has none."""
    by_t: dict[float, float]
    seconds: float
    tokens_per_s: float


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Every arm beside the CE arm of its pipeline."""
    evals = {name: EvalResult.from_json(arm["eval"]) for name, arm in result["arms"].items()}
    out = []
    for name, arm in result["arms"].items():
        own = evals[name]

        def against(objective: str, pipeline: str = arm["pipeline"], own: EvalResult = own) -> Any:
            other = evals.get(f"{pipeline}-{objective}")
            return None if other is None or other is own else paired_bootstrap(own, other)

        out.append(
            Verdict(
                name=name,
                pipeline=arm["pipeline"],
                objective=arm["objective"],
                dataset=arm["dataset"],
                bits=bootstrap(own),
                against_ce=against(BASELINE),
                against_control=against(CONTROL),
                by_t=own.by_t,
                seconds=arm["seconds"],
                tokens_per_s=arm["tokens"] / arm["seconds"],
            )
        )
    return out


def arms_table(result: dict[str, Any], judged: list[Verdict]) -> Table:
    """One row per arm, and the two ends of the scale: the start and the teacher."""
    columns = (
        Column(label="student", align="left"),
        Column(label="dataset", align="left"),
        Column(label="bits per byte [95 %]"),
        Column(label="against CE [95 %, paired]"),
        Column(label="against control [95 %, paired]"),
        Column(label="train s", digits=1),
        Column(label="tokens/s", digits=0),
    )
    rows: list[tuple[Any, ...]] = []
    for name, data in result["reference"].items():
        value = bootstrap(EvalResult.from_json(data))
        rows.append((name, "–", interval(*value, digits=3), None, None, None, None))
    for v in judged:
        compared = [interval(*d, digits=3) if d else None for d in (v.against_ce, v.against_control)]
        rows.append(
            (
                v.name,
                v.dataset,
                interval(*v.bits, digits=3),
                *compared,
                v.seconds,
                v.tokens_per_s,
            )
        )
    size = result["size"]
    samples = len(next(iter(result["arms"].values()))["eval"]["sample_ids"])
    return Table(
        title="Students on held-out modules",
        columns=columns,
        rows=tuple(rows),
        note=(
            f"{samples} samples; every arm: {size['steps']} steps from the same start, one seed "
            f"({result['seed']}). Lower is better. Intervals resample the held-out samples: they say how "
            "sure the comparison of these two students is, not how another seed would turn out."
        ),
    )


def data_table(result: dict[str, Any]) -> Table:
    """What each teacher pass cost and what it stored."""
    columns = (
        Column(label="dataset", align="left"),
        Column(label="pipeline", align="left"),
        Column(label="rows"),
        Column(label="masked positions"),
        Column(label="bytes"),
        Column(label="bytes per masked position", digits=1),
        Column(label="rows/s", digits=1),
        Column(label="chunks above ½", digits=2),
    )
    rows = []
    for name, d in result["datasets"].items():
        totals, report = d["totals"], d["report"]
        rows.append(
            (
                name,
                d["kind"] + (", CompDemo" if d["compdemo"] else ""),
                totals["rows"],
                totals["masked"],
                totals["bytes"],
                totals["bytes"] / max(1, totals["masked"]),
                totals["rows"] / d["seconds"],
                above_half(report),
            )
        )
    return Table(
        title="Logit datasets",
        columns=columns,
        rows=tuple(rows),
        note=(
            "Rates include loading. Chunks above ½: share of active chunks whose tempered teacher "
            "probability (T = 2) exceeds one half; Reverse CALM pushes the student away from the text of all "
            "others."
        ),
    )


def models_table(result: dict[str, Any]) -> Table:
    columns = (
        Column(label="model", align="left"),
        Column(label="parameters"),
        Column(label="training samples"),
        Column(label="seconds", digits=1),
    )
    rows = tuple(
        (name, m["parameters"], m["samples"], m["seconds"] if m["trained"] else None)
        for name, m in result["models"].items()
    )
    return Table(
        title="Models made here", columns=columns, rows=rows, note="A dash: kept from an earlier run."
    )


def findings(judged: list[Verdict]) -> list[str]:
    """What the intervals say, arm by arm; no more."""
    out = []
    for v in judged:
        for other, difference in (("CE", v.against_ce), ("the re-weighted control", v.against_control)):
            if difference is None or (v.objective == BASELINE):
                continue
            value, low, high = difference
            if high < 0:
                says = f"is better than {other} by {-value:.3f} bits per byte"
            elif low > 0:
                says = f"is worse than {other} by {value:.3f} bits per byte"
            else:
                says = f"cannot be told from {other}"
            out.append(f"{v.name} {says} (95 % interval of the difference {low:+.3f} to {high:+.3f}).")
    return out


def write_run_pages(out: Path, result: dict[str, Any]) -> dict[str, str]:
    """A page for every arm's training beside its pipeline's CE arm; arm -> place, from `out`."""
    pages = {}
    for name, arm in result["arms"].items():
        other = f"{arm['pipeline']}-{BASELINE}"
        if name != other and other in result["arms"]:
            runs = (read_run(out / "students" / run) for run in (name, other))
            pages[name] = f"students/{name}/report.html"
            write_run_page(out / pages[name], *runs)
    return pages


def links(pages: Mapping[str, str]) -> Widget:
    """Where the pages of the trainings are."""
    items = "".join(
        f'<li><a href="{html.escape(place)}">{html.escape(name)}</a></li>' for name, place in pages.items()
    )
    about = (
        "Each beside the CE arm of its pipeline: losses, likelihood while it trained, and the texts that "
        "it wrote on the way (what tide report makes of a run)."
    )
    return Widget(
        title="The trainings",
        markup=f"<p class=note>{about}</p><ul class=notes>{items}</ul>",
        script="",
        style=".notes a { color: inherit; }",
        data=None,
    )


def write_page(
    path: Path, result: dict[str, Any], *, quick: bool, pages: Mapping[str, str] | None = None
) -> Path:
    """The demo's report: one self-contained HTML file.

    Args:
        pages: those of the arms' trainings, to be linked.
    """
    judged = verdicts(result)
    grid = list(judged[0].by_t)
    by_t = [Series(name=v.name, x=grid, y=[v.by_t[t] for t in grid]) for v in judged]
    for name, data in result["reference"].items():
        values = EvalResult.from_json(data).by_t
        by_t.append(Series(name=name, x=list(values), y=list(values.values())))
    figures = []
    for other, differences in (
        ("CE", {v.name: v.against_ce for v in judged}),
        ("the re-weighted control", {v.name: v.against_control for v in judged}),
    ):
        figures.append(
            bar_chart(
                f"Difference to {other}",
                [Bar(name=name, value=d[0], low=d[1], high=d[2]) for name, d in differences.items() if d],
                x_label=f"bits per byte against {other} of the same pipeline (left is better)",
                caption="Paired bootstrap over held-out samples, 95 %.",
            )
        )
    figures.append(
        line_chart(
            "Held-out likelihood by timestep",
            by_t,
            x_label="timestep t (share of masked tokens)",
            y_label="bits per byte",
            caption="NLL at t = (1/t) × masked cross entropy, fresh masks that no training saw.",
        )
    )
    for pipeline in dict.fromkeys(v.pipeline for v in judged):
        curves = []
        for v in judged:
            points = [p for p in result["arms"][v.name]["curve"] if "ce" in p]
            if v.pipeline == pipeline and points:
                smooth = _running_mean([p["ce"] for p in points], 5)
                curves.append(Series(name=v.name, x=[p["step"] for p in points], y=smooth))
        figures.append(
            line_chart(
                f"Cross entropy during training: {pipeline} tokenizer",
                curves,
                x_label="step",
                y_label="masked CE, weight 1/t (nats)",
                markers=False,
                caption="Mean of five logged steps. Arms of a pipeline see the same batches.",
            )
        )
    intro = (
        "Two teachers and a student start were trained on functions of Python's standard library; each "
        "teacher scored masked samples once (tide precompute); students learnt from the stored logit "
        "datasets alone (tide train) and are judged on modules that nobody saw.\n\n"
        f"Whole run: {result['seconds']:.0f} s. "
    )
    if quick:
        intro += "This is a quick run: it shows that every stage works. Its numbers mean nothing."
    return write_report(
        path,
        title="tide demo",
        intro=intro,
        tables=[arms_table(result, judged), data_table(result), models_table(result)],
        widgets=[links(pages)] if pages else [],
        figures=figures,
        notes=[
            *([] if quick else findings(judged)),
            "ce-uniform is CE with the extra weight spread evenly: what re-weighting alone does. An "
            "objective that does not beat it has not been shown to profit from the teacher.",
            "kl reads the dataset without CompDemo, tidal the one with it; both hold the same noise.",
            "Cross-tokenizer arms use chunk-consistent masks, so their CE arm is not the shared one's.",
        ],
    )


def _running_mean(values: list[float], width: int) -> list[float]:
    return [sum(w) / len(w) for i in range(len(values)) if (w := values[max(0, i - width + 1) : i + 1])]
