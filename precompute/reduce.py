"""From hidden states to what a row keeps: logits are made a few rows at a time, reduced at once, and never
kept.

Shape suffixes: Q asked places, q rows of one chunk, V vocabulary that targets are normalised over, K kept
entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from shards.row import DenseTarget, SparseTarget

Head = Callable[[Tensor], Tensor]
"""[q, H] hidden states -> [q, V'] float32 logits."""


def _logp(
    hidden: Tensor, head: Head, head_rows: int, vocab_size: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Log-probs of consecutive rows, [q, V] float32 over the first `vocab_size` columns (None = all of
    them)."""
    for start in range(0, len(hidden), head_rows):
        rows = slice(start, min(start + head_rows, len(hidden)))
        logits = head(hidden[rows])
        yield rows, torch.log_softmax(logits[:, :vocab_size].float(), dim=-1)


def gold_logp(logp: Tensor, gold: Tensor) -> Tensor:
    """[q] log-prob of the true tokens; NaN where an id lies outside the V columns of `logp` [q, V]."""
    inside = gold < logp.shape[1]
    picked = logp.gather(1, torch.where(inside, gold, 0)[:, None])[:, 0]
    return torch.where(inside, picked, torch.nan)


def sparse_head(logp: Tensor, *, cap: int, tail_bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest head that drops less than `tail_bound` of the mass at T = 1, at least 1 and at most `cap`
    entries.

    Returns:
        values [q, k] log-probs and ids [q, k], most probable first, and counts [q] of those that belong to
        the head.
    """
    values, ids = logp.topk(min(cap, logp.shape[1]), dim=1)
    dropped = 1.0 - values.double().exp().cumsum(1)
    counts = (dropped >= tail_bound).sum(1) + 1  # entries whose own head still drops too much, and one more
    return values, ids, counts.clamp(max=values.shape[1])


def tail_logsumexp(logp: Tensor, ids: Tensor, counts: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """[q, temperatures]: zeta_T = log sum of p^(1/T) over the tokens outside the head; -inf when there is
    none."""
    kept = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    tail = logp.scatter(1, ids, torch.where(kept, -torch.inf, logp.gather(1, ids)))
    return torch.stack([torch.logsumexp(tail / T, dim=1) for T in temperatures], dim=1)


def reduce_sparse(
    hidden: Tensor,
    gold: Tensor,
    head: Head,
    *,
    vocab_size: int,
    cap: int,
    tail_bound: float,
    temperatures: tuple[float, ...],
    head_rows: int,
) -> tuple[SparseTarget, np.ndarray]:
    """Sparse targets and gold log-probs [Q] of hidden states [Q, H], over the first `vocab_size` tokens."""
    counts, ids, values, tails, golds = [], [], [], [], []
    for rows, logp in _logp(hidden, head, head_rows, vocab_size):
        v, i, n = sparse_head(logp, cap=cap, tail_bound=tail_bound)
        kept = torch.arange(v.shape[1], device=v.device) < n[:, None]
        counts.append(n)
        ids.append(i[kept])
        values.append(v[kept])
        tails.append(tail_logsumexp(logp, i, n, temperatures))
        golds.append(gold_logp(logp, gold[rows]))
    return (
        SparseTarget(
            counts=_join(counts, np.int32),
            ids=_join(ids, np.int32),
            logp=_join(values, np.float32),
            tails=_join(tails, np.float32).reshape(-1, len(temperatures)),
        ),
        _join(golds, np.float32),
    )


def reduce_dense(
    hidden: Tensor, gold: Tensor, head: Head, *, vocab_size: int, head_rows: int
) -> tuple[DenseTarget, np.ndarray]:
    """Whole distributions [Q, V] and gold log-probs [Q] of hidden states [Q, H]."""
    parts, golds = [], []
    for rows, logp in _logp(hidden, head, head_rows, vocab_size):
        parts.append(logp)
        golds.append(gold_logp(logp, gold[rows]))
    return DenseTarget(_join(parts, np.float32).reshape(-1, vocab_size)), _join(golds, np.float32)


def reduce_gold(hidden: Tensor, gold: Tensor, head: Head, *, head_rows: int) -> np.ndarray:
    """[Q] float32: log-probs of the true tokens over the teacher's whole vocabulary."""
    golds = [gold_logp(logp, gold[rows]) for rows, logp in _logp(hidden, head, head_rows, None)]
    return _join(golds, np.float32)


def sum_chunks(logp: np.ndarray, chunk: np.ndarray, active: np.ndarray) -> np.ndarray:
    """[A] float32: log-prob of each active chunk, in chunk order, from its tokens' (in any order).

    Args:
        logp, chunk: [Q] token log-probs and the chunk of each; every active chunk has at least one.
        active: [C] bool.
    """
    return np.bincount(chunk, weights=logp.astype(np.float64), minlength=len(active))[active].astype(
        np.float32
    )


def _join(parts: list[Tensor], dtype: type) -> np.ndarray:
    return torch.cat(parts).cpu().numpy().astype(dtype) if parts else np.zeros(0, dtype=dtype)
