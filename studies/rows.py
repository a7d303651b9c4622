"""What may happen to rows between a dataset and a student: fresh noise with the teacher in the loop, and
targets whose tail is treated as other programs do.

Both wrap a row source, so that samples come in the order they have without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from precompute.engine import make_part
from precompute.sample import ChunkSpans
from shards.noise import NoiseConfig, make_plan
from shards.row import DenseTarget, Row
from student.batch import FRESH
from student.loader import RowSource
from studies.making import Asked
from studies.tasks import Task

TOGETHER = 32
"""Rows that the teacher is asked about at once."""


@dataclass
class TeacherInTheLoop:
    """Every row's noise is redrawn, each epoch anew, and its teacher asked through precompute's engine."""

    task: Task
    """A `data` task: whose samples, whose teacher, how asked."""
    out: Path
    seed: int
    tokens: int = 0
    """Of the teacher, so far."""
    _asked: Asked | None = field(default=None, repr=False)

    @property
    def asked(self) -> Asked:
        if self._asked is None:
            self._asked = Asked(self.task, self.out)
        return self._asked

    @property
    def flops(self) -> float:
        """Of the teacher, so far."""
        return self.tokens * self.asked.flops_per_token

    def __call__(self, source: RowSource) -> RowSource:
        samples = self.asked.samples()

        def rows(start: Mapping[str, Any] | None) -> Iterator[tuple[Row, Any]]:
            epoch = start["epoch"] if start else 0
            waiting: list[tuple[Row, Any, int]] = []
            for row, after in source(start):
                waiting.append((row, after, epoch))
                epoch = after["epoch"] if isinstance(after, Mapping) else after.epoch
                if len(waiting) == TOGETHER:
                    yield from self._answered(waiting, samples)
                    waiting = []

        return rows

    def _answered(
        self, waiting: list[tuple[Row, Any, int]], samples: Mapping[str, Any]
    ) -> Iterator[tuple[Row, Any]]:
        recipe = self.asked.recipe
        some = [samples[row.sample_id] for row, _, _ in waiting]
        plans = []
        for sample, (_, _, epoch) in zip(some, waiting):
            spans = sample.alignment if isinstance(sample.alignment, ChunkSpans) else None
            noise: NoiseConfig = replace(recipe.noise, views=1, timesteps="iid", seed=_seed(self.seed, epoch))
            plan = make_plan(
                noise,
                sample.sample_id,
                0,
                sample.maskable,
                chunk_start=None if spans is None else spans.student_start,
                chunk_length=None if spans is None else spans.student_length,
            )
            plans.append([plan])
        made, tokens = make_part(
            self.asked.teacher, some, plans, asking=recipe.asking, targets=recipe.targets
        )
        self.tokens += tokens
        for row, (_, after, _) in zip(made, waiting):
            yield replace(row, view=FRESH), after  # of no stored plan


def _seed(seed: int, epoch: int) -> int:
    """Of an epoch's noise; none of a dataset's, which are small."""
    return 1_000_003 * (epoch + 1) + seed


def with_tail(how: str) -> Callable[[RowSource], RowSource]:
    """`dropped:K`: the K most probable tokens, renormalised; `uniform:K`: the rest's mass at temperature 1
    spread evenly over it. Both of dense targets."""
    name, _, k = how.partition(":")

    def through(source: RowSource) -> RowSource:
        def rows(start: Mapping[str, Any] | None) -> Iterator[tuple[Row, Any]]:
            for row, after in source(start):
                at = row.positions
                if at is not None and isinstance(at.target, DenseTarget):
                    target = DenseTarget(treated(at.target.logp, int(k), uniform=name == "uniform"))
                    row = replace(row, positions=replace(at, target=target))
                yield row, after

        return rows

    return through


ABSENT = -1e4
"""Log-prob of what is dropped: finite, so that interpolation with a student's logits stays so, and 0 in every
softmax at the temperatures in use."""


def treated(logp: np.ndarray, k: int, *, uniform: bool) -> np.ndarray:
    """Whole distributions [D, V] with another tail outside their `k` most probable tokens."""
    size = logp.shape[1]
    if k >= size or not len(logp):
        return logp
    head = np.argpartition(-logp, k, axis=1)[:, :k]
    kept = np.take_along_axis(logp, head, axis=1).astype(np.float64)
    inside = np.exp(kept).sum(1, keepdims=True)
    if uniform:
        rest = np.maximum(1.0 - inside, 1e-12) / (size - k)
        out = np.repeat(np.log(rest), size, axis=1)
    else:
        kept = kept - np.log(inside)
        out = np.full(logp.shape, ABSENT)
    np.put_along_axis(out, head, kept, axis=1)
    return out.astype(np.float32)
