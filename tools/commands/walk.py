"""`tide walk`: every step that one sample takes, from its message to the loss, with shapes."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import Output, Progress, doing
from tools.options import Config, Json, megabytes, opt

if TYPE_CHECKING:
    from tools.walking.teacher import Sources

NAME = {"shared": "tidal", "cross": "reverse-calm"}
"""Objective by the kind of a dataset."""
MADE_OF, LOSS = "What it was made of (default: as the dataset's folder says)", "Loss"


def walk(
    ctx: typer.Context,
    data: Annotated[str, opt("Logit dataset: folder, hf://, s3://, ...", "PATH|URL")],
    sample: Annotated[str, opt("Sample id, or how it begins, or a row's number.", "ID|N")] = "0",
    view: Annotated[
        int | None, opt("Which noising of it (default: 0, or that of the row's number).", "V")
    ] = None,
    corpus: Annotated[str | None, opt("Corpus.", "SPEC", MADE_OF)] = None,
    student: Annotated[str | None, opt("Student: model folder or hub id.", "DIR|ID", MADE_OF)] = None,
    teacher: Annotated[str | None, opt("Teacher: model folder or hub id.", "DIR|ID", MADE_OF)] = None,
    objective: Annotated[
        str | None, opt("As of tide train (default: tidal, or reverse-calm across tokenizers).", "NAME", LOSS)
    ] = None,
    progress: Annotated[float, opt("Share of training done, for lambda.", "SHARE", LOSS)] = 0.5,
    config: Config = None,
    json: Json = False,
) -> None:
    """Follow one sample through everything: message, tokens, alignment, noise, the teacher's questions and
    answers, its row, the student's batch, forward and loss, with shapes and the module that does each.

    Each step runs the code of the real thing: the teacher is asked again, and what it says is compared with
    what is stored. What is not at hand any more is left out, or given by its option.
    """
    with doing("loading libraries"):
        from shards.errors import UsageError
        from shards.reader import LogitDataset
        from student.objective import parse_objective
        from tools.inspecting.sample import find
        from tools.walking.steps import Step
        from tools.walking.student import student_steps
        from tools.walking.teacher import Sources, teacher_steps

    if not 0 <= progress <= 1:
        raise UsageError(f"--progress must lie between 0 and 1, got {progress}")
    dataset = LogitDataset(data)
    wanted = parse_objective(objective or NAME[dataset.manifest.kind])
    sources = made_of(data, Sources(corpus=corpus, student=student, teacher=teacher))
    output = Output(as_json=json)
    with Progress() as bars:
        row, at = find(dataset, sample, view, megabytes(bars, "looking for the sample"))
    steps: list[Step] = []
    coming = chain(
        teacher_steps(dataset.manifest, row, dataset.manifest.shards[at[0]].part, sources),
        student_steps(dataset, row, at, sources.student, wanted, progress),
    )
    while True:
        with doing(f"step {len(steps) + 1}"):
            step = next(coming, None)
        if step is None:
            break
        steps.append(step)
        output.report(step.table(len(steps)))
    output.result(
        {
            "command": "walk",
            "data": data,
            "sample": row.sample_id,
            "view": row.view,
            "objective": objective or NAME[dataset.manifest.kind],
            "steps": [step.to_json() for step in steps],
        }
    )


def made_of(data: str, given: Sources) -> Sources:
    """`given`, completed from the options that tide precompute left in a local dataset folder, where what
    they name is on this machine: nothing is downloaded that was not asked for."""
    from tools.inspecting.text import saved_options_of

    saved = saved_options_of(data)
    found = {
        name: saved[name]
        for name in ("corpus", "student", "teacher")
        if getattr(given, name) is None and name in saved and at_hand(saved[name])
    }
    return replace(given, **found)


def at_hand(name: str) -> bool:
    return name.startswith("builtin:") or Path(name).expanduser().exists()
