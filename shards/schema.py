"""The columns of a shard, format version 1; `FORMAT.md` is the page another program can be written from.

One row is one view of one sample. Columns are plain typed lists, readable by pyarrow, polars, duckdb and
`datasets` without this project. A token id is three bytes, each in a column of its own (`_0` the lowest): the
lowest does not compress and is stored as it is, the others do, which is smaller and faster than whole ids.

    all       sample_id, view, split, t, real_length, content_bytes, input_0/1/2 [L],
              maskable [start, end, start, end, ...] half-open, masked [L]
    shared    distilled [masked positions], half_a and gold_logp (null outside the shared vocabulary) [N]
      sparse  counts [N], top_0/1/2 and top_logp (u8, differences of codes) [K], tail_i (int8 codes) [N] per
              temperature, with a sketch also sketch (int8, packed codes)
      exact   hidden [N * H]
      dense   dense_logp [N * V]
    cross     chunk_start, chunk_length, chunk_teacher_length, chunk_masked, chunk_active, chunk_half_a [C],
              chunk_logp [active chunks]
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Literal

import pyarrow as pa

from shards.codec import Codec, DenseCodec, ExactCodec, codec_to_json

FORMAT_VERSION = 1
Kind = Literal["shared", "cross"]

SCALARS = {
    "sample_id": pa.string(),
    "view": pa.uint16(),
    "split": pa.string(),
    "t": pa.float32(),
    "real_length": pa.int32(),
    "content_bytes": pa.int32(),
}
PLANES = 3
"""Bytes of a token id."""


def planes(name: str) -> list[str]:
    """The columns that hold token ids, lowest byte first."""
    return [f"{name}_{i}" for i in range(PLANES)]


_NOISE = {**dict.fromkeys(planes("input"), pa.uint8()), "maskable": pa.int32(), "masked": pa.bool_()}
_SHARED = {"distilled": pa.bool_(), "half_a": pa.bool_(), "gold_logp": pa.float32()}
CROSS = {
    "chunk_start": pa.uint16(),
    "chunk_length": pa.uint16(),
    "chunk_teacher_length": pa.uint16(),
    "chunk_masked": pa.bool_(),
    "chunk_active": pa.bool_(),
    "chunk_half_a": pa.bool_(),
    "chunk_logp": pa.float32(),
}
NULLABLE = "gold_logp"


def target_types(codec: Codec) -> dict[str, pa.DataType]:
    """Name -> item type of the columns a codec adds to a shared dataset, in order."""
    if isinstance(codec, DenseCodec):
        return {"dense_logp": pa.float32()}
    if isinstance(codec, ExactCodec):
        return {"hidden": pa.float32() if codec.dtype == "float32" else pa.uint16()}
    heads = {"counts": pa.uint8(), **dict.fromkeys(planes("top"), pa.uint8()), "top_logp": pa.uint8()}
    heads |= {f"tail_{i}": pa.int8() for i in range(len(codec.temperatures))}
    return heads | ({"sketch": pa.int8()} if codec.sketch else {})


def list_types(kind: Kind, codec: Codec) -> dict[str, pa.DataType]:
    """Name -> item type of every list column, in order."""
    return {**_NOISE, **(CROSS if kind == "cross" else {**_SHARED, **target_types(codec)})}


@lru_cache(64)
def schema(kind: Kind, codec: Codec, identity: str = "") -> pa.Schema:
    """The columns of a dataset; the metadata names format version, kind, codec and the dataset's identity."""
    lists = {
        name: pa.list_(pa.field("item", item, nullable=name == NULLABLE))
        for name, item in list_types(kind, codec).items()
    }
    return pa.schema(
        [pa.field(name, t, nullable=False) for name, t in {**SCALARS, **lists}.items()],
        metadata={
            "tide.format_version": str(FORMAT_VERSION),
            "tide.kind": kind,
            "tide.codec": json.dumps(codec_to_json(codec), sort_keys=True),
            "tide.identity": identity,
        },
    )
