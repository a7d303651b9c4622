"""From a folder or hub id to a teacher: the family its config.json names, its mask token, how it attends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from precompute.teachers import dense, llada2
from precompute.teachers.base import TeacherSpec, TransformersTeacher, weights_hash
from shards.errors import ModelError
from student.layout import Attention

DEFAULT_ATTENTION: dict[str, Attention] = {
    llada2.MODEL_TYPE: "bidirectional",
    **dict.fromkeys(dense.STRUCTURES, "staircase"),
}
"""Model type -> how its streams attend unless told otherwise (the paper's choices)."""

PUBLISHED_MASK = {(llada2.MODEL_TYPE, 157184): 156895}
"""(model type, vocabulary) -> mask id of published models that name it in neither tokenizer nor
config.json."""

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What a teacher needs from the hub; never code."""


def teacher_folder(path_or_id: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a model and, for a hub id, the commit it is at.

    Raises:
        ModelError: no such folder, and no such model within reach on the hub.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.is_absolute() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith("."):
        raise ModelError(f"{path_or_id}: no such model folder; give a folder with config.json, or a hub id")
    try:
        folder = Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=FILES))
    except Exception as e:  # the hub client raises many kinds; all mean that the model is not to be had
        reason = str(e).splitlines()[0]
        raise ModelError(f"{path_or_id}: neither a folder nor reachable on the hub ({reason})") from e
    return folder, folder.name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: missing, unreadable, or of a family this program does not know (names the accepted ones).
    """
    file = folder / "config.json"
    try:
        published = json.loads(file.read_text())
    except FileNotFoundError as e:
        raise ModelError(f"{folder}: no config.json; a model folder holds config.json and safetensors") from e
    except ValueError as e:
        raise ModelError(f"{file}: not JSON ({e}); copy the model folder again") from e
    family = published.get("model_type") if isinstance(published, dict) else None
    if family not in DEFAULT_ATTENTION:
        raise ModelError(f"{file}: model_type {family!r} is not one of {', '.join(DEFAULT_ATTENTION)}")
    return published


def mask_token_id(folder: Path, published: dict[str, Any]) -> int:
    """Mask id from the tokenizer, else from config.json, else the one its published model is known to use."""
    vocab_size = published["vocab_size"]
    mask = None
    if any(folder.glob("tokenizer*.json")):
        mask = AutoTokenizer.from_pretrained(folder).mask_token_id
    if mask is None:
        mask = published.get("mask_token_id", PUBLISHED_MASK.get((published["model_type"], vocab_size)))
    if mask is None:
        raise ModelError(
            f"{folder}: no mask token: config.json needs mask_token_id, or its tokenizer a mask_token"
        )
    if not 0 <= mask < vocab_size:
        raise ModelError(f"{folder}: mask id {mask} lies outside the model's vocabulary of {vocab_size}")
    return int(mask)


def load_teacher(
    path_or_id: str | Path,
    *,
    attention: Attention | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> TransformersTeacher:
    """A frozen teacher from a transformers folder or hub id; runs no code of the checkpoint.

    Args:
        attention: how its streams attend; None = the family's own (`DEFAULT_ATTENTION`).
        revision: commit, branch or tag on the hub.

    Raises:
        ModelError: missing folder, unknown family, weights missing or left over, no mask token.
    """
    folder, commit = teacher_folder(path_or_id, revision)
    published = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no safetensors file; a model folder holds config.json and safetensors")
    family = published["model_type"]
    mask = mask_token_id(folder, published)
    implementation = "flex_attention" if torch.device(device).type == "cuda" else "sdpa"
    model: Any
    if family == llada2.MODEL_TYPE:
        config = llada2.glm_config(published, str(folder / "config.json"))
        model = llada2.load_llada2(
            folder, config, dtype=dtype, device=device, attn_implementation=implementation
        )
    else:
        model = dense.load_dense(
            folder, published, dtype=dtype, device=device, attn_implementation=implementation
        )
    spec = TeacherSpec(
        name=str(path_or_id) if commit else folder.resolve().name,
        revision=commit,
        architecture=family,
        attention=attention or DEFAULT_ATTENTION[family],
        mask_token_id=mask,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        shifted=False,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash=weights_hash(folder),
    )
    return TransformersTeacher(model, spec)
