"""From a sample and its noise plans to what a teacher runs: streams, pieces, and where each answer belongs.

A stream hides some teacher tokens and asks for some of them. With CompDemo a view has two: pass 1 hides half
B and shows half A, pass 2 the reverse. Both pipelines differ only in what they hide: single aligned tokens
(shared tokenizer) or whole chunks (cross tokenizer).

An autoregressive teacher hides nothing. What it says of a token follows from the clean text to its left, so
one causal stream answers for all views of a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from precompute.sample import ChunkSpans, PositionPairs, Sample
from shards.align import Fate
from shards.errors import UsageError
from shards.noise import Plan
from student.layout import Attention, Piece, Stream, lay_out

NO_LEFT_NEIGHBOUR = "first token of a shifted teacher"


@dataclass(frozen=True, slots=True)
class Question:
    """One noised teacher sequence of a view, all in teacher positions, with what each answer is about."""

    view: int
    hidden: np.ndarray
    """[h] int: positions that show the mask token."""
    asked: np.ndarray
    """[q] int, ascending: positions to predict, all hidden."""
    slot: np.ndarray
    """[q] int: student position (shared tokenizer) or chunk (cross tokenizer) of each."""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece to run, and the answers that its reads are. Q asked tokens, A answers; A = Q, one for each, but
    where views share them."""

    sample: int
    """Which of the samples given to `make_jobs` it belongs to; 0 for a single one."""
    piece: Piece
    view: np.ndarray
    """[A] int."""
    slot: np.ndarray
    """[A] int: student position or chunk."""
    gold: np.ndarray
    """[Q] int: true teacher token, in the order of `piece.read`."""
    source: np.ndarray
    """[A] int: which of the Q answers it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How a teacher is asked; the same for every sample of a dataset."""

    mask_id: int | None
    """What hidden tokens show; None = an autoregressive teacher, which sees clean text (causal, shifted)."""
    attention: Attention
    block_size: int
    """In teacher positions."""
    shifted: bool
    row_tokens: int
    """Longest piece that may be made."""
    compdemo: bool
    bos_id: int | None = None
    """Begins the text of an autoregressive teacher; None = nothing does."""

    def __post_init__(self) -> None:
        if self.mask_id is None and (self.attention != "causal" or not self.shifted or self.compdemo):
            raise ValueError("an autoregressive teacher is causal and shifted, and has no CompDemo halves")


def as_read(sample: Sample, asking: Asking) -> Sample:
    """The sample as the teacher reads it, and aligned with what it can be asked about."""
    if asking.mask_id is None:
        sample = _begun(_without_filling(sample), asking.bos_id)
    return without_first(sample) if asking.shifted else sample


def _without_filling(sample: Sample) -> Sample:
    """Nothing aligned with the EOS tokens that fill the student's last block: they are no text, and an
    autoregressive model has nothing to say of what follows an end."""
    aligned = sample.alignment
    if not isinstance(aligned, PositionPairs):
        return sample
    keep = aligned.student < sample.real_length
    rest = PositionPairs(aligned.student[keep], aligned.teacher[keep])
    filling = Counter({Fate.NOT_CONTENT.label: int((~keep).sum())})
    return replace(sample, alignment=rest, dropped=sample.dropped + filling)


def _begun(sample: Sample, bos_id: int | None) -> Sample:
    """The teacher's text with its BOS token in front, where it does not begin with that already."""
    ids, aligned = sample.teacher_ids, sample.alignment
    if bos_id is None or ids[0] == bos_id:
        return sample
    moved: PositionPairs | ChunkSpans
    if isinstance(aligned, PositionPairs):
        moved = replace(aligned, teacher=aligned.teacher + 1)
    else:
        moved = replace(aligned, teacher_start=aligned.teacher_start + 1)
    return replace(sample, teacher_ids=np.append(np.int32(bos_id), ids), alignment=moved)


def without_first(sample: Sample) -> Sample:
    """The sample without what a shifted teacher cannot be asked: its first token has no left neighbour.

    Nothing is aligned with that token any more; what was is counted under `NO_LEFT_NEIGHBOUR`.
    """
    aligned = sample.alignment
    start = aligned.teacher if isinstance(aligned, PositionPairs) else aligned.teacher_start
    keep = start > 0
    if keep.all():
        return sample
    rest: PositionPairs | ChunkSpans
    if isinstance(aligned, PositionPairs):
        lost = 1
        rest = PositionPairs(aligned.student[keep], aligned.teacher[keep])
    else:
        first, length = aligned.student_start[0], aligned.student_length[0]
        lost = int(sample.maskable[first : first + length].sum())
        rest = ChunkSpans(
            aligned.student_start[keep],
            aligned.student_length[keep],
            aligned.teacher_start[keep],
            aligned.teacher_length[keep],
        )
    return replace(sample, alignment=rest, dropped=sample.dropped + Counter({NO_LEFT_NEIGHBOUR: lost}))


def questions(sample: Sample, view: int, plan: Plan, *, compdemo: bool) -> list[Question]:
    """The one or two questions of a view (paper: CompDemo). The asked positions of pass 1 are half B, of
    pass 2 half A."""
    if isinstance(sample.alignment, PositionPairs):
        hide, slot, half_a, ask = _positions(sample.alignment, plan)
    else:
        hide, slot, half_a, ask = _chunks(sample.alignment, plan)
    passes = (~half_a, half_a) if compdemo else (np.ones_like(half_a),)
    return [Question(view, hide[p], hide[p & ask], slot[p & ask]) for p in passes]


def _positions(pairs: PositionPairs, plan: Plan) -> tuple[np.ndarray, ...]:
    """Masked pairs: teacher position, student position, in half A, asked. A masked token without a pair is no
    token of the teacher's, so nothing of it is shown."""
    masked = plan.masked[pairs.student]
    student = pairs.student[masked]
    return pairs.teacher[masked], student, plan.half_a[student], np.ones(len(student), dtype=bool)


def _chunks(spans: ChunkSpans, plan: Plan) -> tuple[np.ndarray, ...]:
    """Teacher tokens of masked chunks: position, chunk, in half A, asked (active chunks alone carry loss)."""
    chunk = np.repeat(np.arange(len(spans.teacher_start)), spans.teacher_length)
    first = np.cumsum(spans.teacher_length) - spans.teacher_length
    token = spans.teacher_start[chunk] + np.arange(len(chunk)) - first[chunk]
    masked = plan.chunk_masked[chunk]
    chunk = chunk[masked]
    return token[masked], chunk, plan.chunk_half_a[chunk], plan.chunk_active[chunk]


def make_jobs(sample: Sample, plans: Sequence[Plan], asking: Asking, *, index: int = 0) -> list[Job]:
    """Everything a sample's views ask, as one piece if it fits `row_tokens`, else as few as do; of an
    autoregressive teacher one, each of its answers for every view that asks for it.

    Each piece of a staircase teacher carries the clean stream again, which is why they are kept together.

    Raises:
        UsageError: a single question is longer than `row_tokens` (names the sample and the flag).
    """
    asked = [
        q
        for view, plan in enumerate(plans)
        for q in questions(sample, view, plan, compdemo=asking.compdemo)
        if len(q.asked)
    ]
    jobs: list[Job] = []
    start = 0
    while start < len(asked):
        end = len(asked)
        piece, tokens, source = _lay_out(sample, asked[start:], asking)
        while len(piece) > asking.row_tokens and end > start + 1:
            end -= 1
            piece, tokens, source = _lay_out(sample, asked[start:end], asking)
        if len(piece) > asking.row_tokens:
            raise UsageError(
                f"sample {sample.sample_id} needs {len(piece)} teacher tokens for view {asked[start].view}, "
                f"--row-tokens allows {asking.row_tokens}: raise it or set --teacher-max-length"
            )
        together = asked[start:end]
        jobs.append(
            Job(
                sample=index,
                piece=piece,
                view=np.repeat([q.view for q in together], [len(q.asked) for q in together]),
                slot=np.concatenate([q.slot for q in together]),
                gold=sample.teacher_ids[tokens],
                source=source,
            )
        )
        start = end
    return jobs


def _lay_out(
    sample: Sample, asked: Sequence[Question], asking: Asking
) -> tuple[Piece, np.ndarray, np.ndarray]:
    """What runs for these questions, the token that each of its reads predicts [Q], and which of these
    answers each token that the questions ask for [A]."""
    if asking.mask_id is None:
        tokens, source = np.unique(np.concatenate([q.asked for q in asked]), return_inverse=True)
        streams = [Stream(sample.teacher_ids, tokens)]
    else:
        tokens = np.concatenate([q.asked for q in asked])
        source = np.arange(len(tokens))
        streams = []
        for q in asked:
            ids = sample.teacher_ids.copy()
            ids[q.hidden] = asking.mask_id
            streams.append(Stream(ids, q.asked))
    piece = lay_out(
        sample.teacher_ids,
        streams,
        attention=asking.attention,
        block_size=asking.block_size,
        shifted=asking.shifted,
    )
    return piece, tokens, source
