"""What a teacher answered, over all samples of a part, put back together as the rows of a logit dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from precompute.reduce import sum_chunks
from precompute.sample import ChunkSpans, Sample
from shards.noise import Plan
from shards.row import ChunkTargets, DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget, Target


@dataclass(frozen=True, slots=True)
class Answers:
    """N answers, one per asked token, in any order; `target` None where only the true token's log-prob is
    kept."""

    sample: np.ndarray
    """[N] int: which of the part's samples."""
    view: np.ndarray
    slot: np.ndarray
    """[N] int: student position (shared tokenizer) or chunk (cross tokenizer)."""
    gold_logp: np.ndarray
    """[N] float32."""
    target: Target | None

    def take(self, index: np.ndarray) -> Answers:
        """The answers at `index`, in its order."""
        target = None if self.target is None else take(self.target, index)
        return Answers(self.sample[index], self.view[index], self.slot[index], self.gold_logp[index], target)

    def split(self, bounds: np.ndarray) -> list[Answers]:
        """Consecutive answers, cut at `bounds` [n]: n + 1 sets."""
        target = self.target
        targets: list[Target | None] = [None] * (len(bounds) + 1)
        if isinstance(target, SparseTarget):
            entries = np.append(0, np.cumsum(target.counts))[bounds]
            sketches: list[np.ndarray | None] = [None] * len(targets)
            if target.sketch is not None:
                sketches = list(np.split(target.sketch, bounds))
            targets = [
                SparseTarget(*x)
                for x in zip(
                    np.split(target.counts, bounds),
                    np.split(target.ids, entries),
                    np.split(target.logp, entries),
                    np.split(target.tails, bounds),
                    sketches,
                )
            ]
        elif isinstance(target, DenseTarget):
            targets = [DenseTarget(x) for x in np.split(target.logp, bounds)]
        elif target is not None:
            targets = [ExactTarget(x) for x in np.split(target.hidden, bounds)]
        arrays = (np.split(x, bounds) for x in (self.sample, self.view, self.slot, self.gold_logp))
        return [Answers(*x) for x in zip(*arrays, targets)]


def take(target: Target, index: np.ndarray) -> Target:
    """The distributions at `index`, in its order; one may be there several times."""
    if isinstance(target, SparseTarget):
        counts = target.counts[index]
        start = (np.cumsum(target.counts) - target.counts)[index]
        entry = np.repeat(start - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        sketch = None if target.sketch is None else target.sketch[index]
        return SparseTarget(counts, target.ids[entry], target.logp[entry], target.tails[index], sketch)
    if isinstance(target, DenseTarget):
        return DenseTarget(target.logp[index])
    return ExactTarget(target.hidden[index])


def join(parts: Sequence[Answers]) -> Answers:
    """Several sets of answers of one kind as one; at least one."""

    def of(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name) for p in parts])

    def of_target(name: str) -> np.ndarray:
        return np.concatenate([getattr(p.target, name) for p in parts])

    target: Target | None = parts[0].target
    if isinstance(target, SparseTarget):
        names = ("counts", "ids", "logp", "tails", *([] if target.sketch is None else ["sketch"]))
        target = SparseTarget(*(of_target(n) for n in names))
    elif isinstance(target, DenseTarget):
        target = DenseTarget(of_target("logp"))
    elif target is not None:
        target = ExactTarget(of_target("hidden"))
    return Answers(of("sample"), of("view"), of("slot"), of("gold_logp"), target)


def make_rows(samples: Sequence[Sample], plans: Sequence[Sequence[Plan]], answers: Answers) -> list[Row]:
    """Every view of every sample, in order, with what was answered about it.

    Args:
        plans: per sample, per view.
        answers: about all of them, each asked token once.
    """
    order = np.lexsort((answers.slot, answers.view, answers.sample))
    answers = answers.take(order)
    views = len(plans[0]) if plans else 1
    key = answers.sample.astype(np.int64) * views + answers.view
    answered = iter(answers.split(np.searchsorted(key, np.arange(1, len(samples) * views))))
    rows = []
    for row, sample, plan in noised(samples, plans):
        here, spans = next(answered), sample.alignment
        if isinstance(spans, ChunkSpans):
            rows.append(replace(row, chunks=_chunks(spans, plan, here)))
        else:
            rows.append(replace(row, positions=_positions(plan, here)))
    return rows


def noised(samples: Sequence[Sample], plans: Sequence[Sequence[Plan]]) -> Iterator[tuple[Row, Sample, Plan]]:
    """Every view of every sample, in order, as a row without targets. Arguments as of `make_rows`."""
    for sample, own in zip(samples, plans):
        for view, plan in enumerate(own):
            row = Row(
                sample_id=sample.sample_id,
                view=view,
                split=sample.split,
                t=float(plan.t),
                input_ids=sample.student_ids,
                real_length=sample.real_length,
                content_bytes=sample.content_bytes,
                maskable=sample.maskable,
                masked=plan.masked,
            )
            yield row, sample, plan


def _positions(plan: Plan, here: Answers) -> PositionTargets:
    if here.target is None:
        raise ValueError("a shared-tokenizer row needs distributions, not gold log-probs alone")
    return PositionTargets(
        positions=here.slot.astype(np.int32),
        half_a=plan.half_a[here.slot],
        gold_logp=here.gold_logp,
        target=here.target,
    )


def _chunks(spans: ChunkSpans, plan: Plan, here: Answers) -> ChunkTargets:
    return ChunkTargets(
        start=spans.student_start,
        length=spans.student_length,
        teacher_length=spans.teacher_length,
        masked=plan.chunk_masked,
        active=plan.chunk_active,
        half_a=plan.chunk_half_a,
        logp=sum_chunks(here.gold_logp, here.slot, plan.chunk_active),
    )
