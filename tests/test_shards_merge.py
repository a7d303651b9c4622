"""Merging what several workers made gives, byte for byte, what one worker would have made."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from shards.codec import SparseCodec
from shards.errors import ConfigMismatch, CorruptShard, ShardError, UsageError
from shards.manifest import Manifest, identity_of
from shards.merge import merge
from shards.noise import NoiseConfig
from shards.synthetic import synthetic_config, synthetic_rows
from shards.verify import verify
from shards.writer import DatasetWriter

CODEC = SparseCodec(cap=12, tail_bound=0.05)
SIZE = 4


def make(out: Path, *parts: int, seed: int = 0, shift: int = 0) -> Path:
    """`shift`: rows of other samples, as other hardware would give other bytes."""
    noise = NoiseConfig(views=2, seed=seed)
    with DatasetWriter(out, "shared", synthetic_config(noise, CODEC)) as writer:
        for p in parts:
            first = p * SIZE + shift
            rows = synthetic_rows(first, first + SIZE, kind="shared", noise=noise, codec=CODEC)
            writer.write_part(p, p * SIZE, (p + 1) * SIZE, list(rows), {"dropped": {"absent": p}})
        writer.finish({"skipped_at": {"empty": 3}})
    return out


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in ("README.md", ".lock"))
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def test_merged_is_what_one_worker_makes(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", 0, 2), make(tmp_path / "b", 1, 2)
    whole = make(tmp_path / "whole", 0, 1, 2)
    done = merge(tmp_path / "out", [a, b])
    assert (done.added, done.repeated, done.replaced) == (3, 1, ())
    assert contents(tmp_path / "out") == contents(whole)
    assert verify(tmp_path / "out", full=True).problems == ()
    assert merge(tmp_path / "out", [a, b]).added == 0
    assert merge(tmp_path / "out", [make(tmp_path / "c", 3)]).added == 1
    make(tmp_path / "out", 4)
    assert contents(tmp_path / "out") == contents(make(whole, 3, 4))


def test_copies_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make(tmp_path / "a", 0)
    merge(tmp_path / "linked", [a])
    shard = Manifest.load(a).shards[0].file
    assert (tmp_path / "linked" / shard).samefile(a / shard)

    real = os.link

    def refuse(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "link", refuse)
    merge(tmp_path / "copied", [a])
    assert not (tmp_path / "copied" / shard).samefile(a / shard)
    assert contents(tmp_path / "copied") == contents(a)


def test_other_bytes_are_a_conflict_unless_the_first_is_preferred(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", 0, 1), make(tmp_path / "b", 1, 2, shift=100)
    with pytest.raises(ShardError, match=rf"{a} and {b} have part 1 with other bytes.*--prefer first"):
        merge(tmp_path / "out", [a, b])
    done = merge(tmp_path / "out", [a, b], prefer_first=True)
    assert done.replaced == (1,)
    assert [s.sha256 for s in done.manifest.shards[:2]] == [s.sha256 for s in Manifest.load(a).shards]


def test_a_part_that_has_grown_takes_the_place_of_its_short_version(tmp_path: Path) -> None:
    short, long = tmp_path / "short", make(tmp_path / "long", 0, 1)
    noise = NoiseConfig(views=2)
    with DatasetWriter(short, "shared", synthetic_config(noise, CODEC)) as writer:
        rows = list(synthetic_rows(SIZE, SIZE + 2, kind="shared", noise=noise, codec=CODEC))
        writer.write_part(1, SIZE, SIZE + 2, rows, {})
        writer.finish()
    for i, order in enumerate([[short, long], [long, short]]):
        assert merge(tmp_path / f"out{i}", order).replaced == ()
        assert contents(tmp_path / f"out{i}") == contents(long)
    merge(short, [long])
    assert contents(short) == contents(long)


def test_other_settings_are_named(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", 0), make(tmp_path / "b", 1, seed=5)
    with pytest.raises(ConfigMismatch, match=r"noise\.seed: 0 -> 5"):
        merge(tmp_path / "out", [a, b])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigMismatch, match=r"noise\.seed: 5 -> 0"):
        merge(b, [a])


def test_damaged_source_and_resume(tmp_path: Path) -> None:
    """What was merged before the damaged shard stays; the same merge goes on once it is mended."""
    a, b = make(tmp_path / "a", 0), make(tmp_path / "b", 1)
    shard = b / Manifest.load(b).shards[0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CorruptShard, match=shard.name):
        merge(tmp_path / "out", [a, b])
    assert not (tmp_path / "out" / "manifest.json").exists()
    shard.write_bytes(whole)
    merge(tmp_path / "out", [a, b])
    assert verify(tmp_path / "out", full=True).warnings == ()


def test_sources_without_records(tmp_path: Path) -> None:
    """A copy of the published files alone: counts come from its rows, only its makers' reports are lost."""
    a = make(tmp_path / "a", 0, 1)
    shutil.rmtree(a / "parts")
    (a / "dataset.json").unlink()
    merge(tmp_path / "out", [a])
    verdict = verify(tmp_path / "out", full=True)
    assert (verdict.problems, verdict.warnings) == ((), ())
    assert verdict.manifest.totals == Manifest.load(a).totals


def test_refused(tmp_path: Path) -> None:
    a = make(tmp_path / "a", 0)
    with pytest.raises(UsageError, match="both a source and the output"):
        merge(a, [a])
    with pytest.raises(ShardError, match="not a local folder"):
        merge(tmp_path / "out", ["memory://data"])
    other = json.loads((a / "manifest.json").read_text())
    other["shards"][0]["last"] = 6  # reaches into part 1
    (tmp_path / "b").mkdir()
    shutil.copytree(a, tmp_path / "b", dirs_exist_ok=True)
    del other["sha256"]
    other["sha256"] = identity_of(other)
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(ShardError, match="overlap"):
        merge(tmp_path / "out", [tmp_path / "b", make(tmp_path / "c", 1)])
