"""Run a network over packed rows; read hidden states where they are asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from student.attention import Coordinates, attention_mask
from student.layout import Attention
from student.run_attention import RunMask


def mask_argument(attention: Attention, at: Coordinates, model: Any) -> dict[str, Any]:
    """The attention of a packed batch, as the keyword argument that the forward of `model` takes it by.

    The library takes masks that are tensors; what else an attention function needs, it hands on by name.
    """
    mask = attention_mask(attention, at, model)
    return {"run_mask" if isinstance(mask, RunMask) else "attention_mask": mask}


def hidden_at(
    model: Any, input_ids: Tensor, position_ids: Tensor, at: Coordinates, read: Tensor, attention: Attention
) -> Tensor:
    """[N, H]: the last hidden states (after the final norm) at `read`, flat indices into the [R, P] rows.

    Any decoder-only transformers model serves; the head (`model.get_output_embeddings()`) is not run.
    """
    how = mask_argument(attention, at, model)
    out = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **how)
    return out.last_hidden_state.flatten(0, 1)[read]
