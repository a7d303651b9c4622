"""`python -m studies`: run a study, say how far it is, write what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.errors import UsageError
from tools.console import Output, Progress, guard
from tools.tables import Column, Table

if TYPE_CHECKING:
    from studies.config import Study

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="The study: run, status, report."
)

Config = Annotated[Path, typer.Argument(help="The study's YAML file.", metavar="CONFIG.yaml")]
Out = Annotated[Path, typer.Option(help="Folder of tasks and results.", metavar="DIR")]
Only = Annotated[str | None, typer.Option(help="These questions alone, in this order.", metavar="NAME,...")]
Seeds = Annotated[int | None, typer.Option(help="Seeds of every arm, in place of the file's.", metavar="N")]
Scale = Annotated[
    float, typer.Option(help="Steps, samples and batches, as a multiple of the file's.", metavar="X")
]
Smoke = Annotated[bool, typer.Option(help="With the file's section `smoke` laid over it: a minute.")]


@app.command()
def run(
    config: Config,
    out: Out = Path("study-out"),
    only: Only = None,
    seeds: Seeds = None,
    jobs: Annotated[int, typer.Option(help="Processes at once.", metavar="N")] = 1,
    scale: Scale = 1.0,
    smoke: Smoke = False,
) -> None:
    """Do what is not done yet. Killed at any moment, the same command goes on."""
    from studies.collect import write_results
    from studies.config import read_study
    from studies.plan import Plan
    from studies.tasks import run_tasks

    study = read_study(config, smoke=smoke, scale=scale, seeds=seeds)
    plan = Plan(study, out)
    out.mkdir(parents=True, exist_ok=True)
    for question in _questions(study, only):
        while tasks := plan.open(question):
            with Progress() as progress:
                run_tasks(
                    tasks,
                    out,
                    jobs=jobs,
                    on_event=lambda e: progress(e.job, e.done, e.total, unit="steps", note=e.doing),
                )
            write_results(plan, question)
        print(write_results(plan, question))


@app.command()
def status(
    config: Config,
    out: Out = Path("study-out"),
    only: Only = None,
    seeds: Seeds = None,
    scale: Scale = 1.0,
    smoke: Smoke = False,
) -> None:
    """What is done and what is known to be open, question by question; writes the result files of what is
    done, as `run` does from time to time."""
    from studies.collect import progress_of, spent, write_results
    from studies.config import read_study
    from studies.plan import Plan

    study = read_study(config, smoke=smoke, scale=scale, seeds=seeds)
    plan = Plan(study, out)
    columns = (
        Column(label="question", align="left"),
        Column(label="arms done"),
        Column(label="arms"),
        Column(label="open tasks known now"),
    )
    asked = _questions(study, only)
    rows = tuple((q, *progress_of(plan, q)) for q in asked)
    for question in asked:
        write_results(plan, question)
    tasks, hours = spent(out)
    note = f"{tasks} tasks done in {out}, {hours:.2f} CPU-hours"
    Output(as_json=False).report(Table(title="Study", columns=columns, rows=rows, note=note))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one of results.", metavar="DIR")],
    doc: Annotated[
        Path | None, typer.Option(help="Page whose tables are written anew.", metavar="FILE.md")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page with plots; default: study.html in DIR.", metavar="FILE.html")
    ] = None,
) -> None:
    """Every table and plot, from the result files alone."""
    from studies.report import read_results, write_doc, write_html

    results = read_results(folder)
    page = write_html(html or folder / "study.html", results)
    print(page)
    if doc is not None:
        write_doc(doc, results)
        print(doc)


def _questions(study: Study, only: str | None) -> list[str]:
    known = list(study.questions)
    asked = known if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: no such question; there are {', '.join(known)}")
    return asked


if __name__ == "__main__":
    sys.exit(guard(lambda: app(standalone_mode=False)))
