"""`tide report`: a training run as a page, beside another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UsageError
from tools.console import Output, doing
from tools.options import Config, Json, opt


def report(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of tide train --out, finished or not.")],
    baseline: Annotated[Path | None, opt("Another run to draw beside it (default: none).", "RUN")] = None,
    out: Annotated[
        Path | None, opt("Where the page goes (default: report.html in RUN).", "FILE.html")
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write one self-contained page of a training run: losses, lambda, learning rate, speed, and, where tide
    train was told --eval-every and --sample-every, held-out likelihood by timestep and the texts it wrote.

    A run that is still going, or was interrupted, is shown as far as it got.
    """
    page = out or run / "report.html"
    if page.is_dir():
        raise UsageError(f"--out {page} is a folder; name a file, such as {page / 'report.html'}")
    with doing("writing the page"):
        from tools.pages.run import write_page
        from tools.pages.training_run import read_run

        same = baseline is not None and baseline.resolve().name == run.resolve().name
        shown = read_run(run, str(run) if same else None)
        other = None if baseline is None else read_run(baseline, str(baseline) if same else None)
        write_page(page, shown, other)
    output = Output(as_json=json)
    output.say(f"{page}: {shown.name}, step {shown.step:,} of {shown.steps:,}")
    output.result(
        {
            "command": "report",
            "run": run,
            "baseline": baseline,
            "out": page,
            "finished": shown.finished,
            "step": shown.step,
            "steps": shown.steps,
            "objective": shown.objective,
            "evaluations": len(shown.evaluations),
            "texts": len(shown.texts),
            "bits_per_byte": shown.evaluations[-1]["heldout_bits_per_byte"] if shown.evaluations else None,
        }
    )
