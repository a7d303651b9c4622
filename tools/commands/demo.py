"""`tide demo`: the whole path on CPU, ending in a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.console import Output, Progress
from tools.options import Config, Json, opt, saved_options


def demo(
    ctx: typer.Context,
    out: Annotated[Path, opt("Folder for models, datasets, students and the report.", "DIR")] = Path(
        "demo-out"
    ),
    quick: Annotated[bool, opt("The same code with few steps; the numbers mean nothing.")] = False,
    ar: Annotated[
        bool, opt("Autoregressive teachers too, and students of theirs: half as long again.")
    ] = False,
    seed: Annotated[int, opt("Of weights, noise, order and held-out modules.", "S")] = 0,
    config: Config = None,
    json: Json = False,
) -> None:
    """The whole path on CPU, on text that is on every machine: teachers, logit datasets, students, a report.

    About six minutes on two cores. Trained teachers in the output folder are kept and reused.
    """
    from tools.demo.dataset import write_data_page
    from tools.demo.report import (
        arms_table,
        data_table,
        findings,
        models_table,
        verdicts,
        write_page,
        write_run_pages,
    )
    from tools.demo.run import FULL, QUICK, run_demo

    output = Output(as_json=json)
    with saved_options(ctx, out / "tide-demo.yaml"), Progress() as progress:
        result = run_demo(out, size=QUICK if quick else FULL, seed=seed, progress=progress, autoregressive=ar)
        data_page = write_data_page(out / "dataset.html", out, progress)
        with progress.doing("writing the report"):
            judged = verdicts(result)
            pages = write_run_pages(out, result)
            page = write_page(out / "report.html", result, quick=quick, pages=pages)
    for table in (models_table(result), data_table(result), arms_table(result, judged)):
        output.report(table)
    for line in ["Quick run: every stage works; the numbers mean nothing."] if quick else findings(judged):
        output.say(line)
    output.say(f"Report: {page}   ({result['seconds']:.0f} s)")
    output.say(f"Dataset: {data_page}")
    output.result(
        {
            "command": "demo",
            "out": str(out),
            "report": str(page),
            "dataset": str(data_page),
            "runs": {name: str(out / place) for name, place in pages.items()},
            "quick": quick,
            "seconds": result["seconds"],
            "stage_seconds": result["stage_seconds"],
            "bits_per_byte": {v.name: v.bits for v in judged},
            "against_ce": {v.name: v.against_ce for v in judged},
            "against_control": {v.name: v.against_control for v in judged},
            "datasets": {name: d["totals"] for name, d in result["datasets"].items()},
        }
    )
