"""From a folder or hub id to a teacher: the family its config.json names, its mask token, how it attends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from precompute.teachers import dense, llada2
from precompute.teachers.base import TeacherSpec, TransformersTeacher
from precompute.teachers.checkpoint import weights_hash
from precompute.teachers.families import SECTION, Family, family_of
from shards.errors import ModelError, UsageError
from student.layout import Attention
from student.run_attention import RUNS
from student.tokenizer import load_tokenizer, read_tokenizer

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md"]
"""What a teacher needs from the hub, and its card, which names its licence; never code."""


def teacher_folder(path_or_id: str | Path) -> tuple[Path, str | None]:
    """The local folder of a model and, for a hub id, the commit it is at.

    Args:
        path_or_id: a folder, or `owner/name` on the hub; `owner/name@revision` for a branch, tag or commit.

    Raises:
        ModelError: no such folder, and no such model within reach on the hub.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder, None
    name, _, revision = str(path_or_id).partition("@")
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ModelError(f"{path_or_id}: no such model folder; give a folder with config.json, or a hub id")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except Exception as e:  # the hub client raises many kinds; all mean that the model is not to be had
        reason = (str(e) or type(e).__name__).splitlines()[0]
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
    if not isinstance(published, dict):
        raise ModelError(f"{file}: not a model configuration; copy the model folder again")
    family_of(published, str(file))
    return published


def load_teacher_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a teacher, as `student.tokenizer.load_tokenizer` gives it.

    Raises:
        ModelError: no such model, or no tokenizer there that can be read without running its code.
    """
    folder, _ = teacher_folder(path_or_id)
    return load_tokenizer(folder, tokenizer_type=family_of(read_config(folder)).tokenizer_type)


def mask_token_id(folder: Path, published: dict[str, Any], family: Family, vocab_size: int) -> int:
    """Mask id from the `tide_teacher` section, else from the tokenizer, else from config.json, else the one
    its family is known to use."""
    mask = published.get(SECTION, {}).get("mask_token_id")
    if mask is None and any(folder.glob("tokenizer*.json")):
        mask = read_tokenizer(folder, tokenizer_type=family.tokenizer_type).mask_token_id
    if mask is None:
        mask = published.get("mask_token_id")
    if mask is None and family.mask_token_id is not None and family.mask_token_id < vocab_size:
        mask = family.mask_token_id
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
    experts: str = "grouped_mm",
) -> TransformersTeacher:
    """A frozen teacher from a transformers folder or hub id; runs no code of the checkpoint.

    Args:
        path_or_id: see `teacher_folder`.
        attention: how its streams attend; None = the family's own way.
        experts: of a mixture of experts, one of `llada2.EXPERTS`.

    Raises:
        ModelError: missing folder, unknown family, weights missing or left over, no mask token.
        UsageError: an attention kind that does not go with shifted outputs.
    """
    folder, commit = teacher_folder(path_or_id)
    published = read_config(folder)
    family = family_of(published)
    attention = attention or family.attention
    if family.shifted and attention == "staircase-causal":
        raise UsageError(
            f"teacher-attention {attention} reorders blocks, but {published['model_type']} reads each "
            f"position at its left neighbour: use {family.attention}"
        )
    how: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "attn_implementation": "flex_attention" if torch.device(device).type == "cuda" else RUNS,
    }
    name = str(folder / "config.json")
    moe = family.structure == "llada2"
    config = llada2.glm_config(published, name) if moe else dense.dense_config(published, family, name)
    mask = mask_token_id(folder, published, family, config.vocab_size)  # before gigabytes are read
    model: Any = (
        llada2.load_llada2(folder, config, experts=experts, **how)
        if moe
        else dense.load_dense(folder, published, **how)
    )
    spec = TeacherSpec(
        name=str(path_or_id).partition("@")[0] if commit else folder.resolve().name,
        revision=commit,
        architecture=published["model_type"],
        attention=attention,
        mask_token_id=mask,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        shifted=family.shifted,
        block_size=family.block_size,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash=weights_hash(folder),
    )
    return TransformersTeacher(model, spec)
