"""Tensors that pass between loader, model and objectives. All loss arithmetic on them is float32.

Shape suffixes: B views, R packed rows, P tokens in a row, N masked positions (all views together), D
distilled positions, K kept entries, C active chunks, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from student.attention import Coordinates

T = TypeVar("T")


class _Constant:
    """Tensors that all targets of a dataset share. No dataclass: what cuts or moves a batch leaves it whole,
    and each device gets one copy, in the dtype of the arithmetic it takes part in."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def on(self, like: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = tuple(t.to(*key) for t in self._tensors)
        return self._copies[key]


class Basis(_Constant):
    """What a sketch's coefficients are coefficients of (`student.losses.sketch`)."""

    def __init__(self, directions: Tensor, mean: Tensor, weight: Tensor, *, step: float, mix: float) -> None:
        """
        Args:
            directions: [V, R]. mean, weight: [V], the weights summing to 1.
            step: of the coefficients' codes.
            mix: weight of the student's own shape in what the sketch leaves open.
        """
        super().__init__(directions, mean, weight)
        self.step, self.mix = step, mix


class TeacherHead(_Constant):
    """A linear LM head, cut to the shared vocabulary."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """
        Args:
            weight: [V, H]. bias: [V].
        """
        super().__init__(weight, *([] if bias is None else [bias]))
        self.vocab_size = len(weight)

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """[D, V] in `dtype`."""
        hidden = hidden.to(dtype)
        return torch.nn.functional.linear(hidden, *self.on(hidden))


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
    sketch: Tensor | None = None
    """[D, R] int8: codes of the coefficients that describe the tail's shape; None = it has the student's."""
    basis: Basis | None = None
    """What they are coefficients of; `with_table` adds it."""


@dataclass(frozen=True, slots=True)
class Exact:
    """What the teacher's head makes whole distributions of."""

    hidden: Tensor
    """[D, H] float32: final hidden states."""
    head: TeacherHead | None = None
    """`with_table` adds it."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Whole teacher distributions."""

    logp: Tensor
    """[D, V] float32 log-probs at temperature 1 (raw logits serve as well: every use is shift-invariant)."""


@dataclass(frozen=True, slots=True)
class PositionBatch:
    """Shared-tokenizer targets of a batch."""

    index: Tensor
    """[D] int64, ascending: which of the N masked positions."""
    t: Tensor
    """[D] float32: timestep of the view."""
    gold_logp: Tensor
    """[D] float32, NaN outside the shared vocabulary."""
    target: TopK | Dense | Exact
    vocab_size: int
    """Shared vocabulary: the student's first `vocab_size` columns are compared with the teacher's."""

    def part(self, at: slice, first: int) -> PositionBatch:
        """The distilled positions `at`, of a part of the batch that begins at masked position `first`."""
        cut = take_rows(self, at)
        return replace(cut, index=cut.index - first)


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

    def part(self, tokens: Tensor, chunks: Tensor, first: int) -> ChunkBatch:
        """Chunks `chunks` [c], whose tokens are `tokens` [m] of the M, of a part of the batch that begins at
        masked position `first`."""
        number = torch.zeros_like(self.logp, dtype=torch.int64)
        number[chunks] = torch.arange(len(chunks), device=number.device)
        return ChunkBatch(
            token=self.token[tokens] - first,
            chunk=number[self.chunk[tokens]],
            logp=self.logp[chunks],
            t=self.t[chunks],
            vocab_size=self.vocab_size,
        )


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


class LossOut(NamedTuple):
    """A loss and its unweighted parts. A plain tuple, so that wrappers (FSDP, autocast) find the tensors."""

    total: Tensor
    terms: dict[str, Tensor]
    """Objective name -> detached scalar, before its weight."""


Target = TopK | Dense | Exact


def with_table(target: Target, table: Basis | TeacherHead | None) -> Target:
    """The target with what it needs besides its rows. Done where losses are computed, so that processes that
    make batches do not send it along."""
    if isinstance(target, TopK) and isinstance(table, Basis) and target.sketch is not None:
        return replace(target, basis=table)
    if isinstance(target, Exact) and isinstance(table, TeacherHead):
        return replace(target, head=table)
    return target


def take_rows(x: T, at: slice) -> T:
    """Rows `at` of every tensor inside a dataclass of targets, whose first dimension is always D."""
    if isinstance(x, Tensor):
        return x[at]  # type: ignore[return-value]
    if is_dataclass(x) and not isinstance(x, type):
        return type(x)(**{f.name: take_rows(getattr(x, f.name), at) for f in fields(x)})
    if isinstance(x, dict):
        return {k: take_rows(v, at) for k, v in x.items()}  # type: ignore[return-value]
    return x


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
