"""Models that can be planned with by name, from their published configurations, without a folder or a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KNOWN: dict[str, dict[str, Any]] = {
    "LLaDA2.0-mini": {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": 157184,
        "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 512,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "score_function": "sigmoid", "norm_topk_prob": True, "use_qk_norm": True, "use_qkv_bias": False,
        "use_bias": False, "norm_head": False, "partial_rotary_factor": 0.5, "rope_theta": 600000,
        "rope_scaling": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu",
        "tie_word_embeddings": False, "pad_token_id": 156892, "dtype": "bfloat16",
    },
    "WeDLM-8B": {
        "architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "qk_norm": True,
        "attention_bias": False, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "rope_scaling": None, "max_position_embeddings": 16384, "hidden_act": "silu",
        "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
        "dtype": "bfloat16",
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "max_position_embeddings": 40960, "hidden_act": "silu", "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}  # fmt: skip
"""Name -> config.json."""


def known_folder(name: str, under: Path) -> str:
    """`name`, or, of a model of `KNOWN` (unless a folder has its name), a folder with its configuration."""
    if name not in KNOWN or Path(name).is_dir():
        return name
    folder = under / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(KNOWN[name]))
    return str(folder)
