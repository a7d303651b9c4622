"""The file that a codec needs beside the shards, made before the first part and once per dataset: the basis
of its sketches, or the teacher's head. Both are made of the teacher's weights, so they carry its licence.

Of several runs that begin a dataset together one makes the file and the others wait for it; whoever goes on
with the dataset reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save

from precompute.config import DTYPES, PrecomputeConfig
from precompute.sketch import SketchCoder, fit_sketch, fitted
from precompute.teachers.base import Teacher
from precompute.teachers.load import teacher_folder
from shards.agreement import recorded_config
from shards.atomic import write_once
from shards.codec import Codec, ExactCodec, SparseCodec, codec_to_json, table_of
from shards.errors import ConfigMismatch, TideError, UsageError
from shards.locks import lock
from shards.reader import LogitDataset
from shards.records import differences
from shards.refusals import explained
from shards.settings import FileRecord
from student.tables import open_table
from student.tensors import Basis, TeacherHead

Keep = Callable[[str, Callable[[], bytes]], bytes]
"""The bytes of a file: those that are there, else those that the call makes."""

DECIDED = ("table", "sketch_wide", "width")
"""Settings of a codec that follow from its file."""


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec with its file made."""

    codec: Codec
    files: tuple[FileRecord, ...] = ()
    sketch: SketchCoder | None = None
    table: Basis | TeacherHead | None = None

    def config(self) -> dict[str, Any]:
        """What it adds to a dataset's configuration."""
        files = {"files": [asdict(f) for f in self.files]} if self.files else {}
        return {"codec": codec_to_json(self.codec), **files}


def make_coding(
    config: PrecomputeConfig,
    teacher: Teacher,
    *,
    vocab_size: int,
    states: Callable[[], torch.Tensor],
    keep: Keep | None = None,
) -> Coding:
    """The codec of a shared-tokenizer dataset in `config.out`, its file made unless it is there.

    Args:
        vocab_size: of the targets.
        states: gives hidden states [n, H] at positions like those that the dataset asks for.
        keep: where the file is, or is put once it is made; None = `config.out`.

    Raises:
        ConfigMismatch: `config.out` holds a dataset of another codec.
        ModelError, CorpusError: see `Teacher.head_weights` and `fit_sketch`.
        UsageError, ShardError: `config.sketch_from` cannot be used; `config.out` cannot be written.
    """
    codec = config.codec
    if isinstance(codec, ExactCodec):
        codec = replace(codec, width=teacher.head_weights()[0].shape[1], dtype=config.dtype)
    table = table_of(codec)
    if table is None or not isinstance(codec, SparseCodec | ExactCodec):
        return Coding(codec)
    if keep is None:
        same_codec(config.out, codec_to_json(codec))
        keep = partial(once, config.out)

    def make() -> bytes:
        weight, bias = teacher.head_weights()
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        if isinstance(codec, SparseCodec):
            if config.sketch_from is not None:
                return sketch_file(config.sketch_from)
            return fit_sketch(states(), weight.detach(), bias, codec.sketch)
        named = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        dtype = DTYPES[config.dtype]
        return save({n: x.detach().to("cpu", dtype).contiguous() for n, x in named.items()})

    data = keep(table[0], make)
    digest = hashlib.sha256(data).hexdigest()
    what = "the teacher's LM head"
    if isinstance(codec, SparseCodec):
        try:
            opened = open_table(data, replace(codec, table=digest), vocab_size)
        except TideError as e:
            if config.sketch_from is None:
                raise
            raise UsageError(f"--sketch-from {config.sketch_from} does not fit: {e}") from e
        codec = replace(codec, sketch_wide=fitted(codec, data), table=digest)
        what = "basis of the sketches, from the teacher's LM head"
    else:
        codec = replace(codec, table=digest)
        opened = open_table(data, codec, vocab_size)
    record = FileRecord(
        file=table[0], bytes=len(data), sha256=digest, what=what, licence=licence_of(config.teacher)
    )
    coder = None
    if isinstance(opened, Basis) and isinstance(codec, SparseCodec):
        coder = SketchCoder(opened, codec, teacher.device)
    return Coding(codec, (record,), coder, opened)


def same_codec(out: Path, codec: dict[str, Any]) -> None:
    """Before anything is put into a folder that holds another dataset. Raises: ConfigMismatch."""
    theirs = (recorded_config(out) or {}).get("codec")
    if not isinstance(theirs, dict):
        return
    theirs, mine = ({k: v for k, v in x.items() if k not in DECIDED} for x in (theirs, codec))
    if differs := "; ".join(differences(theirs, mine, "codec")):
        raise ConfigMismatch(
            f"{out} was made with other settings ({differs}): choose another --out, or repeat the options it "
            "was made with"
        )


def once(out: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """The bytes of a file in a dataset's folder, made if it is not there; of several processes one makes it.

    Raises: ShardError: the folder cannot be written.
    """
    path = out / name
    with explained(out, f"{name} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            fd = os.open(out, os.O_RDONLY)  # the folder itself: a lock file of our own would stay behind
            try:
                lock(fd, wait=True)
                if not path.is_file():
                    write_once(path, make())
            finally:
                os.close(fd)
        return path.read_bytes()


def sketch_file(place: str) -> bytes:
    """The basis at a path: a safetensors file, or a dataset whose codec has a sketch.

    Raises: UsageError, ShardError: there is none.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path.read_bytes()
    data = LogitDataset(place).table()
    if data is None or "basis" not in load(data):
        raise UsageError(f"--sketch-from {place}: this dataset has no sketch")
    return data


def licence_of(teacher: str) -> str | None:
    """The licence that a model's card (README.md) names in its header; None = none."""
    try:
        text = (teacher_folder(teacher)[0] / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, TideError, ValueError, IndexError, yaml.YAMLError):
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None if found is None else json.dumps(found)
