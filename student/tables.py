"""What a dataset's targets need beside their rows, from its file: the basis of its sketches, or the teacher's
head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shards.codec import Codec, ExactCodec, SparseCodec, table_of
from shards.errors import CorruptShard
from shards.reader import LogitDataset
from student.tensors import Basis, TeacherHead


def dataset_table(dataset: LogitDataset) -> Basis | TeacherHead | None:
    """The table of a dataset; None where its codec needs none.

    Raises:
        CorruptShard: it is missing, or not what the manifest says. ShardError: it cannot be read.
    """
    data = dataset.table()
    m = dataset.manifest
    return None if data is None else open_table(data, m.codec, m.shared_vocab_size or m.student.vocab_size)


def open_table(data: bytes, codec: Codec, vocab_size: int) -> Basis | TeacherHead:
    """A table from the bytes of its file.

    Args:
        vocab_size: of the targets.

    Raises:
        CorruptShard: not a table for this codec and vocabulary.
    """
    name = (table_of(codec) or ("",))[0]
    try:
        found = load(data)
    except SafetensorError as e:
        raise CorruptShard(f"{name} is not a safetensors file ({e}): fetch or make the dataset again") from e
    if isinstance(codec, ExactCodec):
        shapes = {"weight": (vocab_size, codec.width)} | ({"bias": (vocab_size,)} if "bias" in found else {})
        _check(name, found, shapes)
        return TeacherHead(found["weight"], found.get("bias"))
    if not isinstance(codec, SparseCodec):
        raise ValueError(f"codec {codec.name} has no table")
    v = vocab_size
    _check(name, found, {"basis": (v, codec.sketch), "mean": (v,), "weight": (v,), "scale": (codec.sketch,)})
    return Basis(found["basis"], found["mean"], found["weight"], step=codec.sketch_step, mix=codec.sketch_mix)


def _check(name: str, found: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for key, shape in shapes.items():
        x = found.get(key)
        what = "nothing" if x is None else f"{tuple(x.shape)} {x.dtype}"
        if x is None or tuple(x.shape) != shape or not x.is_floating_point():
            raise CorruptShard(f"{name}: {key}: expected {shape} numbers, got {what}: make the dataset again")
        if not torch.isfinite(x).all():
            raise CorruptShard(f"{name}: {key} has numbers that are not finite: make the dataset again")
