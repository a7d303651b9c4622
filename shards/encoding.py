"""Rows to record batches and back; both ways check every invariant of `shards.invariants`.

Everything runs over the flat values of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from shards.codec import (
    Codec,
    DenseCodec,
    ExactCodec,
    SparseCodec,
    dequantise_tail,
    differences,
    pack_sketch,
    quantise_head,
    quantise_tail,
    sketch_limits,
)
from shards.columns import Columns, Ragged, RowBatch, list_array, list_values, narrowed, scalar_values
from shards.errors import RowError
from shards.invariants import ID_LIMIT, LOGP_SLACK, Checker, check_cross, check_noise, check_shared
from shards.row import ChunkTargets, DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget
from shards.schema import CROSS, NULLABLE, SCALARS, Kind, list_types, planes, schema


def encode(
    rows: Sequence[Row],
    kind: Kind,
    codec: Codec,
    identity: str,
    *,
    vocab_size: int,
    shared_vocab_size: int | None = None,
) -> pa.RecordBatch:
    """A record batch that `decode` accepts.

    Args:
        vocab_size: the student's; every input id is below it.
        shared_vocab_size: of the targets; None = `vocab_size`.

    Raises:
        RowError: a value does not fit its column or a row breaks an invariant.
    """
    check = Checker([r.sample_id for r in rows], [r.view for r in rows])
    scalars = {
        "sample_id": np.array([r.sample_id for r in rows], dtype=str),
        "view": _fit(np.array([r.view for r in rows]), np.uint16, "view", check),
        "split": np.array([r.split for r in rows], dtype=str),
        "t": np.array([r.t for r in rows], dtype=np.float32),
        "real_length": _fit(np.array([r.real_length for r in rows]), np.int32, "real_length", check),
        "content_bytes": _fit(np.array([r.content_bytes for r in rows]), np.int32, "content_bytes", check),
    }
    lists = _encode_noise(rows, check)
    if kind == "cross":
        lists |= _encode_cross(rows, check)
    else:
        lists |= _encode_shared(rows, codec, lists["masked"], check)
    columns = Columns(scalars, lists)
    _check(columns, check, kind, codec, vocab_size, shared_vocab_size)
    wanted = schema(kind, codec, identity)
    arrays = [
        list_array(lists[f.name], f.type) if f.name in lists else pa.array(scalars[f.name], type=f.type)
        for f in wanted
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def decode(
    batch: pa.RecordBatch,
    kind: Kind,
    codec: Codec,
    *,
    vocab_size: int,
    shared_vocab_size: int | None = None,
    thorough: bool = True,
) -> RowBatch:
    """The rows of a record batch, every invariant checked. Arguments as `encode`'s, and:

    Args:
        thorough: also check what takes as long as the rest together: that a head's entries descend, none of
            its ids twice, and distributions of mass 1. False is for bytes that were checked so before.

    Raises:
        RowError: another schema, a null, or a broken invariant (names column, row, expected, got).
    """
    wanted = schema(kind, codec)
    if not batch.schema.equals(wanted, check_metadata=False):
        missing = sorted(set(wanted.names) ^ set(batch.schema.names)) or ["types"]
        raise RowError(f"the record batch has other columns than a {kind} dataset ({missing[0]} differs)")
    for name in SCALARS:
        if batch.column(name).null_count:
            raise RowError(f"column {name}: expected no nulls, got {batch.column(name).null_count}")
    scalars = {name: scalar_values(batch.column(name)) for name in SCALARS}
    lists = {
        name: list_values(batch.column(name), name, nullable=name == NULLABLE)
        for name in list_types(kind, codec)
    }
    columns = Columns(scalars, lists)
    check = Checker(scalars["sample_id"], scalars["view"])
    found = _check(columns, check, kind, codec, vocab_size, shared_vocab_size, thorough)
    if kind == "cross":
        return RowBatch(scalars, found | _decode_cross(columns))
    return RowBatch(scalars, found | _decode_shared(columns, codec, shared_vocab_size or vocab_size))


def _check(
    c: Columns,
    check: Checker,
    kind: Kind,
    codec: Codec,
    vocab_size: int,
    shared_vocab_size: int | None,
    thorough: bool = True,
) -> dict[str, Ragged]:
    """Every invariant; returns what it decoded on the way, by `RowBatch`'s names."""
    found = check_noise(c, check, vocab_size)
    if kind == "cross":
        check_cross(c, check, found["maskable"].values)
        return found
    ids, shared = found["input_ids"], shared_vocab_size or vocab_size
    return found | check_shared(c, check, codec, ids, shared, thorough=thorough)


def _encode_noise(rows: Sequence[Row], check: Checker) -> dict[str, Ragged]:
    ids = Ragged.gather([r.input_ids for r in rows], np.int64)
    maskable = Ragged.gather([r.maskable for r in rows], np.bool_)
    masked = Ragged.gather([r.masked for r in rows], np.bool_)
    for name, x in (("maskable", maskable), ("masked", masked)):
        check.rows(x.lengths != ids.lengths, name, "one flag per token", x.lengths)
    flags = maskable.values
    edges = np.zeros(len(flags) + 1, dtype=bool)  # rows are kept apart: a span ends where its row ends
    edges[ids.offsets] = True
    left = flags & (edges[:-1] | ~np.append(False, flags[:-1])[: len(flags)])
    right = flags & (edges[1:] | ~np.append(flags[1:], False)[: len(flags)])
    bounds = np.stack([np.flatnonzero(left), np.flatnonzero(right) + 1], axis=1)
    bounds -= np.repeat(ids.offsets[:-1], ids.lengths)[left][:, None]
    spans = Ragged.of(bounds.reshape(-1).astype(np.int32), 2 * ids.sums(left))
    return {
        **_planes("input", ids, check),
        "maskable": spans,
        "masked": masked,
    }


def _encode_shared(rows: Sequence[Row], codec: Codec, masked: Ragged, check: Checker) -> dict[str, Ragged]:
    parts: list[PositionTargets] = []
    kind = {SparseCodec: SparseTarget, DenseCodec: DenseTarget, ExactCodec: ExactTarget}[type(codec)]
    for i, r in enumerate(rows):
        if r.positions is None or not isinstance(r.positions.target, kind):
            got = "none" if r.positions is None else type(r.positions.target).__name__
            raise check.error("positions", i, f"{codec.name} targets", got)
        parts.append(r.positions)
    positions = Ragged.gather([p.positions for p in parts], np.int64)
    row = positions.row
    outside = (positions.values < 0) | (positions.values >= masked.lengths[row])
    check.items(outside, "positions", positions, "positions inside the sample")
    at = positions.values + masked.offsets[row]
    check.items(np.diff(at, prepend=-1) <= 0, "positions", positions, "positions in ascending order")
    check.items(~masked.values[at], "positions", positions, "masked positions")
    distilled = np.zeros(len(masked.values), dtype=bool)
    distilled[at] = True
    out = {
        "distilled": Ragged.of(distilled[masked.values], masked.sums(masked.values)),
        "half_a": Ragged.gather([p.half_a for p in parts], np.bool_),
        "gold_logp": Ragged.gather([p.gold_logp for p in parts], np.float32),
    }
    if isinstance(codec, DenseCodec):
        dense = [p.target.logp for p in parts if isinstance(p.target, DenseTarget)]
        return {**out, "dense_logp": Ragged.gather([x.reshape(-1) for x in dense], np.float32)}
    if isinstance(codec, ExactCodec):
        states = [p.target.hidden.reshape(-1) for p in parts if isinstance(p.target, ExactTarget)]
        hidden = Ragged.gather(states, np.float32)
        if codec.dtype == "bfloat16":
            hidden = Ragged(narrowed(hidden.values), hidden.offsets)
        return {**out, "hidden": hidden}
    heads = [p.target for p in parts if isinstance(p.target, SparseTarget)]
    counts = Ragged.gather([h.counts for h in heads], np.int64)
    ids = Ragged.gather([h.ids for h in heads], np.int64)
    logp = Ragged.gather([h.logp for h in heads], np.float32)
    bad = ~(np.isfinite(logp.values) & (logp.values <= LOGP_SLACK))
    check.items(bad, "top_logp", logp, "a finite log-prob, at most 0")
    n = len(codec.temperatures)
    shapes = np.array([h.tails.ndim == 2 and h.tails.shape[1] == n for h in heads], dtype=bool)
    check.rows(~shapes, "tails", f"[N, {n}] values", np.array([str(h.tails.shape) for h in heads]))
    tails = [Ragged.gather([h.tails[:, j] for h in heads], np.float32) for j in range(n)]
    for j, tail in enumerate(tails):
        check.items(
            ~(tail.values < np.inf), f"tail_{j}", tail, "a finite logsumexp, or -inf for an empty tail"
        )
    if codec.sketch:
        out["sketch"] = _sketches(heads, counts.lengths, codec, check)
    codes = quantise_head(logp.values, codec.step)
    return {
        **out,
        "counts": Ragged(_fit(counts.values, np.uint8, "counts", check, counts), counts.offsets),
        **_planes("top", ids, check),
        "top_logp": Ragged(differences(codes, logp.offsets[:-1]), logp.offsets),
        **{
            f"tail_{j}": Ragged(quantise_tail(tail.values, codec.tail_step), tail.offsets)
            for j, tail in enumerate(tails)
        },
    }


def _sketches(heads: Sequence[SparseTarget], n: np.ndarray, codec: SparseCodec, check: Checker) -> Ragged:
    """Packed codes of each row, coefficient after coefficient: those of one compress together."""
    found = [np.zeros((0, 0), np.int8) if h.sketch is None else h.sketch for h in heads]
    limits = sketch_limits(codec)
    bad = [
        x.shape != (k, codec.sketch) or x.dtype != np.int8 or bool((x > limits).any() or (x < -limits).any())
        for x, k in zip(found, n)
    ]
    shown = np.array([f"{x.shape} {x.dtype}, largest {x.max(initial=0)}" for x in found])
    check.rows(np.array(bad, dtype=bool), "sketch", f"[N, {codec.sketch}] int8 codes in their limits", shown)
    return Ragged.gather([pack_sketch(x, codec).T.reshape(-1) for x in found], np.int8)


def _encode_cross(rows: Sequence[Row], check: Checker) -> dict[str, Ragged]:
    parts: list[ChunkTargets] = []
    for i, r in enumerate(rows):
        if r.chunks is None:
            raise check.error("chunks", i, "chunk targets", "none")
        parts.append(r.chunks)
    out = {}
    for column, item in CROSS.items():
        name = column.removeprefix("chunk_")
        dtype = np.int64 if item == pa.uint16() else item.to_pandas_dtype()
        x = Ragged.gather([getattr(p, name) for p in parts], dtype)
        narrow = _fit(x.values, np.uint16, column, check, x) if dtype is np.int64 else x.values
        out[column] = Ragged(narrow, x.offsets)
    return out


def _decode_shared(c: Columns, codec: Codec, shared_vocab_size: int) -> dict[str, Ragged]:
    out = {name: c.lists[name] for name in ("half_a", "gold_logp")}
    if isinstance(codec, ExactCodec):
        return out
    if isinstance(codec, DenseCodec):
        dense = c.lists["dense_logp"]
        by_position = dense.values.reshape(-1, shared_vocab_size)
        return {**out, "dense": Ragged(by_position, dense.offsets // shared_vocab_size)}
    counts = c.lists["counts"]
    tails = np.empty((len(counts.values), len(codec.temperatures)), np.float32)
    for j in range(len(codec.temperatures)):
        dequantise_tail(c.lists[f"tail_{j}"].values, codec.tail_step, out=tails[:, j])
    return {
        **out,
        "counts": Ragged(counts.values.astype(np.int32), counts.offsets),
        "tails": Ragged(tails, counts.offsets),
    }


def _decode_cross(c: Columns) -> dict[str, Ragged]:
    lists = {name: c.lists[name] for name in CROSS}
    return {
        name: Ragged(x.values.astype(np.int32), x.offsets) if x.values.dtype == np.uint16 else x
        for name, x in lists.items()
    }


def _planes(name: str, ids: Ragged, check: Checker) -> dict[str, Ragged]:
    bad = (ids.values < 0) | (ids.values >= ID_LIMIT)
    check.items(bad, name, ids, f"an id in [0, {ID_LIMIT})")
    return {
        plane: Ragged((ids.values >> (8 * i) & 0xFF).astype(np.uint8), ids.offsets)
        for i, plane in enumerate(planes(name))
    }


def _fit(
    values: np.ndarray, dtype: type[np.integer], column: str, check: Checker, of: Ragged | None = None
) -> np.ndarray:
    """`values` as `dtype`, refused where they do not fit: wrapped, they would be other values."""
    info = np.iinfo(dtype)
    bad = (values < info.min) | (values > info.max)
    expected = f"a value in {info.min}..{info.max}"
    if of is None:
        check.rows(bad, column, expected, values)
    else:
        check.items(bad, column, of, expected)
    return values.astype(dtype)
