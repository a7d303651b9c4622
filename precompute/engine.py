"""A part's samples through the teacher: plan, lay out, pack, run a row at a time, reduce, put together.

A pure function of (samples, plans, configuration): packing never depends on what was made before or
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from precompute.inputs import Asking, Job, make_jobs
from precompute.reduce import Head, reduce_dense, reduce_gold, reduce_sparse
from precompute.rows import Answers, join, make_rows
from precompute.sample import ChunkSpans, Sample
from precompute.teachers.base import Teacher
from shards.codec import Codec, SparseCodec
from shards.errors import ModelError
from shards.noise import NoiseConfig, Plan, make_plan
from shards.row import DenseTarget, Row, SparseTarget
from student.attention import Coordinates
from student.layout import PAD, SHARED_CLEAN, Attention, Piece, group, pack

CUDA_TILE = 128
"""Packed rows are padded to whole FlexAttention tiles on CUDA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What is kept of an answer."""

    codec: Codec | None
    """None = the true token's log-prob alone (cross tokenizer)."""
    vocab_size: int
    """Leading ids that log-probs are normalised over."""
    head_rows: int
    """Rows of logits that exist at once."""


def default_row_tokens(
    longest: int, *, streams: int, attention: Attention, block_size: int, device: torch.device
) -> int:
    """Row length where none is given: on an accelerator one that holds every stream of the longest sample
    together; on a CPU, where a dense mask makes long rows dear, one that holds any one of them.

    Args:
        longest: most teacher tokens of a sample.
        streams: noisy streams of a sample: views, times two with CompDemo.
    """
    longest = -(-longest // block_size) * block_size
    clean = 1 if attention in SHARED_CLEAN else 0
    if device.type == "cpu":
        return max(1024, (clean + 1) * longest)
    return max(8192, (clean + streams) * longest)


def run_row(teacher: Teacher, pieces: Sequence[Piece]) -> Tensor:
    """[Q, H]: hidden states at the pieces' reads, piece after piece, all run in one packed row."""
    row = pack(pieces, sum(map(len, pieces)))
    fill = -row.ids.shape[1] % CUDA_TILE if teacher.device.type == "cuda" else 0

    def tensor(x: np.ndarray, pad: int = 0) -> Tensor:
        return torch.from_numpy(np.pad(x, ((0, 0), (0, fill)), constant_values=pad)).to(teacher.device)

    at = Coordinates(tensor(row.sample, PAD), tensor(row.stream), tensor(row.block), tensor(row.order))
    read = torch.from_numpy(row.read).to(teacher.device)
    return teacher.hidden(tensor(row.ids), tensor(row.position), at, read)


def reduce(
    hidden: Tensor, gold: np.ndarray, head: Head, targets: Targets
) -> tuple[np.ndarray, SparseTarget | DenseTarget | None]:
    """Log-probs [Q] of the true tokens `gold` [Q], and the distributions that `targets` keeps."""
    ids = torch.from_numpy(gold.astype(np.int64)).to(hidden.device)
    codec, vocab_size, head_rows = targets.codec, targets.vocab_size, targets.head_rows
    if codec is None:
        return reduce_gold(hidden, ids, head, head_rows=head_rows), None
    if isinstance(codec, SparseCodec):
        sparse, logp = reduce_sparse(
            hidden,
            ids,
            head,
            vocab_size=vocab_size,
            cap=codec.cap,
            tail_bound=codec.tail_bound,
            temperatures=codec.temperatures,
            head_rows=head_rows,
        )
        return logp, sparse
    dense, logp = reduce_dense(hidden, ids, head, vocab_size=vocab_size, head_rows=head_rows)
    return logp, dense


def ask(teacher: Teacher, jobs: Sequence[Job], targets: Targets, samples: Sequence[Sample]) -> Answers:
    """Run jobs in one packed row and reduce what the teacher says.

    Raises:
        ModelError: it says something that is not a finite number (names sample and view).
    """
    gold = np.concatenate([j.gold for j in jobs])
    sample = np.repeat([j.sample for j in jobs], [len(j.gold) for j in jobs])
    view = np.concatenate([j.view for j in jobs])
    logp, target = reduce(run_row(teacher, [j.piece for j in jobs]), gold, teacher.head, targets)
    finite = np.isfinite(logp) | (gold >= targets.vocab_size)
    if isinstance(target, SparseTarget):  # a NaN among the logits makes every log-prob NaN
        finite &= np.isfinite(target.logp[np.cumsum(target.counts) - target.counts])
    elif target is not None:
        finite &= np.isfinite(target.logp).all(axis=1)
    if not finite.all():
        k = int(np.argmin(finite))
        raise ModelError(
            f"sample {samples[sample[k]].sample_id} view {view[k]}: the teacher's output is not finite; try "
            "--dtype float32, and look for damaged weights in its folder"
        )
    return Answers(sample, view, np.concatenate([j.slot for j in jobs]), logp, target)


def plans_of(sample: Sample, noise: NoiseConfig) -> list[Plan]:
    """The noise plans of every view of a sample."""
    spans = sample.alignment if isinstance(sample.alignment, ChunkSpans) else None
    return [
        make_plan(
            noise,
            sample.sample_id,
            view,
            sample.maskable,
            chunk_start=None if spans is None else spans.student_start,
            chunk_length=None if spans is None else spans.student_length,
        )
        for view in range(noise.views)
    ]


def make_part(
    teacher: Teacher,
    samples: Sequence[Sample],
    plans: Sequence[Sequence[Plan]],
    *,
    asking: Asking,
    targets: Targets,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Row], int]:
    """Every view of every sample as rows, and how many teacher tokens ran.

    Args:
        plans: per sample, per view: `plans_of`, or explicit noise.
        progress: gets samples done.

    Raises:
        UsageError: a sample does not fit `asking.row_tokens`. ModelError: see `ask`.
    """
    jobs = [j for i, s in enumerate(samples) for j in make_jobs(s, plans[i], asking, index=i)]
    nothing = np.zeros(0, dtype=np.int64)
    answers = [Answers(nothing, nothing, nothing, *reduce(torch.zeros(0, 1), nothing, teacher.head, targets))]
    for row in group((len(j.piece) for j in jobs), asking.row_tokens):
        progress(jobs[row[0]].sample)
        answers.append(ask(teacher, [jobs[i] for i in row], targets, samples))
    return make_rows(samples, plans, join(answers)), sum(len(j.piece) for j in jobs)
