"""The cache of remote record batches: verified on every use, bounded, shared, never a reason to fail."""

import hashlib
import logging
import multiprocessing
import os
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from http_servers import FolderHandler, serving

from shards.cache import BlobCache, HashMismatch
from shards.codec import SparseCodec
from shards.errors import CorruptShard, UsageError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(i: int, size: int = 1000) -> bytes:
    return i.to_bytes(2, "little") * (size // 2)


def blobs(root: Path) -> dict[str, Path]:
    return {p.name: p for p in root.glob("[0-9a-f][0-9a-f]/*")}


class Source:
    """Gives bytes, and counts how often."""

    def __init__(self, *copies: bytes) -> None:
        self.copies, self.asked = copies, 0

    def __call__(self) -> bytes:
        self.asked += 1
        return self.copies[min(self.asked, len(self.copies)) - 1]


def test_bytes_are_fetched_once(tmp_path: Path) -> None:
    data, source = blob(1), Source(blob(1))
    for _ in range(3):
        assert BlobCache(tmp_path, 10_000).get(sha(data), source) == data
    assert source.asked == 1
    assert blobs(tmp_path) == {sha(data): tmp_path / sha(data)[:2] / sha(data)}


def test_a_damaged_copy_is_quarantined_and_fetched_again_once(tmp_path: Path, caplog: Any) -> None:
    data, cache = blob(1), BlobCache(tmp_path, 10_000)
    cache.get(sha(data), Source(data))
    file = tmp_path / sha(data)[:2] / sha(data)
    for damage in (b"", data[:-1], data + b"x", b"y" + data[1:]):
        file.write_bytes(damage)
        source = Source(data)
        with caplog.at_level(logging.WARNING):
            assert cache.get(sha(data), source) == data
        assert source.asked == 1
        assert file.read_bytes() == data
    assert len(list((tmp_path / "quarantine").iterdir())) == 4
    assert "was damaged: moved to" in caplog.text
    file.write_bytes(b"bad")
    source = Source(b"bad too")
    with pytest.raises(HashMismatch, match=sha(b"bad too")):
        cache.get(sha(data), source)
    assert source.asked == 1
    assert not file.exists()


def test_fetched_bytes_that_fail_are_fetched_once_more(tmp_path: Path) -> None:
    data = blob(1)
    for limit in (10_000, 0):
        source = Source(b"damaged on the way", data)
        assert BlobCache(tmp_path / str(limit), limit).get(sha(data), source) == data
        source = Source(b"bad")
        with pytest.raises(HashMismatch):
            BlobCache(tmp_path / f"{limit}b", limit).get(sha(data), source)
        assert source.asked == 2
    assert not blobs(tmp_path / "0")


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10_000)
    made = [blob(i) for i in range(30)]
    for data in made[:8]:
        cache.get(sha(data), Source(data))
        time.sleep(0.002)
    cache.get(sha(made[0]), Source())  # used again: the cache has it
    for data in made[8:]:
        cache.get(sha(data), Source(data))
        time.sleep(0.002)
        cache.get(sha(made[0]), Source(made[0]))
        kept = blobs(tmp_path)
        assert sum(p.stat().st_size for p in kept.values()) <= 10_000 + 10_000 / 32 + 1000
        assert {sha(data), sha(made[0])} <= kept.keys()
    assert sha(made[1]) not in blobs(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "ab" / ".tmp-x"
    left.parent.mkdir()
    left.write_bytes(b"half")
    fresh = tmp_path / "ab" / ".tmp-y"
    fresh.write_bytes(b"half")
    os.utime(left, (0, 0))
    BlobCache(tmp_path, 10_000).get(sha(b"x"), Source(b"x"))
    assert not left.exists()
    assert fresh.exists()


def test_a_blob_beyond_the_limit_is_not_kept(tmp_path: Path) -> None:
    BlobCache(tmp_path, 100).get(sha(blob(1)), Source(blob(1)))
    assert not blobs(tmp_path)


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = BlobCache(tmp_path / "file" / "inside", 10_000)
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            assert cache.get(sha(blob(i)), Source(blob(i))) == blob(i)
    assert caplog.text.count("going on without it") == 1


def _use(root: Path, seed: int, fetched: Any) -> None:
    """Ask for the same 20 blobs; sources are slow, and the cache is too small for all."""
    cache = BlobCache(root, 16_000)
    for i in range(20):
        data = blob(i)

        def source(data: bytes = data) -> bytes:
            time.sleep(0.003)
            fetched.value += 1
            return data

        assert cache.get(sha(data), source) == data


def test_processes_share_it(tmp_path: Path) -> None:
    """Four at once fetch little more than one alone would, and none sees half a file."""
    context = multiprocessing.get_context("fork")
    counts = [context.Value("i", 0) for _ in range(4)]
    workers = [context.Process(target=_use, args=(tmp_path, i, counts[i])) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sum(c.value for c in counts) < 60  # of 80
    assert not list(tmp_path.glob("*/.tmp-*"))
    assert not (tmp_path / "quarantine").exists()


def test_where_and_how_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TIDE_CACHE", raising=False)
    monkeypatch.delenv("TIDE_CACHE_BYTES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert (BlobCache().root, BlobCache().limit) == (tmp_path / "tide", 20_000_000_000)
    monkeypatch.setenv("TIDE_CACHE", str(tmp_path / "x"))
    monkeypatch.setenv("TIDE_CACHE_BYTES", "5000")
    assert (BlobCache().root, BlobCache().limit) == (tmp_path / "x", 5000)
    for wrong in ("20GB", "-1", ""):
        monkeypatch.setenv("TIDE_CACHE_BYTES", wrong)
        with pytest.raises(UsageError, match="TIDE_CACHE_BYTES must be a number of bytes"):
            BlobCache()


def test_a_flipped_byte_in_the_cache_changes_no_second_run(tmp_path: Path) -> None:
    """The second run of a training: the cached copy was damaged meanwhile; then the remote one as well."""
    noise, codec = NoiseConfig(views=1), SparseCodec(cap=12)
    with DatasetWriter(tmp_path / "data", "shared", synthetic_config(noise, codec)) as writer:
        rows = list(synthetic_rows(0, 40, kind="shared", noise=noise, codec=codec))
        writer.write_part(0, 0, 40, rows, {})
        writer.finish({})

    def first_epoch(url: str) -> list[tuple[str, bytes]]:
        data = LogitDataset(url, cache=BlobCache(tmp_path / "cache", 10**8))
        try:
            with closing(data.stream(0)) as stream:
                return [(r.sample_id, r.input_ids.tobytes()) for r, _ in islice(stream, 30)]
        finally:
            for thread in threading.enumerate():
                if thread.name.endswith("(worker)"):  # may be reading ahead, in a file about to be damaged
                    thread.join()

    with serving(FolderHandler, root=tmp_path / "data") as url:
        run = first_epoch(url)
        [(name, file)] = blobs(tmp_path / "cache").items()
        for at in (0, 100, -1):
            content = bytearray(file.read_bytes())
            content[at] ^= 4
            file.write_bytes(content)
            assert first_epoch(url) == run
            assert sha(file.read_bytes()) == name
        assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 3
        shard = next((tmp_path / "data").glob("*.arrow"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 4] ^= 4
        shard.write_bytes(content)
        assert first_epoch(url) == run, "the cached copy is good"
        file.write_bytes(b"x" + file.read_bytes()[1:])
        with pytest.raises(CorruptShard, match=r"part-00000-.*: record batch 0: sha256 differs .*: "):
            first_epoch(url)
