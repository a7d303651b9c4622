"""The task of training a student and judging it, and of judging a model that was not trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shards.codec import SparseCodec
from shards.reader import LogitDataset
from shards.row import Row
from student.batch import collate
from student.config import METRICS, TrainConfig
from student.evaluate import EvalResult, evaluate
from student.flops import Work, step_flops
from student.loader import DatasetRows, global_batches
from student.memory import Shape
from student.model import load_student, read_config
from student.objective import ABOVE_HALF, REGISTRY, Objective, Term
from student.pairs import Counting
from student.schedule import LambdaSchedule
from student.trainer import train
from studies.making import held_out
from studies.rows import TeacherInTheLoop, with_tail
from studies.tasks import Task
from tools.workers import Report

COUNTED = 16
"""Batches whose FLOPs are counted; the others cost as much."""
CENTINATS = 100
"""Likelihoods are kept in whole hundredths of a nat."""


def objective_of(spec: Mapping[str, Any]) -> Objective:
    """The objective that an arm's settings mean."""
    name, T = spec["objective"], spec["temperature"]
    positions = name != "ce" and REGISTRY[name].needs == "positions"
    return Objective(
        terms=() if name == "ce" else (Term(name, spec["weight"]),),
        temperature=T if positions else 2.0,
        chunk_temperature=2.0 if positions else T,
        schedule=LambdaSchedule(
            initial=spec["lambda_initial"], maximum=spec["lambda_maximum"], axes=spec["axes"]
        ),
        timestep_weighting=spec["timestep_weighting"],
    )


def train_arm(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """`tide train` from the start of this seed on the data of this seed, then the likelihood of validation
    and test."""
    spec, folder = task.spec, task.folder(out)
    data, start = task.needs["data"], task.needs["student"].folder(out) / "model"
    path, student = data.folder(out) / "data", folder / "student"
    through: Any = None
    if spec["online"]:
        through = TeacherInTheLoop(data, out, spec["seed"])
    elif spec["tail"]:
        through = with_tail(spec["tail"])
    rows = {split: _rows(task, out, split) for split in ("validation", "test")}
    config = TrainConfig(
        steps=spec["steps"],
        batch_tokens=spec["batch_tokens"],
        learning_rate=spec["learning_rate"],
        warmup=spec["warmup"],
        seed=spec["seed"],
        fresh_noise=spec["fresh_noise"],
        log_every=max(1, spec["steps"] // 48),
        save_every=spec["steps"],
        eval_every=max(1, spec["steps"] // spec["looks"]) if spec["looks"] else None,
    )
    manifest = LogitDataset(path).manifest
    judged = partial(
        evaluate,
        samples=rows["validation"],
        mask_token_id=manifest.student.mask_token_id,
        block_size=manifest.block_size,
    )
    summary = train(
        path,
        start,
        student,
        config,
        objective_of(spec),
        progress=lambda done, total, text: report(done, total + total // 4, text),
        through=through,
        held_out=lambda model, told: judged(model, progress=told),
    )
    if not summary.finished:
        raise KeyboardInterrupt  # which training has turned into an early end
    for checkpoint in student.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    report(spec["steps"], spec["steps"], "evaluating")
    model, _ = load_student(student)
    model.to(spec["device"])
    found = {s: judged(model, samples=r) for s, r in rows.items()}
    records = [json.loads(line) for line in (student / METRICS).read_text().splitlines()]
    dataset = LogitDataset(path)
    return {
        "validation": found["validation"].bits_per_byte,
        "test": kept(found["test"]),
        "tokens": summary.tokens,
        "train_seconds": summary.seconds,
        "student_flops": spec["steps"] * flops_per_step(dataset, start, config, spec["device"]),
        "teacher_flops": through.flops if spec["online"] else None,
        "curve": [[r["step"], r["heldout_bits_per_byte"]] for r in records if "heldout_bits_per_byte" in r],
        "loss": [[r["step"], r["ce"], r.get("grad_norm")] for r in records if "ce" in r][::4],
        "above_half": next((r[ABOVE_HALF] for r in reversed(records) if ABOVE_HALF in r), None),
        "lambda": [[r["step"], r["lambda"]] for r in records if "lambda" in r][::4],
    }


def judge(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """The likelihood of validation and test under a block-diffusion model of the student's tokenizer."""
    from precompute.teachers.load import load_teacher

    report(0, 1, "evaluating")
    folder = task.needs["model"].folder(out) / "model"
    device = task.spec["device"]
    model: Any
    if task.spec["teacher"]:
        model = load_teacher(folder, device=torch.device(device)).model
    else:
        model, _ = load_student(folder)
        model.to(device)
    tokenizer = _tokenizer(task, out)
    found = {
        split: evaluate(
            model,
            _rows(task, out, split),
            mask_token_id=tokenizer.mask_token_id,
            block_size=task.spec["block_size"],
        )
        for split in ("validation", "test")
    }
    return {"validation": found["validation"].bits_per_byte, "test": kept(found["test"])}


def kept(result: EvalResult) -> dict[str, Any]:
    """What intervals are made of: every sample's NLL, a mean over the grid, and its bytes."""
    return {
        "centinats": [round(CENTINATS * x) for x in result.nll_nats.mean(1).tolist()],
        "bytes": result.bytes.tolist(),
        "bits_per_byte": result.bits_per_byte,
        "by_t": {f"{t:g}": value for t, value in result.by_t.items()},
    }


def flops_per_step(dataset: LogitDataset, start: Path, config: TrainConfig, device: str) -> float:
    """Of the student, a mean over the first batches."""
    manifest = dataset.manifest
    codec = manifest.codec
    shape = Shape.of(read_config(start))
    how: Counting = "tiles" if device == "cuda" else "runs"
    cut = global_batches(
        DatasetRows(dataset, config.seed)(None),
        batch_tokens=config.batch_tokens,
        block_size=manifest.block_size,
    )
    each = [
        step_flops(
            shape,
            Work.of(
                collate(
                    rows,
                    block_size=manifest.block_size,
                    mask_token_id=manifest.student.mask_token_id,
                    row_tokens=config.batch_tokens,
                    shared_vocab_size=manifest.shared_vocab_size,
                    temperatures=codec.temperatures if isinstance(codec, SparseCodec) else (),
                ),
                how,
            ),
        ).total
        for rows, _ in islice(cut, COUNTED)
    ]
    return sum(each) / len(each)


def _tokenizer(task: Task, out: Path) -> Any:
    from student.tokenizer import load_tokenizer

    return load_tokenizer(task.needs["tokenizer"].folder(out) / "chatml")


def _rows(task: Task, out: Path, split: str) -> list[Row]:
    return held_out(
        task.needs["corpus"].folder(out),
        task.needs["tokenizer"].folder(out),
        split,
        task.spec["held_out"][split],
        block_size=task.spec["block_size"],
        max_length=task.spec["max_length"],
    )
