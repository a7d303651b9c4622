"""Dense teachers: Qwen2, Qwen3 and Llama structures, whatever family name their config.json gives.

WeDLM is Qwen3 (`qk_norm` true) or Qwen2 (false) by another name; a BD3LM student (`a2d-qwen3`) is Qwen3.
Which tokens see which is decided by the attention mask, so the library's causal classes serve as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shards.errors import ModelError

Classes = tuple[Any, Any]
"""A library configuration class and its model class."""

QWEN2: Classes = (Qwen2Config, Qwen2ForCausalLM)
QWEN3: Classes = (Qwen3Config, Qwen3ForCausalLM)
STRUCTURES: dict[str, Callable[[Mapping[str, Any]], Classes]] = {
    "wedlm": lambda published: QWEN3 if published.get("qk_norm") else QWEN2,
    "a2d-qwen3": lambda published: QWEN3,
    "qwen3": lambda published: QWEN3,
    "qwen2": lambda published: QWEN2,
    "llama": lambda published: (LlamaConfig, LlamaForCausalLM),
}
"""Model type -> the library's classes for a configuration of it."""

NOT_STRUCTURE = (
    "model_type",
    "architectures",
    "auto_map",
    "qk_norm",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
"""Fields of a published configuration that say what it is called or how it was saved, not what it is."""


def load_dense(
    folder: Path,
    published: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str,
) -> Any:
    """Read a dense checkpoint into the library's class of its structure.

    Raises:
        ModelError: tensors are missing, left over, or of the wrong shape (names them).
    """
    config_class, model_class = STRUCTURES[published["model_type"]](published)
    fields = {k: v for k, v in published.items() if k not in NOT_STRUCTURE}
    if fields.get("rope_scaling") is None:  # the library reads null as a setting of its own, and warns
        fields.pop("rope_scaling", None)
    config = config_class(**fields)
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map={"": str(device)},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as e:
        raise ModelError(
            f"{folder}: cannot be read as {model_class.__name__}: {str(e).splitlines()[0]}"
        ) from e
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ModelError(
                f"{folder}: {problem.replace('_', ' ')} {', '.join(sorted(info[problem])[:3])} for "
                f"{model_class.__name__}; is it a whole {published['model_type']} checkpoint?"
            )
    return model
