"""The student network `a2d-qwen3`: transformers' Qwen3, bidirectional, logits only where they are read.

This file needs torch and transformers alone: `tide export` puts a copy beside the weights, so that people
without tide load a student with `trust_remote_code=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.modeling_outputs import CausalLMOutputWithPast


class A2DQwen3Config(Qwen3Config):
    """Qwen3's configuration under the student's model type."""

    model_type = "a2d-qwen3"
    is_causal = False  # transformers builds bidirectional masks for a config that says so


class A2DQwen3Model(Qwen3Model):
    """Qwen3's decoder stack with bidirectional attention."""

    config_class = A2DQwen3Config

    def __init__(self, config: A2DQwen3Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False  # without a mask, SDPA and flash attention ask the module


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    """The student with its head. Output i predicts token i (not the next one)."""

    config_class = A2DQwen3Config

    def __init__(self, config: A2DQwen3Config) -> None:
        super().__init__(config)
        self.model = A2DQwen3Model(config)
        self.loss_type = "ForMaskedLM"  # `labels`, where a caller passes them, are not shifted
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        read: Tensor | None = None,
        loss_head: Callable[[Tensor, nn.Module], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen3ForCausalLM's; with `read`, logits are made at those tokens alone.

        Args:
            read: [N] int64 into the flattened [R * P] tokens; `logits` is then [N, V]. Going through
                `forward` keeps wrappers (DDP, FSDP, autocast) in the loop.
            loss_head: called with the hidden states [N, H] at `read` and the head, which then makes no logits
                here; what it returns is returned.
        """
        if read is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state.flatten(0, 1)[read]
        if loss_head is not None:
            return loss_head(hidden, self.lm_head)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
