"""Dense teachers: Qwen2, Qwen3 and Llama structures, whatever names their checkpoints give them.

Which tokens see which is decided by the attention mask, so the library's causal classes serve as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

from precompute.teachers.checkpoint import Entry, empty_model, load_weights
from precompute.teachers.families import SECTION, Family, family_of
from shards.errors import ModelError

CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
"""Structure -> the library's configuration and model class."""

NOT_STRUCTURE = (
    *("model_type", "architectures", "auto_map", SECTION),
    *("qk_norm", "mask_token_id", "transformers_version", "dtype", "torch_dtype"),
)
"""Fields of a published configuration that say what it is called, how it was saved or how it is asked, not
what it is."""

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def dense_config(published: Mapping[str, Any], family: Family, name: str = "config.json") -> Any:
    """The library's configuration of a published one.

    Raises:
        ModelError: it is not one (says what the library finds wrong).
    """
    config_class, _ = CLASSES[family.structure]
    settings = {
        k: v
        for k, v in published.items()
        if k not in (*NOT_STRUCTURE, *family.fields, *family.requires)
        and not (k == "rope_scaling" and v is None)  # the library reads null as a setting, and warns
    }
    settings |= {ours: published[k] for k, ours in family.fields.items() if published.get(k) is not None}
    try:
        return config_class(**settings)
    except (TypeError, ValueError, KeyError) as e:
        why = " ".join(str(e).split())
        raise ModelError(f"{name}: not the configuration of a {family.structure} model ({why})") from e


def published_name(ours: str, tensors: Mapping[str, str]) -> str:
    """The published name of a parameter of the library, by `Family.tensors`."""
    module, _, kind = ours.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    theirs = tensors.get(re.sub(r"\.\d+\.", ".*.", module, count=1))
    if theirs is None:
        return ours
    return f"{theirs.replace('*', layer[1]) if layer else theirs}.{kind}"


def weight_map(config: Any, family: Family) -> list[Entry]:
    """Every parameter of the model, exactly once, against the published tensor it is; a tied head is none."""
    names = empty_model(CLASSES[family.structure][1], config).state_dict()
    return [
        Entry((name,), (published_name(name, family.tensors),))
        for name in names
        if not (name == HEAD and config.tie_word_embeddings)
    ]


def tied_names(family: Family) -> dict[str, str]:
    """Published head -> published embeddings."""
    return {published_name(HEAD, family.tensors): published_name(EMBEDDINGS, family.tensors)}


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
    name = str(folder / "config.json")
    family = family_of(published, name)
    config = dense_config(published, family, name)
    return load_weights(
        folder,
        CLASSES[family.structure][1],
        config,
        weight_map(config, family),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        tied=tied_names(family) if config.tie_word_embeddings else None,
    )
