"""Offline equals online: every recorded `compute_loss` call, from its chats and raw uniforms to its losses
and embedding gradients, with a logit dataset in between.

    chats -> tokens, alignment -> noise plan -> teacher -> shards (dense codec), written and read back
          -> packed batch -> student -> objective

The reference ran teacher and student in one process, padded, both CompDemo passes and either concatenation
order apart. Where our alignment differs on purpose, parity is taken from the alignment of the recorded batch,
and `DIFFERENCES` states what the reference has, what ours has, and why.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from precompute.engine import Targets, make_part
from precompute.inputs import Asking
from precompute.sample import Sample
from shards.codec import DenseCodec
from shards.errors import RowError
from shards.reader import LogitDataset
from shards.row import Row
from shards.synthetic import synthetic_config
from shards.writer import DatasetWriter
from student.attention import attention_mask
from student.batch import collate
from student.fused import FusedLoss
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

CUT = "keeps chunks whose teacher tokens were truncated away as active ones of probability 1"
REPEATED = (
    "looks for a content's first occurrence, so an earlier answer gets the prompt's chunks, and loses all "
    "but the first token of a last character that spans several"
)
SHIFTED = "zips positions, so a token merged with the template shifts every later pair onto another token"
DIFFERENCES = {
    "A_cd_s2": ("alm", 0.51784992, 0.49722055, REPEATED),
    "A_nocd_s2": ("alm", 0.53464288, 0.50973696, REPEATED),
    "A_edge_max_teacher_length": ("alm", 1.08978105, 0.18643725, CUT),
    "B_aligned_cd_x0_xt_s1": ("kl_aligned", 5.95647812, 6.06462717, SHIFTED),
    "B_aligned_cd_x0_xt_s2": ("kl_aligned", 6.11133718, 6.22141123, SHIFTED),
    "B_aligned_cd_xt_x0_s1": ("kl_aligned", 5.84974957, 5.86590290, SHIFTED),
    "B_aligned_nocd_x0_xt_s1": ("kl_aligned", 5.87504578, 5.96287394, SHIFTED),
    "B_aligned_nocd_xt_x0_s1": ("kl_aligned", 5.73148441, 5.75838947, SHIFTED),
}
"""Trace -> mode, the reference's distillation loss, ours, and what the reference does that ours does not."""


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


def answered(trace: Any, teacher: Any, samples: list[Sample]) -> list[Row]:
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
    plans = [[trace.plan(i, sample)] for i, sample in enumerate(samples)]
    return make_part(teacher, samples, plans, asking=asking, targets=targets)[0]


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


def storable(row: Row) -> Row:
    """Without the chunks that the format refuses: no teacher token, or tokens of another chunk."""
    chunks = row.chunks
    if chunks is None:
        return row
    end = np.maximum.accumulate(np.append(0, chunks.start + chunks.length))[:-1]
    keep = (chunks.teacher_length > 0) & (chunks.start >= end)
    kept = {name: getattr(chunks, name)[keep] for name in chunks.__slots__ if name != "logp"}
    return replace(row, chunks=replace(chunks, **kept, logp=chunks.logp[keep[chunks.active]]))


def student_step(trace: Any, student: Any, rows: list[Row]) -> tuple[Tensor, Batch]:
    """Logits at the masked positions of the packed rows, and their batch."""
    batch = collate(
        rows,
        block_size=trace.meta["block_size"],
        mask_token_id=trace.meta["student_mask_token_id"],
        row_tokens=48,
        shared_vocab_size=None if trace.cross else trace.meta["config"]["shared_vocab_size"],
    )
    return forward(student, batch).logits, batch


def forward(student: Any, batch: Batch, **kwargs: Any) -> Any:
    return student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=attention_mask("staircase", batch.at, student),
        read=batch.read,
        **kwargs,
    )


def progress_of(trace: Any) -> float:
    return trace.meta["global_step"] / max(1, trace.meta["max_steps"])


def loss_of(trace: Any, objective: Objective, logits: Tensor, batch: Batch) -> LossOut:
    return objective(logits, batch, progress_of(trace))


def fused_step(trace: Any, student: Any, objective: Objective, batch: Batch) -> LossOut:
    few = 7 * 4 * student.config.vocab_size
    return forward(
        student, batch, loss_head=FusedLoss(objective, logits_bytes=few).about(batch, progress_of(trace))
    )


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def rows_of(trace: Any, teacher: Any, samples: list[Sample], out: Path) -> list[Row]:
    """The samples' rows, through shards."""
    return stored(trace, answered(trace, teacher, samples), out)


def as_the_reference(trace: Any, teacher: Any, out: Path) -> list[Row]:
    """Rows of the recorded batch, through shards.

    The reference keeps chunks whose teacher tokens were cut away (log p = 0, so p = 1, still active), and
    gives the first of two equal contents the chunks of both. The format refuses either; what was read must
    be the rest, and they are added again.
    """
    if trace.agrees:
        return rows_of(trace, teacher, trace.prepared, out / "data")
    made = answered(trace, teacher, trace.recorded)
    sound = [storable(row) for row in made]
    read = stored(trace, sound, out / "data")
    rows = []
    for whole, kept, row in zip(made, sound, read):
        if whole.chunks is not None and len(whole.chunks.start) > len(kept.chunks.start):
            with pytest.raises(RowError, match=r"at least one token|in order and disjoint"):
                stored(trace, [whole], out / row.sample_id)
            np.testing.assert_array_equal(row.chunks.logp, kept.chunks.logp)
            row = replace(row, chunks=whole.chunks)
        rows.append(row)
    return rows


def clamps_of(trace: Any) -> tuple[Clamp, ...]:
    """The reference's clamp, and the default one where no chunk's p or 1 - p comes near the clamps."""
    if not trace.cross:
        return ("reference",)
    at = trace.tensors["active_chunk_mask"].astype(bool)
    lp = np.concatenate([trace.tensors[f"{side}_chunk_lp"][at] for side in ("student", "teacher")])
    p = np.exp(lp / trace.meta["config"]["alm_temperature"])
    return ("reference", "log") if ((p > 1e-6) & (p < 1 - 1e-4)).all() else ("reference",)


def test_offline_is_online(
    trace: Any, golden_teacher: Any, golden_student: Any, parity: Any, tmp_path: Path
) -> None:
    """CE, every distillation loss, total and embedding gradient (the tied head's included) of every mode;
    from whole logits, and fused with the head, seven rows at a time."""
    rows = as_the_reference(trace, golden_teacher(trace), tmp_path)
    logits, batch = student_step(trace, golden_student, rows)
    embedding = golden_student.get_input_embeddings().weight
    for i, entry in enumerate(trace.meta["entries"]):
        theirs = torch.from_numpy(trace.tensors[f"grad.embed.{i}"])
        largest = float(theirs.abs().max())
        losses = {OURS[name.removesuffix("_loss")]: value for name, value in entry["components"].items()}
        for clamp, fused in product(clamps_of(trace), (False, True)):
            objective = objective_of(trace, entry["mode"], clamp)
            if fused:
                loss = fused_step(trace, golden_student, objective, batch)
            else:
                loss = loss_of(trace, objective, logits, batch)
            (gradient,) = torch.autograd.grad(loss.total, embedding, retain_graph=True)
            errors = {
                "CE": relative(loss.terms["ce"].item(), entry["ce_loss"]),
                "component": max(relative(loss.terms[n].item(), value) for n, value in losses.items()),
                "total": relative(loss.total.item(), entry["loss"]),
            }
            where = f"{trace.name} {entry['mode']} {clamp} {'fused' if fused else 'plain'}: {errors}"
            assert max(errors.values()) <= 1e-5, where
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-6 * largest)
            error = float((gradient - theirs).abs().max()) / max(largest, 1e-12)
            parity[f"D_trace, {clamp} clamp{', fused' * fused}"].note(trace.name, **errors, gradient=error)


def test_nothing_masked(trace: Any, golden_teacher: Any, golden_student: Any, tmp_path: Path) -> None:
    """Uniforms of 1 mask nothing: rows without targets, every loss and the gradient 0, as the reference's
    edge traces record."""
    quiet = replace(trace, tensors=trace.tensors | {"u_mask": np.ones_like(trace.tensors["u_mask"])})
    rows = rows_of(quiet, golden_teacher(quiet), quiet.prepared, tmp_path)
    assert not any(row.masked.any() for row in rows)
    logits, batch = student_step(quiet, golden_student, rows)
    for entry in quiet.meta["entries"]:
        loss = loss_of(quiet, objective_of(quiet, entry["mode"], "log"), logits, batch)
        (gradient,) = torch.autograd.grad(
            loss.total, golden_student.get_input_embeddings().weight, retain_graph=True
        )
        assert [loss.total.item(), *(v.item() for v in loss.terms.values())] == [0] * (1 + len(loss.terms))
        assert not gradient.any()


@pytest.mark.parametrize("trace", DIFFERENCES, indirect=True)
def test_where_we_differ(trace: Any, golden_teacher: Any, golden_student: Any, tmp_path: Path) -> None:
    """The chats' own alignment gives another loss than the reference recorded, by the stated amount."""
    mode, theirs, ours, why = DIFFERENCES[trace.name]
    assert not trace.agrees, f"no longer differs: the reference {why}"
    entry = next(e for e in trace.meta["entries"] if e["mode"] == mode)
    (name, recorded), *_ = entry["components"].items()
    assert recorded == pytest.approx(theirs, rel=1e-6)
    rows = rows_of(trace, golden_teacher(trace), trace.prepared, tmp_path)
    logits, batch = student_step(trace, golden_student, rows)
    loss = loss_of(trace, objective_of(trace, mode, "reference"), logits, batch)
    assert loss.terms[OURS[name.removesuffix("_loss")]].item() == pytest.approx(ours, rel=1e-4)
    assert loss.terms["ce"].item() == pytest.approx(entry["ce_loss"], rel=1e-5)
