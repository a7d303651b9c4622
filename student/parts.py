"""A batch's masked positions cut into chunks of rows, each with its share of the targets.

The CALM family sums log-probs over the tokens of a chunk of text, so such a chunk is never cut.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from student.tensors import Batch, ChunkBatch


@dataclass(frozen=True, slots=True)
class Part:
    """Masked positions `first` to `end` of a batch."""

    first: int
    end: int
    batch: Batch
    """Its gold tokens and targets, numbered from 0; tokens of the network and counts are the whole's."""
    index: np.ndarray
    """[D] int64: `batch.positions.index` on the host, to slice by; empty without distilled positions."""

    @property
    def rows(self) -> int:
        return self.end - self.first

    @property
    def rows_at(self) -> slice:
        return slice(self.first, self.end)


def parts(batch: Batch, rows: int, needs: Set[str]) -> list[Part]:
    """Parts of at most `rows` masked positions, more only where a chunk of text has more; at least one part.

    Args:
        needs: `Objective.requirements`; targets that are not needed are left out.

    Raises:
        ValueError: distilled positions that do not ascend.
    """
    n = len(batch.gold)
    positions = batch.positions if "positions" in needs else None
    chunks = batch.chunks if "chunks" in needs else None
    index = np.zeros(0, np.int64) if positions is None else positions.index.cpu().numpy()
    if (np.diff(index) <= 0).any():
        raise ValueError("distilled positions must ascend")
    spans = None if chunks is None else _Spans(chunks, n)
    cuts = _cuts(n, rows, np.ones(n + 1, dtype=bool) if spans is None else spans.may_cut)
    out = []
    for first, end in pairwise(cuts):
        spots = slice(*(int(i) for i in np.searchsorted(index, [first, end])))
        piece = replace(
            batch,
            gold=batch.gold[first:end],
            view=batch.view[first:end],
            positions=None if positions is None else positions.part(spots, first),
            chunks=None if spans is None else spans.part(first, end),
        )
        out.append(Part(first, end, piece, index[spots] - first))
    return out


def _cuts(n: int, rows: int, may_cut: np.ndarray) -> list[int]:
    """From 0 to n, ascending, at most `rows` apart where `may_cut` [n + 1] lets them."""
    allowed = np.flatnonzero(may_cut)
    cuts = [0]
    while cuts[-1] < n:
        i = int(np.searchsorted(allowed, cuts[-1] + rows, side="right")) - 1
        if allowed[i] <= cuts[-1]:
            i += 1
        cuts.append(int(allowed[i]))
    return cuts if n else [0, 0]


class _Spans:
    """Which masked positions each chunk of text takes up."""

    def __init__(self, chunks: ChunkBatch, n: int) -> None:
        self.chunks = chunks
        self.token, self.chunk = chunks.token.cpu().numpy(), chunks.chunk.cpu().numpy()
        self.first, last = np.full(len(chunks.logp), n), np.zeros(len(chunks.logp), np.int64)
        np.minimum.at(self.first, self.chunk, self.token)
        np.maximum.at(last, self.chunk, self.token)
        self.first[self.first == n] = 0  # no token at all: they count, and forbid no cut
        depth = np.zeros(n + 2, np.int64)  # how many chunks lie on both sides of a cut before position i
        np.add.at(depth, self.first + 1, 1)
        np.add.at(depth, last + 1, -1)
        self.may_cut = depth.cumsum()[: n + 1] == 0

    def part(self, first: int, end: int) -> ChunkBatch:
        mine = (self.first >= first) & (self.first < end)
        device = self.chunks.token.device
        tokens, chunks = (torch.from_numpy(np.flatnonzero(x)).to(device) for x in (mine[self.chunk], mine))
        return self.chunks.part(tokens, chunks, first)
