"""Rows to record batches and back; both ways check every invariant of `shards.invariants`.

Everything runs over the flat values of a whole batch; only cutting it into rows is per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from shards.codec import Codec, SparseCodec, dequantise_head, dequantise_tail, quantise_head, quantise_tail
from shards.columns import Columns, Ragged, list_array, list_values, scalar_values
from shards.errors import RowError
from shards.invariants import ID_LIMIT, LOGP_SLACK, Checker, check_cross, check_noise, check_shared
from shards.row import ChunkTargets, DenseTarget, PositionTargets, Row, SparseTarget
from shards.schema import CROSS, NULLABLE, SCALARS, Kind, list_types, schema


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
    check = Checker(_labels([r.sample_id for r in rows], [r.view for r in rows]))
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
    batch: pa.RecordBatch, kind: Kind, codec: Codec, *, vocab_size: int, shared_vocab_size: int | None = None
) -> list[Row]:
    """The rows of a record batch, every invariant checked. Arguments as `encode`'s.

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
    check = Checker(_labels(scalars["sample_id"], scalars["view"]))
    maskable, positions = _check(columns, check, kind, codec, vocab_size, shared_vocab_size)
    input_ids, masked = columns.ids("input"), lists["masked"]
    targets: Sequence[PositionTargets] = ()
    chunks: Sequence[ChunkTargets] = ()
    if positions is None:
        chunks = _decode_cross(columns)
    else:
        targets = _decode_shared(columns, positions, codec)
    whole = Ragged(maskable, masked.offsets)
    return [
        Row(
            sample_id=str(scalars["sample_id"][i]),
            view=int(scalars["view"][i]),
            split=str(scalars["split"][i]),
            t=float(scalars["t"][i]),
            input_ids=input_ids[i],
            real_length=int(scalars["real_length"][i]),
            content_bytes=int(scalars["content_bytes"][i]),
            maskable=whole[i],
            masked=masked[i],
            positions=targets[i] if targets else None,
            chunks=chunks[i] if chunks else None,
        )
        for i in range(batch.num_rows)
    ]


def _check(
    c: Columns, check: Checker, kind: Kind, codec: Codec, vocab_size: int, shared_vocab_size: int | None
) -> tuple[np.ndarray, Ragged | None]:
    maskable = check_noise(c, check, vocab_size)
    if kind == "cross":
        check_cross(c, check, maskable)
        return maskable, None
    return maskable, check_shared(c, check, codec, shared_vocab_size or vocab_size)


def _labels(sample_ids: Sequence[str] | np.ndarray, views: Sequence[int] | np.ndarray) -> list[str]:
    return [f"sample {s} view {v}" for s, v in zip(sample_ids, views)]


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
    kind = SparseTarget if isinstance(codec, SparseCodec) else DenseTarget
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
    if not isinstance(codec, SparseCodec):
        dense = [p.target.logp for p in parts if isinstance(p.target, DenseTarget)]
        return {**out, "dense_logp": Ragged.gather([x.reshape(-1) for x in dense], np.float32)}
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
    return {
        **out,
        "counts": Ragged(_fit(counts.values, np.uint8, "counts", check, counts), counts.offsets),
        **_planes("top", ids, check),
        "top_logp": Ragged(quantise_head(logp.values, codec.step), logp.offsets),
        **{
            f"tail_{j}": Ragged(quantise_tail(tail.values, codec.tail_step), tail.offsets)
            for j, tail in enumerate(tails)
        },
    }


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


def _decode_shared(c: Columns, positions: Ragged, codec: Codec) -> list[PositionTargets]:
    half_a, gold = c.lists["half_a"], c.lists["gold_logp"]
    n_rows = len(positions.offsets) - 1
    targets: list[SparseTarget | DenseTarget]
    if isinstance(codec, SparseCodec):
        counts, ids, codes = c.lists["counts"], c.ids("top"), c.lists["top_logp"]
        logp = Ragged(dequantise_head(codes.values, codec.step), codes.offsets)
        tails = [c.lists[f"tail_{j}"].values for j in range(len(codec.temperatures))]
        tail = Ragged(dequantise_tail(np.stack(tails, axis=1), codec.tail_step), counts.offsets)
        whole = Ragged(counts.values.astype(np.int32), counts.offsets)
        targets = [SparseTarget(whole[i], ids[i], logp[i], tail[i]) for i in range(n_rows)]
    else:
        dense, n = c.lists["dense_logp"], positions.lengths
        total = max(1, len(positions.values))
        width = len(dense.values) // total
        targets = [DenseTarget(dense[i].reshape(n[i], width)) for i in range(n_rows)]
    return [PositionTargets(positions[i], half_a[i], gold[i], targets[i]) for i in range(n_rows)]


def _decode_cross(c: Columns) -> list[ChunkTargets]:
    def column(name: str) -> Ragged:
        x = c.lists[f"chunk_{name}"]
        wide = x.values.astype(np.int32) if x.values.dtype == np.uint16 else x.values
        return Ragged(wide, x.offsets)

    fields = [column(name.removeprefix("chunk_")) for name in CROSS]
    return [ChunkTargets(*(f[i] for f in fields)) for i in range(len(fields[0].offsets) - 1)]


def _planes(name: str, ids: Ragged, check: Checker) -> dict[str, Ragged]:
    bad = (ids.values < 0) | (ids.values >= ID_LIMIT)
    check.items(bad, name, ids, f"an id in [0, {ID_LIMIT})")
    low, high = (ids.values & 0xFFFF).astype(np.uint16), (ids.values >> 16).astype(np.uint8)
    return {f"{name}_lo": Ragged(low, ids.offsets), f"{name}_hi": Ragged(high, ids.offsets)}


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
