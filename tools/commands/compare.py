"""`tide compare`: students on the same held-out samples, in pairs against one of them; a table and a plot."""

from __future__ import annotations

import json as jsonlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.atomic import write_atomic
from shards.errors import UsageError
from tools.commands.eval import measure, read_result
from tools.console import Output, Progress
from tools.options import Config, Json, numbers, opt, saved_options
from tools.tables import Column, Table, interval

NOTE = (
    "Differences are paired over samples: below zero is better than the baseline, and an interval that "
    "leaves out zero is no accident of these samples. Intervals are not widened for the number of "
    "comparisons, and say nothing of another training seed."
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One student among others."""

    name: str
    run: str
    """What was given for it: a folder, a hub id, or a result file."""
    objective: str | None
    """What it was trained with, where its folder says so."""
    result: Any
    """`student.evaluate.EvalResult`."""
    bits: tuple[float, float, float]
    """Bits per byte with its 95 % interval."""
    against: tuple[float, float, float] | None
    """Paired difference to the baseline; None for the baseline itself."""


def compare(
    ctx: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(help="Run or model folders, or files of tide eval --out.", metavar="RUN...")
    ],
    data: Annotated[
        str | None, opt("Logit dataset to evaluate folders on, made with --holdout above 0.", "DIR|URL")
    ] = None,
    baseline: Annotated[str | None, opt("The RUN to compare with (default: the first).", "RUN")] = None,
    html: Annotated[Path | None, opt("Write the table and the plot as a page.", "FILE.html")] = None,
    out: Annotated[Path | None, opt("Write the comparison here, options beside it.", "FILE.json")] = None,
    grid: Annotated[
        str | None, opt("Timesteps (default: those of the first file given, else tide eval's).", "T,T,...")
    ] = None,
    limit: Annotated[
        int | None, opt("At most N held-out samples (default: as many as the first file has).", "N")
    ] = None,
    seed: Annotated[
        int | None, opt("Of masks and bootstrap (default: the first file's, else 0).", "S")
    ] = None,
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Compare students on held-out text: bits per byte of each, and paired differences to a baseline.

    Folders are evaluated on --data; files hold what tide eval found before. All must be on the same samples.
    """
    check(runs, baseline, data, limit, {"--out": out, "--html": html})
    read = {run: read_result(Path(run), "RUN") for run in runs if Path(run).is_file()}

    from student.evaluate import GRID, EvalResult

    results = {run: EvalResult.from_json(value) for run, value in read.items()}
    first = next(iter(results.values()), None)
    times = numbers(grid, "grid") if grid else first.grid if first else GRID
    seed = seed if seed is not None else first.seed if first else 0
    limit = limit or (len(first.sample_ids) if first else None)
    with Progress() as progress:
        for run in runs:
            if run not in results:
                report = progress.line(f"evaluating {Path(run).name}", "samples")
                results[run] = measure(
                    run, str(data), grid=times, limit=limit, seed=seed, device=device, report=report
                )
        with progress.doing("comparing"):
            compared = judge(runs, results, baseline or runs[0], names(runs, read), seed)
    table = compared_table(compared)
    output = Output(as_json=json)
    output.report(table)
    samples = len(results[runs[0]].sample_ids)
    summary = {
        "command": "compare",
        "data": data,
        "baseline": baseline or runs[0],
        "samples": samples,
        "grid": times,
        "seed": seed,
        "students": [as_json(c) for c in compared],
    }
    if html is not None:
        write_page(html, compared, table, samples)
        output.say(f"{html}: the page")
    if out is not None:
        with saved_options(ctx, out.with_suffix(".yaml")):
            write_atomic(out, jsonlib.dumps(summary).encode())
    output.result(summary)


def check(
    runs: Sequence[str],
    baseline: str | None,
    data: str | None,
    limit: int | None,
    files: dict[str, Path | None],
) -> None:
    """Refuse what cannot be compared before anything is read.

    Raises:
        UsageError: names the option.
    """
    if len(runs) < 2:
        raise UsageError(f"compare needs at least two RUNs, got {', '.join(runs)}")
    twice = [run for run, n in Counter(runs).items() if n > 1]
    if twice:
        raise UsageError(f"RUN {twice[0]} is given twice")
    if baseline is not None and baseline not in runs:
        raise UsageError(f"--baseline must be one of the RUNs ({', '.join(runs)}), got {baseline!r}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    unread = [run for run in runs if not Path(run).is_file()]
    if unread and data is None:
        raise UsageError(f"RUN {unread[0]} is no result file: give --data DIR|URL to evaluate it on")
    for flag, path in files.items():
        if path is not None:
            if path.is_dir():
                raise UsageError(f"{flag} {path} is a folder; name a file")
            path.parent.mkdir(parents=True, exist_ok=True)


def names(runs: Sequence[str], read: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Run -> (short name, folder of the student); the whole argument where short names coincide."""
    folders = {run: str(read[run].get("model", run)) if run in read else run for run in runs}
    short = {run: Path(folder.rstrip("/")).name or run for run, folder in folders.items()}
    counts = Counter(short.values())
    return {run: (short[run] if counts[short[run]] == 1 else run, folders[run]) for run in runs}


def judge(
    runs: Sequence[str],
    results: dict[str, Any],
    baseline: str,
    called: dict[str, tuple[str, str]],
    seed: int,
) -> list[Compared]:
    """Every student beside the baseline, in the order given.

    Raises:
        UsageError: one was measured on other samples, timesteps or masks than the baseline (says which).
    """
    from student.evaluate import bootstrap, paired_bootstrap

    base = results[baseline]
    for run in runs:
        own = results[run]
        for what, mine, theirs in (
            ("timesteps", own.grid, base.grid),
            ("seed", own.seed, base.seed),
            ("samples", own.sample_ids, base.sample_ids),
        ):
            if mine != theirs:
                said = (
                    f"{len(mine)} and {len(theirs)} samples" if what == "samples" else f"{mine} and {theirs}"
                )
                raise UsageError(
                    f"{run} and {baseline} cannot be compared: other {what} ({said}); evaluate both on the "
                    "same --data with the same --grid, --seed and --limit"
                )
    return [
        Compared(
            name=called[run][0],
            run=run,
            objective=objective_of(Path(called[run][1])),
            result=results[run],
            bits=bootstrap(results[run], seed=seed),
            against=None if run == baseline else paired_bootstrap(results[run], base, seed=seed),
        )
        for run in runs
    ]


def objective_of(folder: Path) -> str | None:
    """The objective that training wrote beside its student: `tidal+kl:4`."""
    from student.config import CONFIG_FILE

    try:
        terms = jsonlib.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["objective"]["terms"]
        return "+".join(t["name"] + (f":{t['weight']:g}" if t["weight"] != 1 else "") for t in terms) or "ce"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compared_table(compared: Sequence[Compared]) -> Table:
    base = next(c for c in compared if c.against is None)
    columns = (
        Column(label="student", align="left"),
        Column(label="objective", align="left"),
        Column(label="bits per byte [95 %]"),
        Column(label=f"against {base.name} [95 %, paired]"),
        *(Column(label=f"t {t:g}") for t in base.result.grid),
    )
    rows = tuple(
        (
            c.name,
            c.objective,
            interval(*c.bits),
            interval(*c.against) if c.against else None,
            *c.result.by_t.values(),
        )
        for c in compared
    )
    title = f"Held-out bits per byte, {len(base.result.sample_ids)} samples"
    return Table(title=title, columns=columns, rows=rows, note=NOTE)


def as_json(c: Compared) -> dict[str, Any]:
    return {
        "name": c.name,
        "run": c.run,
        "objective": c.objective,
        "bits_per_byte": c.bits[0],
        "interval": c.bits[1:],
        "difference": c.against and c.against[0],
        "difference_interval": c.against and c.against[1:],
        "by_t": {f"{t:g}": v for t, v in c.result.by_t.items()},
    }


def write_page(path: Path, compared: Sequence[Compared], table: Table, samples: int) -> None:
    """The table and one plot of the differences.

    Raises:
        UsageError: plotly is not installed.
    """
    from tools.pages.report import Bar, bar_chart, write_report

    base = next(c for c in compared if c.against is None)
    bars = [Bar(c.name, *c.against) for c in compared if c.against]
    figure = bar_chart(
        f"Difference to {base.name}",
        bars,
        x_label="bits per byte (left of zero: better)",
        caption="Bars end at the difference; whiskers are its 95 % interval over samples.",
    )
    write_report(
        path,
        title="Students compared",
        intro=f"Held-out text, {samples} samples, the same masks for every student.",
        tables=[table],
        figures=[figure],
    )
