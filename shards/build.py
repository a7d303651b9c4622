"""The bytes of one shard, and the record that names every range of them. A pure function of the rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shards.codec import Codec
from shards.encoding import encode
from shards.errors import RowError
from shards.guard import MAX_BATCH_BYTES, MAX_BATCH_ROWS, MAX_BATCH_VALUES
from shards.invariants import SPLITS
from shards.manifest import BatchRecord, ShardRecord, shard_hash
from shards.noise import check_plan
from shards.row import Row
from shards.schema import Kind, schema
from shards.settings import Settings


@dataclass(frozen=True, slots=True)
class BuiltPart:
    """A part that is encoded, and not yet on disk."""

    data: pa.Buffer
    """Its shard."""
    shard: ShardRecord
    totals: dict[str, Any]
    """`count_rows` of its rows."""


@dataclass(frozen=True, slots=True)
class PartBuilder:
    """Rows -> a part, for one dataset; picklable, so that another process can do it."""

    kind: Kind
    settings: Settings
    identity: str

    def build(self, rows: Sequence[Row], *, part: int, first: int, last: int) -> BuiltPart:
        """Check and encode the rows of corpus rows [first, last).

        Raises:
            RowError: a row breaks the schema or an invariant.
            PlanMismatch: a row's noise is not that of its plan (noise source `philox`).
        """
        s = self.settings
        if s.noise_source == "philox":
            for row in rows:
                check_plan(s.noise, row)
        data, shard = build_shard(
            rows,
            part=part,
            first=first,
            last=last,
            kind=self.kind,
            codec=s.codec,
            identity=self.identity,
            vocab_size=s.student.vocab_size,
            shared_vocab_size=s.shared_vocab_size,
        )
        return BuiltPart(pa.py_buffer(data), shard, count_rows(rows))


def build_shard(
    rows: Sequence[Row],
    *,
    part: int,
    first: int,
    last: int,
    kind: Kind,
    codec: Codec,
    identity: str,
    vocab_size: int,
    shared_vocab_size: int | None,
) -> tuple[memoryview, ShardRecord]:
    """An Arrow IPC file of record batches by (split, view), zstd-compressed, and its record.

    Args:
        part, first, last: number and corpus rows [first, last) of the part.
        vocab_size, shared_vocab_size: see `shards.encoding.encode`.

    Raises:
        RowError: a row breaks the schema or an invariant.
    """
    wanted = schema(kind, codec, identity)
    sink = pa.BufferOutputStream()
    # One thread: bytes must not depend on the machine.
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 3), use_threads=False)
    spans: list[tuple[int, int, Row, int]] = []
    end = len(b"ARROW1\0\0") + wanted.serialize().size  # Arrow writes both before the first record batch
    with pa.ipc.new_file(sink, wanted, options=options) as file:
        for group in _batches(rows):
            batch = encode(
                group, kind, codec, identity, vocab_size=vocab_size, shared_vocab_size=shared_vocab_size
            )
            if batch.nbytes > MAX_BATCH_BYTES:  # no reader would take it
                first_row = f"sample {group[0].sample_id} view {group[0].view}"
                raise RowError(
                    f"{first_row}: a record batch of {batch.nbytes} bytes, "
                    f"at most {MAX_BATCH_BYTES} are allowed: use the sparse codec, or shorter samples"
                )
            file.write_batch(batch)
            spans.append((end, sink.tell(), group[0], len(group)))
            end = sink.tell()
    data = memoryview(sink.getvalue())
    batches = tuple(
        BatchRecord(offset=a, length=b - a, rows=n, view=row.view, split=row.split, sha256=_sha256(data[a:b]))
        for a, b, row, n in spans
    )
    head = _sha256(data[: batches[0].offset if batches else len(data)])
    foot = _sha256(data[end if batches else len(data) :])
    digest = shard_hash([head, *(b.sha256 for b in batches), foot])
    return data, ShardRecord(
        part=part,
        first=first,
        last=last,
        file=f"part-{part:05d}-{digest[:12]}.arrow",
        rows=len(rows),
        bytes=len(data),
        head_sha256=head,
        foot_sha256=foot,
        sha256=digest,
        batches=batches,
    )


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows by split, view and order of appearance, cut into record batches of one split and view."""
    ordered = sorted(
        rows, key=lambda r: (SPLITS.index(r.split) if r.split in SPLITS else len(SPLITS), r.view)
    )
    group: list[Row] = []
    values = 0
    for row in ordered:
        size = row.positions.target.values if row.positions else 0
        full = len(group) == MAX_BATCH_ROWS or values + size > MAX_BATCH_VALUES
        if group and (full or (row.split, row.view) != (group[0].split, group[0].view)):
            yield group
            group, values = [], 0
        group.append(row)
        values += size
    if group:
        yield group


def count_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of a part: sums over its rows, but samples and bytes of content are counted in view 0 alone."""
    samples = [r for r in rows if r.view == 0]
    shared = [r.positions for r in rows if r.positions is not None]
    chunks = [r.chunks for r in rows if r.chunks is not None]
    totals: dict[str, Any] = {
        "rows": len(rows),
        "samples": {s: n for s in SPLITS if (n := Counter(r.split for r in samples)[s])},
        "content_bytes": sum(r.content_bytes for r in samples),
        "tokens": sum(len(r.input_ids) for r in rows),
        "maskable": sum(int(r.maskable.sum()) for r in rows),
        "masked": sum(int(r.masked.sum()) for r in rows),
    }
    if shared:
        totals["distilled"] = sum(len(p.positions) for p in shared)
        totals["target_entries"] = sum(p.target.values for p in shared)  # N * V when dense
    if chunks:
        totals["chunks"] = sum(len(c.start) for c in chunks)
        totals["active_chunks"] = sum(int(c.active.sum()) for c in chunks)
    return totals
