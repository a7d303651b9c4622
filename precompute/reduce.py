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

from shards.row import DenseTarget, ExactTarget, SparseTarget

Head = Callable[[Tensor], Tensor]
"""[q, H] hidden states -> [q, V'] logits, a new tensor that the caller may overwrite."""


def _logits(
    hidden: Tensor, head: Head, head_rows: int, vocab_size: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of consecutive rows, [q, V] float32 over the first `vocab_size` columns (None = all of them)."""
    for start in range(0, len(hidden), head_rows):
        rows = slice(start, min(start + head_rows, len(hidden)))
        yield rows, head(hidden[rows])[:, :vocab_size].float()


def pick_gold(values: Tensor, gold: Tensor) -> Tensor:
    """[q] values (logits or log-probs) of the true tokens; NaN where an id lies outside the V columns of
    `values` [q, V]."""
    inside = gold < values.shape[1]
    picked = values.gather(1, torch.where(inside, gold, 0)[:, None])[:, 0]
    return torch.where(inside, picked, torch.nan)


def sparse_head(logp: Tensor, rest: Tensor, *, tail_bound: float) -> Tensor:
    """[q] int64: entries of the smallest head that drops less than `tail_bound` of the mass at T = 1, from 1
    to k.

    Args:
        logp: [q, k] largest log-probs, most probable first.
        rest: [q] log of the mass of all others.
    """
    after = torch.cat([logp[:, 1:], rest[:, None]], dim=1).double().exp()
    dropped = after.flip(1).cumsum(1).flip(1)  # summed from the smallest on: 1 - cumsum would round to 0
    return ((dropped >= tail_bound).sum(1) + 1).clamp(max=logp.shape[1])


def rest_logsumexp(logits: Tensor, top: Tensor, ids: Tensor, temperatures: tuple[float, ...]) -> list[Tensor]:
    """log sum of exp(logit / T) over all columns but the k largest, [q] for each T; overwrites `logits`.

    Taken relative to the largest of the rest, so it is exact however small their mass is; one pass of
    exponentials serves T = 1 and 2, e^(x/2) being its square root (what underflows, 87 nats below that
    largest one, weighs less than e^-43 of it there).

    Args:
        logits: [q, V], V > k. top, ids: [q, k + 1], the largest logits in descending order and their columns.
    """
    largest = top[:, -1:].clamp(min=torch.finfo(top.dtype).min)  # -inf - -inf is no number
    logits.scatter_(1, ids[:, :-1], -torch.inf).sub_(largest)
    sums = {T: torch.exp(logits / T).sum(1) for T in temperatures if T not in (1.0, 2.0)}
    sums[1.0] = logits.exp_().sum(1)
    if 2.0 in temperatures:
        sums[2.0] = logits.sqrt_().sum(1)
    return [sums[T].log() + largest[:, 0] / T for T in temperatures]


@torch.inference_mode()
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
    sketch: Callable[[Tensor], np.ndarray] | None = None,
) -> tuple[SparseTarget, np.ndarray]:
    """Sparse targets and gold log-probs [Q] of hidden states [Q, H], over the first `vocab_size` tokens.

    Each chunk of logits is read once for its largest entries and overwritten on the way to its sums, so that
    no second [q, V] tensor is made. Normalised over the vocabulary, zeta_T = log sum of p^(1/T) over the
    tokens outside the head, -inf where there is none, is the sum of two parts: entries of the top k that the
    head leaves out, and everything below them.

    Args:
        sketch: gives codes of the tail's shape [q, R] int8 of logits [q, V]; None = there are none.
    """
    counts, ids, values, tails, golds = [], [], [], [], []
    sketches = [] if sketch is None else [sketch(torch.zeros(0, vocab_size, device=hidden.device))]
    for rows, logits in _logits(hidden, head, head_rows, vocab_size):
        k = min(cap, logits.shape[1])
        top, top_ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
        true = pick_gold(logits, gold[rows])
        if sketch is not None:
            sketches.append(sketch(logits))  # before the logits are overwritten
        ones = (1.0, *temperatures)
        rest = [logits.new_full((len(logits),), -torch.inf)] * len(ones)
        if k < logits.shape[1]:
            rest = rest_logsumexp(logits, top, top_ids, ones)
        top, top_ids = top[:, :k], top_ids[:, :k]
        log_z = torch.cat([top, rest[0][:, None]], dim=1).logsumexp(1)
        logp = top - log_z[:, None]
        n = sparse_head(logp, rest[0] - log_z, tail_bound=tail_bound)
        kept = torch.arange(k, device=top.device) < n[:, None]
        left_out = top.masked_fill(kept, -torch.inf)
        tail = [
            torch.cat([left_out / T, r[:, None]], dim=1).logsumexp(1) - log_z / T
            for T, r in zip(temperatures, rest[1:])
        ]
        counts.append(n)
        ids.append(top_ids[kept])
        values.append(logp[kept])
        tails.append(torch.stack(tail, dim=1))
        golds.append(true - log_z)
    return (
        SparseTarget(
            counts=_join(counts, np.int32),
            ids=_join(ids, np.int32),
            logp=_join(values, np.float32),
            tails=_join(tails, np.float32).reshape(-1, len(temperatures)),
            sketch=np.concatenate(sketches) if sketches else None,
        ),
        _join(golds, np.float32),
    )


def reduce_dense(
    hidden: Tensor, gold: Tensor, head: Head, *, vocab_size: int, head_rows: int
) -> tuple[DenseTarget, np.ndarray]:
    """Whole distributions [Q, V] and gold log-probs [Q] of hidden states [Q, H]."""
    parts, golds = [], []
    for rows, logits in _logits(hidden, head, head_rows, vocab_size):
        parts.append(torch.log_softmax(logits, dim=1))
        golds.append(pick_gold(parts[-1], gold[rows]))
    return DenseTarget(_join(parts, np.float32).reshape(-1, vocab_size)), _join(golds, np.float32)


@torch.inference_mode()
def reduce_exact(
    hidden: Tensor, gold: Tensor, head: Head, *, vocab_size: int, width: int, head_rows: int
) -> tuple[ExactTarget, np.ndarray]:
    """Hidden states [Q, H] as they are, and gold log-probs [Q] over the first `vocab_size` tokens."""
    golds = reduce_gold(hidden, gold, head, vocab_size=vocab_size, head_rows=head_rows)
    kept = hidden.float().cpu().numpy() if len(hidden) else np.zeros((0, width), np.float32)
    return ExactTarget(kept), golds


def reduce_gold(
    hidden: Tensor, gold: Tensor, head: Head, *, head_rows: int, vocab_size: int | None = None
) -> np.ndarray:
    """[Q] float32: log-probs of the true tokens over the teacher's first `vocab_size` tokens (None = all)."""
    golds = [
        pick_gold(logits, gold[rows]) - logits.logsumexp(1)
        for rows, logits in _logits(hidden, head, head_rows, vocab_size)
    ]
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
