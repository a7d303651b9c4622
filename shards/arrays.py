"""Arrays that are made anew of every record batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def empty(n: int, dtype: Any) -> np.ndarray:
    """[n] of Arrow's pool, which uses memory again that malloc gives back to the system each time."""
    return np.frombuffer(pa.allocate_buffer(n * np.dtype(dtype).itemsize), dtype)


def bounds(lengths: Any) -> np.ndarray:
    """[n + 1] int64: where lists of these lengths [n], end to end, start and end."""
    found = empty(len(lengths) + 1, np.int64)
    found[0] = 0
    np.cumsum(lengths, out=found[1:])
    return found
