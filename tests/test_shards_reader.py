"""The training order as a function, and how the reader walks it: ahead, lazily, in any process."""

import multiprocessing
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_servers import FaultProxy, Faults, FolderHandler, serving

from shards.cache import BlobCache
from shards.codec import SparseCodec
from shards.errors import PlanMismatch
from shards.noise import NoiseConfig
from shards.order import windows
from shards.reader import WINDOW, LogitDataset, StreamState
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training samples in record batches of 3: three windows a view."""
    out = tmp_path_factory.mktemp("reader") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.build.MAX_BATCH_ROWS", 3)
        with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
            rows = synthetic_rows(0, 96, kind="shared", noise=NOISE, codec=CODEC, max_length=24)
            writer.write_part(0, 0, 96, list(rows), {})
            writer.finish({})
    return out


def walked(counts: list[int], size: int, skip: int = 0) -> list[tuple[int, int]]:
    """(record batch, row) in the order of an epoch."""
    out = []
    for window in windows(0, 1, counts, size, skip):
        rows = [(b, i) for b in window.batches for i in range(counts[b])]
        out += [rows[i] for i in window.rows]
    return out


def test_the_order_gives_each_row_once_and_starts_anywhere() -> None:
    counts = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for size in (1, 3, 8, 20):
        order = walked(counts, size)
        assert sorted(order) == [(b, i) for b, n in enumerate(counts) for i in range(n)]
        assert order != sorted(order)
        for skip in range(len(order) + 1):
            assert walked(counts, size, skip) == order[skip:]
    assert list(windows(0, 1, [], 8)) == []


def test_the_order_is_pinned() -> None:
    """A checkpoint names a place in this order; any change would send resumed runs elsewhere."""
    found = [(w.batches, w.rows.tolist()) for w in windows(7, 2, [2, 3, 1, 2, 2], 2)]
    assert found == [([4, 3], [2, 3, 1, 0]), ([0, 1], [3, 0, 2, 4, 1]), ([2], [0])]


@pytest.mark.parametrize("index", [0, 1, 71])
def test_starting_costs_the_same_anywhere(folder: Path, monkeypatch: Any, index: int) -> None:
    """One window is read for the first row, at 1 % and at 99 % of an epoch."""
    data = LogitDataset(folder)
    read: list[Any] = []
    real = data._fetch
    monkeypatch.setattr(data, "_fetch", lambda at: read.append(at) or real(at))
    next(data.stream(0, StreamState(5, index)))
    assert len(read) == WINDOW


def test_the_next_window_is_fetched_while_this_one_is_used(folder: Path, tmp_path: Path) -> None:
    faults = Faults(0, (), share=0.0)

    def asked() -> int:
        return sum(n for path, n in faults.requests.items() if path.endswith(".arrow"))

    before = set(threading.enumerate())
    with (
        serving(FolderHandler, root=folder) as there,
        serving(FaultProxy, upstream=there, faults=faults) as url,
    ):
        stream = LogitDataset(url, cache=BlobCache(tmp_path, 10**8)).stream(0)
        next(stream)
        deadline = time.monotonic() + 10
        while asked() < 2 * WINDOW:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        assert asked() == 2 * WINDOW
        stream.close()
        left = [t for t in set(threading.enumerate()) - before if not t.daemon]
    assert not left, "nothing that would hold up the end of the program"


def _rows(data: LogitDataset, result: Any) -> None:
    result.send([(r.sample_id, r.view) for r, _ in islice(data.stream(0), 30)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_dataset_goes_on_in_another_process(folder: Path, tmp_path: Path, method: str) -> None:
    """Handles of the parent (an event loop's thread, open connections) are not used by the child."""
    context = multiprocessing.get_context(method)
    with serving(FolderHandler, root=folder) as url:
        data = LogitDataset(url, cache=BlobCache(tmp_path, 0))
        here = [(r.sample_id, r.view) for r, _ in islice(data.stream(0), 30)]
        ours, theirs = context.Pipe()
        child = context.Process(target=_rows, args=(data, theirs))
        child.start()
        assert ours.poll(60)
        assert ours.recv() == here
        child.join()
        assert child.exitcode == 0
        assert [(r.sample_id, r.view) for r, _ in islice(data.stream(0), 30)] == here


def test_local_datasets_use_no_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_CACHE", str(tmp_path / "cache"))
    list(islice(LogitDataset(folder).stream(0), 50))
    assert not (tmp_path / "cache").exists()


def test_noise_plans_are_checked_unless_left_to_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other tests' readers have passed the same bytes before."""
    data = LogitDataset(folder)
    monkeypatch.setattr("shards.reader.PASSED", set())
    for name in ("check_plan", "check_plans"):
        monkeypatch.setattr(
            f"shards.reader.{name}", lambda noise, rows: (_ for _ in ()).throw(PlanMismatch("differs"))
        )
    row, _ = next(data.stream(0, check=False))
    for ask in (lambda: next(data.stream(0)), lambda: data.check(row), lambda: data.read(0, 0)):
        with pytest.raises(PlanMismatch):
            ask()
    assert np.array_equal(next(LogitDataset(folder, verify_plan=False).stream(0))[0].masked, row.masked)
