"""The whole path on CPU, on text that is on every machine: teachers, logit datasets, students, and what
came of it.

Corpus: functions of Python's standard library (signature and docstring in, body out), held out by module.
Every model is trained here (`tools.demo.models`); everything after that is what `tide precompute`, `tide
train` and `tide eval` do. Arms of one pipeline start from the same student, take the same steps and see the
same noise. Finished pieces in the output folder are kept, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.workers import Job, Report, run_jobs

BLOCK = 8
HOLDOUT = 0.2
VIEWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How much of everything."""

    conversations: int
    """Corpus rows scored by the teachers, held-out ones included."""
    teacher_steps: tuple[int, int]
    """Autoregressive warm-up and diffusion steps of each teacher."""
    start_steps: tuple[int, int]
    """The same for the student's start."""
    steps: int
    """Optimiser steps of every arm."""
    held_out: int
    """Most held-out samples that an arm is judged on."""
    looks: int
    """Evaluations and texts of every arm while it trains, evenly spread."""
    max_length: int = 96
    """Tokens per sample."""


FULL = DemoSize(
    conversations=1200,
    teacher_steps=(340, 320),
    start_steps=(200, 60),
    steps=154,
    held_out=240,
    looks=8,
)
QUICK = DemoSize(
    conversations=128, teacher_steps=(24, 16), start_steps=(16, 8), steps=12, held_out=16, looks=2
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One student: what it is trained on, and by which objective."""

    pipeline: str
    """`shared` or `cross`: which tokenizer pipeline; arms of one pipeline are compared."""
    objective: str
    dataset: str

    @property
    def name(self) -> str:
        teacher = "-ar" if self.dataset.endswith("-ar") else ""
        return f"{self.pipeline}-{self.objective}{teacher}"


@dataclass(frozen=True, slots=True)
class Scored:
    """One logit dataset to make."""

    name: str
    teacher: str
    compdemo: bool


DATASETS = (
    Scored("shared-compdemo", "teacher-dense", True),
    Scored("shared-plain", "teacher-dense", False),
    Scored("cross-compdemo", "teacher-moe", True),
)
ARMS = (
    Arm("shared", "ce", "shared-compdemo"),
    Arm("shared", "ce-uniform", "shared-compdemo"),
    Arm("shared", "kl", "shared-plain"),
    Arm("shared", "tidal", "shared-compdemo"),
    Arm("cross", "ce", "cross-compdemo"),
    Arm("cross", "reverse-calm", "cross-compdemo"),
    Arm("cross", "bernoulli-kl", "cross-compdemo"),
)
AR_DATASETS = (
    Scored("shared-ar", "teacher-ar", False),
    Scored("cross-ar", "teacher-ar-cross", False),
)
"""What autoregressive teachers say of the same samples under the same masks."""
AR_ARMS = (
    Arm("shared", "kl", "shared-ar"),
    Arm("shared", "tidal", "shared-ar"),
    Arm("cross", "calm", "cross-ar"),
    Arm("cross", "reverse-calm", "cross-ar"),
    Arm("cross", "bernoulli-kl", "cross-ar"),
)


def run_demo(
    out: Path, *, size: DemoSize, seed: int, progress: Callable[..., None], autoregressive: bool = False
) -> dict[str, Any]:
    """Run every stage and return the results that the table and the report are made of (also `demo.json`).

    Args:
        progress: called as tools.console.Progress is.
        autoregressive: with autoregressive teachers and their students, beside the others.
    """
    roles = (*ROLES, *(AR_ROLES if autoregressive else ()))
    scored = (*DATASETS, *(AR_DATASETS if autoregressive else ()))
    arms = (*ARMS, *(AR_ARMS if autoregressive else ()))
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def stage(name: str, jobs: list[Job]) -> dict[str, Any]:
        start = time.monotonic()
        results = run_jobs(
            jobs, on_event=lambda e: progress(e.job, e.done, e.total, unit="steps", note=e.doing)
        )
        seconds[name] = time.monotonic() - start
        return results

    progress("reading the standard library", 0, None, unit="functions")
    make_tokenizers(out, seed)
    models = stage(
        "models",
        [Job(role, make_role, {"out": str(out), "role": role, "size": size, "seed": seed}) for role in roles],
    )
    datasets = stage(
        "precompute",
        [Job(d.name, score, {"out": str(out), "scored": d, "size": size, "seed": seed}) for d in scored],
    )
    judged = [Job("student start", judge_start, {"out": str(out), "size": size})]
    judged += [Job("dense teacher", judge_teacher, {"out": str(out), "size": size})]
    trained = [
        Job(arm.name, train_arm, {"out": str(out), "arm": arm, "size": size, "seed": seed}) for arm in arms
    ]
    results = stage("students", trained + judged)
    result = {
        "seed": seed,
        "size": {name: getattr(size, name) for name in size.__dataclass_fields__},
        "models": models,
        "datasets": datasets,
        "reference": {name: results.pop(name) for name in ("student start", "dense teacher")},
        "arms": results,
        "stage_seconds": seconds,
        "seconds": time.monotonic() - began,
    }
    (out / "demo.json").write_text(json.dumps(result))
    return result


ROLES = ("teacher-dense", "teacher-moe", "student-start")
AR_ROLES = ("teacher-ar", "teacher-ar-cross")
BLOCKWISE = ("teacher-dense", "student-start")
"""Those that read blocks of tokens."""


def recipes(size: DemoSize, seed: int) -> dict[str, Any]:
    """The demo's models by role."""
    from student.pretrain import PretrainConfig
    from tools.demo.models import Recipe

    dense = PretrainConfig(
        block_size=BLOCK,
        ar_steps=size.teacher_steps[0],
        diffusion_steps=size.teacher_steps[1],
        batch_size=16,
        learning_rate=4e-3,
        diffusion_learning_rate=2.5e-3,
        seed=seed,
    )
    start = replace(
        dense,
        ar_steps=size.start_steps[0],
        diffusion_steps=size.start_steps[1],
        learning_rate=6e-3,
        diffusion_learning_rate=4e-3,
    )
    experts = replace(dense, attention="bidirectional", diffusion_steps=int(1.4 * size.teacher_steps[1]))
    # As many steps as the dense teacher takes in its two phases, all of the first kind.
    causal = replace(dense, ar_steps=sum(size.teacher_steps), diffusion_steps=0)
    common: dict[str, Any] = {"max_length": size.max_length, "seed": seed}
    return {
        "teacher-dense": Recipe(role="teacher-dense", vocab_size=1024, training=dense, **common),
        "teacher-moe": Recipe(role="teacher-moe", vocab_size=768, training=experts, **common),
        "student-start": Recipe(role="student-start", vocab_size=1024, training=start, **common),
        "teacher-ar": Recipe(role="teacher-ar", vocab_size=1024, training=causal, **common),
        "teacher-ar-cross": Recipe(role="teacher-ar-cross", vocab_size=768, training=causal, **common),
    }


def make_tokenizers(out: Path, seed: int) -> None:
    """Both tokenizers, from the training modules alone."""
    from precompute.corpus import open_corpus
    from precompute.prepare import split_of
    from tools.demo.models import make_tokenizer

    corpus = open_corpus("builtin:stdlib")
    train = [c for c in corpus if split_of(c, holdout=HOLDOUT, seed=seed) == "train"]
    for chatml, vocab_size in ((True, 1024), (False, 768)):
        folder = out / "tokenizers" / ("chatml" if chatml else "roles")
        make_tokenizer(train, vocab_size=vocab_size, chatml=chatml).save_pretrained(folder)


def make_role(*, out: str, role: str, size: DemoSize, seed: int, report: Report) -> dict[str, Any]:
    """Train one of the models, unless its folder holds it already."""
    from transformers import AutoTokenizer

    from precompute.corpus import open_corpus
    from student.pretrain import TrainingText
    from tools.demo.models import build, make_model, model_key, training_samples

    start = time.monotonic()
    recipe = recipes(size, seed)[role]
    tokenizer = AutoTokenizer.from_pretrained(
        Path(out) / "tokenizers" / ("chatml" if recipe.chatml else "roles")
    )
    corpus = open_corpus("builtin:stdlib")
    samples = training_samples(
        tokenizer,
        list(corpus),
        block_size=BLOCK if role in BLOCKWISE else 1,  # the others see no block filling
        max_length=size.max_length,
        holdout=HOLDOUT,
        seed=seed,
    )
    texts = [TrainingText(s.student_ids, s.maskable) for s in samples]
    folder = Path(out) / "models" / role
    made = make_model(
        recipe,
        tokenizer,
        texts,
        folder,
        key=model_key(recipe, corpus.fingerprint, seed, HOLDOUT),
        report=report,
    )
    return {
        "parameters": sum(p.numel() for p in build(recipe).parameters()),
        "samples": len(texts),
        "trained": made,
        "seconds": time.monotonic() - start,
    }


def score(*, out: str, scored: Scored, size: DemoSize, seed: int, report: Report) -> dict[str, Any]:
    """`tide precompute` with one teacher."""
    from precompute.config import PrecomputeConfig
    from precompute.runner import precompute

    start = time.monotonic()
    models = Path(out) / "models"
    folder = Path(out) / "data" / scored.name
    config = PrecomputeConfig(
        teacher=str(models / scored.teacher),
        student=str(models / "student-start"),
        corpus="builtin:stdlib",
        out=folder,
        views=VIEWS,
        seed=seed,
        limit=size.conversations,
        compdemo=scored.compdemo,
        teacher_kind="ar" if scored in AR_DATASETS else "diffusion",
        block_size=BLOCK,
        holdout=HOLDOUT,
        max_length=size.max_length,
        max_teacher_length=2 * size.max_length,
        device="cpu",
    )
    manifest = precompute(config, lambda done, total, what: report(done, total or size.conversations, what))
    return {
        "kind": manifest.kind,
        "compdemo": scored.compdemo,
        "totals": manifest.totals,
        "report": manifest.report,
        "seconds": time.monotonic() - start,
    }


def train_arm(*, out: str, arm: Arm, size: DemoSize, seed: int, report: Report) -> dict[str, Any]:
    """`tide train` from the student's start, then `tide eval`."""
    from student.config import TrainConfig
    from student.objective import parse_objective
    from student.trainer import train

    folder = Path(out) / "students" / arm.name
    shutil.rmtree(folder, ignore_errors=True)
    config = TrainConfig(
        steps=size.steps,
        batch_tokens=1800,
        learning_rate=3e-3,
        warmup=0.1,
        seed=seed,
        log_every=4,
        save_every=size.steps,
        eval_every=size.steps // size.looks,
        eval_samples=48,
        sample_every=size.steps // size.looks,
        sample_tokens=48,
    )
    start = time.monotonic()
    summary = train(
        Path(out) / "data" / arm.dataset,
        Path(out) / "models" / "student-start",
        folder,
        config,
        parse_objective(arm.objective),
        progress=lambda done, total, text: report(done, total + total // 4, text),
    )
    seconds = time.monotonic() - start
    judged = judge(folder, Path(out) / "data" / "shared-compdemo", size)
    return {
        "pipeline": arm.pipeline,
        "objective": arm.objective,
        "dataset": arm.dataset,
        "seconds": seconds,
        "tokens": summary.tokens,
        "curve": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "eval": judged,
    }


def judge_start(*, out: str, size: DemoSize, report: Report) -> dict[str, Any]:
    """The student before any distillation."""
    report(0, 1, "evaluating")
    return judge(Path(out) / "models" / "student-start", Path(out) / "data" / "shared-compdemo", size)


def judge_teacher(*, out: str, size: DemoSize, report: Report) -> dict[str, Any]:
    """The dense teacher on the same samples: what there is to learn."""
    from precompute.teachers.load import load_teacher

    report(0, 1, "evaluating")
    model = load_teacher(Path(out) / "models" / "teacher-dense").model
    return judge_model(model, Path(out) / "data" / "shared-compdemo", size)


def judge(folder: Path, data: Path, size: DemoSize) -> dict[str, Any]:
    """Held-out likelihood of a student folder."""
    from student.model import load_student

    model, _ = load_student(folder)
    return judge_model(model, data, size)


def judge_model(model: Any, data: Path, size: DemoSize) -> dict[str, Any]:
    """Held-out likelihood of a block-diffusion model, as `tide eval` has it."""
    from itertools import islice

    from shards.reader import LogitDataset
    from student.evaluate import evaluate

    dataset = LogitDataset(str(data))
    result = evaluate(
        model,
        islice(dataset.samples("heldout"), size.held_out),
        mask_token_id=dataset.manifest.student.mask_token_id,
        block_size=dataset.manifest.block_size,
    )
    return result.to_json()
