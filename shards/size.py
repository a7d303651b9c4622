"""How large a logit dataset would be, before a teacher has said anything.

Two ways. From a dataset that is there: its bytes per masked position. Or from rows with invented targets,
encoded and compressed as a shard is, all of them and then in halves: what the halves have twice belongs to
files and record batches, the rest to rows. Wide numbers (dense log-probs, hidden states) are not invented row
by row: some of them are compressed, and the rest counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pyarrow as pa

from shards.build import build_shard
from shards.codec import (
    EXACT_BYTES,
    Codec,
    DenseCodec,
    ExactCodec,
    SparseCodec,
    sketch_limits,
)
from shards.columns import narrowed
from shards.manifest import Manifest
from shards.realistic import SPREAD, mean_kept, realistic_targets
from shards.row import ExactTarget, Row, Target
from shards.schema import Kind, schema

ALMOST_ALL = 0.98
"""Of a cap."""
SKETCH_DEVIATIONS = 4.0
"""Of a coefficient, in the range of its codes."""
NUMBERS = 1 << 18
"""Wide numbers that are compressed to see how far they go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of a dataset."""

    shards: float
    beside: float
    """Of the file beside the shards: the teacher's head, or the basis of its sketches."""
    views: int
    """Rows."""
    masked: float
    """Masked positions, of all rows."""

    @property
    def all(self) -> float:
        return self.shards + self.beside

    @property
    def per_view(self) -> float:
        return self.shards / max(self.views, 1)

    @property
    def per_masked(self) -> float:
        return self.shards / max(self.masked, 1.0)


@cache
def spread_of(kept: float, codec: SparseCodec) -> float:
    """How sharp heads must be (`shards.realistic`) for the codec to keep so many entries on average; of those
    that fill its cap everywhere, the sharpest, since real ones are seldom flat."""
    low, high = -6.0, 8.0
    kept = min(kept, ALMOST_ALL * codec.cap)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_kept(codec, middle, positions=1024) > kept else (low, middle)
    return (low + high) / 2


def assumed_targets(
    n: int, codec: Codec, *, vocab_size: int, kept: float | None
) -> tuple[Target, np.ndarray]:
    """Targets of `n` positions and the log-probs [n] of their true tokens: of a sparse codec as large as real
    ones that keep `kept` entries (None = as many as sharp ones do, `shards.realistic.SPREAD`); of the others
    one number, whose width `size_of` adds."""
    rng, extra = (np.random.default_rng([0, i]) for i in (0, 1))
    if not isinstance(codec, SparseCodec):
        gold = -extra.exponential(2.0, n).astype(np.float32)
        return ExactTarget(rng.standard_normal((n, 1)).astype(np.float32)), gold
    target, gold = realistic_targets(
        rng,
        extra,
        n,
        codec,
        vocab_size=vocab_size,
        spread=SPREAD if kept is None else spread_of(kept, codec),
        most=min(codec.cap, vocab_size),
        tail_bound=codec.tail_bound,
    )
    if codec.sketch:
        limits = sketch_limits(codec)
        codes = rng.standard_normal((n, codec.sketch)) * limits / SKETCH_DEVIATIONS
        target = replace(target, sketch=np.clip(np.rint(codes), -limits, limits).astype(np.int8))
    return target, gold


def size_of(
    samples: Sequence[Sequence[Row]],
    *,
    kind: Kind,
    codec: Codec,
    vocab_size: int,
    shared_vocab_size: int | None,
    width: int,
    all_samples: int,
    parts: int,
) -> Size:
    """The dataset of `all_samples` samples like these, in so many parts.

    Args:
        samples: the rows of each, with targets of `assumed_targets` or chunks.
        width: the teacher's hidden size.
        vocab_size, shared_vocab_size: see `shards.encoding.encode`.
    """
    stored = codec if kind == "cross" or isinstance(codec, SparseCodec) else ExactCodec(width=1)

    def built(some: Sequence[Sequence[Row]]) -> int:
        return build_shard(
            [row for rows in some for row in rows],
            part=0,
            first=0,
            last=max(1, len(some)),
            kind=kind,
            codec=stored,
            identity="0" * 64,
            vocab_size=vocab_size,
            shared_vocab_size=shared_vocab_size,
        )[1].bytes

    rows = [row for of in samples for row in of]
    frame, whole = built([]), built(samples)
    twice = built(samples[::2]) + built(samples[1::2]) if len(samples) > 1 else whole + frame
    batches = len({(row.split, row.view) for row in rows})
    a_batch = max(0.0, (twice - whole - frame) / batches)
    a_row = (whole - frame - batches * a_batch) / len(rows)

    targets = shared_vocab_size or vocab_size
    views = all_samples * len(samples[0])
    share = views / len(rows)
    shards = parts * (frame + batches * a_batch) + views * a_row
    if kind == "shared" and not isinstance(codec, SparseCodec):
        positions = share * sum(len(row.positions.positions) for row in rows if row.positions is not None)
        each = wide_bytes(codec, vocab_size=targets, width=width)
        shards += positions * (each - 4 * _compressed(ExactCodec(width=1)))
    beside = 0.0 if kind == "cross" else table_bytes(codec, vocab_size=targets, width=width)
    masked = share * sum(int(row.masked.sum()) for row in rows)
    return Size(shards=shards, beside=beside, views=views, masked=masked)


def wide_bytes(codec: DenseCodec | ExactCodec, *, vocab_size: int, width: int) -> float:
    """Of a position's log-probs or hidden state, compressed."""
    numbers, item = (vocab_size, 4) if isinstance(codec, DenseCodec) else (width, EXACT_BYTES[codec.dtype])
    return numbers * item * _compressed(codec)


def table_bytes(codec: Codec, *, vocab_size: int, width: int) -> float:
    """Of the file beside the shards, which is not compressed: the head, or basis, mean and weights."""
    if isinstance(codec, ExactCodec):
        return EXACT_BYTES[codec.dtype] * vocab_size * width + 100.0
    if isinstance(codec, SparseCodec) and codec.sketch:
        return vocab_size * (2.0 * codec.sketch + 8.0) + 300.0
    return 0.0


@cache
def _compressed(codec: DenseCodec | ExactCodec) -> float:
    """What zstd leaves of the numbers, as a share."""
    x = np.random.default_rng(0).standard_normal(NUMBERS).astype(np.float32)
    if isinstance(codec, DenseCodec):
        x = -np.abs(3 * x + 12)
    data = (narrowed(x) if isinstance(codec, ExactCodec) and codec.dtype == "bfloat16" else x).tobytes()
    return len(pa.Codec("zstd", 3).compress(data)) / len(data)


def size_like(manifest: Manifest, *, views: int, masked: float, parts: int) -> Size:
    """At as many bytes per masked position as a dataset has, what belongs to files and record batches apart.

    Args:
        views, masked, parts: rows, masked positions and parts of the dataset that is planned.
    """
    beside = sum(f.bytes for f in manifest.settings.files)
    batches = [b for shard in manifest.shards for b in shard.batches]
    inside = sum(b.length for b in batches)
    frame = (manifest.totals["bytes"] - inside) / max(1, len(manifest.shards))
    empty = pa.RecordBatch.from_pylist([], schema=schema(manifest.kind, manifest.codec))
    a_batch = float(empty.serialize().size)
    each = (inside - len(batches) * a_batch) / max(1, manifest.totals["masked"])
    in_part = manifest.noise.views * len({b.split for b in batches})
    shards = parts * (frame + in_part * a_batch) + each * masked
    return Size(shards=shards, beside=float(beside), views=views, masked=masked)
