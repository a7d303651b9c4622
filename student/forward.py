"""Run a network over packed rows and read hidden states where they are asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from student.attention import Coordinates, attention_mask
from student.layout import Attention


def hidden_at(
    model: Any, input_ids: Tensor, position_ids: Tensor, at: Coordinates, read: Tensor, attention: Attention
) -> Tensor:
    """[N, H]: the last hidden states (after the final norm) at `read`, flat indices into the [R, P] rows.

    Any decoder-only transformers model serves; the head (`model.get_output_embeddings()`) is not run.
    """
    mask = attention_mask(attention, at, model)
    out = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
    )
    return out.last_hidden_state.flatten(0, 1)[read]
