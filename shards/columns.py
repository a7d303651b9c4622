"""A record batch as numpy arrays, list columns flat with offsets; the way from and to Arrow; its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa

from shards.arrays import bounds, empty
from shards.errors import RowError
from shards.row import ChunkTargets, DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget, Target
from shards.schema import planes

BLOCK = 1 << 16
"""Ids joined at once."""
LIST_LIMIT = 2**31 - 1
"""Values in one list column of one record batch: Arrow's offsets are int32."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """One list column: every row's values, end to end."""

    values: np.ndarray
    offsets: np.ndarray
    """[rows + 1] int64, from 0 to len(values)."""

    @classmethod
    def of(cls, values: np.ndarray, lengths: Any) -> Ragged:
        return cls(values, bounds(lengths))

    @classmethod
    def gather(cls, arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> Ragged:
        """Rows given one by one, any of them empty. Raises: TypeError where `dtype` is of another kind."""
        flat = np.concatenate([a for a in arrays if len(a)] or [np.zeros(0, dtype)])
        return cls.of(flat.astype(dtype, casting="same_kind"), [len(a) for a in arrays])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def row(self) -> np.ndarray:
        """Row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    @property
    def index(self) -> np.ndarray:
        """Place of each value in its row."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[rows] sum of `values` (one per value of this column) over each row."""
        if values.dtype == np.bool_:
            return np.diff(np.searchsorted(np.flatnonzero(values), self.offsets))
        return np.diff(bounds(values)[self.offsets])

    def totals(self) -> np.ndarray:
        """[rows] int64 sum of each row's values."""
        out, filled = np.zeros(len(self.offsets) - 1, np.int64), self.offsets[1:] > self.offsets[:-1]
        if filled.any():
            out[filled] = np.add.reduceat(self.values, self.offsets[:-1][filled], dtype=np.int64)
        return out

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True, slots=True)
class Columns:
    """A record batch as numpy arrays in their stored types."""

    scalars: dict[str, np.ndarray]
    lists: dict[str, Ragged]

    def ids(self, name: str) -> tuple[Ragged, int]:
        """Token ids, int32, from their bytes, and the largest of them (-1 = there are none)."""
        parts = [self.lists[plane] for plane in planes(name)]
        whole, largest = _joined([p.values for p in parts])
        return Ragged(whole, parts[0].offsets), largest


def _joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """int32 from their bytes, lowest first, and their maximum; as many at once as stay in the processor's
    cache on the way."""
    whole, largest = empty(len(parts[0]), np.int32), -1
    for start in range(0, len(whole), BLOCK):
        block = slice(start, start + BLOCK)
        out = whole[block]
        out[:] = parts[-1][block]
        for part in reversed(parts[:-1]):
            out <<= 8
            out |= part[block]
        largest = max(largest, int(out.max()))
    return whole, largest


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(values: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16 (uint16); float32 as it is."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


@dataclass(frozen=True, slots=True)
class RowBatch(Sequence[Row]):
    """The decoded rows of a record batch: flat arrays, from which a row is cut when it is asked for."""

    scalars: dict[str, np.ndarray]
    """[rows]; the scalar columns."""
    lists: dict[str, Ragged]
    """By the names of the fields of `Row`, `PositionTargets`, its target, and `ChunkTargets`
    (`chunk_` before the latter's). A column with a second axis keeps it."""
    _scalars: dict[str, list[Any]] = field(default_factory=dict, init=False, repr=False)
    """Since a row was cut, `scalars` as Python's own values."""
    _cuts: dict[str, tuple[np.ndarray, list[int]]] = field(default_factory=dict, init=False, repr=False)
    """Since then also the values of every list, and its offsets as Python's own numbers, which take half the
    time."""

    def __len__(self) -> int:
        return len(self.scalars["view"])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return (
            [self._row(i) for i in range(len(self))[index]]
            if isinstance(index, slice)
            else self._row(range(len(self))[index])
        )

    def _row(self, i: int) -> Row:
        if not self._cuts:
            self._scalars.update({name: x.tolist() for name, x in self.scalars.items()})
            self._cuts.update({name: (x.values, x.offsets.tolist()) for name, x in self.lists.items()})
        x = {name: values[at[i] : at[i + 1]] for name, (values, at) in self._cuts.items()}
        positions, chunks = None, None
        if "positions" in x:
            target: Target
            if "dense" in x:
                target = DenseTarget(x["dense"])
            elif "hidden" in x:
                target = ExactTarget(x["hidden"])
            else:
                target = SparseTarget(x["counts"], x["ids"], x["logp"], x["tails"], x.get("sketch"))
            positions = PositionTargets(x["positions"], x["half_a"], x["gold_logp"], target)
        else:
            chunks = ChunkTargets(**{name: x[f"chunk_{name}"] for name in ChunkTargets.__slots__})
        return Row(
            **{name: values[i] for name, values in self._scalars.items()},
            input_ids=x["input_ids"],
            maskable=x["maskable"],
            masked=x["masked"],
            positions=positions,
            chunks=chunks,
        )


def list_array(x: Ragged, kind: pa.DataType) -> pa.ListArray:
    if len(x.values) > LIST_LIMIT:
        raise RowError(
            f"{len(x.values)} values in one list column: at most {LIST_LIMIT} fit in a record batch"
        )
    null = np.isnan(x.values) if kind.value_field.nullable else None
    # What lies under a null is set to 0, so that equal rows give equal bytes.
    values = x.values if null is None else np.where(null, np.float32(0), x.values)
    items = pa.array(values, type=kind.value_type, mask=null)
    return pa.ListArray.from_arrays(pa.array(x.offsets.astype(np.int32)), items, type=kind)


def scalar_values(x: pa.Array) -> np.ndarray:
    return x.to_numpy(zero_copy_only=False)


def list_values(x: pa.ListArray, name: str, *, nullable: bool) -> Ragged:
    offsets, values = x.offsets.to_numpy().astype(np.int64), x.values
    if x.null_count or (values.null_count and not nullable):
        raise RowError(f"column {name}: expected no nulls, got {x.null_count + values.null_count}")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise RowError(
            f"column {name}: expected offsets from 0 to {len(values)}, got {offsets[0]} to {offsets[-1]}"
        )
    if pa.types.is_boolean(values.type):
        return Ragged(_flags(values), offsets)
    flat = values.to_numpy(zero_copy_only=False)
    if nullable:
        flat = flat.astype(np.float32, copy=False)
        if (nan := np.count_nonzero(np.isnan(flat))) != values.null_count:
            raise RowError(f"column {name}: expected null or a number, got {nan - values.null_count} NaN")
    return Ragged(flat, offsets)


def _flags(bits: pa.BooleanArray) -> np.ndarray:
    """Booleans from their bits: ten times as fast as Arrow's own way."""
    if not len(bits):
        return np.zeros(0, np.bool_)
    packed = np.frombuffer(bits.buffers()[1], np.uint8)
    return np.unpackbits(packed, count=bits.offset + len(bits), bitorder="little")[bits.offset :].view(
        np.bool_
    )
