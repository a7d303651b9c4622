"""Tensors that pass between loader, model and objectives. All loss arithmetic on them is float32.

Shape suffixes: B views, R packed rows, P tokens in a row, N masked positions (all views together), D
distilled positions, K kept entries, C active chunks, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from student.attention import Coordinates

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TopK:
    """Sparse teacher targets, padded to the widest position. Log-probs at temperature 1 over `vocab_size`
    tokens."""

    ids: Tensor
    """[D, K] int64, most probable first; padding repeats the position's first id."""
    logp: Tensor
    """[D, K] float32; undefined where padded."""
    keep: Tensor
    """[D, K] bool: False where padded."""
    tails: dict[float, Tensor]
    """Temperature -> [D] float32: log of the sum of p^(1/T) over tokens not kept; -inf = every token is
    kept."""
    gold: Tensor
    """[D] int64: the true token."""
    gold_logp: Tensor
    """[D] float32: its log-prob; NaN where its id lies outside the shared vocabulary."""
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Whole teacher distributions."""

    logp: Tensor
    """[D, V] float32 log-probs at temperature 1 (raw logits serve as well: every use is shift-invariant)."""


@dataclass(frozen=True, slots=True)
class PositionBatch:
    """Shared-tokenizer targets of a batch."""

    index: Tensor
    """[D] int64: which of the N masked positions."""
    t: Tensor
    """[D] float32: timestep of the view."""
    gold_logp: Tensor
    """[D] float32, NaN outside the shared vocabulary."""
    target: TopK | Dense
    vocab_size: int
    """Shared vocabulary: the student's first `vocab_size` columns are compared with the teacher's."""


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """Active chunks of a batch: of a cross-tokenizer dataset, or one-token chunks made of gold log-probs."""

    token: Tensor
    """[M] int64: which of the N masked positions, for every token of every active chunk."""
    chunk: Tensor
    """[M] int64: its chunk, in [0, C)."""
    logp: Tensor
    """[C] float32: teacher's chunk log-prob."""
    t: Tensor
    """[C] float32: timestep of the view."""
    vocab_size: int | None = None
    """Student log-probs are normalised over its first `vocab_size` tokens; None = its whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Denominators over the whole global batch: every rank, every micro-batch, known before the first
    forward."""

    views: int = 0
    maskable: int = 0
    """Maskable tokens: the denominator of CE."""
    masked: int = 0
    distilled: int = 0
    """Distilled positions: the denominator of KL and TIDAL."""
    chunks: int = 0
    """Active chunks: the denominator of the CALM family."""
    tokens: int = 0
    """Packed tokens that run through the student."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: packed tokens, where to read, what is true there, and what the teacher says."""

    input_ids: Tensor
    """[R, P] int64."""
    position_ids: Tensor
    """[R, P] int64: each token's position in its own sample."""
    at: Coordinates
    """[R, P] int64 each."""
    read: Tensor
    """[N] int64 into the flattened [R * P]: hidden states that predict the masked positions."""
    gold: Tensor
    """[N] int64: true tokens there."""
    view: Tensor
    """[N] int64: which of the B views each belongs to."""
    t: Tensor
    """[B] float32."""
    maskable: Tensor
    """[B] int64: maskable tokens of each view."""
    counts: Counts
    """Of the global batch this is part of, not of this micro-batch."""
    positions: PositionBatch | None = None
    chunks: ChunkBatch | None = None
    rows: tuple[str, ...] = ()
    """`sample_id/view` of each view, for messages."""
    state: dict[str, Any] = field(default_factory=dict)
    """Where the data stream stands after the global batch this is part of: what a checkpoint stores."""


@dataclass(frozen=True, slots=True)
class LossOut:
    """A loss and its unweighted parts."""

    total: Tensor
    terms: dict[str, Tensor]
    """Objective name -> detached scalar, before its weight."""


def to_device(x: T, device: torch.device | str) -> T:
    """Move every tensor inside nested dataclasses, tuples and dicts."""
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)  # type: ignore[return-value]
    if is_dataclass(x) and not isinstance(x, type):
        return type(x)(**{f.name: to_device(getattr(x, f.name), device) for f in fields(x)})
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}  # type: ignore[return-value]
    if isinstance(x, tuple):
        moved = [to_device(v, device) for v in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)  # type: ignore[return-value]
    return x
