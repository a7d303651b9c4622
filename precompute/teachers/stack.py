"""A decoder's layers one after another, the last one at the asked places only.

What the last layer computes at a place is used there and nowhere else, so it needs queries, output projection
and MLP (experts) where it is read, and keys and values alone everywhere else. The library's `forward` has no
such argument; the layer's own submodules do the same sums.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from student.attention import Coordinates, attention_mask
from student.forward import hidden_at
from student.layout import Attention

LAYERS = (Qwen2DecoderLayer, Qwen3DecoderLayer, LlamaDecoderLayer, Glm4MoeDecoderLayer)
"""Layers made of the same submodules under the same names: norm, attention, residual, norm, MLP, residual."""


def known_layers(model: Any) -> bool:
    """Whether `read_last` serves: every layer is of one of `LAYERS` itself, whose `forward` it repeats."""
    return all(type(layer) in LAYERS for layer in getattr(model.base_model, "layers", (None,)))


def read_hidden(
    model: Any, ids: Tensor, position: Tensor, at: Coordinates, read: Tensor, attention: Attention
) -> Tensor:
    """[N, H]: as `student.forward.hidden_at`, at less cost for the classes of `LAYERS`."""
    if not known_layers(model):
        return hidden_at(model, ids, position, at, read, attention)
    base = model.base_model
    hidden = base.embed_tokens(ids)
    rotary = base.rotary_emb(hidden, position)
    *layers, last = base.layers
    if layers:
        mask = attention_mask(attention, at, model)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=position, position_embeddings=rotary)
        del mask  # a dense one is as large as anything in the layer to come
    hidden = read_last(last, hidden, rotary, read, attention_mask(attention, at, model, read))
    return base.norm(hidden)


class _Given:
    """Keys and values in place of a layer's own, handed over where the library's attention would ask a
    cache."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.key, self.value


def read_last(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], read: Tensor, mask: Any) -> Tensor:
    """[N, H]: output of a decoder layer at `read`, flat indices into the [R, P] rows of `hidden` [R, P, H].

    Args:
        rotary: cosines and sines of all tokens, [R, P, D] each.
        mask: of [N] queries over all R * P keys.
    """
    attention = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    everywhere = [x.reshape(1, tokens.shape[1], -1) for x in rotary]
    normed = layer.input_layernorm(tokens)
    key, value = (
        p(normed).unflatten(-1, (-1, attention.head_dim)) for p in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    _, key = rotate(key[:, :0], key, *everywhere)
    seen, _ = attention(
        hidden_states=normed[:, read],
        position_embeddings=tuple(x[:, read] for x in everywhere),
        attention_mask=mask,
        past_key_values=_Given(key, value),
    )
    out = tokens[:, read] + seen
    return (out + layer.mlp(layer.post_attention_layernorm(out)))[0]
