"""Published weights into a library model: which tensor makes which parameter, read from safetensors.

A weight map lists every parameter of the model once, against the published tensors it is made of. What the
checkpoint lacks or has too much of is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.errors import ModelError

INDEX = "model.safetensors.index.json"
"""Names the file of every tensor of a checkpoint in several files."""
RECOMPUTED = "rotary_emb.inv_freq"
"""Ending of the frequencies that some checkpoints store; they follow from the configuration."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a layout against one or more of the other's: `ours` (library) and `theirs`
    (published)."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Fused rows: how many each of `ours` takes of the one published tensor."""
    parts: int = 0
    """Stacked experts: published tensors joined along rows to form one expert."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.rows:
            return list(tensors[0].split(self.rows))
        if self.parts:
            experts = [torch.cat(tensors[i : i + self.parts]) for i in range(0, len(tensors), self.parts)]
            return [torch.stack(experts)]
        return tensors

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.rows:
            return [torch.cat(tensors)]
        if self.parts:
            return [t.clone() for expert in tensors[0] for t in expert.chunk(self.parts)]
        return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order: those its index names, else all there are.

    Raises:
        ModelError: none, or one that the index names is missing (names it).
    """
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelError(f"{index}: not a safetensors index ({e!r}); copy the model folder again") from e
        for file in files:
            if file.parent != folder or not file.is_file():
                raise ModelError(f"{folder}: {INDEX} names {file.name}, which is not there; copy it again")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no safetensors file; a model folder holds config.json and safetensors")
    return files


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, over all files of a checkpoint.

    Raises:
        ModelError: see `weight_files`; a file that is no safetensors file.
    """
    where: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                where |= dict.fromkeys(f.keys(), file)
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file}: not a whole safetensors file ({e}); copy it again") from e
    return where


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint's safetensors files and its config.json: the same
    weights under another rope base are another teacher."""
    total = hashlib.sha256()
    for file in (*weight_files(folder), folder / "config.json"):
        with file.open("rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()


def check_names(
    folder: Path, entries: Sequence[Entry], tied: Mapping[str, str], read_as: str
) -> dict[str, Path]:
    """`tensor_files` of a checkpoint that has what its model takes, and nothing else.

    Args:
        entries, tied: see `load_weights`.
        read_as: the model's name.

    Raises:
        ModelError: tensors are missing or left over (names them).
    """
    where = tensor_files(folder)
    wanted = {name for e in entries for name in e.theirs}
    spare = {name for name in where if name.endswith(RECOMPUTED)} | tied.keys()
    _refuse(folder, "lacks", wanted - where.keys(), read_as)
    _refuse(folder, "has tensors that no parameter takes:", where.keys() - wanted - spare, read_as)
    return where


def empty_model(model_class: Any, config: Any, **how: Any) -> Any:
    """The model with its shapes and no memory behind them. `how`: dtype, attn_implementation."""
    with torch.device("meta"):
        return model_class._from_config(config, **how)


def load_weights(
    folder: Path,
    model_class: Any,
    config: Any,
    entries: Sequence[Entry],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str,
    tied: Mapping[str, str] | None = None,
    float32: str | None = None,
) -> Any:
    """Read a published checkpoint. Peak memory: the model and the parts of one of its tensors.

    Args:
        entries: every parameter of the model once, a tied head left out.
        tied: published head -> published embeddings, where they are tied; a copy of the head may be there.
        float32: parameters whose name ends with it keep float32 whatever the `dtype`.

    Raises:
        ModelError: tensors are missing, left over, or of the wrong shape (names them).
    """
    where = check_names(folder, entries, tied or {}, model_class.__name__)
    model = empty_model(model_class, config, dtype=dtype, attn_implementation=attn_implementation)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    open_files = {file: safe_open(file, framework="pt") for file in set(where.values())}
    for head, embeddings in (tied or {}).items():
        if head in where and not torch.equal(
            open_files[where[head]].get_tensor(head), open_files[where[embeddings]].get_tensor(embeddings)
        ):
            raise ModelError(
                f"{folder}: config.json ties {head} to {embeddings}, but they differ; untie them"
            )
    for e in entries:
        read = [open_files[where[name]].get_tensor(name) for name in e.theirs]
        if e.rows and read[0].shape[0] != sum(e.rows):
            raise _shape(folder, e.theirs[0], ", ".join(e.ours), read[0].shape, (sum(e.rows), "..."))
        odd = next((i for i, t in enumerate(read) if t.shape != read[0].shape), None)
        if odd is not None:
            raise _shape(folder, e.theirs[odd], f"its part of {e.ours[0]}", read[odd].shape, read[0].shape)
        for name, tensor in zip(e.ours, e.to_ours(read), strict=True):
            if tensor.shape != shapes[name]:
                raise _shape(folder, e.theirs[0], name, tensor.shape, shapes[name])
            keep = float32 is not None and name.endswith(float32)
            state[name] = tensor.to(device, torch.float32 if keep else dtype)
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config).to(device)  # its frequencies are in no checkpoint
    return model.eval()


def _shape(folder: Path, theirs: str, ours: str, got: Iterable[Any], expected: Iterable[Any]) -> ModelError:
    return ModelError(
        f"{folder}: {theirs} gives {ours} the shape {list(got)}, config.json says {list(expected)}: the "
        "weights belong to another configuration"
    )


def _refuse(folder: Path, problem: str, names: Iterable[str], read_as: str) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"{folder}: {problem} {', '.join(found[:3])}{more}, read as {read_as}; is it a "
            "whole checkpoint of the model type that config.json names?"
        )
