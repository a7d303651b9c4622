"""Interrupted, repeated and grown datasets: nothing lost, nothing twice, the bytes of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.codec import SparseCodec
from shards.errors import ConfigMismatch, ShardError, VersionError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import Row
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter, add_counts

NOISE = NoiseConfig(views=2)
CODEC = SparseCodec(cap=12, tail_bound=0.05)
CONFIG = synthetic_config(NOISE, CODEC)
PARTS, SIZE = 3, 6


def rows(first: int, last: int) -> list[Row]:
    return list(synthetic_rows(first, last, kind="shared", noise=NOISE, codec=CODEC))


def run(out: Path, n: int = PARTS * SIZE) -> list[int]:
    """What a precompute over `n` corpus rows does; returns the parts it had to make."""
    made = []
    with DatasetWriter(out, "shared", CONFIG) as writer:
        done = writer.finished()
        for part in range(-(-n // SIZE)):
            wanted = (part * SIZE, min(n, (part + 1) * SIZE))
            if done.get(part) != wanted:
                writer.write_part(part, *wanted, rows(*wanted), {"dropped": {"absent": part}})
                made.append(part)
        writer.finish()
    return made


def contents(out: Path) -> dict[str, bytes]:
    skip = ("README.md", ".lock")  # the card has the folder's name in it
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in skip)
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    assert run(out) == [0, 1, 2]
    return contents(out)


class Stopped(BaseException):
    """Stands for a kill at one system call: nothing that the writer catches."""


def test_stopping_at_any_write_loses_at_most_one_part(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before the n-th fsync, rename or removal, for every n there is; then run the same again."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
    countdown = 0

    def counted(name: str):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Stopped
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    stops = 0
    for n in range(1, 200):
        out, countdown = tmp_path / str(n), n
        try:
            run(out)
        except Stopped:
            stops += 1
        else:
            break
        countdown = 0  # counts on below zero: no more stops
        before = {int(p.stem[5:]) for p in out.glob("parts/part-*.json")}
        made = run(out)
        assert set(made).isdisjoint(before)
        assert contents(out) == whole
    assert stops > 20


def test_a_killed_process_leaves_what_the_next_one_completes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    # A real SIGKILL with a shard half on disk: after the temporary file of the second part was written.
    program = f"""
import os, signal, sys
from pathlib import Path
from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from shards.synthetic import synthetic_rows
from shards.writer import DatasetWriter
import json
noise, codec = NoiseConfig(views=2), SparseCodec(cap=12, tail_bound=0.05)
real = os.fsync
def fsync(fd):
    name = os.readlink(f"/proc/self/fd/{{fd}}")
    if ".tmp-part-00001" in name and name.endswith(".arrow"):
        os.truncate(fd, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    real(fd)
os.fsync = fsync
with DatasetWriter(Path(sys.argv[1]), "shared", json.loads(sys.argv[2])) as writer:
    for p in range(3):
        rows = list(synthetic_rows({SIZE} * p, {SIZE} * p + {SIZE}, kind="shared", noise=noise, codec=codec))
        writer.write_part(p, {SIZE} * p, {SIZE} * p + {SIZE}, rows, {{"dropped": {{"absent": p}}}})
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), json.dumps(CONFIG)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [p.name for p in tmp_path.glob(".tmp-*")]
    assert len(left) == 1
    assert (tmp_path / left[0]).stat().st_size == 1000
    assert run(tmp_path) == [1, 2]
    assert contents(tmp_path) == whole


def test_repeating_a_finished_run_changes_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(tmp_path)
    assert run(tmp_path) == []
    assert contents(tmp_path) == whole


def test_a_part_may_be_made_twice(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(tmp_path)
    with DatasetWriter(tmp_path, "shared", CONFIG) as writer:
        writer.write_part(1, SIZE, 2 * SIZE, rows(SIZE, 2 * SIZE), {"dropped": {"absent": 1}})
        writer.finish()
    assert contents(tmp_path) == whole


def test_parts_may_be_made_in_any_order(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with DatasetWriter(tmp_path, "shared", CONFIG) as writer:
        for p in (2, 0, 1):
            span = (p * SIZE, (p + 1) * SIZE)
            writer.write_part(p, *span, rows(*span), {"dropped": {"absent": p}})
        writer.finish()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", ["truncated", "missing", "torn record", "changed record"])
def test_a_damaged_part_is_made_again(tmp_path: Path, whole: dict[str, bytes], damage: str) -> None:
    run(tmp_path)
    record = tmp_path / "parts" / "part-00001.json"
    shard = next(tmp_path.glob("part-00001-*.arrow"))
    if damage == "truncated":
        os.truncate(shard, 500)
    elif damage == "missing":
        shard.unlink()
    elif damage == "torn record":
        os.truncate(record, record.stat().st_size // 2)
    else:
        record.write_text(record.read_text().replace('"last": 12', '"last": 11'))
    assert run(tmp_path) == [1]
    assert contents(tmp_path) == whole


def test_a_dataset_grows_with_its_limit_and_stays_readable(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert run(tmp_path, 8) == [0, 1]
    small = LogitDataset(tmp_path)
    with DatasetWriter(tmp_path, "shared", CONFIG) as writer:
        assert writer.finished() == {0: (0, 6), 1: (6, 8)}
        writer.write_part(1, 6, 12, rows(6, 12), {"dropped": {"absent": 1}})
    # Interrupted here: the old manifest still has all its files.
    assert sum(small.check_shard(s) for s in range(2)) == 16
    assert run(tmp_path) == [2]
    assert contents(tmp_path) == whole


def test_what_no_record_names_is_removed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(tmp_path)
    (tmp_path / "part-00009-0123456789ab.arrow").write_bytes(b"left over")
    (tmp_path / "parts" / ".tmp-part-00002.json").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path)
    assert contents(tmp_path).keys() - whole.keys() == {"notes.txt"}


def test_other_settings_are_named_one_by_one(tmp_path: Path) -> None:
    run(tmp_path)
    noise = NoiseConfig(views=2, seed=5)
    other = synthetic_config(noise, SparseCodec(cap=20, tail_bound=0.05))
    before = contents(tmp_path)
    with pytest.raises(ConfigMismatch) as e:
        DatasetWriter(tmp_path, "cross", other)
    assert str(e.value) == (
        f'{tmp_path} was made with other settings (kind: "shared" -> "cross"; codec.cap: 12 -> 20; '
        "noise.seed: 0 -> 5): choose another --out, or repeat the options it was made with"
    )
    assert contents(tmp_path) == before
    run(tmp_path)  # and the lock is free again


def test_a_copy_without_records_is_not_taken_for_leftovers(tmp_path: Path) -> None:
    run(tmp_path)
    for path in (*tmp_path.glob("parts/*"), tmp_path / "dataset.json"):
        path.unlink()
    with pytest.raises(ShardError, match=r"holds shards but no dataset\.json .*: choose another --out"):
        DatasetWriter(tmp_path, "shared", CONFIG)
    assert len(list(tmp_path.glob("*.arrow"))) == PARTS


def test_a_dataset_of_another_version_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(VersionError, match="format version 9"):
        DatasetWriter(tmp_path, "shared", CONFIG)


def test_nothing_finished_is_no_dataset(tmp_path: Path) -> None:
    with (
        DatasetWriter(tmp_path, "shared", CONFIG) as writer,
        pytest.raises(ShardError, match="no part is finished"),
    ):
        writer.finish()


def test_reports_add_up() -> None:
    a = add_counts({"rows": 1, "dropped": {"x": 2}}, {"rows": 2, "dropped": {"x": 1, "y": 5}, "s": 0.5})
    assert a == {"rows": 3, "dropped": {"x": 3, "y": 5}, "s": 0.5}
    with pytest.raises(ValueError, match="name='x'"):
        add_counts({}, {"name": "x"})
