"""LLaDA2 (`llada2_moe`) checkpoints in transformers' own Glm4MoeForCausalLM, without remote code.

The two are one structure: rotary over part of each head, QK norm, DeepSeek-V3 routing, a shared expert, dense
first layers. They differ in names, in the fused query_key_value and in how experts are stored, one tensor
each there, stacked here so that the library's grouped GEMM applies. `weight_map` says so once; loading reads
it one way, `to_llada2` the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from precompute.teachers.checkpoint import Entry, load_weights
from shards.errors import ModelError, UsageError

MODEL_TYPE = "llada2_moe"
EXPERTS = ("grouped_mm", "eager")
"""How the library multiplies by experts: all in one grouped GEMM, or in a loop over them. On a CPU with the
256 experts of LLaDA2.0 the first takes half the time; with 64 and many tokens for each, up to half more."""
KEPT_IN_FLOAT32 = "e_score_correction_bias"
"""The router's selection bias: rounding it changes which experts are chosen."""
TIED = {"lm_head.weight": "model.word_embeddings.weight"}
"""Published head -> published embeddings, where they are tied."""

SAME_NAME = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "head_dim",
    ),
    *("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group"),
    *("first_k_dense_replace", "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings"),
)
"""Fields both configurations have under one name."""


def weight_map(config: Glm4MoeConfig) -> list[Entry]:
    """Every parameter of the model, exactly once, against the published tensors it is made of."""
    head = config.head_dim
    rows = (config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2)
    entries: list[Entry] = []

    def same(ours: str, theirs: str | None = None) -> None:
        entries.append(Entry((ours,), (theirs or ours,)))

    same("model.embed_tokens.weight", "model.word_embeddings.weight")
    same("model.norm.weight")
    if not config.tie_word_embeddings:
        same("lm_head.weight")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        same(f"{at}.input_layernorm.weight")
        same(f"{at}.post_attention_layernorm.weight")
        same(f"{at}.self_attn.o_proj.weight", f"{at}.attention.dense.weight")
        if config.use_qk_norm:
            same(f"{at}.self_attn.q_norm.weight", f"{at}.attention.query_layernorm.weight")
            same(f"{at}.self_attn.k_norm.weight", f"{at}.attention.key_layernorm.weight")
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            ours = tuple(f"{at}.self_attn.{x}_proj.{kind}" for x in "qkv")
            entries.append(Entry(ours, (f"{at}.attention.query_key_value.{kind}",), rows=rows))
        if layer < config.first_k_dense_replace:
            for name in ("gate_proj", "up_proj", "down_proj"):
                same(f"{at}.mlp.{name}.weight")
            continue
        same(f"{at}.mlp.gate.weight")
        same(f"{at}.mlp.gate.{KEPT_IN_FLOAT32}", f"{at}.mlp.gate.expert_bias")
        for name in ("gate_proj", "up_proj", "down_proj"):
            same(f"{at}.mlp.shared_experts.{name}.weight")
        for ours_name, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            theirs = tuple(
                f"{at}.mlp.experts.{e}.{n}.weight" for e in range(config.n_routed_experts) for n in names
            )
            entries.append(Entry((f"{at}.mlp.experts.{ours_name}",), theirs, parts=len(names)))
    return entries


def glm_config(published: Mapping[str, Any], name: str = "config.json") -> Glm4MoeConfig:
    """The library's configuration of a published one.

    Raises:
        ModelError: a field is missing, or asks for something the library's class does not do.
    """
    missing = [k for k in (*SAME_NAME, "num_experts") if k not in published]
    if missing:
        raise ModelError(f"{name}: a {MODEL_TYPE} configuration needs {', '.join(missing)}")
    unlike = {
        "use_bias": bool(published.get("use_bias", False)),
        "norm_head": bool(published.get("norm_head", False)),
        "use_sliding_window": bool(published.get("use_sliding_window", False)),
        "num_nextn_predict_layers": bool(published.get("num_nextn_predict_layers", 0)),
        "score_function": published.get("score_function", "sigmoid") != "sigmoid",
        "num_shared_experts": not published.get("num_shared_experts", 1),
    }
    if any(unlike.values()):
        field = next(k for k, wrong in unlike.items() if wrong)
        raise ModelError(
            f"{name}: {field} = {published.get(field)!r} is not part of the LLaDA2 structure that tide loads"
        )
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {"rope_type": "default"})
    rope.setdefault("rope_theta", published.get("rope_theta", 10000.0))
    if "partial_rotary_factor" not in rope:
        share = (
            published.get("partial_rotary_factor") or published.get("rotary_dim", 0) / published["head_dim"]
        )
        rope["partial_rotary_factor"] = share or 1.0
    return Glm4MoeConfig(
        **{k: published[k] for k in SAME_NAME},
        n_routed_experts=published["num_experts"],
        n_shared_experts=published.get("num_shared_experts", 1),
        norm_topk_prob=published.get("norm_topk_prob", True),
        use_qk_norm=published.get("use_qk_norm", True),
        attention_bias=published.get("use_qkv_bias", False),
        tie_word_embeddings=published.get("tie_word_embeddings", False),
        hidden_act=published.get("hidden_act", "silu"),
        rope_parameters=rope,
        num_mtp_layers=0,
        pad_token_id=None,
    )


def published_config(config: Glm4MoeConfig) -> dict[str, Any]:
    """The published form of a library configuration: what `glm_config` reads back unchanged."""
    rope = config.rope_parameters
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": MODEL_TYPE,
        **{k: getattr(config, k) for k in SAME_NAME},
        "num_experts": config.n_routed_experts,
        "num_shared_experts": config.n_shared_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "use_qk_norm": config.use_qk_norm,
        "use_qkv_bias": config.attention_bias,
        "use_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "score_function": "sigmoid",
    }


def load_llada2(
    folder: Path,
    config: Glm4MoeConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str,
    experts: str = "grouped_mm",
) -> Glm4MoeForCausalLM:
    """Read a published checkpoint.

    Args:
        experts: one of `EXPERTS`.

    Raises:
        UsageError: `experts` is none of them. ModelError: this machine cannot do it, or tensors are missing,
            left over, or of the wrong shape (names them).
    """
    if experts not in EXPERTS:
        raise UsageError(f"experts must be one of {', '.join(EXPERTS)}, got {experts!r}")
    model = load_weights(
        folder,
        Glm4MoeForCausalLM,
        config,
        weight_map(config),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        tied=TIED if config.tie_word_embeddings else None,
        float32=KEPT_IN_FLOAT32,
    )
    try:  # asked for by name, the library refuses where it would otherwise fall back to the loop
        model.set_experts_implementation(experts)
    except (ValueError, ImportError) as e:
        raise ModelError(f"{folder}: experts {experts} cannot run here ({' '.join(str(e).split())})") from e
    return model


def to_llada2(model: Glm4MoeForCausalLM) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config.json of a library model in the published layout: the inverse of loading."""
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for e in weight_map(model.config):
        built = e.to_theirs([state[name] for name in e.ours])
        tensors |= {name: t.contiguous() for name, t in zip(e.theirs, built, strict=True)}
    dtype = str(model.dtype).removeprefix("torch.")
    return tensors, published_config(model.config) | {"dtype": dtype}


def save_llada2(model: Glm4MoeForCausalLM, folder: Path) -> None:
    """Write config.json and model.safetensors of a library model in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, published = to_llada2(model)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
