"""Counting the FLOPs that run: torch's own counter, told about kernels that it leaves out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten: Any = torch.ops.aten
Shape = Sequence[int]


def attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores and their product with the values; keys may have fewer heads."""
    rows, heads, queries, depth = query
    return 2 * 2 * rows * heads * queries * key[2] * depth


def attention_backward(grad: Shape, query: Shape, key: Shape, *args: Any, **kwargs: Any) -> int:
    """The scores again, and gradients of both products by both factors."""
    return attention(query, key, key) * 5 // 2


def grouped_mm(rows: Shape, weights: Shape, *args: Any, **kwargs: Any) -> int:
    """Every row by the matrix of its group."""
    return 2 * rows[0] * rows[1] * weights[2]


def added_product(total: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Of a product that is added in place."""
    return 2 * left[0] * left[1] * right[1]


KERNELS = {
    aten.addmm_: added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten._grouped_mm: grouped_mm,
}


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of all matrix products and attention in a call."""
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run()
    return counter.get_total_flops()
