"""What is refused before a library opens it: batches that would fill the memory, forged metadata, links,
pipes, manifests that are bombs. Each has its own message, and nothing large is allocated on the way."""

import json
import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards.codec import SparseCodec
from shards.encoding import encode
from shards.errors import CorruptShard, ManifestError, RowError, ShardError
from shards.guard import MAX_BATCH_BYTES, Guard, memory_limit, plain_file
from shards.manifest import Manifest, shard_from_json
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import Row
from shards.schema import schema
from shards.synthetic import synthetic_config, synthetic_rows
from shards.untrusted import MAX_CONTAINERS, MAX_DEPTH, parse
from shards.writer import DatasetWriter

CODEC = SparseCodec(cap=12, tail_bound=0.05)
NOISE = NoiseConfig(views=2)
GUARD = Guard(kind="shared", codec=CODEC, max_length=64, block_size=8, vocab_size=300)
ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def rows() -> list[Row]:
    return list(synthetic_rows(0, 4, kind="shared", noise=NOISE, codec=CODEC))


def good() -> pa.RecordBatch:
    return encode(rows(), "shared", CODEC, "", vocab_size=304, shared_vocab_size=300)


def message(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions = ZSTD) -> bytes:
    """The batch as an encapsulated message, as it lies in a shard."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as stream:
        stream.write_batch(batch)
        end = sink.tell()
    return sink.getvalue().to_pybytes()[batch.schema.serialize().size : end]


def bomb(values: int) -> bytes:
    """A batch of one row whose `maskable` has that many zeros."""
    one = good().slice(0, 1)
    i = one.schema.get_field_index("maskable")
    zeros = pa.ListArray.from_arrays(
        pa.array([0, values], pa.int32()), pa.array(np.zeros(values, np.int32)), type=one.schema.field(i).type
    )
    return message(one.set_column(i, one.schema.field(i), zeros))


@pytest.mark.parametrize("options", [ZSTD, pa.ipc.IpcWriteOptions()], ids=["zstd", "plain"])
def test_real_batches_pass(options: pa.ipc.IpcWriteOptions) -> None:
    GUARD.check(message(good(), options), "x")


def test_a_bomb_is_refused_before_anything_is_allocated() -> None:
    """64 MB of zeros in a few kB: Arrow would allocate them; the guard tells from the declared sizes."""
    data = bomb(16 << 20)
    assert len(data) < 30_000
    before, start = pa.total_allocated_bytes(), time.process_time()
    tracemalloc.start()
    with pytest.raises(
        CorruptShard, match=r"x: .* would take 6\d{7} bytes of memory, 1 rows of this dataset at most"
    ):
        GUARD.check(data, "x")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == before
    assert time.process_time() - start < 1


def test_the_reader_asks_the_guard(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, "shared", synthetic_config(NOISE, CODEC)) as writer:
        writer.write_part(0, 0, 4, rows(), {})
        writer.finish()
    with pytest.raises(CorruptShard, match="bytes of memory"):
        LogitDataset(tmp_path)._decode(bomb(16 << 20), "part-x.arrow: record batch 0")


def test_no_manifest_lifts_the_bound_of_all_bounds() -> None:
    assert (
        memory_limit("shared", CODEC, 256, max_length=1 << 20, block_size=8, vocab_size=1 << 24)
        == MAX_BATCH_BYTES
    )


def patched(data: bytes, at: int, format: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(format, out, at, value)
    return bytes(out)


def find(data: bytes, format: str, *values: int) -> int:
    """Where the first of these numbers stand in the metadata."""
    at = data.find(struct.pack(format, *values))
    assert at > 0
    return at


def declared(data: bytes, value: int) -> bytes:
    """The first compressed buffer says that it holds `value` bytes."""
    (size,) = struct.unpack_from("<i", data, 4)
    return patched(data, 8 + size, "<q", value)


FORGED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda d: b"", "no message starts here"),
    ("zeros", lambda d: bytes(len(d)), "no message starts here"),
    ("no continuation", lambda d: b"\0" + d[1:], "no message starts here"),
    ("metadata too long", lambda d: patched(d, 4, "<i", 1 << 30), r"metadata of 1073741824 bytes in \d+"),
    ("metadata negative", lambda d: patched(d, 4, "<i", -8), "metadata of -8 bytes"),
    ("cut", lambda d: d[:-64], r"\d+ bytes declared, \d+ follow"),
    ("longer", lambda d: d + bytes(64), r"\d+ bytes declared, \d+ follow"),
    ("root beyond", lambda d: patched(d, 8, "<I", 1 << 31), "an offset beyond the metadata"),
    ("many rows", lambda d: patched(d, find(d, "<q", 8), "<q", 257), "257 rows, at most 256 are allowed"),
    ("negative rows", lambda d: patched(d, find(d, "<q", 8), "<q", -1), "-1 rows"),
    ("node length", lambda d: patched(d, find(d, "<qq", 8, 0), "<q", 1 << 60), "impossible array lengths"),
    ("node nulls", lambda d: patched(d, find(d, "<qq", 8, 0) + 8, "<q", 9), "impossible array lengths"),
    ("huge buffer", lambda d: declared(d, 1 << 62), "would take 46116860"),
    ("negative buffer", lambda d: declared(d, -2), "a buffer of -2 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [f[1:] for f in FORGED], ids=[f[0] for f in FORGED])
def test_forged_metadata_is_refused(change: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(CorruptShard, match=reason) as e:
        GUARD.check(change(message(good())), "x")
    assert "\n" not in str(e.value)


def test_other_messages_are_refused() -> None:
    lz4 = message(good(), pa.ipc.IpcWriteOptions(compression="lz4"))
    with pytest.raises(CorruptShard, match="compressed otherwise than by zstd"):
        GUARD.check(lz4, "x")
    with pytest.raises(CorruptShard, match="message type 1 of version 4"):
        GUARD.check(schema("shared", CODEC).serialize().to_pybytes(), "x")
    dense = pa.RecordBatch.from_arrays([pa.array([1, 2])], names=["x"])
    with pytest.raises(CorruptShard, match=r"1 arrays in 2 buffers, expected \d+ in \d+"):
        GUARD.check(message(dense), "x")


def test_every_cut_of_the_metadata_is_refused_in_one_way() -> None:
    """No look-up leaves the metadata: whatever is missing, the answer is CorruptShard."""
    whole = message(good())
    (size,) = struct.unpack_from("<i", whole, 4)
    for end in range(0, 8 + size, 3):
        for data in (whole[:end], whole[:4] + struct.pack("<i", max(end - 8, 0)) + whole[8:end]):
            with pytest.raises(CorruptShard):
                GUARD.check(data, "x")


# Manifests and part records.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "key 'a' occurs twice in one object"),
        ('{"x": {"b": 1, "c": 2, "b": 1}}', "key 'b' occurs twice in one object"),
        ('{"a": 1e999}', "1e999 is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", f"nested more than {MAX_DEPTH} levels deep"),
        ('{"a": ' + "9" * 5_000 + "}", "not valid JSON"),
        ("{" + "[" * MAX_CONTAINERS, "lists and objects, at most"),
        ("[" + "0," * (1 << 25) + "0]", "values, at most"),
        (b"\xff\xfe{", "not valid JSON"),
    ],
    ids=["twice", "twice-inside", "overflow", "infinity", "deep", "digits", "lists", "values", "bytes"],
)
def test_json_that_is_no_manifest(text: str | bytes, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason) as e:
        parse(text, "manifest.json")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


@pytest.fixture
def data(tmp_path: Path) -> Path:
    out = tmp_path / "data"
    with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
        writer.write_part(0, 0, 4, rows(), {})
        writer.finish()
    return out


def test_a_changed_manifest_does_not_have_its_hash(data: Path) -> None:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in (
        {"report": {"seconds": 1}},
        {"fidelity": {"cosine": 1.0}},
        {"sha256": "0" * 64},
        {"sha256": None},
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ManifestError, match="its sha256 is not that of its content"):
            Manifest.load(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": MAX_BATCH_BYTES + 1}, "record batch 0 is impossible"),
        ({"length": 0}, "record batch 0 is impossible"),
    ],
    ids=str,
)
def test_sizes_that_no_shard_has(data: Path, change: dict[str, Any], reason: str) -> None:
    shard = json.loads((data / "manifest.json").read_text())["shards"][0]
    shard["batches"][0].update(change)
    with pytest.raises(ManifestError, match=reason):
        shard_from_json(shard, "shard 0")


def test_a_head_that_is_no_schema(data: Path) -> None:
    shard = json.loads((data / "manifest.json").read_text())["shards"][0]
    shard["bytes"] += 5 << 20
    for batch in shard["batches"]:
        batch["offset"] += 5 << 20
    with pytest.raises(ManifestError, match=r"52\d{5} bytes before the first record batch, at most 1048576"):
        shard_from_json(shard, "shard 0")


@pytest.mark.parametrize("name", ["manifest.json", "shard"])
def test_links_are_refused(data: Path, tmp_path: Path, name: str) -> None:
    path = data / name if name != "shard" else next(data.glob("*.arrow"))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(
        ShardError, match=rf"{path.name} is a link, and a dataset's folder holds plain files only"
    ):
        LogitDataset(data).check_shard(0)
    with pytest.raises(ShardError, match="is a link"):
        LogitDataset(data).read(0, 0)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")  # a dangling one is not called missing
    with pytest.raises(ShardError, match="is a link"):
        LogitDataset(data).check_shard(0)


def test_a_pipe_or_a_folder_is_no_shard(data: Path) -> None:
    """A pipe would never end: opening it waits for a writer."""
    path = next(data.glob("*.arrow"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match="is no plain file"):
        LogitDataset(data).check_shard(0)
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardError, match="is no plain file"):
        LogitDataset(data).read(0, 0)
    with pytest.raises(FileNotFoundError):
        plain_file(str(data / "nothing"))


def test_a_batch_that_no_reader_would_take_is_not_written(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.build.MAX_BATCH_BYTES", 1_000)
    with (
        DatasetWriter(data.parent / "other", "shared", synthetic_config(NOISE, CODEC)) as writer,
        pytest.raises(RowError, match=r"a record batch of \d+ bytes, at most 1000 are allowed"),
    ):
        writer.write_part(0, 0, 4, rows(), {})
