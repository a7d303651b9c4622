"""The attention predicate: one rule for student, teacher, training and evaluation (BD3LM section 3).

Every token carries (sample s, stream v, block b, order o). A query may attend to a key iff s_q = s_k and

    staircase         (v_k = 0 and b_k < b_q) or (v_q = v_k and b_q = b_k)
    staircase-causal  (v_k = 0 and b_k < b_q) or (v_q = v_k and b_q = b_k and o_k <= o_q)
    bidirectional      v_q = v_k
    block-causal       v_q = v_k and b_k <= b_q
    causal             v_q = v_k and o_k <= o_q
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from student.layout import ATTENTIONS, Attention


class Coordinates(NamedTuple):
    """Where tokens are: tensors (or arrays) of one shape, broadcast against another's."""

    sample: Any
    stream: Any
    block: Any
    order: Any


def may_attend(attention: Attention, q: Coordinates, k: Coordinates) -> Any:
    """True where query `q` may attend to key `k`; `q` and `k` broadcast (torch tensors or numpy arrays)."""
    same_stream = q.stream == k.stream
    if attention == "staircase":
        allowed = ((k.stream == 0) & (k.block < q.block)) | (same_stream & (k.block == q.block))
    elif attention == "staircase-causal":
        inside = same_stream & (k.block == q.block) & (k.order <= q.order)
        allowed = ((k.stream == 0) & (k.block < q.block)) | inside
    elif attention == "bidirectional":
        allowed = same_stream
    elif attention == "block-causal":
        allowed = same_stream & (k.block <= q.block)
    elif attention == "causal":
        allowed = same_stream & (k.order <= q.order)
    else:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    return (q.sample == k.sample) & allowed


def one_row(at: Coordinates) -> Coordinates:
    """[R, P] coordinates (tensors) as [1, R * P], the samples of different rows (and their padding) kept
    apart."""
    rows = torch.arange(len(at.sample), device=at.sample.device)[:, None]
    apart = at.sample + rows * (at.sample.max() + 2) if at.sample.numel() else at.sample
    return Coordinates(*(x.reshape(1, -1) for x in (apart, *at[1:])))


def dense_mask(attention: Attention, queries: Coordinates, keys: Coordinates | None = None) -> Tensor:
    """[R, 1, Q, K] bool, True = may attend, for scaled_dot_product_attention. `queries` holds [R, Q] tensors,
    `keys` [R, K]; None = the same tokens."""
    q = Coordinates(*(x[:, :, None] for x in queries))
    k = Coordinates(*(x[:, None, :] for x in keys or queries))
    return may_attend(attention, q, k)[:, None]


@cache
def _create_block_mask(device: str) -> Any:
    """Compiled on CUDA, where it then makes no [Q, K] tensor on the way to the tiles."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask


def block_mask(attention: Attention, queries: Coordinates, keys: Coordinates | None = None) -> Any:
    """FlexAttention BlockMask of the same predicate (CUDA), which skips the empty tiles. Arguments as of
    `dense_mask`."""
    q_at, k_at = queries, keys or queries

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_attend(
            attention, Coordinates(*(x[b, q] for x in q_at)), Coordinates(*(x[b, k] for x in k_at))
        )

    (rows, length), device = q_at.sample.shape, q_at.sample.device
    return _create_block_mask(device.type)(
        mask_mod, rows, None, length, k_at.sample.shape[1], device=str(device)
    )


def attention_mask(attention: Attention, at: Coordinates, model: Any, read: Tensor | None = None) -> Any:
    """The mask in the form that the attention implementation of `model` (a transformers model) wants.

    Args:
        at: [R, P] coordinates of the tokens.
        read: [N] flat indices: the mask of these queries alone, over all R * P keys as one row.
    """
    from student.run_attention import RUNS, run_mask

    queries, keys = at, at
    if read is not None:
        keys = one_row(at)
        queries = Coordinates(*(x[:, read] for x in keys))
    implementation = model.config._attn_implementation
    if implementation == RUNS:
        return run_mask(attention, queries, keys)
    if implementation == "flex_attention":
        return block_mask(attention, queries, keys)
    mask = dense_mask(attention, queries, keys)
    if implementation == "eager":  # added to the scores there
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask
