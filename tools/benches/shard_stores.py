"""Ways to keep rows of a sparse logit dataset, which `tide bench shards` compares.

Each writes them to a file or folder, reads them back in order as flat numpy arrays, and tells its bytes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shards.codec import SparseCodec, dequantise_head, quantise_head, quantise_tail
from shards.columns import RowBatch
from shards.encoding import decode, encode
from shards.realistic import REALISTIC_VOCAB
from shards.row import Row, SparseTarget

Rows = Sequence[Sequence[Row]]
"""Record batches."""
Heads = tuple[np.ndarray, np.ndarray]
"""Ids and log-probs of all rows, end to end: what must come back the same."""
IN_ORDER = pa.ipc.IpcReadOptions(use_threads=False)


class Store(Protocol):
    """One way to keep rows."""

    def write(self) -> object: ...
    def read(self) -> Iterator[Any]: ...
    def bytes(self) -> int: ...
    def heads(self) -> Heads: ...


def columns(rows: Sequence[Row], codec: SparseCodec, *, codes: bool) -> dict[str, Any]:
    """Name -> values of one batch: numpy scalars' arrays, or (lengths, values) of a list column.

    Args:
        codes: log-probs and tails as our codes; otherwise as f16.
    """

    def lists(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([len(a) for a in arrays], np.int32), np.concatenate(arrays)

    targets = [target(r) for r in rows]
    logp = [t.logp for t in targets]
    spans = [np.flatnonzero(np.diff(r.maskable, prepend=False, append=False)) for r in rows]
    out: dict[str, Any] = {
        "sample_id": np.array([r.sample_id for r in rows]),
        "view": np.array([r.view for r in rows], np.uint16),
        "split": np.array([r.split for r in rows]),
        "t": np.array([r.t for r in rows], np.float32),
        "real_length": np.array([r.real_length for r in rows], np.int32),
        "content_bytes": np.array([r.content_bytes for r in rows], np.int32),
        "input_ids": lists([r.input_ids.astype(np.uint32) for r in rows]),
        "maskable": lists([s.astype(np.int32) for s in spans]),
        "masked": lists([r.masked for r in rows]),
        "distilled": lists([np.ones(len(t.counts), np.bool_) for t in targets]),
        "half_a": lists([r.positions.half_a for r in rows if r.positions]),
        "gold_logp": lists([r.positions.gold_logp for r in rows if r.positions]),
        "counts": lists([t.counts.astype(np.uint8) for t in targets]),
        "top_ids": lists([t.ids.astype(np.uint32) for t in targets]),
        "top_logp": lists([quantise_head(x, codec.step) if codes else x.astype(np.float16) for x in logp]),
    }
    for j in range(len(codec.temperatures)):
        tails = [t.tails[:, j] for t in targets]
        out[f"tail_{j}"] = lists(
            [quantise_tail(x, codec.tail_step) if codes else x.astype(np.float16) for x in tails]
        )
    return out


def target(row: Row) -> SparseTarget:
    assert row.positions is not None
    assert isinstance(row.positions.target, SparseTarget)
    return row.positions.target


def record_batch(rows: Sequence[Row], codec: SparseCodec, *, codes: bool) -> pa.RecordBatch:
    arrays = {}
    for name, x in columns(rows, codec, codes=codes).items():
        if isinstance(x, tuple):
            offsets = np.concatenate([[0], np.cumsum(x[0])]).astype(np.int32)
            arrays[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(x[1]))
        else:
            arrays[name] = pa.array(x)
    return pa.record_batch(arrays)


def flat(batch: pa.RecordBatch | pa.Table) -> dict[str, Any]:
    """Numpy arrays of all columns: values, or offsets and values."""
    out: dict[str, Any] = {}
    for name, x in zip(batch.schema.names, batch.columns):
        x = x.combine_chunks() if isinstance(x, pa.ChunkedArray) else x
        values = x.values if pa.types.is_list(x.type) else x
        found = values.to_numpy(zero_copy_only=False)
        out[name] = (x.offsets.to_numpy(), found) if pa.types.is_list(x.type) else found
    return out


def write_ipc(batches: Sequence[pa.RecordBatch], sink: Any, compression: str | None) -> None:
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec(compression, 3) if compression else None, use_threads=False
    )
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)


@dataclass(frozen=True, slots=True)
class ArrowStore:
    """An Arrow IPC file: ids u32, log-probs f16."""

    path: Path
    rows: Rows
    codec: SparseCodec
    compression: str | None

    def write(self) -> None:
        made = [record_batch(rows, self.codec, codes=False) for rows in self.rows]
        with open(self.path, "wb") as sink:
            write_ipc(made, sink, self.compression)

    def read(self) -> Iterator[dict[str, Any]]:
        return map(flat, batches_of(self.path))

    def bytes(self) -> int:
        return self.path.stat().st_size

    def heads(self) -> Heads:
        return joined(self.read(), lambda x: x.astype(np.float32))


@dataclass(frozen=True, slots=True)
class OurStore:
    """Our record batches in an Arrow IPC file, decoded to flat arrays."""

    path: Path
    rows: Rows
    codec: SparseCodec

    def write(self) -> None:
        made = [encode(rows, "shared", self.codec, "", vocab_size=REALISTIC_VOCAB) for rows in self.rows]
        with open(self.path, "wb") as sink:
            write_ipc(made, sink, "zstd")

    def read(self, *, thorough: bool = False) -> Iterator[RowBatch]:
        for batch in batches_of(self.path):
            yield decode(batch, "shared", self.codec, vocab_size=REALISTIC_VOCAB, thorough=thorough)

    def bytes(self) -> int:
        return self.path.stat().st_size

    def heads(self) -> Heads:
        read = list(self.read())
        return tuple(np.concatenate([b.lists[k].values for b in read]) for k in ("ids", "logp"))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ParquetStore:
    """A Parquet file, zstd-3: ids u32, log-probs and tails as our codes; a row group per batch."""

    path: Path
    rows: Rows
    codec: SparseCodec

    def write(self) -> None:
        import pyarrow.parquet as pq

        made = [record_batch(rows, self.codec, codes=True) for rows in self.rows]
        with pq.ParquetWriter(self.path, made[0].schema, compression="zstd", compression_level=3) as file:
            for batch in made:
                file.write_batch(batch)

    def read(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.path)
        return (flat(file.read_row_group(i, use_threads=False)) for i in range(file.num_row_groups))

    def bytes(self) -> int:
        return self.path.stat().st_size

    def heads(self) -> Heads:
        return joined(self.read(), lambda x: dequantise_head(x, self.codec.step))


@dataclass(slots=True)
class MdsStore:
    """mosaicml-streaming's shards, zstd-3: ids u32, log-probs and tails as our codes, flags as packed bits; a
    sample per row, read in order. Its shards are decompressed once, by the first read."""

    path: Path
    rows: Rows
    codec: SparseCodec
    _size: int = 0
    _dataset: Any = field(default=None)

    def samples(self) -> Iterator[dict[str, Any]]:
        for rows in self.rows:
            for row in rows:
                one = columns([row], self.codec, codes=True)
                yield {name: packed(x[1]) if isinstance(x, tuple) else x[0].item() for name, x in one.items()}

    def write(self) -> None:
        with mosaicml() as streaming:
            first = next(self.samples())
            encodings = {
                name: f"ndarray:{x.dtype}"
                if isinstance(x, np.ndarray)
                else {str: "str", int: "int", float: "float32"}[type(x)]
                for name, x in first.items()
            }
            with streaming.MDSWriter(
                out=str(self.path), columns=encodings, compression="zstd:3", size_limit=1 << 26
            ) as file:
                for sample in self.samples():
                    file.write(sample)
        self._size = sum(f.stat().st_size for f in self.path.iterdir())

    def read(self) -> Iterator[dict[str, Any]]:
        if self._dataset is None:
            with mosaicml() as streaming:
                streaming.base.util.clean_stale_shared_memory()
                self._dataset = streaming.StreamingDataset(local=str(self.path), shuffle=False, batch_size=1)
        # By number: iterating the dataset runs threads that poll, at several times the processor time.
        return (self._dataset[i] for i in range(len(self._dataset)))

    def bytes(self) -> int:
        return self._size

    def heads(self) -> Heads:
        read = list(self.read())
        codes = np.concatenate([s["top_logp"] for s in read])
        return np.concatenate([s["top_ids"] for s in read]).astype(np.int32), dequantise_head(
            codes, self.codec.step
        )


def packed(x: np.ndarray) -> np.ndarray:
    return np.packbits(x) if x.dtype == np.bool_ else x


@contextmanager
def mosaicml() -> Iterator[Any]:
    """The module. It imports its image datasets, and those torchvision, even where none is used: without
    torchvision an empty module stands in for it meanwhile. Raises: ImportError."""
    import transformers.feature_extraction_utils  # noqa: F401  looks for torchvision itself: before the stand-in

    class Empty(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    absent = importlib.util.find_spec("torchvision") is None and "streaming" not in sys.modules
    try:
        if absent:
            sys.modules.update({name: Empty(name) for name in names})
        import streaming
        import streaming.base.util
    finally:
        for name in names if absent else ():
            del sys.modules[name]
    yield streaming


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source, options=IN_ORDER)
        for i in range(file.num_record_batches):
            yield file.get_batch(i)


def joined(batches: Iterator[dict[str, Any]], logp: Callable[[np.ndarray], np.ndarray]) -> Heads:
    read = list(batches)
    ids = np.concatenate([b["top_ids"][1] for b in read]).astype(np.int32)
    return ids, np.concatenate([logp(b["top_logp"][1]) for b in read])


def make_stores(folder: Path, rows: Rows, codec: SparseCodec) -> dict[str, Store]:
    """By name, mosaicml-streaming's where it can be imported."""
    stores: dict[str, Store] = {
        "arrow": ArrowStore(folder / "raw.arrow", rows, codec, None),
        "arrow_zstd": ArrowStore(folder / "zstd.arrow", rows, codec, "zstd"),
        "parquet": ParquetStore(folder / "u8.parquet", rows, codec),
        "ours": OurStore(folder / "ours.arrow", rows, codec),
    }
    try:
        with mosaicml():
            stores["mds"] = MdsStore(folder / "mds", rows, codec)
    except ImportError:
        pass
    return stores
