"""From conversations to what a teacher runs: samples, their noise, what is asked about them, what was lost.

A function of the conversations and the settings alone, so that it can be done in another process, some
conversations at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from precompute.engine import plans_of
from precompute.inputs import Asking, Job, as_read, make_jobs
from precompute.prepare import Drop, Preparer
from precompute.sample import Conversation, Sample
from shards.align import Fate
from shards.noise import NoiseConfig, Plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """Conversations, ready for the teacher."""

    samples: list[Sample]
    plans: list[list[Plan]]
    """Per sample, per view."""
    jobs: list[Job]
    teacher_tokens: int
    """In all jobs."""
    dropped: Counter[str]
    """Conversations that give no sample, by reason."""
    first: dict[str, str]
    """Where the first of them is, by reason."""
    content_tokens: int
    """Maskable tokens that a teacher counterpart can be expected of, those of dropped rows included."""
    unaligned: Counter[str]
    """Those of them that have none, by reason."""
    notes: Counter[str]
    """Samples that deserve a remark, by remark."""


def prepare(
    conversations: Sequence[Conversation], preparer: Preparer, noise: NoiseConfig, asking: Asking
) -> Prepared:
    """Tokenise, align, draw noise, lay out.

    Raises:
        UsageError: a sample does not fit `asking.row_tokens`.
    """
    preparer.notes.clear()
    samples: list[Sample] = []
    dropped, unaligned = Counter[str](), Counter[str]()
    first: dict[str, str] = {}
    content = 0
    for conversation in conversations:
        made = preparer.prepare(conversation)
        if isinstance(made, Sample):
            made = as_read(made, asking)
        unaligned += made.dropped
        if isinstance(made, Drop):
            content += made.dropped.total()
            dropped[made.reason] += 1
            where = f"{conversation.source} row {conversation.index + 1}"
            why = f": {' '.join(made.detail.split())}" if made.detail else ""
            first.setdefault(made.reason, where + why)
        else:
            content += int(made.maskable.sum())
            samples.append(made)
    content -= unaligned.pop(Fate.NOT_CONTENT.label, 0)
    plans = [plans_of(s, noise) for s in samples]
    jobs = [j for i, s in enumerate(samples) for j in make_jobs(s, plans[i], asking, index=i)]
    tokens = sum(len(j.piece) for j in jobs)
    return Prepared(samples, plans, jobs, tokens, dropped, first, content, unaligned, Counter(preparer.notes))


def join_prepared(slices: Sequence[Prepared]) -> Prepared:
    """Consecutive slices of a range as the whole, as if prepared in one go; at least one."""
    jobs: list[Job] = []
    before = 0
    for some in slices:
        jobs += [replace(j, sample=j.sample + before) for j in some.jobs]
        before += len(some.samples)
    first: dict[str, str] = {}
    for reason, where in (item for some in slices for item in some.first.items()):
        first.setdefault(reason, where)
    none = Counter[str]()
    return Prepared(
        samples=[s for some in slices for s in some.samples],
        plans=[p for some in slices for p in some.plans],
        jobs=jobs,
        teacher_tokens=sum(some.teacher_tokens for some in slices),
        dropped=sum((some.dropped for some in slices), none),
        first=first,
        content_tokens=sum(some.content_tokens for some in slices),
        unaligned=sum((some.unaligned for some in slices), none),
        notes=sum((some.notes for some in slices), none),
    )
