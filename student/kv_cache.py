"""Keys and values of a growing sequence, in slots that are written in place: nothing is copied or moved.

A transformers model takes it as `past_key_values`. While a block is being denoised its own slots are written
again at every pass; the commit pass writes them for the last time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """[rows, KV heads, slots, head size] keys and values for each layer.

    Args:
        config: of the model (Qwen3's fields).
        rows: sequences.
        slots: tokens that fit.
    """

    is_compileable = True  # transformers asks: every tensor keeps its shape and address

    def __init__(
        self, config: Any, rows: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        self._layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        self._rows = torch.arange(rows, device=device)[:, None]
        self._where: slice | Tensor = slice(0, 0)
        self._seen = slice(0, slots)

    @property
    def bytes(self) -> int:
        return sum(2 * keys.numel() * keys.element_size() for keys, _ in self._layers)

    def point(self, where: slice | Tensor, seen: slice) -> None:
        """Say where the next pass writes, and which slots its queries are shown (a mask may hide some).

        Args:
            where: slots of the pass's tokens, the same in each row, or [rows, tokens] slots.
        """
        self._where, self._seen = where, seen

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values [rows, KV heads, tokens, head size]; views of those seen."""
        held = self._layers[layer_idx]
        for slots, new in zip(held, (keys, values)):
            if isinstance(self._where, slice):
                slots[:, :, self._where] = new
            else:
                slots[self._rows, :, self._where] = new.transpose(1, 2)
        return held[0][:, :, self._seen], held[1][:, :, self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of what transformers expects of a cache; positions are always given, so nobody counts."""
        return 0
