"""What a study found, from its result files alone: tables in a Markdown page, and an HTML page with plots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UsageError
from student.schedule import LambdaSchedule
from studies.collect import RESULTS
from studies.intervals import Interval, interval
from studies.plots import write_plots
from studies.why_tables import why_tables
from tools.pages.report import Bar, Figure, Series, bar_chart, line_chart, write_report
from tools.tables import Cell, Column, Table
from tools.tables import interval as shown_interval

BITS = "bits per byte"
DIGITS = 4
MARK = "<!-- study: {} -->"
"""Where tables of a question begin in a page; they end at `END`."""
END = "<!-- end -->"
DETAILS = "What was chosen on validation, and what was measured besides"


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Question -> its file, from a run's folder or a folder of such files.

    Raises:
        UsageError: there is none.
    """
    where = folder / RESULTS if (folder / RESULTS).is_dir() else folder
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(where.glob("*.json"))}
    results = {name: result for name, result in found.items() if "question" in result}
    if not results:
        raise UsageError(f"{folder}: no results of a study; make some: python -m studies run")
    return results


class Judged:
    """One arm of a question, beside those it is compared with."""

    def __init__(self, result: dict[str, Any], arm: dict[str, Any]) -> None:
        arms = {a["name"]: a for a in result["arms"]}
        self.arm, self.name = arm, arm["name"]
        self.content = np.asarray(arm["bytes"])
        self.groups = np.asarray(result["groups"])
        self.nll = np.asarray(arm["centinats"], dtype=np.float64)
        self.bits = interval(self.nll, self.content, groups=self.groups)
        self.other = arm["against"] or result["baseline"]
        self.difference = self.against(arms.get(self.other))
        self.from_control = self.against(arms.get(result["control"] or ""))

    def against(self, other: dict[str, Any] | None) -> Interval | None:
        if other is None or other["name"] == self.name:
            return None
        against = np.asarray(other["centinats"], dtype=np.float64)
        return interval(self.nll, self.content, against, groups=self.groups)


def judged(result: dict[str, Any]) -> list[Judged]:
    return [Judged(result, arm) for arm in result["arms"]]


def settings(arm: dict[str, Any]) -> str:
    """What was chosen or given, in short."""
    s = arm["settings"]
    parts = [f"lr {s['learning_rate']:g}"]
    if arm["objective"] != "ce":
        parts.append(f"w {s['weight']:g}")
    if arm["objective"] not in ("ce", "ce-uniform"):
        parts.append(f"T {s['temperature']:g}")
    return ", ".join(parts)


def arms_table(result: dict[str, Any]) -> Table:
    """A row per arm, and the ends of the scale."""
    has_control = result["control"] is not None
    has_chunks = any(a["above_half"] is not None for a in result["arms"])
    has_codecs = len({a["codec"] for a in result["arms"]}) > 1
    columns = [
        Column(label="arm", align="left"),
        Column(label="chosen", align="left"),
        *([Column(label="bytes per masked position", digits=0)] if has_codecs else []),
        Column(label=f"{BITS} [95 %]"),
        Column(label="difference [95 %, paired]"),
        Column(label="seeds"),
        *([Column(label="against control [95 %, paired]")] if has_control else []),
        *([Column(label="chunks above ½", digits=2)] if has_chunks else []),
        Column(label="student TFLOP", digits=2),
        Column(label="teacher TFLOP", digits=2),
        Column(label="CPU-s", digits=0),
    ]
    rows: list[tuple[Cell, ...]] = []
    for name, value in _references(result):
        own = [None] if has_codecs else []
        rows.append((name, "–", *own, f"{value:.{DIGITS}f}", *[None] * (len(columns) - 3 - len(own))))
    for j in judged(result):
        d, c = j.difference, j.from_control
        rows.append(
            (
                j.name,
                settings(j.arm),
                *([j.arm["bytes_per_position"]] if has_codecs else []),
                shown_interval(*j.bits.triple, digits=DIGITS),
                None if d is None else shown_interval(*d.triple, digits=DIGITS),
                None if d is None else d.agree,
                *([None if c is None else shown_interval(*c.triple, digits=DIGITS)] if has_control else []),
                *([j.arm["above_half"]] if has_chunks else []),
                j.arm["student_flops"] / 1e12,
                j.arm["teacher_flops"] / 1e12,
                j.arm["cpu_seconds"],
            )
        )
    steps = result["train"]["steps"]
    note = (
        f"{result['seeds']} seeds (student initialisation, noise, order), {len(result['groups'])} test "
        f"samples of {max(result['groups'], default=-1) + 1} modules, {steps} steps of "
        f"{result['train']['batch_tokens']} packed tokens unless the arm says otherwise. "
        f"Lower is better. Difference: to {result['baseline']}, or to the arm of its kind where the question "
        "has several. Seeds: in how many the sign is that of the mean. Teacher TFLOP: one pass over all "
        "stored views, or what the loop asked."
    )
    if result["open"]:
        note += f" Not run yet: {', '.join(result['open'])}."
    return Table(title=result["title"], columns=tuple(columns), rows=tuple(rows), note=note)


def _references(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Starts, a mean over seeds, and teachers."""
    groups: dict[str, list[float]] = {}
    for name, found in result["references"].items():
        groups.setdefault(name.partition("/")[0], []).append(found["test"])
    for name, values in groups.items():
        yield (f"({name}, before)" if len(values) > 1 else f"({name})"), sum(values) / len(values)


def contrasts_table(result: dict[str, Any]) -> Table | None:
    """Arms compared with each other as the question asks; None where it asks for none that are done."""
    arms = {j.name: j for j in judged(result)}
    rows = []
    for first, second in result["contrasts"]:
        if first in arms and second in arms:
            d = arms[first].against(arms[second].arm)
            if d is not None:
                rows.append((first, second, shown_interval(*d.triple, digits=DIGITS), d.agree))
    columns = (
        Column(label="arm", align="left"),
        Column(label="minus", align="left"),
        Column(label=f"{BITS} [95 %, paired]"),
        Column(label="seeds"),
    )
    title = f"{result['title']}: direct comparisons"
    return Table(title=title, columns=columns, rows=tuple(rows)) if rows else None


def choices_table(result: dict[str, Any]) -> Table | None:
    """What validation said; None where nothing was chosen."""
    columns = (
        Column(label="arm", align="left"),
        Column(label="field", align="left"),
        Column(label="value", digits=4),
        Column(label=f"validation {BITS}", digits=DIGITS),
    )
    rows = tuple(
        (arm["name"], t["field"], float(t["value"]), t["validation"])
        for arm in result["arms"]
        for t in arm["tried"]
    )
    if not rows:
        return None
    note = (
        f"Means over {result['tuning_seeds']} seeds. Fields are chosen one after the other, each with the "
        "others as they stand; tests are not looked at."
    )
    return Table(
        title=f"{result['title']}: what was chosen on validation", columns=columns, rows=rows, note=note
    )


def findings(result: dict[str, Any]) -> list[str]:
    """What the intervals say, arm by arm; no more."""
    out = []
    for j in judged(result):
        for other, d in ((j.other, j.difference), (result["control"], j.from_control)):
            if d is None or j.name == result["control"] != other or other is None:
                continue
            if d.high < 0:
                says = f"is better than {other} by {-d.value:.4f} {BITS}"
            elif d.low > 0:
                says = f"is worse than {other} by {d.value:.4f} {BITS}"
            else:
                says = f"cannot be told from {other}"
            out.append(f"{j.name} {says} [{d.low:+.4f}, {d.high:+.4f}], {d.agree} seeds.")
    return out


def tables(result: dict[str, Any]) -> list[Table]:
    """All of a question's."""
    found = [arms_table(result)]
    if (contrasts := contrasts_table(result)) is not None:
        found.append(contrasts)
    if (chosen := choices_table(result)) is not None:
        found.append(chosen)
    found += why_tables(result)
    if result["codecs"]:
        from tools.benches.codec import tables as codec_tables

        of = f"SmolLM2-135M, V = {result['codecs']['vocabulary']:,}"
        found += [replace(t, title=f"{of}: {t.title}") for t in codec_tables(result["codecs"]["sides"])]
    return found


def figures(result: dict[str, Any]) -> Iterator[Figure]:
    """Differences, likelihood by timestep, curves over training, λ."""
    arms = judged(result)
    for title, of in (("to the baseline", "difference"), (f"to {result['control']}", "from_control")):
        bars = [Bar(j.name, *d.triple) for j in arms if (d := getattr(j, of)) is not None]
        if bars:
            yield bar_chart(
                f"{result['title']}: difference {title}",
                bars,
                x_label=f"{BITS} (left is better)",
                caption="Two-way paired bootstrap over seeds and test modules, 95 %.",
            )
    base = next((j for j in arms if j.name == result["baseline"]), None)
    if base is not None:
        yield line_chart(
            f"{result['title']}: difference by timestep",
            [
                Series(
                    name=j.name,
                    x=[float(t) for t in j.arm["by_t"]],
                    y=[v - base.arm["by_t"][t] for t, v in j.arm["by_t"].items()],
                )
                for j in arms
            ],
            x_label="timestep t (share of masked tokens)",
            y_label=f"{BITS} against {base.name}",
        )
    curves = [
        Series(name=j.name, x=[p[0] for p in c], y=[p[1] for p in c]) for j in arms if (c := j.arm["curve"])
    ]
    if curves:
        yield line_chart(
            f"{result['title']}: validation likelihood while training",
            curves,
            x_label="step",
            y_label=BITS,
            caption="Means over seeds.",
        )
    if any(j.arm["objective"].endswith("tidal") for j in arms):
        yield lambda_chart()


def lambda_chart() -> Figure:
    """λ_t over training at three timesteps, with both axes and with each alone."""
    import torch

    t = torch.tensor([0.1, 0.5, 0.9])
    progress = [i / 20 for i in range(21)]
    lines = []
    for axes in ("both", "training_only", "timestep_only"):
        schedule = LambdaSchedule(axes=axes)
        values = [schedule.at(p, t).tolist() for p in progress]
        for k, at in enumerate(t.tolist()):
            if axes != "training_only" or k == 0:
                name = axes if axes == "training_only" else f"{axes}, t {at:.1f}"
                lines.append(Series(name=name, x=progress, y=[v[k] for v in values]))
    return line_chart(
        "λ over training",
        lines,
        x_label="share of training done",
        y_label="λ_t, the teacher's share of TIDAL's target",
        markers=False,
    )


def write_html(path: Path, results: dict[str, dict[str, Any]]) -> Path:
    """The page of all questions."""
    return write_report(
        path,
        title="The study",
        intro="Students trained by different objectives, judged on modules that no model saw. docs/study.md "
        "says what each question means.",
        tables=[t for r in results.values() for t in tables(r)],
        figures=[f for r in results.values() for f in figures(r)],
        notes=[f"{r['title']}: {line}" for r in results.values() for line in findings(r)],
    )


def markdown(table: Table) -> str:
    """A table as Markdown, its note below."""
    lines = [f"**{table.title}**", ""]
    lines.append("| " + " | ".join(c.label for c in table.columns) + " |")
    lines.append("|" + "|".join("---" if c.align == "left" else "--:" for c in table.columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.texts()]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def write_doc(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write every question's plots beside the page, and its tables between its marks in it, the long ones
    folded; the rest of the page stays.

    Raises:
        UsageError: the page has no marks for a question.
    """
    text = path.read_text(encoding="utf-8")
    for question, result in results.items():
        begin = MARK.format(question)
        place = re.search(re.escape(begin) + r".*?" + re.escape(END), text, re.S)
        if place is None:
            raise UsageError(f"{path}: no place for question {question}; add {begin} and {END}")
        plots = write_plots(path.with_suffix(""), result, judged(result))
        found = tables(result)
        shown = 1 + (contrasts_table(result) is not None)
        parts = [markdown(table) for table in found[:shown]]
        parts += [f"![{result['title']}]({p.relative_to(path.parent).as_posix()})" for p in plots]
        if rest := found[shown:]:
            details = "\n\n".join(map(markdown, rest))
            parts.append(f"<details><summary>{DETAILS}</summary>\n\n{details}\n\n</details>")
        body = "\n\n".join(parts)
        text = f"{text[: place.start()]}{begin}\n\n{body}\n\n{END}{text[place.end() :]}"
    path.write_text(text, encoding="utf-8")
