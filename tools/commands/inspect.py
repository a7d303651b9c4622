"""`tide inspect`: what a logit dataset holds, on the terminal or on a page."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Config, Json, megabytes, opt

ROW, PAGE = "One sample", "Page"


def inspect(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="PATH|URL", help="Logit dataset: folder, hf://, s3://, ...")],
    rows: Annotated[int, opt("Rows that are looked at, spread over the shards.", "N")] = 1024,
    tokenizer: Annotated[
        str | None,
        opt("The student's tokenizer, for texts (default: what made a local dataset, if there).", "DIR|ID"),
    ] = None,
    teacher_tokenizer: Annotated[
        str | None, opt("The teacher's, for its side of chunks (default: likewise).", "DIR|ID")
    ] = None,
    row: Annotated[
        str | None,
        opt("Show one sample: row number from 0, sample id, or the beginning of one.", "ID", ROW),
    ] = None,
    view: Annotated[int | None, opt("Its view (default: the numbered row's, else 0).", "N", ROW)] = None,
    html: Annotated[
        Path | None, opt("Write one self-contained page with figures.", "FILE.html", PAGE)
    ] = None,
    beside: Annotated[
        str | None,
        opt("Second dataset in the figures over t, as one made with --no-compdemo.", "PATH|URL", PAGE),
    ] = None,
    lambda_initial: Annotated[
        float, opt("Schedule: teacher's share at the first step.", "SHARE", PAGE)
    ] = 0.1,
    lambda_max: Annotated[float, opt("Schedule: teacher's share at the last step.", "SHARE", PAGE)] = 0.9,
    lambda_decay: Annotated[str, opt("Schedule: from one to the other.", "cosine|linear", PAGE)] = "cosine",
    lambda_axes: Annotated[
        str, opt("Schedule: what the share depends on.", "both|training_only|timestep_only", PAGE)
    ] = "both",
    config: Config = None,
    json: Json = False,
) -> None:
    """What a logit dataset holds: a summary; with --row one sample, token by token; with --html a page.

    Reads the manifest and a bounded sample of rows, so a remote dataset is not downloaded. An id that is not
    whole is looked for in all samples.
    """
    if rows < 1:
        raise UsageError(f"--rows must be at least 1, got {rows}")
    if view is not None and row is None:
        raise UsageError(f"--view {view} is of one sample: name it by --row")
    if beside is not None and html is None:
        raise UsageError(f"--beside {beside} is for the page's figures: name the page by --html")
    if html is not None:
        writable(html)

    from shards.reader import LogitDataset
    from student.schedule import LambdaSchedule
    from tools.inspecting.page import write_page
    from tools.inspecting.row import Rendered
    from tools.inspecting.sample import find, sample
    from tools.inspecting.summary import summarise
    from tools.inspecting.targets import Teller
    from tools.inspecting.text import teacher_texts_of, texts_of
    from tools.inspecting.view import view_of

    schedule = LambdaSchedule(
        initial=lambda_initial,
        maximum=lambda_max,
        decay=lambda_decay,  # type: ignore[arg-type]
        axes=lambda_axes,  # type: ignore[arg-type]
    )
    dataset = LogitDataset(data)
    other = None if beside is None else LogitDataset(beside)
    output = Output(as_json=json)
    payload: dict[str, Any] = {"command": "inspect", "data": data}
    texts = texts_of(dataset.manifest, data, tokenizer) if row or html else None
    teacher_texts = None
    if teacher_tokenizer and dataset.manifest.kind != "cross":
        raise UsageError(f"--teacher-tokenizer {teacher_tokenizer}: {data} has one tokenizer; leave it out")
    if texts is not None and dataset.manifest.kind == "cross":
        teacher_texts = teacher_texts_of(dataset.manifest, data, teacher_tokenizer)
    if row is not None and texts is not None:
        with Progress() as progress:
            found, _ = find(dataset, row, view, megabytes(progress, "looking for the sample"))
            with progress.doing("reading its targets"):
                one = view_of(
                    found,
                    Teller(dataset),
                    compdemo=dataset.manifest.noise.compdemo,
                    student=texts,
                    teacher=teacher_texts,
                )
        output.show(Rendered(one, texts, lower=dataset.manifest.codec.name == "sparse"))
        for side in (texts, teacher_texts):
            if side is not None and side.why_not:
                output.say(side.why_not)
        payload |= {
            "row": one.to_json(),
            "tokens": [texts[i] for i in found.input_ids.tolist()] if texts.tokenizer else None,
        }
    if row is None or html is not None:
        with Progress() as progress:
            sampled = sample(dataset, rows, megabytes(progress, "reading rows"))
            summary = summarise(dataset, sampled)
            if html is not None and texts is not None:
                page = write_page(
                    html,
                    dataset,
                    sampled,
                    summary,
                    texts=texts,
                    teacher_texts=teacher_texts,
                    schedule=schedule,
                    rows=rows,
                    beside=other,
                    progress=progress,
                )
        payload |= summary.json
        if row is None:
            for table in summary.tables:
                output.report(table)
        if html is not None and texts is not None:
            if texts.why_not and row is None:
                output.say(texts.why_not)
            output.say(f"Page: {page}")
            payload["html"] = page
    output.result(payload)


def writable(path: Path) -> None:
    """Whether a page can be made at its place, asked before the work.

    Raises:
        UsageError: a folder, or plotly is missing. OSError: the system refuses.
    """
    from tools.pages.report import plotly_script

    if path.is_dir():
        raise UsageError(f"--html {path} is a folder: name a file")
    plotly_script()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
