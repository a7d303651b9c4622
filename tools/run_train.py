"""`tide train`: a student from a logit dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.console import INTERRUPTED, Output, Progress
from tools.options import Config, Json, opt, saved_options

OBJECTIVE, OPTIMISER, WORK = "Objective", "Optimiser", "Work"
NAMES = (
    "ce, ce-uniform, kl, reverse-kl, tidal, calm, reverse-calm, bernoulli-kl, calm-tidal, reverse-calm-tidal"
)


def train(
    ctx: typer.Context,
    data: Annotated[str, opt("Logit dataset.", "DIR|URL")],
    student: Annotated[str, opt("Student to start from: model folder or hub id.", "DIR|ID")],
    out: Annotated[Path, opt("Folder of the run: student, checkpoints, metrics.", "DIR")],
    steps: Annotated[int, opt("Optimiser steps.", "N")],
    resume: Annotated[bool, opt("Go on from the newest checkpoint in --out, if there is one.")] = False,
    objective: Annotated[
        str,
        opt(
            f"Added to CE; sums with + and weights with :, as tidal:1+kl:4. One of {NAMES}.",
            "NAME",
            OBJECTIVE,
        ),
    ] = "tidal",
    temperature: Annotated[float, opt("Softmax temperature of KL and TIDAL.", "T", OBJECTIVE)] = 2.0,
    chunk_temperature: Annotated[
        float, opt("Temperature of chunk probabilities (CALM).", "T", OBJECTIVE)
    ] = 2.0,
    clamp: Annotated[
        str,
        opt("CALM: bounds of chunk probabilities; reference's kill gradients.", "log|reference", OBJECTIVE),
    ] = "log",
    ce_weight: Annotated[float, opt("Weight of CE; 0 drops it.", "W", OBJECTIVE)] = 1.0,
    ce_weighting: Annotated[
        str, opt("CE: weight of each timestep, about 1/t or 1.", "scheduler|uniform", OBJECTIVE)
    ] = "scheduler",
    ce_schedule: Annotated[
        str, opt("CE: noise schedule of the scheduler's weight.", "linear|cosine", OBJECTIVE)
    ] = "linear",
    ce_normalisation: Annotated[
        str,
        opt(
            "CE: divided by maskable tokens, by each view's own and by views, or by views.",
            "token|sequence|batch",
            OBJECTIVE,
        ),
    ] = "token",
    lambda_initial: Annotated[
        float, opt("TIDAL: teacher's share at the first step.", "SHARE", OBJECTIVE)
    ] = 0.1,
    lambda_max: Annotated[float, opt("TIDAL: teacher's share at the last step.", "SHARE", OBJECTIVE)] = 0.9,
    lambda_decay: Annotated[str, opt("TIDAL: from one to the other.", "cosine|linear", OBJECTIVE)] = "cosine",
    lambda_axes: Annotated[
        str, opt("TIDAL: what the share depends on.", "both|training_only|timestep_only", OBJECTIVE)
    ] = "both",
    timestep_weighting: Annotated[
        str, opt("TIDAL: weight of each timestep.", "uniform|mid-range", OBJECTIVE)
    ] = "uniform",
    lr: Annotated[float, opt("Peak learning rate.", "RATE", OPTIMISER)] = 5e-5,
    warmup: Annotated[float, opt("Share of the steps with rising learning rate.", "SHARE", OPTIMISER)] = 0.1,
    batch_tokens: Annotated[
        int, opt("Packed student tokens per step, over all GPUs.", "TOKENS", OPTIMISER)
    ] = 8192,
    seed: Annotated[int, opt("Decides the order of the data.", "S", OPTIMISER)] = 0,
    row_tokens: Annotated[
        int | None, opt("Packed row length (default: 512 on CPU, 4096 on CUDA).", "TOKENS", WORK)
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Compute in bfloat16 (default: where CUDA offers it).",
            rich_help_panel=WORK,
        ),
    ] = None,
    log_steps: Annotated[int, opt("Steps between log lines.", "N", WORK)] = 10,
    save_steps: Annotated[int, opt("Steps between checkpoints; the last step is saved.", "N", WORK)] = 500,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a student on a logit dataset; no teacher is needed.

    Runs under torchrun and accelerate launch too. Ctrl-C ends the run after the current step with a
    checkpoint; the same command with --resume goes on.
    """
    from student.objective import parse_objective
    from student.schedule import LambdaSchedule
    from student.trainer import TrainConfig
    from student.trainer import train as run

    aim = parse_objective(
        objective,
        ce_weight=ce_weight,
        ce_weighting=ce_weighting,
        ce_schedule=ce_schedule,
        ce_normalisation=ce_normalisation,
        temperature=temperature,
        chunk_temperature=chunk_temperature,
        clamp=clamp,
        timestep_weighting=timestep_weighting,
        schedule=LambdaSchedule(
            initial=lambda_initial,
            maximum=lambda_max,
            decay=lambda_decay,  # type: ignore[arg-type]
            axes=lambda_axes,  # type: ignore[arg-type]
        ),
    )
    settings = TrainConfig(
        steps=steps,
        batch_tokens=batch_tokens,
        row_tokens=row_tokens,
        learning_rate=lr,
        warmup=warmup,
        bf16=bf16,
        seed=seed,
        log_every=log_steps,
        save_every=save_steps,
    )
    with saved_options(ctx, out / "tide-train.yaml") as saved, Progress(plain=False) as progress:
        report = saved(progress.line("training", "steps"))
        summary = run(data, student, out, settings, aim, resume=resume, progress=report)
    output = Output(as_json=json)
    if summary.finished:
        rate = summary.tokens / max(summary.seconds, 1e-9)
        output.say(
            f"{summary.out}: student of {summary.step} steps; {summary.seconds:,.0f} s, {rate:,.0f} tokens/s"
        )
    output.result(
        {
            "command": "train",
            "out": summary.out,
            "finished": summary.finished,
            "step": summary.step,
            "steps": summary.steps,
            "seconds": summary.seconds,
            "tokens": summary.tokens,
            "checkpoint": summary.checkpoint and str(summary.checkpoint),
            "last": summary.last,
        }
    )
    if not summary.finished:
        raise SystemExit(INTERRUPTED)
