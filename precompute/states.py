"""Hidden states of a dataset's first samples: what sketches are fitted to, and fidelity is measured on.

Both look at part 0, view 0 and training samples alone, so they do not depend on who makes which part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from precompute.engine import Targets, make_part, plans_of
from precompute.inputs import Asking, as_read
from precompute.parts import Range
from precompute.prepare import Preparer
from precompute.sample import Sample
from precompute.teachers.base import Teacher
from shards.codec import ExactCodec
from shards.errors import CorpusError
from shards.noise import NoiseConfig
from shards.row import ExactTarget, Row

CALIBRATION_SAMPLES = 96
"""Samples that a fit looks at; they have some thousand masked tokens."""


def first_samples(work: Range, preparer: Preparer, most: int, asking: Asking) -> list[Sample]:
    """The first training samples of a range."""
    samples: list[Sample] = []
    for conversation in work.conversations:
        if len(samples) == most:
            break
        made = preparer.prepare(conversation)
        if isinstance(made, Sample) and made.split == "train":
            samples.append(as_read(made, asking))
    return samples


def state_rows(teacher: Teacher, samples: list[Sample], noise: NoiseConfig, asking: Asking) -> list[Row]:
    """View 0 of every sample, with the hidden states as its targets."""
    targets = Targets(
        codec=ExactCodec(width=teacher.head_weights()[0].shape[1]),
        vocab_size=teacher.spec.vocab_size,
        head_rows=512,
    )
    plans = [plans_of(sample, noise)[:1] for sample in samples]
    return make_part(teacher, samples, plans, asking=asking, targets=targets)[0]


def calibration(
    teacher: Teacher,
    work: Range,
    preparer: Preparer,
    noise: NoiseConfig,
    asking: Asking,
    progress: Callable[[int, int | None, str], None],
) -> torch.Tensor:
    """[n, H] hidden states at the distilled positions of the first samples.

    Raises:
        CorpusError: the first part has no training sample with a masked token.
    """
    progress(0, None, "fitting the sketch")
    samples = first_samples(work, preparer, CALIBRATION_SAMPLES, asking)
    found = [
        torch.from_numpy(row.positions.target.hidden)
        for row in state_rows(teacher, samples, noise, asking)
        if row.positions is not None and isinstance(row.positions.target, ExactTarget)
    ]
    if not sum(map(len, found)):
        raise CorpusError("the corpus's first part has no masked training token to fit a sketch to")
    return torch.cat(found)
