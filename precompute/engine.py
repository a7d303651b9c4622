"""A part's samples through the teacher: plan, lay out, pack, run some rows at a time, reduce, put together.

A pure function of (samples, plans, configuration): packing never depends on what was made before or
elsewhere, nor on how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from precompute.inputs import Asking, Job, make_jobs
from precompute.reduce import Head, reduce_dense, reduce_exact, reduce_gold, reduce_sparse
from precompute.rows import Answers, join, make_rows, take
from precompute.sample import ChunkSpans, Sample
from precompute.teachers.base import EngineTeacher, PackedTeacher, Teacher, TeacherSpec
from shards.codec import Codec, ExactCodec, SparseCodec
from shards.errors import ModelError
from shards.noise import NoiseConfig, Plan, make_plan
from shards.row import ExactTarget, Row, SparseTarget, Target
from student.attention import Coordinates
from student.layout import PAD, Piece, group, pack

T = TypeVar("T")

CUDA_TILE = 128
"""Packed rows and what is read of them are filled up to whole FlexAttention tiles on CUDA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What is kept of an answer."""

    codec: Codec | None
    """None = the true token's log-prob alone (cross tokenizer)."""
    vocab_size: int
    """Leading ids that log-probs are normalised over."""
    head_rows: int
    """Rows of logits that exist at once."""
    sketch: Callable[[Tensor], np.ndarray] | None = None
    """Codes of the tail's shape from logits (`precompute.sketch.SketchCoder`), if the codec has a sketch."""


@dataclass(slots=True)
class Pace:
    """How much runs at once; halved whenever memory runs out, and kept so for the parts that follow.

    Which samples share a row never depends on it. What comes out does to rounding alone: matrix products of
    fewer rows may add up in another order.
    """

    rows: int
    """Packed rows in one forward."""
    head_rows: int
    """Rows of logits in one chunk."""

    def fit(self, name: Literal["rows", "head_rows"], run: Callable[[], T], what: str) -> T | None:
        """The result of `run`, or None when memory ran out and `name` is halved: ask for less and try again.

        Raises:
            ModelError: memory runs out and there is nothing left to halve.
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as e:  # torch's error for an accelerator is a RuntimeError
            if not (isinstance(e, MemoryError) or should_reduce_batch_size(e)):
                raise
            if getattr(self, name) == 1:
                raise ModelError(
                    f"out of memory: {what} does not fit beside the teacher; use --dtype bfloat16, a "
                    "device with more memory, or (for a new dataset) a lower --row-tokens"
                ) from e
        clear_device_cache(garbage_collection=True)
        setattr(self, name, getattr(self, name) // 2)
        return None


def run_row(teacher: PackedTeacher, pieces: Sequence[Piece]) -> Tensor:
    """[Q, H]: hidden states at the pieces' reads, piece after piece, all run in one packed row."""
    row = pack(pieces, sum(map(len, pieces)))
    tile = CUDA_TILE if teacher.device.type == "cuda" else 1
    fill = -row.ids.shape[1] % tile

    def tensor(x: np.ndarray, pad: int = 0) -> Tensor:
        return torch.from_numpy(np.pad(x, ((0, 0), (0, fill)), constant_values=pad)).to(teacher.device)

    at = Coordinates(tensor(row.sample, PAD), tensor(row.stream), tensor(row.block), tensor(row.order))
    read = torch.from_numpy(np.pad(row.read, (0, -len(row.read) % tile))).to(teacher.device)
    return teacher.hidden(tensor(row.ids), tensor(row.position), at, read)[: len(row.read)]


def reduce(
    hidden: Tensor, gold: np.ndarray, head: Head, targets: Targets
) -> tuple[np.ndarray, Target | None]:
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
            sketch=targets.sketch,
        )
        return logp, sparse
    if isinstance(codec, ExactCodec):
        exact, logp = reduce_exact(
            hidden, ids, head, vocab_size=vocab_size, width=codec.width, head_rows=head_rows
        )
        return logp, exact
    dense, logp = reduce_dense(hidden, ids, head, vocab_size=vocab_size, head_rows=head_rows)
    return logp, dense


def ask(
    teacher: Teacher, jobs: Sequence[Job], targets: Targets, samples: Sequence[Sample], pace: Pace
) -> Answers | None:
    """Run jobs in one forward and reduce what the teacher says; None if memory ran out on the way and `pace`
    asks for fewer rows now.

    Raises:
        ModelError: it says something that is not a finite number (names sample and view), or one row is too
            much for the memory.
    """
    pieces = [j.piece for j in jobs]
    gold = np.concatenate([j.gold for j in jobs])
    if isinstance(teacher, EngineTeacher):
        logp, target = teacher.answer(pieces, gold, targets)
    else:
        tokens, runs = sum(map(len, pieces)), teacher
        hidden = pace.fit("rows", lambda: run_row(runs, pieces), f"a row of {tokens} tokens")
        if hidden is None:
            return None
        reduced = None
        while reduced is None:

            def in_chunks() -> tuple[np.ndarray, Target | None]:
                return reduce(hidden, gold, runs.head, replace(targets, head_rows=pace.head_rows))

            reduced = pace.fit("head_rows", in_chunks, "a row of logits")
        logp, target = reduced
    finite = np.isfinite(logp) | (gold >= targets.vocab_size)
    if isinstance(target, SparseTarget):  # a NaN among the logits makes every log-prob NaN
        finite &= np.isfinite(target.logp[np.cumsum(target.counts) - target.counts])
    elif target is not None:
        values = target.hidden if isinstance(target, ExactTarget) else target.logp
        finite &= np.isfinite(values).all(axis=1)
    sample = np.repeat([j.sample for j in jobs], [len(j.view) for j in jobs])
    view = np.concatenate([j.view for j in jobs])
    before = np.cumsum([0, *(len(j.gold) for j in jobs)])
    source = np.concatenate([j.source + first for j, first in zip(jobs, before)])
    if not finite.all():
        k = int(np.argmin(finite[source]))
        raise ModelError(
            f"sample {samples[sample[k]].sample_id} view {view[k]}: the teacher's output is not finite; try "
            "--dtype float32, and look for damaged weights in its folder"
        )
    if not np.array_equal(source, np.arange(len(gold))):  # views share answers
        logp, target = logp[source], None if target is None else take(target, source)
    return Answers(sample, view, np.concatenate([j.slot for j in jobs]), logp, target)


def check_vocabulary(samples: Sequence[Sample], mask_id: int | None, spec: TeacherSpec) -> None:
    """Raises: ModelError for a token id that the teacher has no row for (names sample, id and vocabulary)."""
    for sample in samples:
        largest = int(sample.teacher_ids.max(initial=mask_id or 0))
        if largest >= spec.vocab_size:
            raise ModelError(
                f"sample {sample.sample_id} has token id {largest}, but {spec.name} knows ids below "
                f"{spec.vocab_size}: give the teacher's own tokenizer, or a teacher with a larger vocabulary"
            )


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


def ask_all(
    teacher: Teacher,
    samples: Sequence[Sample],
    jobs: Sequence[Job],
    *,
    asking: Asking,
    targets: Targets,
    pace: Pace,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answers]:
    """Pack the jobs of a part, run them, and reduce what the teacher says; at least one set of answers.

    Args:
        pace: how much runs at once, changed here when memory runs out.
        progress: gets samples done.

    Raises:
        ModelError: see `check_vocabulary` and `ask`.
    """
    check_vocabulary(samples, asking.mask_id, teacher.spec)
    rows = list(group((len(j.piece) for j in jobs), asking.row_tokens))
    nothing = np.zeros(0, dtype=np.int64)
    answers = [Answers(nothing, nothing, nothing, *reduce(torch.zeros(0, 1), nothing, teacher.head, targets))]
    done = 0
    while done < len(rows):
        progress(jobs[rows[done][0]].sample)
        together = rows[done : done + pace.rows]
        answer = ask(teacher, [jobs[i] for row in together for i in row], targets, samples, pace)
        if answer is not None:
            answers.append(answer)
            done += len(together)
    return answers


def make_part(
    teacher: Teacher,
    samples: Sequence[Sample],
    plans: Sequence[Sequence[Plan]],
    *,
    asking: Asking,
    targets: Targets,
    pace: Pace | None = None,
) -> tuple[list[Row], int]:
    """Every view of every sample as rows, and how many teacher tokens ran: a part in one call.

    Args:
        plans: per sample, per view: `plans_of`, or explicit noise.
        pace: see `ask_all`; None = a row, and `targets.head_rows` logits.

    Raises:
        UsageError: a sample does not fit `asking.row_tokens`. ModelError: see `ask_all`.
    """
    pace = pace or Pace(rows=1, head_rows=targets.head_rows)
    jobs = [j for i, s in enumerate(samples) for j in make_jobs(s, plans[i], asking, index=i)]
    answers = ask_all(teacher, samples, jobs, asking=asking, targets=targets, pace=pace)
    return make_rows(samples, plans, join(answers)), sum(len(j.piece) for j in jobs)
