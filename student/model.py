"""Loading a student, `a2d-qwen3` (`student.modeling_a2d_qwen3` has the network).

Importing this module registers the family with the Auto classes. Weights, names and config fields are
Qwen3's, so any Qwen3 checkpoint is a starting point and published a2d-qwen3 students load unchanged.
Attention is bidirectional over a 2D padding mask; a 4D mask or a FlexAttention BlockMask
(`student.attention`) is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging as hf_logging

from shards.errors import ModelError
from student.modeling_a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel, A2DQwen3Model
from student.run_attention import RUNS
from student.tokenizer import load_tokenizer

ACCEPTED = ("a2d-qwen3", "qwen3")
"""Values of `model_type` that a student can start from."""


AutoConfig.register(A2DQwen3Config.model_type, A2DQwen3Config, exist_ok=True)
AutoModel.register(A2DQwen3Config, A2DQwen3Model, exist_ok=True)
AutoModelForCausalLM.register(A2DQwen3Config, A2DQwen3LMHeadModel, exist_ok=True)
AutoModelForMaskedLM.register(A2DQwen3Config, A2DQwen3LMHeadModel, exist_ok=True)


def load_student(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: Any = None,
) -> tuple[A2DQwen3LMHeadModel, Any]:
    """A student and its tokenizer from a transformers folder or hub id.

    A Qwen3 autoregressive checkpoint becomes an a2d-qwen3 student with the same weights. Where the tokenizer
    has more ids than the embedding (an added mask token), the embedding grows and the new rows start as the
    mean row.

    Args:
        dtype: of the weights; training keeps float32 and computes in bfloat16 by autocast.
        attention: transformers' attention implementation; None = `flex_attention` on CUDA, else
            `student.run_attention`.
        quantization: transformers' quantisation settings for weights that are not trained (QLoRA).

    Raises:
        ModelError: no such folder, an unknown family (names `model_type` and what is accepted), missing
        weights, or
            no usable tokenizer.
    """
    if attention is None:
        attention = "flex_attention" if torch.cuda.is_available() else RUNS
    config = read_config(path)
    tokenizer = load_tokenizer(path)
    try:
        with without_progress_bar():
            model, info = A2DQwen3LMHeadModel.from_pretrained(
                str(path),
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                quantization_config=quantization,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError) as e:
        reason = (str(e) or type(e).__name__).strip().splitlines()[0]
        raise ModelError(
            f"{path}: weights cannot be loaded ({reason}); the folder needs safetensors files"
        ) from e
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"{path}: {len(info['missing_keys'])} weights missing ({some}, ...); the checkpoint is incomplete"
        )
    _grow(model, len(tokenizer))
    return model, tokenizer


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Silences the library's bars for loading and writing files; they would cut through our lines."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def read_config(path: str | Path) -> A2DQwen3Config:
    """A student's configuration, without its weights. Raises: ModelError, as `load_student`."""
    folder = Path(path).expanduser()
    looks_local = folder.exists() or Path(path).is_absolute() or str(path).count("/") != 1
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such model folder"
        raise ModelError(f"{path}: {what}; pass a transformers folder (config.json, safetensors, tokenizer)")
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as e:
        reason = (str(e) or type(e).__name__).strip().splitlines()[0]
        raise ModelError(
            f"{path}: config.json cannot be read ({reason}); accepted model_type: {', '.join(ACCEPTED)}"
        ) from e
    if config.model_type not in ACCEPTED:
        raise ModelError(
            f"{path}: model_type {config.model_type!r} is not a student family; accepted: "
            f"{', '.join(ACCEPTED)}"
        )
    fields = config.to_dict()
    # auto_map names modelling code beside that checkpoint, which is not beside those that this student saves.
    for name in ("model_type", "architectures", "auto_map"):
        fields.pop(name, None)
    return A2DQwen3Config(**fields)


def _grow(model: A2DQwen3LMHeadModel, size: int) -> None:
    """Grow the vocabulary to `size`; new rows are the mean of the old: loading draws nothing random."""
    old = model.config.vocab_size
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(dim=0)
