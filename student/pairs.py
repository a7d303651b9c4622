"""How many query-key pairs attention computes over packed rows: what its FLOPs follow from.

More than may attend to one another, and which depends on the device: on CUDA, FlexAttention computes whole
tiles of 128 by 128 that hold at least one allowed pair; on a CPU, `student.run_attention` computes whole runs
of tokens. A dense mask pays for the square of the row.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from torch import Tensor

from student.attention import Coordinates, may_attend, one_row
from student.layout import Attention
from student.run_attention import run_mask

TILE = 128
"""Queries and keys of a FlexAttention tile."""
Counting = Literal["tiles", "runs", "dense"]
"""What is computed: FlexAttention's tiles, SDPA over runs of tokens, or every pair."""


def computed_pairs(how: Counting, attention: Attention, at: Coordinates, read: Tensor | None = None) -> int:
    """Pairs of one layer and one head.

    Args:
        at: [R, P] coordinates (tensors) of the tokens, padding included.
        read: [N] flat indices: only these are queries, over all R * P keys as one row.

    Raises:
        ValueError: `how` is none of `Counting`.
    """
    queries, keys = at, at
    if read is not None:
        keys = one_row(at)
        queries = Coordinates(*(x[:, read] for x in keys))
    if how == "dense":
        return len(keys.sample) * queries.sample.shape[1] * keys.sample.shape[1]
    if how == "runs":
        calls = run_mask(attention, queries, keys).calls
        return sum(len(c.queries) * len(c.keys) // c.runs for c in calls)
    if how == "tiles":
        pairs = zip(*([Coordinates(*x) for x in zip(*side)] for side in (queries, keys)))
        return sum(_tile_pairs(attention, q, k) for q, k in pairs)
    raise ValueError(f"how must be one of {', '.join(get_args(Counting))}, got {how!r}")


def _tile_pairs(attention: Attention, queries: Coordinates, keys: Coordinates) -> int:
    """Pairs of the tiles of one row, [Q] queries over [K] keys, that hold an allowed one."""
    (q, q_tile), (k, k_tile) = _stretches(queries, highest=True), _stretches(keys, highest=False)
    some = may_attend(attention, Coordinates(*(x[:, None] for x in q)), Coordinates(*(x[None] for x in k)))
    seen = np.add.reduceat(some, _starts(q_tile), axis=0, dtype=np.int64)
    seen = np.add.reduceat(seen, _starts(k_tile), axis=1)
    return int(np.count_nonzero(seen)) * TILE * TILE


def _stretches(at: Coordinates, *, highest: bool) -> tuple[Coordinates, np.ndarray]:
    """The tokens of one tile, sample, stream and block as one, tile after tile, and the tile of each.

    Order enters the predicate only as o_k <= o_q, so the highest of the queries and the lowest of the keys
    stand for all of them.
    """
    *which, order = (x.numpy() for x in at)
    named = np.stack([np.arange(len(order)) // TILE, *which])
    found, of = np.unique(named, axis=1, return_inverse=True)
    extreme = np.full(found.shape[1], -1 if highest else np.iinfo(np.int64).max)
    (np.maximum if highest else np.minimum).at(extreme, of.ravel(), order)
    tile, sample, stream, block = found
    return Coordinates(sample, stream, block, extreme), tile


def _starts(tile: np.ndarray) -> np.ndarray:
    """Where each tile begins among ascending tile numbers."""
    return np.flatnonzero(np.append(True, tile[1:] != tile[:-1]))
