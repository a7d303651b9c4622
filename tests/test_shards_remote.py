"""Remote datasets give what local ones give: S3 (moto), http and the hub, with faults on the way.

Rows are compared field by field with those of the local folder; a seeded proxy answers part of the requests
with an error, not at all, or with half a body.
"""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_servers import FaultProxy, Faults, FolderHandler, serving
from hub_server import HubHandler, Repo

from shards.cache import BlobCache
from shards.codec import SparseCodec
from shards.errors import CorruptShard, ManifestError, ShardError, UsageError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset, StreamState
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12, tail_bound=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of 48 training samples in record batches of 8 rows: twelve a view."""
    out = tmp_path_factory.mktemp("remote") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.build.MAX_BATCH_ROWS", 8)
        with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
            for p in range(2):
                rows = synthetic_rows(64 * p, 64 * (p + 1), kind="shared", noise=NOISE, codec=CODEC)
                writer.write_part(p, 64 * p, 64 * (p + 1), list(rows), {})
            writer.finish({})
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shards.files.BACKOFF_S", 0.01)
    monkeypatch.setattr("shards.files.PATIENCE_S", 0.5)
    monkeypatch.setenv("TIDE_CACHE", str(tmp_path / "cache"))


def plain(x: Any) -> Any:
    """A row as nested tuples, arrays with their dtype and bytes."""
    if is_dataclass(x):
        return tuple(plain(getattr(x, f.name)) for f in fields(x))
    return (x.dtype.str, x.tobytes()) if isinstance(x, np.ndarray) else x


def taken(data: LogitDataset, n: int, start: StreamState | None = None) -> list[Any]:
    return [(plain(row), state) for row, state in islice(data.stream(3, start), n)]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of moto's S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The dataset as s3://tide/data, behind the proxy, which starts to fail as its `kinds` say."""
    import s3fs

    faults = Faults(1, ())
    with serving(FaultProxy, upstream=s3, faults=faults) as proxy:
        settings = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": proxy,
            "AWS_MAX_ATTEMPTS": "1",  # the client's own attempts, which only cost time here
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        faults.share = 0.0
        fs = s3fs.S3FileSystem()
        fs.mkdirs("s3://tide", exist_ok=True)
        fs.put(f"{folder}/", "s3://tide/data/", recursive=True)
        yield faults
        s3fs.S3FileSystem.clear_instance_cache()


def test_s3_with_faults_gives_the_local_stream(bucket: Faults, folder: Path) -> None:
    """Through errors, stalls and cut bodies; resumed in the middle, by another reader without a cache."""
    bucket.kinds, bucket.share = ("500", "cut", "stall"), 0.5
    local = taken(LogitDataset(folder), 250)
    assert taken(LogitDataset("s3://tide/data"), 250) == local
    again = LogitDataset("s3://tide/data", cache=BlobCache(limit=0))
    assert taken(again, 40, local[149][1]) == local[150:190]
    assert all(bucket.injected[kind] >= 2 for kind in bucket.kinds), bucket.injected


def test_http_with_faults_gives_the_local_stream(folder: Path) -> None:
    faults = Faults(2, ("500", "cut", "stall"), share=0.5, stall_s=1.0)
    with (
        serving(FolderHandler, root=folder) as there,
        serving(FaultProxy, upstream=there, faults=faults) as proxy,
    ):
        local = taken(LogitDataset(folder), 250)
        assert taken(LogitDataset(f"{proxy}/"), 250) == local
        assert all(faults.injected[kind] for kind in faults.kinds), faults.injected
        before = faults.requests.total()
        assert taken(LogitDataset(proxy), 250) == local
        shards = [path for path in faults.requests if path.endswith(".arrow")]
        assert len(shards) == 2
        assert faults.requests.total() - before <= 8, "record batches came from the cache"


def test_a_server_that_stays_down_ends_in_one_line(folder: Path, caplog: Any) -> None:
    faults = Faults(0, ("500",), share=0.0)
    with (
        serving(FolderHandler, root=folder) as there,
        serving(FaultProxy, upstream=there, faults=faults) as proxy,
    ):
        data = LogitDataset(proxy)
        faults.share, faults.times = 1.1, 1000
        with caplog.at_level(logging.WARNING), pytest.raises(ShardError) as e:
            next(data.stream(0))
    said = str(e.value)
    assert proxy in said
    assert "gave up after 5 attempts" in said
    assert "run the same command again" in said
    assert "\n" not in said
    assert "trying again in" in caplog.text


def test_a_changed_remote_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Between two reads by one reader, and by a reader opened afterwards whose cache held the old bytes."""
    root = tmp_path / "copy"
    root.mkdir()
    for file in folder.glob("*.*"):
        (root / file.name).write_bytes(file.read_bytes())
    with serving(FolderHandler, root=root) as url:
        data = LogitDataset(url, cache=BlobCache(limit=0))
        data.read(0, 1)
        shard = data.manifest.shards[0]
        content = bytearray((root / shard.file).read_bytes())
        content[shard.batches[1].offset + 40] ^= 1
        (root / shard.file).write_bytes(content)
        with pytest.raises(CorruptShard, match=r"record batch 1: sha256 differs .* ask the owner of http"):
            data.read(0, 1)
        (root / shard.file).write_bytes(content[: shard.batches[1].offset + 10])
        with pytest.raises(CorruptShard, match=r"record batch 1: the file is truncated"):
            data.read(0, 1)
        with pytest.raises(CorruptShard, match=r"record batch 3: the file is truncated .* got 0"):
            data.read(0, 3)
        (root / shard.file).unlink()
        with pytest.raises(CorruptShard, match="is missing from http"):
            data.read(0, 0)
        with pytest.raises(CorruptShard, match="is missing from http"):
            data.check_shard(0)
    with pytest.raises(ShardError, match="gave up after 5 attempts"):
        data.check_shard(0)  # nobody listens any more


def test_verifying_a_remote_dataset_reads_it_and_not_the_cache(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    for file in folder.glob("*.*"):
        (root / file.name).write_bytes(file.read_bytes())
    with serving(FolderHandler, root=root) as url:
        data = LogitDataset(url)
        taken(data, 192)  # both views are cached now
        assert data.check_shard(0) == 128
        shard = data.manifest.shards[0]
        content = bytearray((root / shard.file).read_bytes())
        content[shard.batches[2].offset + 40] ^= 1
        (root / shard.file).write_bytes(content)
        taken(data, 192)
        with pytest.raises(CorruptShard, match="record batch 2: sha256 differs"):
            data.check_shard(0)


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    nothing = pytest.raises(ManifestError, match=r"http://.* has no manifest.json: not a logit dataset")
    with serving(FolderHandler, root=tmp_path) as url, nothing:
        LogitDataset(url)
    with pytest.raises(UsageError, match="nosuch://x"):
        LogitDataset("nosuch://x")
    with pytest.raises(ShardError, match="gave up after 5 attempts"):
        LogitDataset(url)  # nobody listens any more


def test_a_server_without_ranges_is_named(folder: Path) -> None:
    class Whole(FolderHandler):
        def do_GET(self) -> None:
            del self.headers["Range"]
            super().do_GET()

    with serving(Whole, root=folder) as url, pytest.raises(ShardError, match="ignores byte ranges"):
        LogitDataset(url).read(0, 0)


HUB = """
import json, sys
from dataclasses import asdict
from itertools import islice
from shards.errors import TideError
from shards.reader import LogitDataset
out = []
for url in sys.argv[1:]:
    try:
        data = LogitDataset(url)
        rows = [(r.sample_id, r.view, asdict(s)) for r, s in islice(data.stream(3), 100)]
        out.append([data.revision, rows])
    except TideError as e:
        out.append(str(e))
print(json.dumps(out))
"""


def test_the_hub_pinned_and_not(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads where the hub is, and that it may be asked, on import.

    `main` moves on to another dataset; the pinned revision is still what it was.
    """
    files = {p.name: p.read_bytes() for p in folder.glob("*.*")}
    repo = Repo()
    first = repo.commit(files)
    broken = {**files, "manifest.json": b"{}"}
    second = repo.commit(broken)
    asked: Counter[str] = Counter()
    with serving(HubHandler, repos={"team/data": repo}, asked=asked) as url:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "TIDE_CACHE": str(tmp_path / "hub")}
        hub = "hf://datasets/team/data"
        urls = [f"{hub}@{first}", hub, "hf://datasets/team/none", f"team/data@{first[:39]}x"]
        repo.branches["old"] = first
        urls.append(f"{hub}@old")
        done = subprocess.run([sys.executable, "-c", HUB, *urls], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pinned, moved, missing, unknown, branch = json.loads(done.stdout.splitlines()[-1])
    local = [[r.sample_id, r.view, asdict(s)] for r, s in islice(LogitDataset(folder).stream(3), 100)]
    assert pinned == branch == [first, local]
    assert "format version None" in moved
    assert "no such dataset repo or revision" in missing
    assert "\n" not in unknown
    assert second != first
    assert asked["file"] < 40
