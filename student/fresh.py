"""Fresh noise for a share of the training rows, so that few stored views are not learnt by heart.

Online training draws a new view at every step; a logit dataset has a few per sample, and a student that meets
the same masks again memorises them. A fresh row keeps its sample and takes a new timestep and new iid token
masks. The teacher was never asked about these, so it carries CE alone.

Which rows, and their noise, follow from (seed, sample id, epoch): a resumed run, another number of ranks or
micro-batches sees the same ones. They are drawn in the global row order, before batches are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shards.errors import UsageError
from shards.noise import NoiseConfig, plan_from_uniforms, timestep, uniform01
from shards.row import Row
from student.batch import FRESH
from student.loader import RowSource
from student.objective import Objective

SHARE = 0.25
"""Of the rows of an objective with teacher targets, where stored views repeat. In the study (docs/study.md)
it gains KL of weight 1 0.008 bits per byte where a view is met 3.25 times and 0.117 at 13 times; KL of weight
4, beside which CE counts for less, loses 0.011 at 3.25 times and gains 0.003 at 6.5 and 0.035 at 13."""
IID = NoiseConfig(views=1, timesteps="iid", unit="token", compdemo=False)


@dataclass(frozen=True, slots=True)
class FreshNoise:
    """A row source that redraws the noise of a share of another source's rows."""

    source: RowSource
    """Yields rows with states that have an `epoch`; its samples occur once an epoch."""
    share: float
    """Expected share of the rows, in [0, 1]."""
    seed: int

    def __call__(self, start: Mapping[str, Any] | None) -> Iterator[tuple[Row, Any]]:
        epoch = start["epoch"] if start else 0
        for row, after in self.source(start):
            if uniform01(self.seed, row.sample_id, f"fresh|{epoch}", 1)[0] < self.share:
                row = redraw(row, self.seed, epoch)
            yield row, after
            epoch = after["epoch"] if isinstance(after, Mapping) else after.epoch


def share_for(objective: Objective, share: float | None, *, repeated: bool) -> float:
    """The share an objective is trained with; None = where stored views are `repeated`, `SHARE`, or all rows
    where CE is the whole objective; none where they are not, or without CE.

    Raises:
        UsageError: fresh rows would carry nothing, or be all there is.
    """
    targets = bool(objective.requirements())
    if share is None:
        if not (repeated and objective.ce_weight):
            return 0.0
        return SHARE if targets else 1.0
    if share and not objective.ce_weight:
        raise UsageError(
            f"fresh noise on a share of {share:g} of the rows with CE of weight 0: they would carry no loss; "
            "set a CE weight above 0, or no fresh noise"
        )
    if share == 1.0 and targets:
        named = "+".join(term.name for term in objective.terms)
        raise UsageError(
            f"fresh noise on every row leaves no teacher target to {named}; use a share below 1, or train ce"
        )
    return share


def redraw(row: Row, seed: int, epoch: int) -> Row:
    """The row's sample under a new timestep, uniform as every view's marginal is, and iid token masks."""
    t = timestep(uniform01(seed, row.sample_id, f"fresh t|{epoch}", 1)[0], 0, IID)
    u_mask = uniform01(seed, row.sample_id, f"fresh mask|{epoch}", len(row.maskable))
    plan = plan_from_uniforms(t, u_mask, u_mask, row.maskable, config=IID)
    return replace(row, view=FRESH, t=float(t), masked=plan.masked, positions=None, chunks=None)
