"""The attention predicate: one rule for student, teacher, training and evaluation (BD3LM section 3).

Every token carries (sample s, stream v, block b, order o). A query may attend to a key iff s_q = s_k and

    staircase         (v_k = 0 and b_k < b_q) or (v_q = v_k and b_q = b_k)
    staircase-causal  (v_k = 0 and b_k < b_q) or (v_q = v_k and b_q = b_k and o_k <= o_q)
    bidirectional      v_q = v_k
    block-causal       v_q = v_k and b_k <= b_q
    causal             v_q = v_k and o_k <= o_q
"""

from __future__ import annotations

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


def dense_mask(attention: Attention, at: Coordinates) -> Tensor:
    """[R, 1, P, P] bool, True = may attend, for scaled_dot_product_attention. `at` holds [R, P] tensors."""
    q = Coordinates(*(x[:, :, None] for x in at))
    k = Coordinates(*(x[:, None, :] for x in at))
    return may_attend(attention, q, k)[:, None]


def block_mask(attention: Attention, at: Coordinates) -> Any:
    """FlexAttention BlockMask of the same predicate (CUDA), which skips the empty tiles. `at` holds [R, P]
    tensors."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_attend(attention, Coordinates(*(x[b, q] for x in at)), Coordinates(*(x[b, k] for x in at)))

    rows, length = at.sample.shape
    return create_block_mask(mask_mod, rows, None, length, length, device=str(at.sample.device))


def attention_mask(attention: Attention, at: Coordinates, model: Any) -> Any:
    """The mask in the form that the attention implementation of `model` (a transformers model) wants."""
    implementation = model.config._attn_implementation
    if implementation == "flex_attention":
        return block_mask(attention, at)
    mask = dense_mask(attention, at)
    if implementation == "eager":  # added to the scores there
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask
