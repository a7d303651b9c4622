"""vLLM's own model classes as teachers: another attention, a head of their own, a pooler that reads.

Which tokens see which is a matter of the attention layer and of how requests are cut into steps:

- `bidirectional`: vLLM's layer for encoders, a whole request in one step.
- `block-causal`, `staircase`: keys and values in pages, steps of one block each (`vllm_scheduler`), and every
  token of a step sees all others of it.
- `causal`: the layer as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
from vllm.model_executor.models import glm4_moe, llama, qwen2, qwen3
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.attention.selector import get_attn_backend

from precompute.backends.vllm_checkpoint import SECTION, read_checkpoint
from precompute.backends.vllm_pooler import ReadPooler


@functools.cache
def whole_blocks(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend whose steps are blocks: inside one everyone sees everyone.

    Raises:
        RuntimeError: while it runs, a step that is not one whole block of each request.
    """

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        def build(
            self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
        ) -> AttentionMetadata:
            size = self.vllm_config.model_config.hf_config.to_dict()[SECTION]["block_size"]
            length = common.query_start_loc_cpu.diff()
            exact = common.seq_lens_cpu_upper_bound
            start = (common.seq_lens.cpu() if exact is None else exact) - length
            if (start % size).any() or (length > size).any():
                raise RuntimeError(
                    f"steps {start.tolist()} + {length.tolist()} are not blocks of {size} tokens: this "
                    "version of vLLM schedules in another way"
                )
            # Without a common prefix: what requests share is attended to like the rest.
            return super().build(0, common.replace(causal=False), fast_build)

    return subclass_attention_backend("WholeBlocks", backend, Builder)


class BlockAttention(Attention):
    """vLLM's layer on `whole_blocks`."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **settings: Any) -> None:
        cache = settings.get("cache_config")
        dtype = cache.cache_dtype if cache is not None else "auto"
        backend = whole_blocks(get_attn_backend(head_size, torch.get_default_dtype(), dtype))
        super().__init__(num_heads, head_size, scale, attn_backend=backend, **settings)


LAYERS: dict[str, type[Attention]] = {
    "bidirectional": EncoderOnlyAttention,
    "block-causal": BlockAttention,
    "staircase": BlockAttention,
    "causal": Attention,
}
"""Attention kind -> layer."""


@contextmanager
def layers_of(module: ModuleType, layer: type[Attention]) -> Iterator[None]:
    """A model that is made inside has attention layers of this class."""
    before = module.Attention
    module.Attention = layer  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.Attention = before  # type: ignore[attr-defined]


class Teaching:
    """What turns one of vLLM's classes, which it is put in front of, into a teacher."""

    is_pooling_model = True
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    attn_type = "decoder"
    score_type = "bi-encoder"
    module: ModuleType
    """Where the class makes its attention layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        with layers_of(self.module, LAYERS[getattr(config, SECTION)["attention"]]):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._folder = Path(vllm_config.model_config.model)
        # Whole on every rank: one rank may then ask it when the others do not.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pooler = ReadPooler(self.head)

    def head(self, hidden: Tensor) -> Tensor:
        """[q, V] logits of [q, H]."""
        return self.lm_head(hidden)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Published tensors, whatever names their family has."""
        named = read_checkpoint(self._folder).named(weights)
        return super().load_weights(named)  # type: ignore[misc]


class TideQwen2(Teaching, qwen2.Qwen2ForCausalLM):
    module = qwen2


class TideQwen3(Teaching, qwen3.Qwen3ForCausalLM):
    module = qwen3


class TideLlama(Teaching, llama.LlamaForCausalLM):
    module = llama


class TideLLaDA2(Teaching, glm4_moe.Glm4MoeForCausalLM):
    module = glm4_moe
