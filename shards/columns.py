"""A record batch as numpy arrays, every list column flat with offsets, and the way from and to Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import RowError

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
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))

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
        running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True, slots=True)
class Columns:
    """A record batch as numpy arrays in their stored types."""

    scalars: dict[str, np.ndarray]
    lists: dict[str, Ragged]

    def ids(self, name: str) -> Ragged:
        """Token ids from their two planes."""
        low, high = self.lists[f"{name}_lo"], self.lists[f"{name}_hi"]
        return Ragged(low.values.astype(np.int32) | (high.values.astype(np.int32) << 16), low.offsets)


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
    return np.array(x.to_pylist(), dtype=str) if x.type == pa.string() else x.to_numpy(zero_copy_only=False)


def list_values(x: pa.ListArray, name: str, *, nullable: bool) -> Ragged:
    offsets, values = x.offsets.to_numpy().astype(np.int64), x.values
    if x.null_count or (values.null_count and not nullable):
        raise RowError(f"column {name}: expected no nulls, got {x.null_count + values.null_count}")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise RowError(
            f"column {name}: expected offsets from 0 to {len(values)}, got {offsets[0]} to {offsets[-1]}"
        )
    flat = values.to_numpy(zero_copy_only=False)
    if nullable:
        flat = flat.astype(np.float32)
        if (nan := int(np.isnan(flat).sum())) != values.null_count:
            raise RowError(f"column {name}: expected null or a number, got {nan - values.null_count} NaN")
    return Ragged(flat, offsets)
