"""How sure a difference is: two-way bootstrap over seeds and modules, paired.

All arms of a question are trained with the same seeds and judged on the same samples and masks. A resample
draws seeds with replacement and groups of samples (modules) with replacement, the same for both arms, so
what a seed or a module does to both cancels, and samples that resemble each other count as one draw. Of n
seeds n - 1 are drawn, which makes the variance over seeds unbiased (n would leave it a fifth too small for
five); beside each interval stands in how many seeds the sign is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
CENTINAT = 0.01


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % percentile interval, and the value of every seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def triple(self) -> tuple[float, float, float]:
        return self.value, self.low, self.high

    @property
    def agree(self) -> str:
        """In how many seeds the sign is that of the value."""
        return f"{sum(s * self.value > 0 for s in self.seeds)}/{len(self.seeds)}"


def bits_per_byte(centinats: np.ndarray, content: np.ndarray) -> np.ndarray:
    """[seeds] from [seeds, samples] NLL and [samples] bytes."""
    return CENTINAT * centinats.sum(-1) / content.sum() / math.log(2)


def interval(
    a: np.ndarray,
    content: np.ndarray,
    b: np.ndarray | None = None,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Of bits per byte, a mean over seeds; with `b` of the difference, a minus b.

    Args:
        a, b: [seeds, samples] NLL in hundredths of a nat.
        content: [samples] bytes.
        groups: [samples] number of each sample's group, from 0; None = each is its own.

    Raises:
        ValueError: arms of other seeds or samples.
    """
    if b is not None and a.shape != b.shape:
        raise ValueError(f"arms of {a.shape} and {b.shape} seeds and samples cannot be paired")
    values = a - b if b is not None else a
    seeds, samples = values.shape
    rng = np.random.Generator(np.random.Philox(seed))
    drawn_seeds = max(1, seeds - 1)
    of_seeds = rng.multinomial(drawn_seeds, np.full(seeds, 1 / seeds), DRAWS) / drawn_seeds
    groups = np.arange(samples) if groups is None else groups
    count = int(groups.max()) + 1
    of_samples = rng.multinomial(count, np.full(count, 1 / count), DRAWS)[:, groups]
    nll = np.einsum("ds,sn,dn->d", of_seeds, values, of_samples, optimize=True)
    drawn = CENTINAT * nll / np.maximum(of_samples @ content, 1) / math.log(2)
    each = bits_per_byte(values, content)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(each.mean()), float(low), float(high), tuple(each.tolist()))
