"""Why an objective does what it does: its gradients beside those of CE, calibration, chunk probabilities; and
codecs on SmolLM2's distributions.

Gradients are those of all of the student's weights, over stored training rows of one range of timesteps. The
yardstick is CE's gradient on other text, of the validation groups: an objective can help as far as its own
points there, and does little where it is short beside CE's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precompute.teachers.load import load_teacher
from shards.codec import SparseCodec
from shards.manifest import Manifest
from shards.reader import LogitDataset
from shards.row import Row
from student.batch import collate
from student.forward import hidden_at, mask_argument
from student.fresh import redraw
from student.fused import FusedLoss
from student.losses.ce import gold_log_probs
from student.losses.chunks import chunk_log_probs
from student.model import load_student
from student.objective import REGISTRY, Objective, Term
from student.run_attention import RUNS
from student.tables import dataset_table
from student.tensors import Batch, with_table
from studies.making import held_out
from studies.tasks import Task
from tools.workers import Report

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the ranges of timesteps."""
ROWS = 32
"""Of each range, at most."""
LOOKED_AT = 2000
"""Rows that they are taken from, at most."""
CONFIDENCES = 10
"""Ranges of confidence that calibration is measured in."""
TEMPERATURES = (1.0, 2.0, 5.0)


def explain(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """Gradients at the student's start and after an arm; calibration of both and of the teacher."""
    spec = task.spec
    dataset = LogitDataset(task.needs["data"].folder(out) / "data")
    manifest = dataset.manifest
    stored = _binned(row for row, _ in islice(dataset.stream(0), LOOKED_AT))
    text = held_out(
        task.needs["corpus"].folder(out),
        task.needs["tokenizer"].folder(out),
        "validation",
        spec["held_out"]["validation"],
        block_size=spec["block_size"],
        max_length=spec["max_length"],
    )
    other = _binned(redraw(row, 1, epoch) for epoch in range(8) for row in text)
    table = dataset_table(dataset)

    def batch(rows: Sequence[Row], *, targets: bool) -> Batch:
        made = _collate(rows, manifest, targets=targets)
        at = made.positions
        if at is None or table is None:
            return made
        return replace(made, positions=replace(at, target=with_table(at.target, table)))

    on_stored = [batch(rows, targets=True) for rows in stored]
    on_other = [batch(rows, targets=False) for rows in other]
    students = {
        "start": task.needs["start"].folder(out) / "model",
        "after": task.needs["after"].folder(out) / "student",
    }
    found: dict[str, Any] = {"edges": list(EDGES), "rows": [len(rows) for rows in stored]}
    for i, (name, folder) in enumerate(students.items()):
        report(i, len(students), f"gradients, {name}")
        model, _ = load_student(folder, attention=RUNS)
        found[name] = {
            "gradients": gradients(model, on_stored, on_other, spec["objectives"]),
            "calibration": [calibration(_logits(model, b), b.gold) for b in on_other],
            "chunks": [chunks(model, b) for b in on_stored] if manifest.kind == "cross" else None,
        }
    teacher = load_teacher(task.needs["teacher"].folder(out) / "model")
    if manifest.kind == "shared" and teacher.spec.attention == "staircase" and not teacher.spec.shifted:
        found["teacher"] = {"calibration": [calibration(_logits(teacher.model, b), b.gold) for b in on_other]}
    return found


def gradients(
    model: Any, stored: Sequence[Batch], other: Sequence[Batch], names: Sequence[str]
) -> list[dict[str, Any]]:
    """For CE and every objective, as NAME@T or NAME@T@PROGRESS, and every range of timesteps: the norm of its
    gradient, and its cosine with CE's on the same rows, with KL's (the first in the list), and with the
    yardstick, CE's over all of `other`."""
    ce = Objective()
    yardstick = torch.stack([gradient(model, b, ce, 0.0) for b in other]).mean(0)
    own = [gradient(model, b, ce, 0.0) for b in stored]
    rows = {"ce": own}
    for name in names:
        objective, progress = term(name)
        rows[name] = [gradient(model, b, objective, progress) for b in stored]
    kl = next((rows[n] for n in names if n.startswith("kl@")), None)
    return [
        {
            "objective": name,
            "norm": [float(g.norm()) for g in found],
            "with_ce": [_cosine(g, h) for g, h in zip(found, own)],
            "with_kl": None if kl is None else [_cosine(g, h) for g, h in zip(found, kl)],
            "with_other_text": [_cosine(g, yardstick) for g in found],
        }
        for name, found in rows.items()
    ]


def term(text: str) -> tuple[Objective, float]:
    """A single term, without CE, and the share of training done, from NAME[@T[@PROGRESS]]."""
    name, *rest = text.split("@")
    T = float(rest[0]) if rest else 2.0
    over_chunks = REGISTRY[name].needs == "chunks"
    objective = Objective(
        terms=(Term(name),),
        ce_weight=0.0,
        temperature=2.0 if over_chunks else T,
        chunk_temperature=T if over_chunks else 2.0,
    )
    return objective, float(rest[1]) if len(rest) > 1 else 0.0


def gradient(model: Any, batch: Batch, objective: Objective, progress: float) -> Tensor:
    """[parameters]: of the batch's loss, as the trainer forms it."""
    model.zero_grad(set_to_none=True)
    loss = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        read=batch.read,
        loss_head=FusedLoss(objective).about(batch, progress),
        use_cache=False,
        **mask_argument("staircase", batch.at, model),
    )
    loss.total.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def calibration(logits: Tensor, gold: Tensor) -> dict[str, Any]:
    """Confidence (probability of the best token), accuracy, expected calibration error; at T = 1 and 2."""
    right = (logits.argmax(-1) == gold).double()
    found: dict[str, Any] = {"positions": len(gold), "accuracy": float(right.mean()) if len(gold) else None}
    for T in (1.0, 2.0):
        confidence = (logits / T).softmax(-1).max(-1).values.double()
        which = (confidence * CONFIDENCES).long().clamp_max(CONFIDENCES - 1)
        gap = torch.zeros(CONFIDENCES, dtype=torch.double).index_add(0, which, confidence - right)
        found[f"T {T:g}"] = {
            "confidence": float(confidence.mean()) if len(gold) else None,
            "error": float(gap.abs().sum() / max(1, len(gold))),
        }
    return found


@torch.no_grad()
def chunks(model: Any, batch: Batch) -> dict[str, Any]:
    """Mean tempered probability of the right text under teacher and student, and the share of chunks that the
    teacher gives more than one half."""
    at = batch.chunks
    if at is None or not len(at.logp):
        return {"chunks": 0}
    student = chunk_log_probs(
        gold_log_probs(_logits(model, batch), batch.gold)[at.token], at.chunk, len(at.logp)
    )
    found: dict[str, Any] = {"chunks": len(at.logp)}
    for T in TEMPERATURES:
        p, q = (at.logp / T).exp(), (student / T).exp()
        found[f"T {T:g}"] = {
            "teacher": float(p.mean()),
            "student": float(q.mean()),
            "above_half": float((p > 0.5).double().mean()),
            "student_above_teacher": float((q > p).double().mean()),
        }
    return found


def measure_codecs(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """`tide bench codec` on some positions."""
    from tools.benches.codec import load_states, measure, parse_codec

    class Lines:
        def line(self, name: str, unit: str) -> Callable[[int, int, str], None]:
            return lambda done, total, note: report(done, total, name)

    lines: Any = Lines()
    codecs = {text: parse_codec(text) for text in task.spec["codecs"]}
    states = load_states(task.folder(out) / "states", lines)
    sides = measure(codecs, states, task.spec["positions"], lines.line("measuring", "positions"))
    return {"positions": task.spec["positions"], "vocabulary": len(states.head), "sides": sides}


def _binned(rows: Iterable[Row]) -> list[list[Row]]:
    """The first rows with something masked of each range of timesteps."""
    found: list[list[Row]] = [[] for _ in EDGES[1:]]
    for row in rows:
        into = found[min(int(np.searchsorted(EDGES, row.t, side="right")) - 1, len(found) - 1)]
        if row.masked.any() and len(into) < ROWS:
            into.append(row)
        if all(len(some) == ROWS for some in found):
            break
    return found


def _collate(rows: Sequence[Row], manifest: Manifest, *, targets: bool) -> Batch:
    codec = manifest.codec
    return collate(
        rows,
        block_size=manifest.block_size,
        mask_token_id=manifest.student.mask_token_id,
        row_tokens=1024,
        shared_vocab_size=manifest.shared_vocab_size if targets else None,
        temperatures=codec.temperatures if targets and isinstance(codec, SparseCodec) else (),
    )


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> Tensor:
    """[N, V] at the masked positions."""
    hidden = hidden_at(model, batch.input_ids, batch.position_ids, batch.at, batch.read, "staircase")
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    return logits


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
