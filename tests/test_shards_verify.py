"""Verify names every damaged file, and nothing else; hash-only finds any byte, full any row or record too."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from http_servers import FolderHandler, serving

from shards import verify as verifying
from shards.codec import SparseCodec
from shards.errors import ManifestError, ShardError
from shards.manifest import identity_of
from shards.noise import NoiseConfig
from shards.records import PartRecord
from shards.synthetic import synthetic_config, synthetic_rows
from shards.verify import verify
from shards.writer import DatasetWriter

NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12, tail_bound=0.05)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    out = tmp_path / "data"
    with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
        for p in range(4):
            rows = synthetic_rows(p * 4, p * 4 + 4, kind="shared", noise=NOISE, codec=CODEC)
            writer.write_part(p, p * 4, p * 4 + 4, list(rows), {})
        writer.finish()
    return out


@pytest.mark.parametrize("full", [False, True])
def test_clean(data: Path, full: bool) -> None:
    seen: list[float] = []
    verdict = verify(data, full=full, report=lambda done, total: seen.append(done / (total or 1)))
    assert (verdict.problems, verdict.warnings) == ((), ())
    assert seen[-1] == 1


@pytest.mark.parametrize("full", [False, True])
def test_every_damaged_shard_is_named(data: Path, full: bool) -> None:
    flipped, cut, gone, whole = sorted(data.glob("*.arrow"))
    raw = bytearray(flipped.read_bytes())
    raw[len(raw) // 2] ^= 4
    flipped.write_bytes(raw)
    os.truncate(cut, 1000)
    gone.unlink()
    with serving(FolderHandler, root=data) as web:
        for place in (data, web):
            found = {p.file: p.reason for p in verify(place, full=full).problems}
            assert list(found) == [flipped.name, cut.name, gone.name]
            assert "sha256 differs" in found[flipped.name]
            assert "1000" in found[cut.name]
            assert "missing" in found[gone.name]
            assert whole.name not in found


def test_any_flipped_byte_is_found(data: Path) -> None:
    """Head, record batches, foot and the bytes appended after it: a byte of each."""
    shard = sorted(data.glob("*.arrow"))[1]
    raw = shard.read_bytes()
    for at in (0, 9, len(raw) // 3, len(raw) - 200, len(raw) - 1):
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert [p.file for p in verify(data).problems] == [shard.name]
    shard.write_bytes(raw + b"x")
    assert "too long" in verify(data).problems[0].reason
    shard.write_bytes(raw)
    assert verify(data).problems == ()


def test_links_are_refused(data: Path, tmp_path: Path) -> None:
    """A link leads out of the folder, to whatever is there."""
    shard = sorted(data.glob("*.arrow"))[0]
    shard.rename(tmp_path / "away")
    shard.symlink_to(tmp_path / "away")
    for full in (False, True):
        (problem,) = verify(data, full=full).problems
        assert problem.file == shard.name
        assert "is a link" in problem.reason


def test_a_lost_connection_is_no_damage(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.files.BACKOFF_S", 0.001)
    with serving(FolderHandler, root=data) as web:
        shard = sorted(data.glob("*.arrow"))[0]
        monkeypatch.setattr(Path, "read_bytes", lambda path: 1 / 0 if path.name == shard.name else real(path))
        with pytest.raises(ShardError, match="gave up"):
            verify(web)


real = Path.read_bytes


def test_strays_are_warnings(data: Path) -> None:
    (data / "notes.txt").write_text("x")
    (data / ".tmp-part-00000-x.arrow").write_text("x")
    verdict = verify(data)
    assert verdict.problems == ()
    assert verdict.warnings == (
        ".tmp-part-00000-x.arrow: left by a command that was interrupted",
        "notes.txt: not part of the dataset",
    )


def _totals(data: Path) -> str:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["totals"]["tokens"] += 1
    del manifest["sha256"]
    (data / "manifest.json").write_text(json.dumps({**manifest, "sha256": identity_of(manifest)}))
    return "manifest.json"


def _record(data: Path) -> str:
    path = data / "parts" / "part-00001.json"
    record = PartRecord.parse(path.read_bytes(), "")
    record.totals["masked"] += 1
    path.write_bytes(record.to_bytes())
    return "parts/part-00001.json"


def _changed(data: Path) -> str:
    path = data / "parts" / "part-00002.json"
    path.write_text(path.read_text().replace('"rows": ', '"rows": 1'))
    return "parts/part-00002.json"


@pytest.mark.parametrize("change", [_totals, _record, _changed])
def test_full_finds_what_disagrees(data: Path, change: Callable[[Path], str]) -> None:
    file = change(data)
    assert verify(data).problems == ()
    assert [p.file for p in verify(data, full=True).problems] == [file]


def test_full_warns_of_records_and_card(data: Path) -> None:
    (data / "parts" / "part-00001.json").unlink()
    (data / "README.md").write_text("mine")
    warnings = verify(data, full=True).warnings
    assert len(warnings) == 2
    assert "1 of 4 parts have no record" in warnings[0]
    assert "identity" in warnings[1]


def test_processes_find_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "PROCESSES_PAY", 0)
    monkeypatch.setattr(verifying, "processors", lambda: 2)
    shard = sorted(data.glob("*.arrow"))[2]
    os.truncate(shard, 500)
    assert [p.file for p in verify(data, full=True).problems] == [shard.name]


def test_unfinished_is_explained(data: Path, tmp_path: Path) -> None:
    (data / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"unfinished: 4 parts are done.*run the same tide precompute"):
        verify(data)
    with pytest.raises(ManifestError, match="not a logit dataset"):
        verify(tmp_path)
