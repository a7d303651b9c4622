"""`tide train`: a student from a logit dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UsageError
from tools.commands.train_settings import adapter_of, explain, fit_card, sharding
from tools.console import INTERRUPTED, Output, Progress, doing, is_main_process
from tools.options import Config, Json, opt, option_names, saved_options

OBJECTIVE, OPTIMISER, MEMORY, WORK = "Objective", "Optimiser", "Memory", "Work"
ADAPTERS, RECORDS = "LoRA", "Records"
NAMES = (
    "ce, ce-uniform, kl, reverse-kl, tidal, calm, reverse-calm, bernoulli-kl, calm-tidal, reverse-calm-tidal"
)

LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
PRESET_NAMES = (
    "paper-shared, paper-cross, paper-ablation-shared-ce, paper-ablation-shared-kl, "
    "paper-ablation-shared-tide-cross, paper-ablation-shared-no-timestep-axis, "
    "paper-ablation-shared-no-compdemo, paper-ablation-cross-ce, paper-ablation-cross-calm, "
    "paper-ablation-cross-tide-shared"
)


def use_preset(ctx: typer.Context, name: str | None) -> str | None:
    """Callback of `--preset`: its options become defaults, below those of a file and the flags."""
    if name is not None:
        from student.presets import preset_named

        given = {key: str(value) for key, value in preset_named(name).options.items()}
        names = option_names(ctx)
        ctx.default_map = {names[k]: v for k, v in given.items()} | dict(ctx.default_map or {})
    return name


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        is_eager=True,
        callback=use_preset,
        help=f"Settings of the paper, below every flag and file: {PRESET_NAMES}.",
    ),
]


def train(
    ctx: typer.Context,
    data: Annotated[str, opt("Logit dataset.", "DIR|URL")],
    student: Annotated[str, opt("Student to start from: model folder or hub id.", "DIR|ID")],
    out: Annotated[Path, opt("Folder of the run: student, checkpoints, metrics.", "DIR")],
    steps: Annotated[
        int | None, opt("Optimiser steps; wins over --epochs (default: as those say).", "N")
    ] = None,
    epochs: Annotated[
        float | None, opt("Times over the training samples (default: as --steps says).", "E")
    ] = None,
    preset: Preset = None,
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
    fresh_noise: Annotated[
        float | None,
        opt(
            "Share of the rows that redraw their noise and carry CE alone (default: where the run meets "
            "stored views more than once 0.25, and 1 with ce; else 0).",
            "SHARE",
            OBJECTIVE,
        ),
    ] = None,
    lr: Annotated[float, opt("Peak learning rate.", "RATE", OPTIMISER)] = 5e-5,
    lr_schedule: Annotated[
        str, opt("Learning rate after warm-up.", "cosine|linear|constant", OPTIMISER)
    ] = "cosine",
    warmup: Annotated[float, opt("Share of the steps with rising learning rate.", "SHARE", OPTIMISER)] = 0.1,
    weight_decay: Annotated[float, opt("AdamW's, per step and learning rate.", "W", OPTIMISER)] = 0.0,
    max_grad_norm: Annotated[
        float, opt("Gradients are scaled down to this norm; 0 = never.", "NORM", OPTIMISER)
    ] = 1.0,
    batch_tokens: Annotated[
        int, opt("Packed student tokens per step, over all GPUs.", "TOKENS", OPTIMISER)
    ] = 8192,
    optimizer: Annotated[
        str,
        opt(
            "transformers' name; adamw_bnb_8bit keeps its state in 8 bits (bitsandbytes).", "NAME", OPTIMISER
        ),
    ] = "adamw_torch",
    seed: Annotated[int, opt("Decides the order of the data and fresh noise.", "S", OPTIMISER)] = 0,
    lora: Annotated[
        int | None,
        opt("Train updates of this rank, the weights frozen (default: the weights).", "RANK", ADAPTERS),
    ] = None,
    qlora: Annotated[
        bool, opt("The same with the frozen weights in 4 bits (bitsandbytes).", None, ADAPTERS)
    ] = False,
    lora_alpha: Annotated[
        float | None, opt("Updates are scaled by alpha / rank (default: twice the rank).", "A", ADAPTERS)
    ] = None,
    lora_dropout: Annotated[float, opt("Of the updates' inputs.", "SHARE", ADAPTERS)] = 0.0,
    lora_targets: Annotated[str, opt("Linear layers that get one.", "NAME,...", ADAPTERS)] = LORA_TARGETS,
    vram: Annotated[
        float | None,
        opt(
            "Pick optimiser, checkpointing, micro-batches and row length, those not given, for a card of "
            "this size, and print what it should use: 8, 12, 16, 24 or any other (default: pick nothing).",
            "GIB",
            MEMORY,
        ),
    ] = None,
    row_tokens: Annotated[
        int | None, opt("Packed row length (default: 512 on CPU, 4096 on CUDA).", "TOKENS", MEMORY)
    ] = None,
    accumulation: Annotated[
        int, opt("Micro-batches a GPU cuts its share of a step into; changes memory alone.", "N", MEMORY)
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, opt("Run each layer again in the backward pass: less memory, a third more work.", None, MEMORY)
    ] = False,
    eight_bit_embedding: Annotated[
        bool, opt("With an 8-bit optimiser: the embedding's state in 8 bits too.", None, MEMORY)
    ] = False,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Compute in bfloat16 (default: where CUDA offers it).",
            rich_help_panel=WORK,
        ),
    ] = None,
    fsdp: Annotated[
        bool, opt("Shard weights, gradients and optimiser over the GPUs (FSDP2).", None, WORK)
    ] = False,
    deepspeed: Annotated[Path | None, opt("DeepSpeed settings.", "FILE.json", WORK)] = None,
    workers: Annotated[
        int | None, opt("Processes that prepare batches (default: 1 with CUDA, else 0).", "N", WORK)
    ] = None,
    log_steps: Annotated[int, opt("Steps between log lines.", "N", RECORDS)] = 10,
    save_steps: Annotated[int, opt("Steps between checkpoints; the last step is saved.", "N", RECORDS)] = 500,
    keep: Annotated[int, opt("Checkpoints kept.", "N", RECORDS)] = 2,
    eval_every: Annotated[
        int | None, opt("Steps between evaluations on held-out samples (default: none).", "N", RECORDS)
    ] = None,
    eval_samples: Annotated[int, opt("Most held-out samples of one.", "N", RECORDS)] = 128,
    keep_best: Annotated[
        bool, opt("Keep the best evaluated student in --out's best/.", None, RECORDS)
    ] = False,
    sample_every: Annotated[
        int | None,
        opt(
            "Steps between texts for held-out prompts, which tide report shows (default: none).", "N", RECORDS
        ),
    ] = None,
    samples: Annotated[int, opt("Held-out prompts of these.", "N", RECORDS)] = 3,
    sample_tokens: Annotated[int, opt("Most tokens of such a text.", "TOKENS", RECORDS)] = 64,
    report_to: Annotated[
        str | None, opt("Send metrics to tensorboard, wandb, trackio too.", "NAME,...", RECORDS)
    ] = None,
    push_to: Annotated[
        str | None, opt("Push the finished student to the Hugging Face Hub.", "OWNER/NAME", RECORDS)
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a student on a logit dataset; no teacher is needed.

    Runs under torchrun and accelerate launch too. Ctrl-C ends the run after the current step with a
    checkpoint; the same command with --resume goes on.
    """
    with doing("loading libraries"):
        from shards.reader import LogitDataset
        from student.hub import check_push, push_student
        from student.objective import parse_objective
        from student.schedule import LambdaSchedule
        from student.trainer import TrainConfig, steps_of
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
    if steps is None and epochs is None:
        raise UsageError("Missing option '--steps'; or pass --epochs, or a --preset, which has its own")
    if push_to is not None:
        check_push(push_to)
    with doing("opening the dataset"):
        dataset = LogitDataset(data)
        if steps is None and epochs is not None:
            steps = steps_of(dataset, epochs, batch_tokens)
    if preset is not None and is_main_process():
        explain(preset, dataset.manifest)
    settings = TrainConfig(
        steps=steps or 0,
        batch_tokens=batch_tokens,
        row_tokens=row_tokens,
        accumulation=accumulation,
        learning_rate=lr,
        schedule=lr_schedule,  # type: ignore[arg-type]
        warmup=warmup,
        weight_decay=weight_decay,
        optimizer=optimizer,
        eight_bit_embedding=eight_bit_embedding,
        adapter=adapter_of(lora, qlora, lora_alpha, lora_dropout, lora_targets),
        gradient_checkpointing=gradient_checkpointing,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        fresh_noise=fresh_noise,
        seed=seed,
        log_every=log_steps,
        save_every=save_steps,
        keep=keep,
        workers=workers,
        eval_every=eval_every,
        eval_samples=eval_samples,
        keep_best=keep_best,
        sample_every=sample_every,
        samples=samples,
        sample_tokens=sample_tokens,
        report_to=tuple(filter(None, (report_to or "").split(","))),
        trainer_args=sharding(fsdp, deepspeed),
    )
    if vram is not None:
        settings = fit_card(ctx, student, vram, settings)
    with saved_options(ctx, out / "tide-train.yaml") as saved, Progress(plain=False) as progress:
        report = saved(progress.line("training", "steps"))
        summary = run(data, student, out, settings, aim, resume=resume, progress=report)
    output = Output(as_json=json)
    if summary.finished:
        rate = summary.tokens / max(summary.seconds, 1e-9)
        output.say(
            f"{summary.out}: student of {summary.step} steps; {summary.seconds:,.0f} s, {rate:,.0f} tokens/s"
        )
    pushed = None
    if summary.finished and push_to is not None and is_main_process():
        with doing(f"pushing to {push_to}"):
            pushed = push_student(summary.out, push_to)
        output.say(f"pushed to {pushed}")
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
            "pushed": pushed,
        }
    )
    if not summary.finished:
        raise SystemExit(INTERRUPTED)
