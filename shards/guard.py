"""What is checked about foreign files before any library opens them.

A record batch of 33 kB can declare buffers of a gigabyte, which Arrow allocates before it decompresses the
first byte; so the declared sizes are read here first, from the batch's own metadata, and held against what
its manifest allows. Links and devices inside a dataset's folder are refused: a link leads out of it, a pipe
never ends.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shards.codec import Codec, ExactCodec, SparseCodec
from shards.errors import CorruptShard, ShardError
from shards.schema import SCALARS, Kind, list_types

MAX_BATCH_ROWS = 256
MAX_BATCH_VALUES = 1 << 22
"""Kept entries or dense values in a record batch of more than one row (16 MiB), so that a reader's window
fits in memory at any vocabulary."""
MAX_BATCH_BYTES = 1 << 30
"""Of a decoded record batch, whatever a manifest says."""
ROW_BYTES = 1024
"""Room for a row's scalars and list offsets."""
_CONTINUATION, _METADATA_V5, _RECORD_BATCH, _ZSTD = b"\xff\xff\xff\xff", 4, 3, 1
_REMEDY = "fetch or make the dataset again"


def plain_file(path: str) -> None:
    """A local file of a dataset. Raises: ShardError: a link, a folder or a device. FileNotFoundError."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise ShardError(
            f"{path} is a link, and a dataset's folder holds plain files only: put the file in its place "
            "(tide pull makes such a folder)"
        )
    if not stat.S_ISREG(mode):
        raise ShardError(f"{path} is no plain file: {_REMEDY}")


def memory_limit(
    kind: Kind, codec: Codec, rows: int, *, max_length: int, block_size: int, vocab_size: int
) -> int:
    """Bytes that a decoded record batch of `rows` rows may take.

    Args:
        max_length, block_size: a sample has at most `max_length` tokens, rounded up to whole blocks.
        vocab_size: of the targets.
    """
    tokens = -(-max_length // block_size) * block_size
    # Ids 3, one edge of a span 4, flags; a chunk 13; or per position flags, gold log-prob, count and tails.
    each = 8 + 13 if kind == "cross" else 8 + 8
    entries = 0
    if kind == "shared":
        width = vocab_size
        if isinstance(codec, SparseCodec):
            width = min(codec.cap, vocab_size)
            each += len(codec.temperatures) + codec.sketch_bytes
        elif isinstance(codec, ExactCodec):
            width = codec.width
        entries = min(rows * tokens * width, max(MAX_BATCH_VALUES, tokens * width))
    return min(rows * (ROW_BYTES + tokens * each) + 4 * entries + ROW_BYTES, MAX_BATCH_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """Looks at the record batches of one dataset before Arrow does."""

    kind: Kind
    codec: Codec
    max_length: int
    block_size: int
    vocab_size: int
    """Of the targets."""

    def check(self, data: bytes, where: str) -> None:
        """An encapsulated record batch message: whole, of this schema's shape, and not too large decoded.

        Raises:
            CorruptShard: it is not, and Arrow must not see it.
        """
        try:
            rows, nodes, _, sizes = _declared(data)
        except (struct.error, ValueError) as e:
            raise CorruptShard(f"{where}: is not a record batch ({e}): {_REMEDY}") from e
        limit = memory_limit(
            self.kind,
            self.codec,
            min(rows, MAX_BATCH_ROWS),
            max_length=self.max_length,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
        )
        n_columns, n_lists = len(SCALARS), len(list_types(self.kind, self.codec))
        n_text = sum(t == pa.string() for t in SCALARS.values())
        wanted = (n_columns + 2 * n_lists, 2 * n_columns + n_text + 4 * n_lists)
        if rows > MAX_BATCH_ROWS:
            reason = f"{rows} rows, at most {MAX_BATCH_ROWS} are allowed"
        elif (len(nodes), len(sizes)) != wanted:
            reason = f"{len(nodes)} arrays in {len(sizes)} buffers, expected {wanted[0]} in {wanted[1]}"
        elif (total := sum(sizes)) > limit:
            reason = f"it would take {total} bytes of memory, {rows} rows of this dataset at most {limit}"
        elif any(not 0 <= nulls <= length <= 8 * limit for length, nulls in nodes):
            reason = "impossible array lengths"
        else:
            return
        raise CorruptShard(f"{where}: is not a record batch of this dataset ({reason}): {_REMEDY}")


def column_bytes(data: bytes, columns: pa.Schema) -> dict[str, int]:
    """Bytes that each column takes in a record batch message as it is stored, compressed.

    What is left of the message are Arrow's headers and padding.

    Args:
        data: a message that `Guard.check` accepted.
        columns: of this project's types: numbers, strings, and lists of numbers.
    """
    stored = iter(_declared(data)[2])
    found = {}
    for field in columns:
        # Validity and values; a string has offsets besides, a list offsets and the validity of its items.
        buffers = 4 if pa.types.is_list(field.type) else 3 if pa.types.is_string(field.type) else 2
        found[field.name] = sum(next(stored) for _ in range(buffers))
    return found


def _declared(data: bytes) -> tuple[int, list[tuple[int, int]], list[int], list[int]]:
    """Rows, (length, nulls) of every array, bytes of every buffer as stored, and once decompressed.

    Follows Arrow's Message.fbs. Raises: ValueError, struct.error: cut short, contradictory, something else.
    """
    if data[:4] != _CONTINUATION:
        raise ValueError("no message starts here")
    (size,) = struct.unpack_from("<i", data, 4)
    if not 8 <= size <= len(data) - 8:
        raise ValueError(f"metadata of {size} bytes in {len(data)}")
    metadata, body = memoryview(data)[8 : 8 + size], memoryview(data)[8 + size :]
    message = _Table(metadata, _uint32(metadata, 0))
    if (version := message.scalar(0, "<h")) != _METADATA_V5 or message.scalar(1, "<B") != _RECORD_BATCH:
        raise ValueError(f"message type {message.scalar(1, '<B')} of version {version}")
    if (length := message.scalar(3, "<q")) != len(body):
        raise ValueError(f"{length} bytes declared, {len(body)} follow")
    batch = message.table(2)
    rows = batch.scalar(0, "<q")
    if rows < 0:
        raise ValueError(f"{rows} rows")
    compression = batch.table(3) if batch.at(3) else None
    if compression is not None and (compression.scalar(0, "<b"), compression.scalar(1, "<b")) != (_ZSTD, 0):
        raise ValueError("compressed otherwise than by zstd")
    if batch.at(4):
        raise ValueError("arrays with a variable number of buffers")
    buffers, sizes = batch.pairs(2), []
    for offset, length in buffers:
        if not (0 <= offset <= len(body) and 0 <= length <= len(body) - offset):
            raise ValueError(f"a buffer of {length} bytes at {offset} of {len(body)}")
        if compression is not None and length:
            (declared,) = struct.unpack_from("<q", body[offset : offset + length])
            length = length - 8 if declared == -1 else declared  # -1: stored as it is
            if length < 0:
                raise ValueError(f"a buffer of {length} bytes")
        sizes.append(length)
    return rows, batch.pairs(1), [length for _, length in buffers], sizes


class _Table:
    """A flatbuffer table whose every look-up stays inside `data`."""

    def __init__(self, data: memoryview, position: int) -> None:
        (back,) = struct.unpack_from("<i", _from(data, position))
        self._data, self._position, self._fields = data, position, _from(data, position - back)
        (self._size,) = struct.unpack_from("<H", self._fields)

    def at(self, field: int) -> int:
        """Position of a field's value; 0 = not there."""
        entry = 4 + 2 * field
        (offset,) = struct.unpack_from("<H", self._fields, entry) if entry + 2 <= self._size else (0,)
        return self._position + offset if offset else 0

    def scalar(self, field: int, format: str) -> Any:
        """0 where it is not there."""
        return struct.unpack_from(format, _from(self._data, at))[0] if (at := self.at(field)) else 0

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._follow(field))

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structs of two int64."""
        start = self._follow(field)
        n = _uint32(self._data, start)
        return list(struct.iter_unpack("<qq", _from(self._data, start + 4, 16 * n)))

    def _follow(self, field: int) -> int:
        if not (at := self.at(field)):
            raise ValueError(f"field {field} is missing")
        return at + _uint32(self._data, at)


def _uint32(data: memoryview, position: int) -> int:
    return int(struct.unpack_from("<I", _from(data, position))[0])


def _from(data: memoryview, position: int, length: int | None = None) -> memoryview:
    """What lies at a position, all of `length` bytes where that is given."""
    end = len(data) if length is None else position + length
    if not 0 <= position <= end <= len(data):
        raise ValueError(f"an offset beyond the metadata ({position})")
    return data[position:end]
