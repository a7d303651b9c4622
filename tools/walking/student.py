"""`tide walk`, second half: one stored row from its bytes to the student's loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shards.codec import SparseCodec
from shards.reader import LogitDataset
from shards.row import DenseTarget, ExactTarget, Row, SparseTarget
from student.attention import dense_mask
from student.batch import collate, packed_tokens
from student.forward import mask_argument
from student.fused import FusedLoss
from student.losses.ce import gold_log_probs, timestep_weight
from student.losses.sparse import classes
from student.model import load_student
from student.objective import REGISTRY, Objective, PositionLoss, check_dataset
from student.tables import dataset_table
from student.tensors import Batch, with_table
from student.trainer import check_student
from tools.walking.steps import Step, excerpt, shaped


def student_steps(
    dataset: LogitDataset,
    row: Row,
    at: tuple[int, int],
    student: str | None,
    objective: Objective,
    progress: float,
) -> Iterator[Step]:
    """Stored row, batch, forward, loss.

    Args:
        at: (shard, record batch) that holds the row.
        progress: share of training done.

    Raises:
        UsageError: the dataset cannot feed the objective. ModelError: the student cannot be loaded.
        ConfigMismatch: it is not one for this dataset.
    """
    m = dataset.manifest
    temperatures = m.codec.temperatures if isinstance(m.codec, SparseCodec) else ()
    check_dataset(objective, m.kind, temperatures or None)
    yield row_step(dataset, row, at)
    batch = collate(
        [row],
        block_size=m.block_size,
        mask_token_id=m.student.mask_token_id,
        row_tokens=max(1, packed_tokens(row, m.block_size)),
        shared_vocab_size=m.shared_vocab_size if m.kind == "shared" else None,
        temperatures=temperatures,
    )
    yield batch_step(batch, row)
    title, where = "student's forward", "student/modeling_a2d_qwen3.py (BD3LM section 3)"
    if student is None or not len(batch.gold):
        why = "this view masks nothing" if student else "give --student: the dataset does not say where it is"
        yield Step(title=title, where=where, missing=why)
        yield Step(title="loss", where="student/objective.py", missing=why)
        return
    model, tokenizer = load_student(student)
    check_student(m, model, tokenizer, student)
    if batch.positions is not None:
        target = with_table(batch.positions.target, dataset_table(dataset))
        batch = replace(batch, positions=replace(batch.positions, target=target))
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "read": batch.read,
        "use_cache": False,
        **mask_argument("staircase", batch.at, model),
    }
    with torch.no_grad():
        logits = model(**inputs).logits
    yield Step(
        title=title,
        where=where,
        facts={
            "weights": f"{student}: {sum(p.numel() for p in model.parameters()):,} parameters",
            "hidden states [R, P, H]": f"[{batch.input_ids.shape[0]}, {batch.input_ids.shape[1]}, "
            f"{model.config.hidden_size}] {str(model.dtype).removeprefix('torch.')}",
            "logits [N, V]": shaped(logits, "at the N masked positions alone; in training a chunk at a time"),
        },
    )
    fused = model(**inputs, loss_head=FusedLoss(objective).about(batch, progress))
    fused.total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    yield loss_step(objective, batch, logits, fused, float(norm), progress)
    yield one_step(objective, batch, logits, tokenizer, progress)


def row_step(dataset: LogitDataset, row: Row, at: tuple[int, int]) -> Step:
    shard = dataset.manifest.shards[at[0]]
    record = shard.batches[at[1]]
    facts: dict[str, Any] = {
        "shard": f"{shard.file}: record batch {at[1]} of {len(shard.batches)}, {record.rows} rows of view "
        f"{record.view} ({record.split}), {record.length:,} bytes at {record.offset:,}",
        "sha256": f"{record.sha256[:16]}..., as the manifest has it",
        "bytes a row": round(record.length / record.rows),
        "input_ids [L]": shaped(row.input_ids),
        "masked [L]": shaped(row.masked, f"{int(row.masked.sum())} set"),
    }
    if row.positions is not None:
        p = row.positions
        facts["positions [N]"] = shaped(p.positions)
        facts["gold_logp [N]"] = shaped(p.gold_logp)
        if isinstance(p.target, SparseTarget):
            facts["counts [N]"] = shaped(p.target.counts, f"{len(p.target.ids):,} kept entries in all")
            facts["ids, logp [K]"] = shaped(p.target.logp)
            facts["tails [N, T]"] = shaped(p.target.tails)
        elif isinstance(p.target, DenseTarget):
            facts["logp [N, V]"] = shaped(p.target.logp)
        elif isinstance(p.target, ExactTarget):
            facts["hidden [N, H]"] = shaped(p.target.hidden)
    if row.chunks is not None:
        c = row.chunks
        facts["chunks [C]"] = f"{len(c.start)}: {int(c.masked.sum())} masked, {int(c.active.sum())} active"
        facts["logp [A]"] = shaped(c.logp)
    return Step(title="row of the dataset", where="shards/FORMAT.md, shards/encoding.py", facts=facts)


def batch_step(batch: Batch, row: Row) -> Step:
    tokens = batch.counts.tokens
    allowed = int(dense_mask("staircase", batch.at).sum())
    counts = batch.counts
    return Step(
        title="student's batch",
        where="student/batch.py, student/layout.py, student/attention.py",
        facts={
            "input_ids [R, P]": shaped(
                batch.input_ids, f"[clean | noisy] packed, {tokens} tokens; padded: {2 * len(row.input_ids)}"
            ),
            "coordinates": "sample, stream (0 clean, 1 noisy), block, order: [R, P] each",
            "pairs that may attend": f"{allowed:,} of {batch.input_ids.numel() ** 2:,}",
            "read [N]": shaped(batch.read, "where the masked positions' hidden states are"),
            "counts": f"{counts.maskable} maskable (CE), {counts.distilled} distilled (KL, TIDAL), "
            f"{counts.chunks} active chunks (CALM)",
        },
    )


def loss_step(
    objective: Objective, batch: Batch, logits: Tensor, fused: Any, norm: float, progress: float
) -> Step:
    plain = objective(logits, batch, progress)
    lam = objective.schedule.at(progress, batch.t)
    facts: dict[str, Any] = {
        "w(t)": float(timestep_weight(batch.t, objective.ce_schedule)[0]),
        "lambda_t": f"{float(lam[0]):.4f} = {objective.schedule.train(progress):.4f} x (1 - t) at progress "
        f"{progress:g}"
        if objective.schedule.axes == "both"
        else float(lam[0]),
    }
    weights = {"ce": objective.ce_weight} | {term.name: term.weight for term in objective.terms}
    for name, value in fused.terms.items():
        facts[name] = f"{float(value):.6g}" + (f", weight {weights[name]:g}" if name in weights else "")
    facts |= {
        "total": float(fused.total.detach()),
        "the plain form, whole logits": float(plain.total),
        "norm of the gradient": norm,
    }
    return Step(title="loss", where="student/objective.py, student/fused.py", facts=facts)


def one_step(objective: Objective, batch: Batch, logits: Tensor, tokenizer: Any, progress: float) -> Step:
    """The masked position (or chunk) where teacher and student differ most, its numbers one by one."""
    logp = gold_log_probs(logits, batch.gold)
    facts: dict[str, Any] = {}
    where = "student/losses"
    if batch.chunks is not None and batch.positions is None and len(batch.chunks.logp):
        c = batch.chunks
        student = torch.zeros(len(c.logp)).index_add(0, c.chunk, logp[c.token])
        i = int((c.logp - student).abs().argmax())
        token, T = c.token[c.chunk == i], objective.chunk_temperature
        facts = {
            "chunk": f"{i}: {excerpt(tokenizer.decode(batch.gold[token].tolist()))!r}",
            "student tokens": len(token),
            "student's log-probs": ", ".join(f"{float(x):.3f}" for x in logp[token]),
            "LP student, teacher": f"{float(student[i]):.4f}, {float(c.logp[i]):.4f}",
            f"p = exp(LP / {T:g})": ", ".join(f"{float((x / T).exp()):.4f}" for x in (student[i], c.logp[i])),
        }
        where = "student/losses/chunks.py (paper: CALM)"
    elif batch.positions is not None and len(batch.positions.index):
        p, T = batch.positions, objective.temperature
        i = int((p.gold_logp - logp[p.index]).abs().nan_to_num(-1.0).argmax())
        at = p.index[i : i + 1]
        both = classes(logits[p.index, : p.vocab_size], p.target, T)
        q, r = (x[i].log_softmax(-1) for x in both)
        facts = {
            "masked position": f"{i} of {len(p.index)}: gold {tokenizer.decode([int(batch.gold[at])])!r}",
            "log-prob of gold: student, teacher": f"{float(logp[at]):.4f}, {float(p.gold_logp[i]):.4f}",
            "classes": f"{int((~q.isneginf()).sum())} at T {T:g}: kept tokens, gold if not kept, the rest",
            "teacher's largest class": f"{float(r.exp().max()):.4f}, the student's share of it "
            f"{float(q.exp()[int(r.argmax())]):.4f}",
        }
        lam = objective.schedule.at(progress, p.t)[i : i + 1]
        for term in objective.terms:
            loss = REGISTRY[term.name]
            if isinstance(loss, PositionLoss):
                facts[f"{term.name} here"] = float(
                    loss.value(type(both)(*(x[i : i + 1] for x in both)), T, lam)
                )
        where = "student/losses/sparse.py, student/losses/divergence.py"
    return Step(title="one of them by hand", where=where, facts=facts, missing="no target in this view")
