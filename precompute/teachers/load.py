"""From a folder or hub id to a teacher: the family its config.json names, its mask token, how it attends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from precompute.teachers import dense, llada2
from precompute.teachers.base import TeacherKind, TeacherSpec, TransformersTeacher
from precompute.teachers.checkpoint import weights_hash
from precompute.teachers.families import AUTOREGRESSIVE, SECTION, Family, family_of
from shards.errors import ModelError, UsageError
from student.layout import Attention
from student.run_attention import RUNS
from student.tokenizer import load_tokenizer, read_tokenizer

WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model")
FILES = (*WITHOUT_WEIGHTS, "*.safetensors", "README.md")
"""What a teacher needs from the hub, and its card, which names its licence; never code."""


def teacher_folder(path_or_id: str | Path, files: Sequence[str] = FILES) -> tuple[Path, str | None]:
    """The local folder of a model and, for a hub id, the commit it is at.

    Args:
        path_or_id: a folder, or `owner/name` on the hub; `owner/name@revision` for a branch, tag or commit.
        files: patterns of those to fetch from the hub.

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
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
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


def named_mask(folder: Path, published: dict[str, Any], family: Family) -> int | None:
    """Mask id from the `tide_teacher` section, else from the tokenizer, else from config.json; None = they
    name none."""
    mask = published.get(SECTION, {}).get("mask_token_id")
    if mask is None:
        mask = _token_id(folder, family, "mask")
    return published.get("mask_token_id") if mask is None else mask


def _token_id(folder: Path, family: Family, which: str) -> int | None:
    """Id of the tokenizer's `mask` or `bos` token; None where it has none, or is not there."""
    if not any(folder.glob("tokenizer*.json")):
        return None
    found = getattr(read_tokenizer(folder, tokenizer_type=family.tokenizer_type), f"{which}_token_id")
    return None if found is None else int(found)


def mask_token_id(folder: Path, published: dict[str, Any], family: Family, vocab_size: int) -> int:
    """The mask id that the checkpoint names, else the one its family is known to use."""
    mask = named_mask(folder, published, family)
    if mask is None and family.mask_token_id is not None and family.mask_token_id < vocab_size:
        mask = family.mask_token_id
    if mask is None:
        raise ModelError(
            f"{folder}: no mask token: config.json needs mask_token_id, or its tokenizer a mask_token; an "
            "autoregressive model is teacher-kind ar"
        )
    if not 0 <= mask < vocab_size:
        raise ModelError(f"{folder}: mask id {mask} lies outside the model's vocabulary of {vocab_size}")
    return int(mask)


def teacher_kind(path_or_id: str | Path) -> TeacherKind:
    """Whether a teacher is asked as a diffusion model or as an autoregressive one, by its checkpoint: `ar` is
    one of a model type that autoregressive models have too, without a mask token to its name.

    Raises:
        ModelError: see `read_config`.
    """
    folder, _ = teacher_folder(path_or_id)
    published = read_config(folder)
    plain = published.get("model_type") in AUTOREGRESSIVE
    return "ar" if plain and named_mask(folder, published, family_of(published)) is None else "diffusion"


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A checkpoint, read but for its weights, and how it is asked."""

    folder: Path
    name: str
    revision: str | None
    published: dict[str, Any]
    """Its config.json."""
    family: Family
    config: Any
    """The library's configuration of it."""
    kind: TeacherKind
    attention: Attention
    mask_token_id: int | None
    bos_token_id: int | None

    def spec(self, dtype: torch.dtype) -> TeacherSpec:
        """Its identity; reads all of its weights.

        Args:
            dtype: that it runs in.
        """
        return TeacherSpec(
            name=self.name,
            revision=self.revision,
            architecture=self.published["model_type"],
            attention=self.attention,
            mask_token_id=self.mask_token_id,
            vocab_size=self.config.vocab_size,
            shifted=self.family.shifted,
            block_size=self.family.block_size,
            dtype=str(dtype).removeprefix("torch."),
            weights_hash=weights_hash(self.folder),
            kind=self.kind,
            bos_token_id=self.bos_token_id,
        )


def describe_teacher(
    path_or_id: str | Path, *, kind: TeacherKind = "diffusion", attention: Attention | None = None
) -> Description:
    """What a folder or hub id says of a teacher; before gigabytes are read. Arguments and errors: as
    `load_teacher`."""
    folder, commit = teacher_folder(path_or_id)
    published = read_config(folder)
    family = family_of(published)
    autoregressive = kind == "ar"
    if autoregressive:
        family = replace(family, attention="causal", shifted=True, block_size=None)
    attention = attention or family.attention
    if autoregressive and attention != "causal":
        raise ValueError(f"an autoregressive teacher is causal, got attention {attention!r}")
    if family.shifted and attention == "staircase-causal":
        raise UsageError(
            f"teacher-attention {attention} reorders blocks, but {published['model_type']} reads each "
            f"position at its left neighbour: use {family.attention}"
        )
    name = str(folder / "config.json")
    config = (
        llada2.glm_config(published, name)
        if family.structure == "llada2"
        else dense.dense_config(published, family, name)
    )
    return Description(
        folder=folder,
        name=str(path_or_id).partition("@")[0] if commit else folder.resolve().name,
        revision=commit,
        published=published,
        family=family,
        config=config,
        kind=kind,
        attention=attention,
        mask_token_id=None if autoregressive else mask_token_id(folder, published, family, config.vocab_size),
        bos_token_id=_token_id(folder, family, "bos") if autoregressive else None,
    )


def load_teacher(
    path_or_id: str | Path,
    *,
    kind: TeacherKind = "diffusion",
    attention: Attention | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    experts: str = "grouped_mm",
) -> TransformersTeacher:
    """A frozen teacher from a transformers folder or hub id; runs no code of the checkpoint.

    Args:
        path_or_id: see `teacher_folder`.
        kind: how it is asked, whatever its family: `ar` is causal, reads each position at its left neighbour,
            and needs no mask token.
        attention: how a diffusion teacher's streams attend; None = the family's own way.
        experts: of a mixture of experts, one of `llada2.EXPERTS`.

    Raises:
        ModelError: missing folder, unknown family, weights missing or left over, no mask token.
        UsageError: an attention kind that does not go with shifted outputs.
    """
    found = describe_teacher(path_or_id, kind=kind, attention=attention)
    how: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "attn_implementation": "flex_attention" if torch.device(device).type == "cuda" else RUNS,
    }
    model: Any = (
        llada2.load_llada2(found.folder, found.config, experts=experts, **how)
        if found.family.structure == "llada2"
        else dense.load_dense(found.folder, found.published, **how)
    )
    return TransformersTeacher(model, found.spec(dtype))
