"""Offline equals online: every recorded `compute_loss` call, from its chats and raw uniforms to its losses and
embedding gradients, with a logit dataset in between.

    chats -> tokens, alignment -> noise plan -> teacher -> shards (dense codec), written and read back
          -> packed batch -> student -> objective

The reference ran teacher and student in one process, padded, both CompDemo passes and either concatenation
order apart. Where our alignment differs on purpose, parity is taken from the alignment of the recorded batch,
and `DIFFERENCES` states what the reference has, what ours has, and why.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from precompute.engine import Targets, make_part
from precompute.inputs import Asking
from precompute.sample import ChunkSpans, Sample
from shards.codec import DenseCodec
from shards.errors import RowError
from shards.noise import Plan
from shards.reader import LogitDataset
from shards.row import Row
from shards.synthetic import synthetic_config
from shards.writer import DatasetWriter
from student.attention import attention_mask
from student.batch import collate
from student.losses.chunks import Clamp
from student.objective import Objective, parse_objective
from student.schedule import LambdaSchedule
from student.tensors import Batch, LossOut

OURS = {
    "kl": "kl",
    "reverse_kl": "reverse-kl",
    "taid": "tidal",
    "alm": "calm",
    "reverse_alm": "reverse-calm",
    "alm_taid": "calm-tidal",
    "reverse_alm_taid": "reverse-calm-tidal",
}

SHIFTED = "a token merged with the template shifts the reference's pairs: it compares unequal tokens"
DIFFERENCES: dict[str, tuple[str, str, float, float]] = {
    "A_cd_s2": ("", "alm", 0.0, 0.0),
}
"""Trace -> (why, mode, the reference's distillation loss, ours)."""


def objective_of(trace: Any, mode: str, clamp: Clamp) -> Objective:
    config = trace.meta["config"]
    return parse_objective(
        "+".join(OURS[part.removesuffix("_aligned")] for part in mode.split("+")),
        temperature=config["kl_temperature"],
        chunk_temperature=config["alm_temperature"],
        schedule=LambdaSchedule(
            initial=config["taid_lambda_init"],
            maximum=config["taid_lambda_max"],
            decay=config["taid_lambda_decay"],
            axes=config["taid_axis_mode"],
        ),
        timestep_weighting={"midrange": "mid-range"}.get(config["taid_timestep_weight"], "uniform"),
        ce_weighting=config["loss_weight_type"],
        ce_normalisation=config["loss_norm_type"],
        clamp=clamp,
    )


def answered(trace: Any, teacher: Any, samples: list[Sample], plans: list[Plan]) -> list[Row]:
    """What the teacher says about the samples."""
    asking = Asking(
        mask_id=teacher.spec.mask_token_id,
        attention=teacher.spec.attention,
        block_size=trace.meta["block_size"],
        shifted=False,
        row_tokens=100,  # several packed rows, more than one sample in some
        compdemo=trace.noise.compdemo,
    )
    targets = Targets(
        codec=None if trace.cross else DenseCodec(),
        vocab_size=teacher.spec.vocab_size if trace.cross else trace.meta["config"]["shared_vocab_size"],
        head_rows=16,
    )
    return make_part(teacher, samples, [[p] for p in plans], asking=asking, targets=targets)[0]


def stored(trace: Any, rows: list[Row], out: Path) -> list[Row]:
    """The rows, written as a dataset of explicit noise and read back with every check."""
    meta = trace.meta
    shared = None if trace.cross else meta["config"]["shared_vocab_size"]
    size = meta["dims"]["V_student"]
    config = synthetic_config(trace.noise, DenseCodec(), vocab_size=size, shared_vocab_size=shared)
    config["noise"]["source"] = "explicit"
    config["student"]["mask_token_id"] = meta["student_mask_token_id"]
    config["block_size"] = meta["block_size"]
    with DatasetWriter(out, "cross" if trace.cross else "shared", config) as writer:
        writer.write_part(0, 0, len(rows), rows, {})
        writer.finish()
    data = LogitDataset(out)
    assert data.check_shard(0) == len(rows)
    return list(data.samples("train"))


def without_ghosts(row: Row) -> Row:
    """Only chunks that have a teacher token; see `test_offline_is_online`."""
    if row.chunks is None:
        return row
    real = row.chunks.teacher_length > 0
    parts = {name: getattr(row.chunks, name)[real] for name in row.chunks.__slots__ if name != "logp"}
    chunks = replace(row.chunks, **parts, logp=row.chunks.logp[real[row.chunks.active]])
    return replace(row, chunks=chunks)


def student_step(trace: Any, student: Any, rows: list[Row]) -> tuple[Tensor, Batch]:
    """Logits at the masked positions of the packed rows, and their batch."""
    batch = collate(
        rows,
        block_size=trace.meta["block_size"],
        mask_token_id=trace.meta["student_mask_token_id"],
        row_tokens=48,
        shared_vocab_size=None if trace.cross else trace.meta["config"]["shared_vocab_size"],
    )
    logits = student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=attention_mask("staircase", batch.at, student.config._attn_implementation),
        read=batch.read,
    ).logits
    return logits, batch


def loss_of(trace: Any, objective: Objective, logits: Tensor, batch: Batch) -> LossOut:
    return objective(logits, batch, trace.meta["global_step"] / max(1, trace.meta["max_steps"]))


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


@pytest.fixture
def recorded_rows(trace: Any, golden_teacher: Any, tmp_path: Path) -> list[Row]:
    """Rows of the recorded batch, through shards.

    Where the teacher was truncated the reference keeps chunks without a teacher token: log p = 0, so p = 1,
    still active. The format refuses such ghosts; here they are added again to what was read.
    """
    samples = trace.prepared if trace.agrees else trace.recorded
    made = answered(trace, golden_teacher(trace), samples, [trace.plan(i, s) for i, s in enumerate(samples)])
    sound = [without_ghosts(row) for row in made]
    ghosts = [a.chunks is not None and len(a.chunks.start) > len(b.chunks.start) for a, b in zip(made, sound)]
    if any(ghosts):
        with pytest.raises(RowError, match="at least one token"):
            stored(trace, made, tmp_path / "ghosts")
    read = stored(trace, sound, tmp_path / "data")
    return [replace(r, chunks=m.chunks) if ghost else r for r, m, ghost in zip(read, made, ghosts)]


@pytest.mark.parametrize("clamp", ["reference", "log"])
def test_offline_is_online(
    trace: Any, recorded_rows: list[Row], golden_student: Any, parity: Any, clamp: Clamp
) -> None:
    """CE, every distillation loss, total and embedding gradient of every mode. The default log-space clamp
    agrees too: no chunk of the traces reaches the clamps."""
    logits, batch = student_step(trace, golden_student, recorded_rows)
    embedding = golden_student.get_input_embeddings().weight
    for i, entry in enumerate(trace.meta["entries"]):
        loss = loss_of(trace, objective_of(trace, entry["mode"], clamp), logits, batch)
        (gradient,) = torch.autograd.grad(loss.total, embedding, retain_graph=True)
        losses = {OURS[name.removesuffix("_loss")]: value for name, value in entry["components"].items()}
        theirs = torch.from_numpy(trace.tensors[f"grad.embed.{i}"])
        largest = float(theirs.abs().max())
        errors = {
            "ce": relative(loss.terms["ce"].item(), entry["ce_loss"]),
            "component": max(relative(loss.terms[name].item(), value) for name, value in losses.items()),
            "total": relative(loss.total.item(), entry["loss"]),
        }
        where = f"{trace.name} {entry['mode']}: {errors}"
        assert max(errors.values()) <= 1e-5, where
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-6 * largest, msg=lambda m: f"{where}\n{m}")
        error = float((gradient - theirs).abs().max()) / max(largest, 1e-12)
        parity[f"D_trace ({clamp} clamp)"].note(trace.name, **errors, gradient=error)
