"""Reads logit datasets, local or remote: every record batch is verified before one of its rows is used.

The training order (`shards.order`) is a pure function of (seed, epoch) and the rows in each record batch, so
a run resumes anywhere without replaying. Datasets over the same samples (another teacher, codec or CompDemo)
give them in the same order, so that runs on them differ in their targets alone.

Remote record batches are kept in a local cache (`shards.cache`), and those of the next window are fetched
while the rows of this one are used.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.cache import BlobCache, HashMismatch
from shards.codec import Codec
from shards.columns import RowBatch
from shards.encoding import decode
from shards.errors import CorruptShard, RowError, ShardError
from shards.files import Files
from shards.guard import column_bytes
from shards.location import first_line
from shards.manifest import BatchRecord, Manifest, ShardRecord
from shards.noise import NoiseConfig, check_plan, check_plans
from shards.order import Window, windows
from shards.row import Row
from shards.schema import schema
from shards.settings import FileRecord

WINDOW = 8
"""Record batches whose rows are shuffled together: at most 2,048 rows are held."""
READERS = 8
"""Requests under way at once, for a remote dataset."""
PASSED: set[tuple[str, Codec | NoiseConfig]] = set()
"""What this process has found of record batches, by their sha256: rows of this codec, thoroughly checked;
plans of this noise. The same bytes pass again, and the structural checks are enough."""
REMEDY = "delete it and run the same tide precompute again, or fetch it again"


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a training stream stands; JSON by `dataclasses.asdict`."""

    epoch: int = 0
    index: int = 0
    """Rows of the epoch already given."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One window of the training order."""

    window: Window
    batches: list[tuple[int, int]]
    """The record batches of the epoch."""
    first: StreamState
    """Where its first row is."""
    total: int
    """Rows of the epoch."""


class LogitDataset:
    """A logit dataset: a folder, or any URL of fsspec (`hf://datasets/OWNER/NAME@REVISION`, `s3://`,
    `https://`, ...). It may be pickled and may cross a fork.

    Args:
        cache: of remote record batches; None = the machine's. Local datasets use none.
        verify_plan: compute every row's noise plan again and compare (datasets with noise source `philox`).

    Raises:
        ManifestError, VersionError: see `Manifest.load`. UsageError, ShardError: see `shards.files.Files`.
    """

    def __init__(
        self, path_or_url: str | Path, *, cache: BlobCache | None = None, verify_plan: bool = True
    ) -> None:
        self.path = str(path_or_url)
        self._files = Files(path_or_url)
        self.manifest = Manifest.load(path_or_url, self._files.text)
        self._cache = (cache or BlobCache()) if self._files.remote else None
        self._verify_plan = verify_plan and self.manifest.noise_source == "philox"
        self._schema = schema(self.manifest.kind, self.manifest.codec)

    @property
    def revision(self) -> str | None:
        """Commit of the hub that is read; None elsewhere."""
        return self._files.revision

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
        return self._read((shard, batch), cached=True)

    def column_bytes(self, shard: int, batch: int) -> dict[str, int]:
        """Bytes of each column of one record batch as it is stored, compressed. Raises: see `read`."""
        data = self._fetch((shard, batch))
        self.manifest.guard.check(data, self._where((shard, batch)))
        return column_bytes(data, self._schema)

    def table(self) -> bytes | None:
        """The file that targets of this codec need beside their rows (safetensors); None = there is none.

        Raises: CorruptShard, ShardError: see `read`.
        """
        for f in self.manifest.settings.files:
            return self._bytes(f, 0, f.bytes, f.sha256, "the file")
        return None

    def check(self, row: Row) -> None:
        """Compute the noise plan of a row again and compare, if this dataset does (`verify_plan`).

        Raises:
            PlanMismatch: they differ.
        """
        if self._verify_plan:
            check_plan(self.manifest.noise, row)

    def samples(self, split: str) -> Iterator[Row]:
        """View 0 of every sample of a split, in dataset order. Raises: see `read`."""
        for shard, batch in self.batches(split, 0):
            yield from self.read(shard, batch)

    def stream(
        self, seed: int, start: StreamState | None = None, *, check: bool = True
    ) -> Generator[tuple[Row, StreamState], None, None]:
        """Training rows without end, each with the state that goes on after it.

        Epoch e gives view e mod R of every training sample once.

        Args:
            check: `check` every row; False leaves that to whoever uses it (it costs more than decoding, and
                of several processes that read the same order each uses a part).

        Raises:
            ShardError: there are no training rows, or `start` lies outside the epoch. See also `read`.
        """
        for work, found in self._ahead(self._plan(seed, start or StreamState())):
            at = [work.batches[i] for i in work.window.batches]
            opened = [self._open(a, data(), plans=check) for a, data in zip(at, found)]
            ends = np.cumsum([len(rows) for rows in opened])
            which = np.searchsorted(ends, work.window.rows, side="right")
            within = work.window.rows - (ends - [len(rows) for rows in opened])[which]
            epoch, index = work.first.epoch, work.first.index
            for b, i in zip(which.tolist(), within.tolist()):
                index += 1
                yield (
                    opened[b][i],
                    StreamState(epoch, index) if index < work.total else StreamState(epoch + 1, 0),
                )

    def _plan(self, seed: int, start: StreamState) -> Iterator[_Work]:
        """The windows from a state on, epoch after epoch."""
        epoch, index = start.epoch, start.index
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
            counts = [self._record(at).rows for at in batches]
            for window in windows(seed, epoch, counts, WINDOW, skip=index):
                yield _Work(window, batches, StreamState(epoch, index), total)
                index += len(window.rows)
            epoch, index = epoch + 1, 0

    def _ahead(self, plan: Iterator[_Work]) -> Iterator[tuple[_Work, list[Callable[[], bytes]]]]:
        """Each window with the bytes of its record batches; remote ones are fetched a window ahead."""
        if not self._files.remote:
            for work in plan:
                yield work, [partial(self._fetch, work.batches[i]) for i in work.window.batches]
            return
        with ThreadPool(READERS) as pool:  # its threads are daemons: none holds up the end of the program
            waiting: deque[tuple[_Work, list[Callable[[], bytes]]]] = deque()
            for work in plan:
                asked = [pool.apply_async(self._fetch, (work.batches[i],)) for i in work.window.batches]
                waiting.append((work, [result.get for result in asked]))
                if len(waiting) > 1:
                    yield waiting.popleft()

    def check_shard(self, shard: int) -> int:
        """Verify every byte and every row of a shard; returns its rows' number. Raises: see `shard_rows`."""
        return sum(len(rows) for rows in self.shard_rows(shard))

    def shard_rows(self, shard: int) -> Iterator[list[Row]]:
        """The rows of every record batch of a shard, each of its bytes verified, Arrow's own included.

        Raises:
            CorruptShard: also where the file is longer than declared or has another schema. See also `read`.
        """
        record = self.manifest.shards[shard]
        try:
            size = self._files.size(record.file)
        except FileNotFoundError as e:
            raise self._missing(record) from e
        if size is not None and size != record.bytes:
            raise CorruptShard(f"{record.file}: expected {record.bytes} bytes, got {size}: {REMEDY}")
        head = self._bytes(record, *record.head, record.head_sha256, "head", cached=False)
        self._bytes(record, *record.foot, record.foot_sha256, "foot", cached=False)
        wanted = schema(self.manifest.kind, self.manifest.codec, self.manifest.identity)
        try:
            found = pa.ipc.read_schema(pa.py_buffer(head[8:]))
        except (pa.ArrowException, OSError) as e:
            raise CorruptShard(f"{record.file}: no Arrow schema ({first_line(e)}): {REMEDY}") from e
        if not found.equals(wanted, check_metadata=True):
            raise CorruptShard(f"{record.file}: its schema is not that of this dataset: {REMEDY}")
        for batch in range(len(record.batches)):
            yield self._read((shard, batch), cached=False)

    def _rows(self, batches: list[tuple[int, int]]) -> int:
        return sum(self._record(b).rows for b in batches)

    def _record(self, at: tuple[int, int]) -> BatchRecord:
        return self.manifest.shards[at[0]].batches[at[1]]

    def _read(self, at: tuple[int, int], *, cached: bool) -> list[Row]:
        return list(self._open(at, self._fetch(at, cached=cached), anew=not cached))

    def _fetch(self, at: tuple[int, int], *, cached: bool = True) -> bytes:
        """The verified bytes of a record batch."""
        record, wanted = self.manifest.shards[at[0]], self._record(at)
        what = f"record batch {at[1]}"
        return self._bytes(record, wanted.offset, wanted.length, wanted.sha256, what, cached=cached)

    def _open(self, at: tuple[int, int], data: bytes, *, plans: bool = True, anew: bool = False) -> RowBatch:
        """The rows of a record batch, from its verified bytes.

        Args:
            plans: check their noise plans, where this dataset does.
            anew: make every check, also those that these bytes passed before.
        """
        wanted = self._record(at)
        codec, noise = (wanted.sha256, self.manifest.codec), (wanted.sha256, self.manifest.noise)
        rows = self._decode(data, self._where(at), thorough=anew or codec not in PASSED)
        same = (rows.scalars["view"] == wanted.view) & (rows.scalars["split"] == wanted.split)
        if len(rows) != wanted.rows or not same.all():
            raise self._other_rows(at)
        PASSED.add(codec)
        if plans and self._verify_plan and (anew or noise not in PASSED):
            check_plans(self.manifest.noise, rows)
            PASSED.add(noise)
        return rows

    def _where(self, at: tuple[int, int]) -> str:
        return f"{self.manifest.shards[at[0]].file}: record batch {at[1]}"

    def _other_rows(self, at: tuple[int, int]) -> CorruptShard:
        wanted = self._record(at)
        return CorruptShard(
            f"{self._where(at)}: has other rows than the {wanted.rows} of split {wanted.split} view "
            f"{wanted.view} that the manifest names: {REMEDY}"
        )

    def _missing(self, record: ShardRecord | FileRecord) -> CorruptShard:
        return CorruptShard(f"{record.file} is missing from {self.path}: {self._remedy}")

    @property
    def _remedy(self) -> str:
        if not self._files.remote:
            return REMEDY
        return f"it is not what the manifest was made for; ask the owner of {self.path} to publish it again"

    def _bytes(
        self,
        record: ShardRecord | FileRecord,
        offset: int,
        length: int,
        sha256: str,
        what: str,
        *,
        cached: bool = True,
    ) -> bytes:
        """A verified byte range of a file: hashed once, be it from the cache or from its place."""

        def fetch() -> bytes:
            try:
                data = self._files.range(record.file, offset, length)
            except FileNotFoundError as e:
                raise self._missing(record) from e
            if len(data) != length:
                raise CorruptShard(
                    f"{record.file}: {what}: the file is truncated (expected {length} bytes at {offset}, "
                    f"got {len(data)}): {self._remedy}"
                )
            return data

        try:
            if self._cache is not None and cached:
                return self._cache.get(sha256, fetch)
            data = fetch()
            if (found := hashlib.sha256(data).hexdigest()) == sha256:
                return data
        except HashMismatch as e:
            found = str(e)
        raise CorruptShard(
            f"{record.file}: {what}: sha256 differs (manifest {sha256[:12]}, file {found[:12]}): "
            f"{self._remedy}"
        )

    def _decode(self, data: bytes, where: str, *, thorough: bool = True) -> RowBatch:
        m = self.manifest
        m.guard.check(data, where)
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), self._schema)
            batch.validate(full=True)
        except (pa.ArrowException, OSError, EOFError, ValueError) as e:
            raise CorruptShard(f"{where}: is not a record batch ({first_line(e)}): {REMEDY}") from e
        try:
            return decode(
                batch,
                m.kind,
                m.codec,
                vocab_size=m.student.vocab_size,
                shared_vocab_size=m.shared_vocab_size,
                thorough=thorough,
            )
        except RowError as e:
            raise RowError(f"{where}: {e}; made by a faulty writer: fetch or make the dataset again") from e
