"""The columns of a shard: format version 0.

One row is one view of one sample. Columns are plain typed lists, readable by pyarrow and `datasets` without
this project; token ids are split into a 16-bit and an 8-bit plane, which compress better than 32-bit ones.

    all       sample_id, view, split, t, input_lo/hi [L], real_length, content_bytes,
              maskable [start, end, start, end, ...] half-open, masked [L]
    shared    distilled [masked positions], half_a and gold_logp (null outside the shared vocabulary) [N]
      sparse  counts [N], top_lo/hi and top_logp (u8 codes) [K], tail_i (int8 codes) [N] per temperature
      dense   dense_logp [N * V]
    cross     chunk_start, chunk_length, chunk_teacher_length, chunk_masked, chunk_active, chunk_half_a [C],
              chunk_logp [active chunks]
"""

from __future__ import annotations

import json
from typing import Literal

import pyarrow as pa

from shards.codec import Codec, SparseCodec, codec_to_json

FORMAT_VERSION = 0
Kind = Literal["shared", "cross"]

SCALARS = {
    "sample_id": pa.string(),
    "view": pa.uint16(),
    "split": pa.string(),
    "t": pa.float32(),
    "real_length": pa.int32(),
    "content_bytes": pa.int32(),
}
_NOISE = {"input_lo": pa.uint16(), "input_hi": pa.uint8(), "maskable": pa.int32(), "masked": pa.bool_()}
_SHARED = {"distilled": pa.bool_(), "half_a": pa.bool_(), "gold_logp": pa.float32()}
_HEADS = {"counts": pa.uint8(), "top_lo": pa.uint16(), "top_hi": pa.uint8(), "top_logp": pa.uint8()}
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


def list_types(kind: Kind, codec: Codec) -> dict[str, pa.DataType]:
    """Name -> item type of every list column, in order."""
    if kind == "cross":
        return {**_NOISE, **CROSS}
    if isinstance(codec, SparseCodec):
        tails = {f"tail_{i}": pa.int8() for i in range(len(codec.temperatures))}
        return {**_NOISE, **_SHARED, **_HEADS, **tails}
    return {**_NOISE, **_SHARED, "dense_logp": pa.float32()}


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
