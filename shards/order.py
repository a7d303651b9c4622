"""The training order: a pure function of (seed, epoch) and the rows in each record batch.

Record batches are permuted, and rows are shuffled within windows of consecutive ones. Any row of any epoch is
found without walking there, so a run resumes as fast at the end of an epoch as at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.noise import uniform01


@dataclass(frozen=True, slots=True)
class Window:
    """Record batches whose rows are shuffled together."""

    batches: list[int]
    """Which of the epoch's record batches; their rows, end to end, are the window's."""
    rows: np.ndarray
    """Order in which to give the window's rows, those before the start left out."""


def windows(seed: int, epoch: int, counts: Sequence[int], size: int, skip: int = 0) -> Iterator[Window]:
    """One epoch in windows of `size` record batches, from its row `skip` on.

    Args:
        counts: rows in each record batch of the epoch.
    """

    def permutation(stream: str, n: int) -> np.ndarray:
        return np.argsort(uniform01(seed, "training order", f"{stream}|{epoch}", n), kind="stable")

    order = permutation("batches", len(counts))
    for first in range(0, len(order), size):
        batches = order[first : first + size].tolist()
        n = sum(counts[b] for b in batches)
        if skip < n:
            yield Window(batches, permutation(f"rows|{first // size}", n)[skip:])
        skip = max(0, skip - n)
