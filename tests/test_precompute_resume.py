"""Runs that meet in one folder, one after another or at the same time: what they take over from it, wait for,
make again, and that the dataset in the end is the one of a single run."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from precompute import loop
from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.parts import cut, unfinished
from precompute.runner import precompute
from shards.agreement import recorded_config
from shards.errors import ConfigMismatch, ShardError
from shards.manifest import Manifest
from shards.settings import identity_of
from shards.writer import DatasetWriter

ROWS, SIZE = 11, 4
HOLES = (0, 4, 5, 8)
"""Rows before which the corpus has an unusable one."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = []
    for i in range(ROWS):
        lines += [{f"hole {i}": 0}] * (i in HOLES)
        lines.append({"prompt": f"Say {i}.", "completion": f"{i}, {i + 1} and {i + 2} follow."})
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


@pytest.fixture
def make(model: Path, corpus: Path, tmp_path: Path) -> Callable[..., PrecomputeConfig]:
    def settings(**changes: Any) -> PrecomputeConfig:
        given = {
            "teacher": str(model),
            "student": str(model),
            "corpus": str(corpus),
            "out": tmp_path / "data",
            "views": 2,
            "block_size": 8,
            "max_length": 64,
            "samples_per_part": SIZE,
            "device": "cpu",
        }
        return PrecomputeConfig(**{**given, **changes})

    return settings


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a single run."""
    out = tmp_path_factory.mktemp("whole") / "data"
    precompute(
        PrecomputeConfig(
            teacher=str(model), student=str(model), corpus=str(corpus), out=out,
            views=2, block_size=8, max_length=64, samples_per_part=SIZE, device="cpu",
        )
    )  # fmt: skip
    return contents(out)


def claimed(config: PrecomputeConfig, part: int) -> tuple[DatasetWriter, Any]:
    """Another run in the folder, which makes a part just now."""
    begun = recorded_config(config.out)
    assert begun is not None
    writer = DatasetWriter(config.out, "shared", begun)
    claim = writer.claim(part, min(ROWS, (part + 1) * SIZE))
    assert claim is not None
    return writer, claim


def test_a_part_whose_maker_died_is_taken_over_after_the_others(
    make: Any, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its maker lives, the others are made; then the run says whom it waits for; then it makes it."""
    monkeypatch.setattr(loop, "WAIT_S", 0.0)
    config = make()
    precompute(replace(config, limit=1))  # a first part of one row, which is not whole
    (config.out / "manifest.json").unlink()
    other, _ = claimed(config, 0)
    said: list[str] = []

    def progress(done: int, total: int | None, message: str) -> None:
        said.append(message)
        if message.startswith("waiting") and said.count(message) == 3:
            assert f"waiting for part 0, which process {os.getpid()} on " in message
            other.close()

    precompute(config, progress)
    order = list(dict.fromkeys(m.split(",")[0] for m in said if "part" in m))
    assert order == ["part 1", "part 2", "waiting for part 0", "part 0"]
    assert contents(config.out) == whole


def test_a_part_that_another_run_finishes_is_waited_for(
    make: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run returns the whole dataset, of which it made one part less."""
    monkeypatch.setattr(loop, "WAIT_S", 0.0)
    donor, config = make(out=tmp_path / "donor"), make()
    precompute(donor)
    precompute(replace(config, part="0/3"))
    other, claim = claimed(config, 1)
    made = []

    def progress(done: int, total: int | None, message: str) -> None:
        made.append(message)
        if message.startswith("waiting") and not (config.out / "parts" / "part-00001.json").exists():
            for path in (next(donor.out.glob("part-00001-*")), donor.out / "parts" / "part-00001.json"):
                (config.out / path.relative_to(donor.out)).write_bytes(path.read_bytes())
            claim.close()
            other.close()

    manifest = precompute(config, progress)
    assert len(manifest.shards) == 3
    assert "part 1" not in made
    assert contents(config.out) == whole


@pytest.mark.slow
def test_two_commands_at_once(
    model: Path, corpus: Path, make: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The real command, twice: both end well and say the same totals, and the dataset is that of one."""
    out = make().out
    command = [
        sys.executable, "-m", "tools.cli", "precompute", "--teacher", model, "--student", model, "--corpus",
        corpus, "--out", out, "--views", 2, "--block-size", 8, "--student-max-length", 64,
        "--samples-per-part", SIZE, "--device", "cpu", "--json",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    told = [r.communicate(timeout=300) for r in runs]
    assert [r.returncode for r in runs] == [0, 0], told
    results = [json.loads(text.splitlines()[-1]) for text, _ in told]
    for result in results:
        share = result.pop("busy")  # of each run's own time
        assert share is None or 0 < share <= 1
    assert results[0] == results[1]
    got = contents(out)
    assert got.pop("tide-precompute.yaml")
    assert got == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_workers_in_any_order_publish_the_same(
    make: Any, whole: dict[str, bytes], order: tuple[int, ...]
) -> None:
    """Each restricted to its own part; each publishes what is there, the last of them all."""
    config = make()
    for n, part in enumerate(order, 1):
        assert len(precompute(replace(config, part=f"{part}/3")).shards) == n
    assert contents(config.out) == whole


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 10])
def test_a_grown_dataset_is_the_one_made_at_once(make: Any, whole: dict[str, bytes], limit: int) -> None:
    """Counts and places of unusable rows included, which belong to the part of the next usable row."""
    config = make()
    small = precompute(replace(config, limit=limit))
    assert small.shards[-1].last == limit
    precompute(config)
    assert contents(config.out) == whole
    precompute(replace(config, limit=limit))  # a smaller limit takes nothing away
    assert contents(config.out) == whole


def test_ranges_do_not_depend_on_the_limit(corpus: Path) -> None:
    """Every whole range, its unusable rows and their places; together they are the corpus's own counts."""
    everything = open_corpus(str(corpus))
    ranges = list(cut(everything, SIZE))
    assert [(w.first, w.last) for w in ranges] == [(0, 4), (4, 8), (8, 11)]
    assert [w.skipped.total() for w in ranges] == [1, 2, 1]
    assert [list(w.skipped_at.values()) for w in ranges] == [
        [["corpus.jsonl:1"]],
        [["corpus.jsonl:6"], ["corpus.jsonl:8"]],
        [["corpus.jsonl:12"]],
    ]
    assert sum((w.skipped for w in ranges), start=type(everything.skipped)()) == everything.skipped
    for limit in range(1, ROWS + 1):
        for work, same in zip(cut(open_corpus(str(corpus), limit=limit), SIZE), ranges):
            if work.last == same.last:
                assert work == same


def test_unusable_rows_at_the_end_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    lines = [{"prompt": "a", "completion": "b"}] * 4 + [{"hole": 1}] * 3
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert [w.skipped.total() for w in cut(open_corpus(str(path)), 2)] == [0, 3]


def test_the_folder_decides_row_tokens_and_threads(make: Any, whole: dict[str, bytes]) -> None:
    """Another machine would choose others: the dataset's are taken, and the run's threads given back; a flag
    that says otherwise is an error that names it."""
    config = make()
    precompute(replace(config, row_tokens=300, limit=SIZE))
    begun = recorded_config(config.out)
    assert begun is not None
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        manifest = precompute(config)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert manifest.config == begun
    assert manifest.config["compute"]["row_tokens"] == 300
    assert manifest.config["compute"]["threads"] == before
    with pytest.raises(ConfigMismatch, match=r"compute\.row_tokens: 300 -> 200\)"):
        precompute(replace(config, row_tokens=200))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_dataset_of_another_device_is_not_continued_here(make: Any) -> None:
    config = make()
    precompute(config)
    path = config.out / "dataset.json"
    begun = json.loads(path.read_text())
    begun["config"]["compute"] |= {"device": "cuda", "threads": None}
    path.write_text(json.dumps(begun | {"identity": identity_of(begun["config"])}))
    with pytest.raises(ConfigMismatch, match=r"compute\.device: cuda -> cpu, there is no cuda device here"):
        precompute(replace(config, device=None))
    with pytest.raises(ConfigMismatch, match=r"\(compute\.device: \"cuda\" -> \"cpu\""):
        precompute(config)


def test_a_finished_dataset_refuses_another_configuration(make: Any, whole: dict[str, bytes]) -> None:
    """Each setting that differs is named, and nothing changes."""
    config = make()
    precompute(config)
    with pytest.raises(ConfigMismatch) as e:
        precompute(replace(config, seed=3, views=3, block_size=4))
    message = str(e.value)
    for difference in ("block_size: 8 -> 4", "noise.seed: 0 -> 3", "noise.views: 2 -> 3"):
        assert difference in message
    assert contents(config.out) == whole


def test_rotten_parts_are_made_again_on_demand(make: Any, whole: dict[str, bytes]) -> None:
    """A flipped bit in a shard: found by --verify-parts, and by that alone."""
    config = make()
    precompute(config)
    shard = next(config.out.glob("part-00001-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    precompute(config)
    assert contents(config.out) != whole
    precompute(replace(config, verify_parts=True))
    assert contents(config.out) == whole


def test_a_full_disk_stops_the_run_and_the_same_call_goes_on(
    make: Any, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = make(), os.fsync

    def full(fd: int) -> None:
        if "part-00002" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ShardError, match=r"part 2 .* No space left on device; free some space there, then"
        ):
            precompute(config)
    assert sorted(p.name for p in config.out.glob("parts/*")) == ["part-00000.json", "part-00001.json"]
    assert not list(config.out.rglob(".tmp-*"))
    made: list[str] = []
    precompute(config, lambda done, total, message: made.append(message))
    assert not {"part 0", "part 1"} & set(made)
    assert contents(config.out) == whole


def test_several_parts_may_be_under_way_at_once(make: Any, corpus: Path) -> None:
    """What a pipeline needs: claims of one process are given out one after another, and those that are not
    written yet hold up nothing but the end."""
    config = make()
    precompute(replace(config, limit=1))
    begun = recorded_config(config.out)
    assert begun is not None
    with DatasetWriter(config.out, "shared", begun) as a, DatasetWriter(config.out, "shared", begun) as b:
        theirs = b.claim(1, 2 * SIZE)
        ranges = unfinished(cut(open_corpus(str(corpus)), SIZE), a, mine=lambda part: True)
        given = [next(ranges) for _ in range(4)]
        assert [w.part for w, _ in given] == [0, 2, 1, 1]
        assert [c is None for _, c in given] == [False, False, True, True]
        assert theirs is not None
        theirs.close()
        last, claim = next(ranges)
        assert last.part == 1
        assert claim is not None
        assert next(ranges, None) is None


def test_the_manifest_follows_from_the_records_alone(make: Any) -> None:
    """Totals and reports of the parts, added up in order, whoever publishes."""
    config = make()
    manifest = precompute(config)
    records = [json.loads(p.read_text()) for p in sorted(config.out.glob("parts/*.json"))]
    places = [at for r in records for found in r["report"]["skipped_at"].values() for at in found]
    assert [at for found in manifest.report["skipped_at"].values() for at in found] == places
    assert len(places) == len(HOLES)
    assert (
        manifest.report["corpus_rows"]
        == sum(r["report"]["corpus_rows"] for r in records)
        == ROWS + len(HOLES)
    )
    assert Manifest.load(config.out) == manifest
