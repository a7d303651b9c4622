"""The loader: one global order for any number of ranks and workers, exact resume, errors in one line.

Worker processes are real ones. Batches are compared tensor by tensor with those made in this process.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from shards.codec import SparseCodec
from shards.errors import CorruptShard, PlanMismatch
from shards.noise import NoiseConfig, check_plan
from shards.reader import LogitDataset
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from student.batch import collate
from student.loader import BatchStream, DatasetRows
from student.tensors import Batch

NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12)
STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 training samples in record batches of 8: an epoch is two windows, about 10 global batches."""
    out = tmp_path_factory.mktemp("loader") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.build.MAX_BATCH_ROWS", 8)
        with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
            rows = synthetic_rows(0, 120, kind="shared", noise=NOISE, codec=CODEC, max_length=40)
            writer.write_part(0, 0, 120, list(rows), {})
            writer.finish({})
    return out


def stream(data: Path, start: Mapping[str, Any] | None = None, **split: int) -> BatchStream:
    dataset = LogitDataset(data)
    make = partial(
        collate,
        block_size=8,
        mask_token_id=303,
        row_tokens=64,
        shared_vocab_size=300,
        temperatures=CODEC.temperatures,
    )
    return BatchStream(
        DatasetRows(dataset, 3),
        make,
        batch_tokens=300,
        block_size=8,
        check=dataset.check,
        start=start,
        **split,
    )


def content(x: Any) -> Any:
    """Nested tuples that compare equal iff every tensor has the same dtype, shape and bytes."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.numpy().tobytes()
    if is_dataclass(x):
        return tuple(content(getattr(x, f.name)) for f in fields(x))
    if isinstance(x, Mapping):
        return tuple((k, content(v)) for k, v in x.items())
    if isinstance(x, tuple):
        return tuple(map(content, x))
    return x


def steps(loader: Any, accumulation: int, n: int) -> list[list[Batch]]:
    parts = list(islice(loader, accumulation * n))
    return [parts[i : i + accumulation] for i in range(0, len(parts), accumulation)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Batch]:
    """Global batches as one rank makes them in its own process: past the end of an epoch."""
    batches = list(islice(stream(folder), 2 * STEPS))
    assert {batch.state["epoch"] for batch in batches} == {0, 1}
    return batches


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (4, 1)])
def test_the_order_is_the_same_for_every_world_and_worker_count(
    folder: Path, whole: list[Batch], world: int, accumulation: int, workers: int
) -> None:
    """Every rank gets the tensors it gets without workers; together they are the global batch."""
    split = {"world": world, "accumulation": accumulation}
    plain = [steps(stream(folder, rank=rank, **split), accumulation, STEPS) for rank in range(world)]
    for rank in range(world):
        mine = stream(folder, rank=rank, **split).loader(workers)
        assert content(tuple(map(tuple, steps(mine, accumulation, STEPS)))) == content(
            tuple(map(tuple, plain[rank]))
        )
    for s in range(STEPS):
        parts = [batch for rank in plain for batch in rank[s]]
        assert sorted(name for p in parts for name in p.rows) == sorted(whole[s].rows)
        assert all((p.counts, p.state) == (whole[s].counts, whole[s].state) for p in parts)


def test_resuming_at_random_places_with_other_counts(folder: Path, whole: list[Batch]) -> None:
    """A run cut at random steps, each piece with other ranks and workers, sees each global batch once."""
    rng = random.Random(5)
    for _ in range(2):
        state, seen = None, 0
        while seen < 2 * STEPS:
            n = min(rng.randint(1, 6), 2 * STEPS - seen)
            world, workers = rng.choice([1, 2, 4]), rng.choice([0, 1, 2, 3])
            pieces = [
                list(islice(stream(folder, state, rank=rank, world=world).loader(workers), n))
                for rank in range(world)
            ]
            for k in range(n):
                names = sorted(name for piece in pieces for name in piece[k].rows)
                assert names == sorted(whole[seen + k].rows)
            state, seen = pieces[0][-1].state, seen + n


def test_a_stream_survives_pickling_as_spawned_workers_need_it(folder: Path, whole: list[Batch]) -> None:
    again = pickle.loads(pickle.dumps(stream(folder)))
    assert content(tuple(islice(again, 3))) == content(tuple(whole[:3]))


def test_only_own_rows_have_their_noise_plan_computed_again(folder: Path) -> None:
    checked = []
    for rank in range(4):
        mine = stream(folder, rank=rank, world=4)
        mine.check = lambda row: checked.append(f"{row.sample_id}/{row.view}")
        for batch in islice(mine, 5):
            assert set(batch.rows) <= set(checked)
    assert len(checked) == len(set(checked))


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_the_same_one_line_from_a_worker(folder: Path, tmp_path: Path, workers: int) -> None:
    data = copy_of(folder, tmp_path / "data")
    shard = LogitDataset(data).manifest.shards[0]
    bytes_ = bytearray((data / shard.file).read_bytes())
    for batch in shard.batches:
        bytes_[batch.offset + 50] ^= 1
    (data / shard.file).write_bytes(bytes_)
    with pytest.raises(CorruptShard, match=rf"^{shard.file}: record batch \d+: sha256 differs .*again$") as e:
        next(iter(stream(data).loader(workers)))
    assert "\n" not in str(e.value)


def test_a_wrong_plan_is_found_by_the_worker_that_collates_the_row(folder: Path) -> None:
    wrong = stream(folder)
    wrong.check = partial(check_plan, replace(NOISE, seed=1))
    with pytest.raises(PlanMismatch, match=r"^sample s\d+ view 0: stored .* differ from the noise plan"):
        next(iter(wrong.loader(1)))


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "forkserver" not in " ".join(p.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


def test_leaving_the_loop_ends_the_workers(folder: Path) -> None:
    before = set(children())
    batches = iter(stream(folder).loader(2))
    next(batches)
    made = [p for p in children() if p not in before]
    assert len(made) == 2
    batches.close()
    del batches
    assert gone(made)


RUN = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_student_loader import stream
import psutil

def wait(number, frame):
    global asked
    asked = True

if __name__ == "__main__":
    asked = False
    signal.signal(signal.SIGINT, wait)
    signal.signal(signal.SIGTERM, wait)
    batches = iter(stream(Path(sys.argv[2])).loader(2))
    next(batches)
    print(*(p.pid for p in psutil.Process().children()), flush=True)
    while not asked:
        time.sleep(0.01)
    time.sleep(0.2)
    left = [next(batches) for _ in range(12)]  # more than was prefetched
    print("went on for", len(left), flush=True)
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("sent", "end"), [("SIGTERM", "return"), pytest.param("SIGINT", "kill", marks=pytest.mark.slow)]
)
def test_signals_to_the_whole_job_leave_workers_to_the_trainer(
    folder: Path, tmp_path: Path, sent: str, end: str
) -> None:
    """Ctrl-C reaches every process of the terminal, and schedulers send SIGTERM to all of a job: the trainer
    must still get batches until its step is saved. No worker outlives it, even when it is killed."""
    program = tmp_path / "run.py"
    program.write_text(RUN)
    run = subprocess.Popen(
        [sys.executable, program, Path(__file__).parent, folder, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(run.pid, getattr(signal, sent))
    out, errors = run.communicate(timeout=60)
    assert out == "went on for 12\n", errors
    assert errors == ""
    assert run.returncode == (0 if end == "return" else -signal.SIGKILL)
    began = time.monotonic()
    assert gone(workers)
    assert time.monotonic() - began < 10
