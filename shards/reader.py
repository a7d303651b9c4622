"""Reads logit datasets, local or remote: every record batch is verified before one of its rows is used.

The training order is a pure function of (seed, epoch) and the rows in each record batch, so a run resumes
anywhere without replaying: record batches are permuted, and rows are shuffled within windows of consecutive
batches. Datasets over the same samples (another teacher, codec or CompDemo) give them in the same order, so
that runs on them differ in their targets alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa

from shards.encoding import decode
from shards.errors import CorruptShard, RowError, ShardError
from shards.manifest import BatchRecord, Manifest, ShardRecord
from shards.noise import check_plan, uniform01
from shards.row import Row
from shards.schema import schema

WINDOW = 8
"""Record batches whose rows are shuffled together: at most 2,048 rows are held."""
REMEDY = "delete it and run the same tide precompute again, or fetch it again"


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a training stream stands; JSON by `dataclasses.asdict`."""

    epoch: int = 0
    index: int = 0
    """Rows of the epoch already given."""


class LogitDataset:
    """A logit dataset: a folder, or any fsspec URL (`hf://`, `s3://`, ...).

    Args:
        verify_plan: compute every row's noise plan again and compare (datasets with noise source `philox`).

    Raises:
        ManifestError, VersionError: see `Manifest.load`.
    """

    def __init__(self, path_or_url: str | Path, *, verify_plan: bool = True) -> None:
        self.path = str(path_or_url)
        self.manifest = Manifest.load(path_or_url)
        self._fs, root = fsspec.core.url_to_fs(self.path)
        self._root = root.rstrip("/")
        self._verify_plan = verify_plan and self.manifest.noise_source == "philox"
        self._schema = schema(self.manifest.kind, self.manifest.codec)

    def batches(self, split: str, view: int) -> list[tuple[int, int]]:
        """(shard, record batch) indices that hold one view of one split, in dataset order."""
        return [
            (s, b)
            for s, shard in enumerate(self.manifest.shards)
            for b, batch in enumerate(shard.batches)
            if batch.split == split and batch.view == view
        ]

    def count(self, split: str) -> int:
        """Samples in a split."""
        return self._rows(self.batches(split, 0))

    def read(self, shard: int, batch: int) -> list[Row]:
        """The rows of one record batch.

        Raises:
            CorruptShard: the file is missing or its bytes are not those the manifest names.
            RowError: a row breaks an invariant. PlanMismatch: its noise is not that of its plan.
            ShardError: the file cannot be read.
        """
        record = self.manifest.shards[shard]
        wanted = record.batches[batch]
        where = f"{record.file}: record batch {batch}"
        data = self._bytes(record, wanted.offset, wanted.length, wanted.sha256, f"record batch {batch}")
        rows = self._decode(data, where)
        if len(rows) != wanted.rows or any((r.split, r.view) != (wanted.split, wanted.view) for r in rows):
            raise CorruptShard(
                f"{where}: has other rows than the {wanted.rows} of split {wanted.split} view {wanted.view} "
                f"that the manifest names: {REMEDY}"
            )
        if self._verify_plan:
            for row in rows:
                check_plan(self.manifest.noise, row)
        return rows

    def samples(self, split: str) -> Iterator[Row]:
        """View 0 of every sample of a split, in dataset order. Raises: see `read`."""
        for shard, batch in self.batches(split, 0):
            yield from self.read(shard, batch)

    def stream(self, seed: int, start: StreamState | None = None) -> Iterator[tuple[Row, StreamState]]:
        """Training rows without end, each with the state that goes on after it.

        Epoch e gives view e mod R of every training sample once.

        Raises:
            ShardError: there are no training rows, or `start` lies outside the epoch. See also `read`.
        """
        state = start or StreamState()
        epoch, index = state.epoch, state.index
        while True:
            batches = self.batches("train", epoch % self.manifest.noise.views)
            total = self._rows(batches)
            if total == 0:
                raise ShardError(f"{self.path} has no training rows (split train): nothing to train on")
            if not 0 <= index <= total or epoch < 0:
                raise ShardError(
                    f"{self.path}: cannot go on at row {index} of epoch {epoch}, which has {total} rows; the "
                    "dataset changed since the checkpoint: use the same one, or start a new run"
                )
            for row in self._epoch(batches, seed, epoch, index):
                index += 1
                yield row, StreamState(epoch, index) if index < total else StreamState(epoch + 1, 0)
            epoch, index = epoch + 1, 0

    def check_shard(self, shard: int) -> int:
        """Verify every byte and every row of a shard; returns its number of rows.

        Raises:
            CorruptShard: also where the file is longer than declared or has another schema. See also `read`.
        """
        record = self.manifest.shards[shard]
        size = self._size(record)
        if size != record.bytes:
            raise CorruptShard(f"{record.file}: expected {record.bytes} bytes, got {size}: {REMEDY}")
        head = self._bytes(record, *record.head, record.head_sha256, "head")
        self._bytes(record, *record.foot, record.foot_sha256, "foot")
        wanted = schema(self.manifest.kind, self.manifest.codec, self.manifest.identity)
        try:
            found = pa.ipc.read_schema(pa.py_buffer(head[8:]))
        except (pa.ArrowException, OSError) as e:
            raise CorruptShard(f"{record.file}: no Arrow schema ({_first_line(e)}): {REMEDY}") from e
        if not found.equals(wanted, check_metadata=True):
            raise CorruptShard(f"{record.file}: its schema is not that of this dataset: {REMEDY}")
        return sum(len(self.read(shard, b)) for b in range(len(record.batches)))

    def _rows(self, batches: list[tuple[int, int]]) -> int:
        return sum(self._record(b).rows for b in batches)

    def _record(self, at: tuple[int, int]) -> BatchRecord:
        return self.manifest.shards[at[0]].batches[at[1]]

    def _epoch(self, batches: list[tuple[int, int]], seed: int, epoch: int, skip: int) -> Iterator[Row]:
        """The rows of one epoch from row `skip` on; only the window that holds it is read again."""

        def permutation(stream: str, n: int) -> np.ndarray:
            return np.argsort(uniform01(seed, "training order", f"{stream}|{epoch}", n), kind="stable")

        order = [batches[i] for i in permutation("batches", len(batches))]
        for w in range(0, len(order), WINDOW):
            window = order[w : w + WINDOW]
            n = self._rows(window)
            if skip >= n:
                skip -= n
                continue
            rows = [row for at in window for row in self.read(*at)]
            for i in permutation(f"rows|{w // WINDOW}", n)[skip:]:
                yield rows[i]
            skip = 0

    def _size(self, record: ShardRecord) -> int:
        try:
            return int(self._fs.size(f"{self._root}/{record.file}"))
        except FileNotFoundError as e:
            raise self._missing(record) from e

    def _missing(self, record: ShardRecord) -> CorruptShard:
        return CorruptShard(f"{record.file} is missing from {self.path}: {REMEDY}")

    def _bytes(self, record: ShardRecord, offset: int, length: int, sha256: str, what: str) -> bytes:
        """A verified byte range of a shard."""
        try:
            data = self._fs.cat_file(f"{self._root}/{record.file}", start=offset, end=offset + length)
        except FileNotFoundError as e:
            raise self._missing(record) from e
        except OSError as e:
            raise ShardError(f"cannot read {what} of {record.file} in {self.path}: {_first_line(e)}") from e
        if len(data) != length:
            raise CorruptShard(
                f"{record.file}: {what}: the file is truncated (expected {length} bytes at {offset}, "
                f"got {len(data)}): {REMEDY}"
            )
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise CorruptShard(
                f"{record.file}: {what}: sha256 differs (manifest {sha256[:12]}, file {found[:12]}): {REMEDY}"
            )
        return bytes(data)

    def _decode(self, data: bytes, where: str) -> list[Row]:
        m = self.manifest
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), self._schema)
            batch.validate(full=True)
        except (pa.ArrowException, OSError, EOFError, ValueError) as e:
            raise CorruptShard(f"{where}: is not a record batch ({_first_line(e)}): {REMEDY}") from e
        try:
            return decode(
                batch,
                m.kind,
                m.codec,
                vocab_size=m.student.vocab_size,
                shared_vocab_size=m.shared_vocab_size,
            )
        except RowError as e:
            raise RowError(f"{where}: {e}; made by a faulty writer: fetch or make the dataset again") from e


def _first_line(e: BaseException) -> str:
    return str(e).splitlines()[0] if str(e) else type(e).__name__
