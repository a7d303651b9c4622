"""How many tokens a packed row gets and how many rows run at once: from the device's memory and habits.

`row_tokens` decides which samples share a row, and with it the last bits of what is written, so it is chosen
once, when a dataset is made, and recorded. How many rows run in one forward is each machine's own business.
"""

from __future__ import annotations

from typing import Any

import torch

from student.layout import SHARED_CLEAN, Attention

LEAST_ROW = {"cpu": 2048, "cuda": 8192}
"""Tokens below which a row leaves a device idle between layers."""
ENOUGH_TOKENS = 32768
"""Tokens of one forward beyond which nothing gets faster, experts included (256 of them, 8 active: a matrix
of 1,000 rows each)."""
USABLE = 0.8
"""Share of the free memory that activations may take."""


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of activations that one token adds to a forward at its peak, in a layer's attention or its MLP.

    Args:
        config: of a transformers model of the Qwen, Llama or GLM-4-MoE structure.
    """
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    rotated = 3 * (query + keys)  # before, after and between
    attention = 2 * hidden + rotated + keys + query
    mlp = 2 * hidden + 3 * config.intermediate_size + hidden
    if experts := getattr(config, "num_experts_per_tok", 0):
        mlp = max(mlp, 3 * hidden + experts * (3 * hidden + 3 * config.moe_intermediate_size))
    return max(attention, mlp) * dtype.itemsize + 2 * hidden * 4  # norms work in float32


def default_row_tokens(
    longest: int,
    *,
    streams: int,
    attention: Attention,
    block_size: int,
    device: torch.device,
    token_bytes: int = 0,
    free_bytes: int | None = None,
) -> int:
    """Row length where none is given: one that holds every stream of the longest sample together, so that its
    clean stream runs once, and is not too short for the device; on an accelerator no longer than its free
    memory allows, but one that holds any single stream.

    Attention costs what its pairs cost, on a CPU too (`student.run_attention`), so long rows are not dear.

    Args:
        longest: most teacher tokens of a sample.
        streams: noisy streams of a sample: views, times two with CompDemo.
        token_bytes: see `token_bytes`; 0 = memory is no concern.
        free_bytes: of the device; None = it is asked.
    """
    longest = -(-longest // block_size) * block_size
    clean = 1 if attention in SHARED_CLEAN else 0
    tokens = max(LEAST_ROW.get(device.type, LEAST_ROW["cuda"]), (clean + streams) * longest)
    if device.type == "cuda" and token_bytes:
        tokens = min(tokens, _usable(device, free_bytes) // token_bytes)
    return max(tokens, (clean + 1) * longest)


def rows_at_once(
    row_tokens: int, *, device: torch.device, token_bytes: int, free_bytes: int | None = None
) -> int:
    """Rows in one forward to begin with: on an accelerator as many as are of use and fit its free memory, on
    a CPU one (more are no faster). `free_bytes`: see `default_row_tokens`."""
    if device.type != "cuda":
        return 1
    fit = _usable(device, free_bytes) // token_bytes
    return max(1, min(ENOUGH_TOKENS, fit) // row_tokens)


def _usable(device: torch.device, free_bytes: int | None) -> int:
    """Bytes that activations may take."""
    return int(USABLE * (torch.cuda.mem_get_info(device)[0] if free_bytes is None else free_bytes))
