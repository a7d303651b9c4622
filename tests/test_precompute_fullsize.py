"""LLaDA2.0-mini and WeDLM-8B at full size, without their weights: models on the meta device, from the
published configurations; tensor names as the golden checkpoints of the same families have them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4MoeForCausalLM, Qwen3ForCausalLM

from precompute.teachers import dense, llada2
from precompute.teachers.checkpoint import empty_model
from precompute.teachers.families import family_of
from tools.planning.models import KNOWN

MINI, WEDLM_8B = (KNOWN[name] for name in ("LLaDA2.0-mini", "WeDLM-8B"))


def tensors_at_size(golden_model: Path, published: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The golden checkpoint's names and shapes, carried over to another configuration of its family.

    Layers of each kind and experts are repeated, every dimension is what that configuration makes it.
    """
    small = json.loads((golden_model / "config.json").read_text())
    heads = ("num_attention_heads", "num_key_value_heads")

    def dims(config: dict[str, Any], name: str, axis: int) -> int:
        q, kv = (config[h] * config["head_dim"] for h in heads)
        wide = config["intermediate_size"]
        if ".experts." in name or "shared_experts" in name:
            wide = config["moe_intermediate_size"]
        rows, columns = {
            "word_embeddings": (config["vocab_size"], config["hidden_size"]),
            "embed_tokens": (config["vocab_size"], config["hidden_size"]),
            "lm_head": (config["vocab_size"], config["hidden_size"]),
            "query_key_value": (q + 2 * kv, config["hidden_size"]),
            "q_proj": (q, config["hidden_size"]),
            "k_proj": (kv, config["hidden_size"]),
            "v_proj": (kv, config["hidden_size"]),
            "dense": (config["hidden_size"], q),
            "o_proj": (config["hidden_size"], q),
            "gate_proj": (wide, config["hidden_size"]),
            "up_proj": (wide, config["hidden_size"]),
            "down_proj": (config["hidden_size"], wide),
            "gate": (config.get("num_experts", 0), config["hidden_size"]),
            "query_layernorm": (config["head_dim"], 0),
            "key_layernorm": (config["head_dim"], 0),
            "q_norm": (config["head_dim"], 0),
            "k_norm": (config["head_dim"], 0),
        }.get(name.split(".")[-2], (config["hidden_size"], 0))
        return (rows, columns)[axis]

    tensors: dict[str, tuple[int, ...]] = {}
    for name, tensor in load_file(golden_model / "model.safetensors").items():
        assert tuple(tensor.shape) == tuple(dims(small, name, a) for a in range(tensor.ndim)), name
        shape = tuple(dims(published, name, a) for a in range(tensor.ndim))
        layer = re.search(r"layers\.(\d+)\.", name)
        layers: list[int | None] = [None]
        if layer:
            first = published.get("first_k_dense_replace", 0)
            dense_layer = int(layer[1]) < small.get("first_k_dense_replace", 0)
            layers = list(range(first) if dense_layer else range(first, published["num_hidden_layers"]))
        experts = range(published["num_experts"]) if ".experts." in name else [0]
        for n in layers:
            for e in experts:
                at = re.sub(r"layers\.\d+\.", f"layers.{n}.", name)
                tensors[re.sub(r"experts\.\d+\.", f"experts.{e}.", at)] = shape
    return tensors


@pytest.mark.parametrize(
    ("published", "golden_name", "count", "parameters"),
    [(MINI, "teacher_moe", 14813, 16.256e9), (WEDLM_8B, "teacher_dense", 399, 8.191e9)],
)
def test_full_size_weight_maps_cover_everything_once(
    golden: Path, published: dict[str, Any], golden_name: str, count: int, parameters: float
) -> None:
    """LLaDA2.0-mini and WeDLM-8B on the meta device: every published tensor goes to exactly one place, every
    parameter comes from exactly one entry, in its shape."""
    tensors = tensors_at_size(golden / "D_trace" / "models" / golden_name, published)
    assert len(tensors) == count
    family = family_of(published)
    if family.structure == "llada2":
        config: Any = llada2.glm_config(published)
        model = empty_model(Glm4MoeForCausalLM, config, dtype=torch.bfloat16)
        entries = llada2.weight_map(config)
    else:
        config = dense.dense_config(published, family)
        assert family.structure == "qwen3"
        model = empty_model(Qwen3ForCausalLM, config, dtype=torch.bfloat16)
        entries = dense.weight_map(config, family)
    assert sorted(n for e in entries for n in e.theirs) == sorted(tensors)
    state = model.state_dict()
    assert sorted(n for e in entries for n in e.ours) == sorted(state)
    for e in entries:
        with torch.device("meta"):
            built = e.to_ours([torch.empty(tensors[n]) for n in e.theirs])
        assert [t.shape for t in built] == [state[n].shape for n in e.ours], e.ours
    assert sum(np.prod(s) for s in tensors.values()) == pytest.approx(parameters, rel=1e-3)
