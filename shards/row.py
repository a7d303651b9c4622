"""One row of a logit dataset, decoded: one view of one sample, with what the teacher said about it.

Shape suffixes: L student tokens, N distilled positions, K kept entries (all positions together), V shared
vocabulary, R coefficients of a sketch, H teacher's hidden size, C chunks, A active chunks. Everything is
numpy; log-probs are natural logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """Head of the teacher's distribution at each distilled position, normalised over the shared
    vocabulary."""

    counts: np.ndarray
    """[N] int32: entries kept at each position, at least 1."""
    ids: np.ndarray
    """[K] int32: token ids, position after position, most probable first."""
    logp: np.ndarray
    """[K] float32: their log-probs at temperature 1."""
    tails: np.ndarray
    """[N, number of temperatures] float32: log of the sum of p^(1/T) over the tokens not kept; -inf = no
    such token."""
    sketch: np.ndarray | None = None
    """[N, R] int8: codes of the coefficients of the dataset's basis; None = the codec has no sketch."""

    @property
    def values(self) -> int:
        """Kept entries, or numbers of another target."""
        return len(self.logp)


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """The teacher's whole distribution at each distilled position."""

    logp: np.ndarray
    """[N, V] float32: log-probs at temperature 1, normalised over the shared vocabulary."""

    @property
    def values(self) -> int:
        return self.logp.size


@dataclass(frozen=True, slots=True)
class ExactTarget:
    """What the teacher's head makes its distribution of, at each distilled position."""

    hidden: np.ndarray
    """[N, H] float32: final hidden states, representable in the codec's dtype."""

    @property
    def values(self) -> int:
        return self.hidden.size


Target = SparseTarget | DenseTarget | ExactTarget


@dataclass(frozen=True, slots=True)
class PositionTargets:
    """Targets of the shared-tokenizer pipeline."""

    positions: np.ndarray
    """[N] int32, ascending: masked student positions that have a teacher counterpart."""
    half_a: np.ndarray
    """[N] bool: in CompDemo half A (predicted by pass 2, shown in pass 1). All False without CompDemo."""
    gold_logp: np.ndarray
    """[N] float32: log-prob of the true token; NaN where its id lies outside the shared vocabulary."""
    target: Target


@dataclass(frozen=True, slots=True)
class ChunkTargets:
    """Targets of the cross-tokenizer pipeline: every chunk of the sample, in order, disjoint."""

    start: np.ndarray
    """[C] int32: first student position."""
    length: np.ndarray
    """[C] int32: student tokens, at least 1."""
    teacher_length: np.ndarray
    """[C] int32: teacher tokens, at least 1."""
    masked: np.ndarray
    """[C] bool: hidden in this view, on both sides."""
    active: np.ndarray
    """[C] bool: masked and touching no unmaskable (prompt) token: these carry loss."""
    half_a: np.ndarray
    """[C] bool: in CompDemo half A; False where not masked."""
    logp: np.ndarray
    """[A] float32: teacher's log-prob of each active chunk, in chunk order."""


@dataclass(frozen=True, slots=True)
class Row:
    """One view of one sample. `positions` or `chunks` by the dataset's kind; neither for noise alone."""

    sample_id: str
    view: int
    split: str
    """`train` or `heldout`."""
    t: float
    """Timestep, a float32 value."""
    input_ids: np.ndarray
    """[L] int32: clean student ids, L a multiple of the block size (EOS fills the last block)."""
    real_length: int
    """Tokens before the block-filling EOS; L when there is none (a truncated sample)."""
    content_bytes: int
    """UTF-8 bytes of message content under the maskable positions: the denominator of bits per byte."""
    maskable: np.ndarray
    """[L] bool: may be masked and carries loss."""
    masked: np.ndarray
    """[L] bool: masked in this view; a subset of `maskable`."""
    positions: PositionTargets | None = None
    chunks: ChunkTargets | None = None
