"""Push and pull through folders, S3 (moto) and the hub (a stand-in over HTTP, used by the real client):
what arrives is the dataset byte for byte, only what is missing moves, and whatever stops half-way is finished
by the same call. Readers see the old dataset or the new one."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_servers import FaultProxy, Faults, FolderHandler, serving
from hub_server import HubHandler, Repo

from shards import pull as pulling
from shards import stores
from shards.codec import SparseCodec
from shards.errors import ConfigMismatch, CorruptShard, ManifestError, ShardError, UsageError
from shards.location import locate
from shards.manifest import Manifest, identity_of
from shards.merge import merge
from shards.noise import NoiseConfig
from shards.pull import pull
from shards.push import push
from shards.reader import LogitDataset
from shards.synthetic import synthetic_config, synthetic_rows
from shards.verify import verify
from shards.writer import DatasetWriter

NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12, tail_bound=0.05)
SIZE = 4


def make(out: Path, *parts: int, seed: int = 0) -> Path:
    """A dataset of these parts, or these parts more; another seed is another dataset."""
    noise = NoiseConfig(views=2, seed=seed)
    with DatasetWriter(out, "shared", synthetic_config(noise, CODEC)) as writer:
        for p in parts:
            rows = synthetic_rows(p * SIZE, (p + 1) * SIZE, kind="shared", noise=noise, codec=CODEC)
            writer.write_part(p, p * SIZE, (p + 1) * SIZE, list(rows), {"dropped": {"absent": p}})
        writer.finish()
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """What must be equal in every copy: the card has a name in it, the others are of the folder itself."""
    skip = ("README.md", ".lock", "origin.json")
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in skip)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make(tmp_path / "data", 0, 1, 2)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Faults]:
    """A proxy before moto that can fail; the bucket is named after the test."""
    import s3fs

    faults = Faults(3, ("500",), share=0.0)
    with serving(FaultProxy, upstream=moto, faults=faults, failing=("PUT", "GET")) as url:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdirs("s3://tide", exist_ok=True)
        yield faults
        s3fs.S3FileSystem().rm("s3://tide", recursive=True)
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubHandler]]:
    """The stand-in; its class attributes are the hub's state."""
    from huggingface_hub import HfFileSystem, constants

    state: dict[str, Any] = {"repos": {}, "asked": Counter(), "large": {}}
    with serving(HubHandler, **state) as url:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        HfFileSystem.clear_instance_cache()
        yield type("State", (HubHandler,), state)
        HfFileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "s3", "hub", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL of each kind, nothing there yet."""
    if request.param == "folder":
        return str(tmp_path / "place" / "data")
    if request.param == "memory":
        import fsspec

        fsspec.filesystem("memory").store.clear()
        return "memory://place/data"
    request.getfixturevalue(request.param)
    return {"s3": "s3://tide/place/data", "hub": "hf://datasets/team/data"}[request.param]


def test_there_and_back(data: Path, place: str, tmp_path: Path) -> None:
    """A copy of a copy is the dataset, records included; a second push or pull moves nothing."""
    assert push(data, place).moved == 3
    assert push(data, place).moved == 0
    assert verify(place, full=True).problems == ()
    copy = tmp_path / "copy"
    first = pull(place, copy)
    assert (first.moved, first.continuable) == (3, True)
    assert contents(copy) == contents(data)
    assert pull(place, copy).moved == 0
    origin = json.loads((copy / "origin.json").read_text())
    assert origin["url"] == place
    assert origin["revision"] == first.revision
    assert Manifest.load(copy).identity == Manifest.load(data).identity
    make(copy, 3)  # the copy can be continued
    assert contents(copy) == contents(make(data, 3))


def test_growth_moves_only_what_is_new(data: Path, place: str, tmp_path: Path) -> None:
    push(data, place)
    copy = tmp_path / "copy"
    pull(place, copy)
    make(data, 3, 4)
    grown = push(data, place)
    assert grown.moved == 2
    assert pull(place, copy).moved == 2
    assert contents(copy) == contents(data)
    assert verify(copy, full=True).warnings == ()


def test_the_codec_table_comes_along(place: str, tmp_path: Path) -> None:
    """Some codecs need a file beside the shards, which no row can be used without."""
    basis = bytes(range(256)) * 50
    codec = SparseCodec(sketch=4, table=hashlib.sha256(basis).hexdigest())
    data = tmp_path / "data"
    data.mkdir()
    (data / "sketch.safetensors").write_bytes(basis)
    config = synthetic_config(NOISE, codec)
    config["files"] = [
        {"file": "sketch.safetensors", "bytes": len(basis), "sha256": codec.table, "what": "basis"}
    ]
    with DatasetWriter(data, "shared", config) as writer:
        writer.write_part(0, 0, SIZE, [], {})
        writer.finish()
    assert push(data, place).moved == 2
    assert verify(place).problems == ()
    copy, merged = tmp_path / "copy", tmp_path / "merged"
    assert pull(place, copy).moved == 2
    assert pull(place, copy).moved == 0
    assert contents(copy) == contents(data)
    merge(merged, [copy])
    assert contents(merged) == contents(data)
    (copy / "sketch.safetensors").write_bytes(basis[1:] + b"x")
    assert [p.file for p in verify(copy).problems] == ["sketch.safetensors"]
    with pytest.raises(CorruptShard, match=r"sketch\.safetensors: sha256 differs"):
        push(copy, str(tmp_path / "elsewhere"))
    assert pull(place, copy).moved == 1
    assert contents(copy) == contents(data)


def test_another_dataset_in_the_way_is_refused_by_name(data: Path, place: str, tmp_path: Path) -> None:
    push(data, place)
    other = make(tmp_path / "other", 0, seed=7)
    for replace in (False, True):
        with pytest.raises(ConfigMismatch, match=r"noise\.seed: 0 -> 7"):
            push(other, place, replace=replace)
    with pytest.raises(ConfigMismatch, match=r"noise\.seed: 7 -> 0"):
        pull(place, other)
    assert verify(place).problems == ()
    assert verify(other, full=True).problems == ()


def test_parts_of_its_own_are_not_taken_from_a_place(data: Path, place: str, tmp_path: Path) -> None:
    """A copy that lags behind, or made a part again with other bytes, does not win silently."""
    push(data, place)
    behind = make(tmp_path / "behind", 0, 1)
    with pytest.raises(ShardError, match=r"part 2 .*--replace"):
        push(behind, place)
    push(behind, place, replace=True)
    assert len(LogitDataset(place).manifest.shards) == 2
    with pytest.raises(ShardError, match=r"part 2 .*tide merge"):
        pull(place, data)
    assert len(Manifest.load(data).shards) == 3


def test_a_mirror_follows_and_what_was_replaced_goes(data: Path, place: str, tmp_path: Path) -> None:
    push(data, place)
    copy = tmp_path / "copy"
    pull(place, copy)
    push(make(tmp_path / "behind", 0, 1), place, replace=True)
    pull(place, copy)
    assert contents(copy) == contents(tmp_path / "behind")


def test_damaged_copies_are_mended_and_damaged_sources_refused(
    data: Path, place: str, tmp_path: Path
) -> None:
    push(data, place)
    copy = tmp_path / "copy"
    pull(place, copy)
    shards = sorted(copy.glob("*.arrow"))
    flip(shards[0])
    os.truncate(shards[1], 100)
    with pytest.raises(CorruptShard, match=rf"{shards[0].name}: .*1 more shards.*nothing was sent"):
        push(copy, str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").glob("*.arrow")) == []
    assert pull(place, copy).moved == 2
    assert contents(copy) == contents(data)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_interrupted_push_is_invisible_and_goes_on(
    data: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when a first shard is there: no reader sees anything, the next push sends the rest."""
    sent = 0

    def interrupted(self: Any, files: Any, work: Any) -> Iterator[int]:
        nonlocal sent
        for size in real(self, files[:1], work):
            sent += 1
            yield size
        raise KeyboardInterrupt

    store = store_of(place)
    real = store.send
    with monkeypatch.context() as patch:
        patch.setattr(store, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            push(data, place)
    with pytest.raises(ManifestError, match="no manifest"):
        verify(place)
    again = push(data, place)
    # What the hub has been sent but not shown is known to it alone: its client skips it below ours.
    assert again.moved == (3 if place.startswith("hf") else 2)
    assert verify(place, full=True).problems == ()


def store_of(place: str) -> Any:
    """The class that writes to a place."""
    store = stores.open_store(locate(place))
    store.close()
    return type(store)


def test_hub_uploads_nothing_twice(data: Path, hub: Any) -> None:
    """A push that died before its commit has its files kept by the hub; the next one sends the others."""
    calls: list[int] = []

    def break_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionResetError

    HubHandler.before_upload = staticmethod(break_third)
    try:
        push(data, "team/data")  # the client itself tries again
    finally:
        HubHandler.before_upload = None
    assert len(calls) == 4
    assert hub.asked["upload"] == 3
    assert hub.repos["team/data"].private
    assert len(hub.repos["team/data"].commits) == 2, "one commit after the empty repo"
    push(make(data, 3), "team/data")
    assert hub.asked["upload"] == 4


def test_hub_revisions_are_pinned(data: Path, hub: Any, tmp_path: Path) -> None:
    old = push(data, "team/data").revision
    new = push(make(data, 3), "hf://datasets/team/data").revision
    assert new != old
    pulled = pull("team/data", tmp_path / "old", revision=old)
    assert (pulled.revision, len(pulled.manifest.shards)) == (old, 3)
    assert pull("hf://datasets/team/data", tmp_path / "new").revision == new
    assert len(pull(f"hf://datasets/team/data@{old}", tmp_path / "at").manifest.shards) == 3
    with pytest.raises(ShardError, match="no such branch, tag or commit"):
        pull("team/data", tmp_path / "none", revision="nowhere")
    with pytest.raises(ShardError, match="no dataset repo that you may see"):
        pull("team/missing", tmp_path / "none")
    with pytest.raises(UsageError, match="give one"):
        pull(f"hf://datasets/team/data@{old}", tmp_path / "none", revision=new)


def test_revision_elsewhere_is_the_manifest(data: Path, place: str, tmp_path: Path) -> None:
    if place.startswith("hf"):
        pytest.skip("commits are tested above")
    push(data, place)
    revision = hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
    assert pull(place, tmp_path / "a", revision=revision).revision == revision
    push(make(data, 3), place)
    with pytest.raises(UsageError, match="not at revision"):
        pull(place, tmp_path / "b", revision=revision)


@pytest.mark.parametrize("grown", [False, True], ids=["new", "grown"])
def test_one_of_two_pushes_wins(
    data: Path, place: str, grown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another push publishes between the look at a place and the publishing there."""
    if grown:
        push(data, place)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    make(data, 3)
    make(other, 4)
    store = store_of(place)
    real, raced = store.publish, []

    def second(self: Any, *arguments: Any) -> Any:
        if not raced:
            raced.append(True)
            if isinstance(self, stores.FolderStore):
                with pytest.raises(ShardError, match="is being written by another tide"):
                    push(other, place)
            else:
                push(other, place)
        return real(self, *arguments)

    monkeypatch.setattr(store, "publish", second)
    if store is stores.FolderStore:
        push(data, place)
    else:
        with pytest.raises(ShardError, match="published by somebody else meanwhile"):
            push(data, place)
    winner = data if store is stores.FolderStore else other
    assert verify(place, full=True).problems == ()
    copy = tmp_path / "copy"
    pull(place, copy)
    assert (copy / "manifest.json").read_bytes() == (winner / "manifest.json").read_bytes()


def test_s3_with_errors(data: Path, s3: Faults, tmp_path: Path) -> None:
    """One request in four answered with 500, the manifest's conditional write among them."""
    s3.share = 0.25
    push(data, "s3://tide/data")
    pull("s3://tide/data", tmp_path / "copy")
    assert s3.injected["500"] > 0
    assert contents(tmp_path / "copy") == contents(data)


def test_pull_goes_on_in_the_middle_of_a_shard(data: Path, tmp_path: Path) -> None:
    """The first half of a shard is there: only the other half is asked for. A wrong half is noticed."""
    shard = Manifest.load(data).shards[0]
    half = shard.bytes // 2
    faults = Faults(0, (), share=0.0)
    with serving(FolderHandler, root=data) as web, serving(FaultProxy, upstream=web, faults=faults) as proxy:
        for start in (lambda raw: raw[:half], lambda raw: bytes(half)):
            copy = tmp_path / f"copy{len(faults.seen)}"
            copy.mkdir()
            (copy / f".tmp-{shard.file}").write_bytes(start((data / shard.file).read_bytes()))
            faults.seen.clear()
            faults.requests.clear()
            pull(proxy, copy)
            asked = [r for r in faults.seen if shard.file in r and "bytes=" in r]
            assert any(f"bytes={half}-" in r for r in asked)
            assert contents(copy) == contents(data)
            copy.rename(tmp_path / f"done{half}-{len(asked)}")


def test_lost_connection_keeps_what_is_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.files.BACKOFF_S", 0.001)
    monkeypatch.setattr(pulling, "REMOTE_WORKERS", 1)
    shards = Manifest.load(data).shards
    hidden = tmp_path / "hidden.arrow"
    copy = tmp_path / "copy"
    with serving(FolderHandler, root=data) as web:
        (data / shards[1].file).rename(hidden)
        with pytest.raises(CorruptShard, match=rf"{shards[1].file} is missing"):
            pull(web, copy)
        assert (copy / shards[0].file).exists()
        assert not (copy / "manifest.json").exists()
        hidden.rename(data / shards[1].file)
        assert pull(web, copy).moved == 2
    with pytest.raises(ShardError, match="cannot read"):
        pull(web, tmp_path / "late")


def test_full_disk(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreseen where it can be; else the shards that are complete stay and the same pull goes on."""
    import errno

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ShardError, match=r"has room for 0\.00 GB"):
            pull(data, tmp_path / "copy")
    real, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(pulling, "processors", lambda: 1)
        with pytest.raises(ShardError, match="the disk is full; make room, then the same command"):
            pull(data, tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("part-*.arrow"))) >= 1
    pull(data, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(data)


def hostile(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        edit(manifest)
        del manifest["sha256"]
        manifest["sha256"] = identity_of(manifest)
        file.write_text(json.dumps(manifest))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hostile(lambda m: m["shards"][0].update(file="../part.arrow")), "plain .arrow name"),
        (hostile(lambda m: m["shards"][0].update(file="/etc/part.arrow")), "plain .arrow name"),
        (hostile(lambda m: m["shards"][0].update(bytes=10**18)), "are possible"),
        (lambda f: (f / "manifest.json").write_text("{" * 10_000), "not valid JSON"),
    ],
    ids=["up", "absolute", "huge", "nested"],
)
def test_hostile_manifests(data: Path, tmp_path: Path, change: Any, words: str) -> None:
    change(data)
    with pytest.raises(ManifestError, match=words):
        pull(data, tmp_path / "copy")
    assert not (tmp_path / "part.arrow").exists()
    assert list((tmp_path / "copy").glob("*")) == [] if (tmp_path / "copy").exists() else True


def test_swapped_bytes_never_get_a_name(data: Path, tmp_path: Path) -> None:
    """A server that gives one shard for another: refused after a second look, and nothing is published."""
    first, second, _ = (data / s.file for s in Manifest.load(data).shards)
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptShard, match=rf"{first.name} is not what its manifest says"):
        pull(data, tmp_path / "copy")
    assert not (tmp_path / "copy" / first.name).exists()
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_places_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can only be read"):
        push(data, "https://example.org/data")
    with pytest.raises(UsageError, match="hf://datasets/OWNER/NAME"):
        push(data, "hf://team/data")
    with pytest.raises(UsageError, match="Protocol not known"):
        pull("gopher://x/y", tmp_path / "copy")
    with pytest.raises(ShardError, match="is the dataset itself"):
        push(data, str(data))
    with pytest.raises(ManifestError, match="no manifest"):
        pull(tmp_path, tmp_path / "copy")
    with (
        DatasetWriter(data, "shared", synthetic_config(NOISE, CODEC)),
        pytest.raises(ShardError, match="being written by another tide"),
    ):
        pull(make(tmp_path / "other", 0), data)


def test_a_hub_name_is_a_folder_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("team/data").hub is not None
    (tmp_path / "team").mkdir()
    assert locate("team/data").folder == tmp_path / "team" / "data"
    assert locate("./other/data").hub is None


def test_repo_without_commits_is_not_ours(hub: Any, data: Path) -> None:
    """Files of others in a repo stay; a dataset is published beside them."""
    hub.repos["team/notes"] = Repo()
    hub.repos["team/notes"].commit({"notes.txt": b"ours"})
    push(data, "team/notes")
    assert hub.repos["team/notes"].commits[hub.repos["team/notes"].branches["main"]]["notes.txt"] == b"ours"
    assert "notes.txt: not part of the dataset" in verify("hf://datasets/team/notes").warnings
