"""Families of diffusion language models, as data: what the library calls their structure, how their
checkpoints name things, and how they are asked.

A checkpoint of a model type that is not in the table, or one that differs from its family, is described by an
object under `tide_teacher` in its config.json, with the fields of `Family`. See docs/teachers.md for where
each fact comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shards.errors import ModelError
from student.layout import ATTENTIONS, Attention

SECTION = "tide_teacher"
"""Key of config.json under which a checkpoint describes itself."""
STRUCTURES = ("qwen2", "qwen3", "llama", "llada2")
"""Structures that the library has: three dense ones, and GLM-4-MoE, which LLaDA2 is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Checkpoints of one model type. Everything but `structure` has a default: a BD3LM by its own names."""

    structure: str
    """One of `STRUCTURES`."""
    structure_with_qk_norm: str | None = None
    """Structure where config.json says `qk_norm: true`; None = the same."""
    attention: Attention = "staircase"
    """How it attends unless told otherwise: as it was trained, or as the paper asks it."""
    shifted: bool = False
    """The output at i - 1 predicts position i, as in the autoregressive model it was made from."""
    mask_token_id: int | None = None
    """Where neither tokenizer nor config.json names one; None = an error."""
    block_size: int | None = None
    """Tokens per block that it was trained with; None = the dataset's `--block-size`."""
    block_size_field: str | None = None
    """Field of config.json that says so, if it is there."""
    tokenizer_type: str | None = None
    """Library tokenizer to read its vocabulary with, where the published one is code."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Published configuration field -> the library's."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """The library's module -> the published one, `*` standing for the layer number; others keep their
    name."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Published configuration fields that must have this value where they are present."""


FAMILIES: dict[str, Family] = {
    "llada2_moe": Family(structure="llada2", attention="bidirectional", mask_token_id=156895),
    "wedlm": Family(structure="qwen2", structure_with_qk_norm="qwen3", mask_token_id=151665),
    "a2d-qwen3": Family(structure="qwen3"),
    "qwen3": Family(structure="qwen3"),
    "qwen2": Family(structure="qwen2"),
    "llama": Family(structure="llama"),
    "llada": Family(
        structure="llama",
        attention="bidirectional",
        mask_token_id=126336,
        fields={
            "d_model": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "mlp_hidden_size": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
            "embedding_size": "vocab_size",
            "weight_tying": "tie_word_embeddings",
        },
        tensors={
            "model.embed_tokens": "model.transformer.wte",
            "model.norm": "model.transformer.ln_f",
            "lm_head": "model.transformer.ff_out",
            "model.layers.*.input_layernorm": "model.transformer.blocks.*.attn_norm",
            "model.layers.*.self_attn.q_proj": "model.transformer.blocks.*.q_proj",
            "model.layers.*.self_attn.k_proj": "model.transformer.blocks.*.k_proj",
            "model.layers.*.self_attn.v_proj": "model.transformer.blocks.*.v_proj",
            "model.layers.*.self_attn.o_proj": "model.transformer.blocks.*.attn_out",
            "model.layers.*.post_attention_layernorm": "model.transformer.blocks.*.ff_norm",
            "model.layers.*.mlp.gate_proj": "model.transformer.blocks.*.ff_proj",
            "model.layers.*.mlp.up_proj": "model.transformer.blocks.*.up_proj",
            "model.layers.*.mlp.down_proj": "model.transformer.blocks.*.ff_out",
        },
        requires={
            "block_type": "llama",
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
        },
    ),
    "Dream": Family(
        structure="qwen2",
        attention="bidirectional",
        shifted=True,
        mask_token_id=151666,
        tokenizer_type="qwen2",
    ),
    "sdar": Family(structure="qwen3", mask_token_id=151669, block_size=4, block_size_field="block_size"),
    "Fast_dLLM_Qwen": Family(
        structure="qwen2", shifted=True, mask_token_id=151665, block_size=32, block_size_field="bd_size"
    ),
}
"""Model type -> family."""
AUTOREGRESSIVE = ("qwen2", "qwen3", "llama")
"""Model types of autoregressive checkpoints too: of those that name no mask token."""


def family_of(published: Mapping[str, Any], name: str = "config.json") -> Family:
    """The family of a published configuration: the table's, changed by what its `tide_teacher` section says.

    Raises:
        ModelError: an unknown model type without a section, or a section that says what cannot be (names the
            field and what it may be), or a field of the configuration that the structure cannot follow.
    """
    model_type = published.get("model_type")
    section = published.get(SECTION, {})
    known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if known is None and not section:
        raise ModelError(
            f"{name}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}; describe it under "
            f"{SECTION} there (docs/teachers.md)"
        )
    family = _described(known, section, name)
    for key, value in family.requires.items():
        if published.get(key) not in (value, None):
            raise ModelError(
                f"{name}: {key} = {published[key]!r}, but tide reads {model_type} only with {value!r} there"
            )
    own = published.get(family.block_size_field) if family.block_size_field else None
    if own is not None and "block_size" not in section:
        family = replace(family, block_size=_checked(f"{name}: {family.block_size_field}", own, int))
    if family.structure_with_qk_norm and published.get("qk_norm"):
        family = replace(family, structure=family.structure_with_qk_norm)
    return family


def _described(known: Family | None, section: Any, name: str) -> Family:
    """A family with the fields of a `tide_teacher` section, each checked."""
    where = f"{name}: {SECTION}"
    kinds: dict[str, type] = {f.name: str for f in fields(Family)}
    kinds |= dict.fromkeys(("mask_token_id", "block_size"), int) | {"shifted": bool}
    kinds |= dict.fromkeys(("fields", "tensors", "requires"), dict)
    for key, value in _checked(where, section, dict).items():
        if key not in kinds:
            raise ModelError(f"{where} has no field {key!r}; its fields are {', '.join(kinds)}")
        _checked(f"{where}.{key}", value, kinds[key])
    choices: dict[str, tuple[str, ...]] = {"structure": STRUCTURES, "attention": ATTENTIONS}
    for key, allowed in choices.items():
        if key in section and section[key] not in allowed:
            raise ModelError(f"{where}.{key} must be one of {', '.join(allowed)}, got {section[key]!r}")
    if known is None and "structure" not in section:
        raise ModelError(f"{where} needs structure, one of {', '.join(STRUCTURES)}")
    family = Family(**section) if known is None else replace(known, **section)
    if family.structure == "llada2" and (family.fields or family.tensors):
        raise ModelError(f"{where}: fields and tensors are for dense structures, not for llada2")
    return family


def _checked(where: str, value: Any, kind: type) -> Any:
    """`value`, which must be of `kind` (a bool is no number), and not negative."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (number if kind is int else isinstance(value, kind)):
        said = {int: "a whole number", bool: "true or false", dict: "an object", str: "text"}[kind]
        raise ModelError(f"{where} must be {said}, got {value!r}")
    return value
