"""One run on several processes of this machine: the dataset is the one of a single process, byte for byte,
whatever happens to the processes."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from precompute.config import PrecomputeConfig
from precompute.crew import Spread
from precompute.launch import launch
from precompute.local_crew import LocalCrew, visible_devices
from precompute.runner import Interrupted, precompute
from precompute.spread import Run, spread
from shards.codec import DenseCodec, ExactCodec, SparseCodec
from shards.errors import ConfigMismatch, CorpusError, ModelError, TideError, UsageError

ROWS, SIZE = 22, 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows that cannot be used, in the middle and at the end."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": f"Say {i}.", "completion": f"{i}, {i + 1} and {i + 2} follow."} for i in range(ROWS)
    ]
    rows[7:7] = [{"hole": 1}]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"hole": 2}]))
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
            "holdout": 0.2,
            "codec": SparseCodec(sketch=2, sketch_wide=2),  # has a file that the first worker makes
            "fidelity": 2,
        }
        return PrecomputeConfig(**{**given, **changes})

    return settings


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture
def whole(make: Any, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run in one process."""
    out = tmp_path / "alone" / "data"  # the card names the folder
    precompute(make(out=out))
    return contents(out)


def pid_of(name: str) -> int:
    """Of a worker, by what it calls itself."""
    found = re.match(r"process (\d+) on ", name)
    assert found, name
    return int(found[1])


def when_all_are_busy(monkeypatch: pytest.MonkeyPatch, workers: int, act: Callable[[Run], bool]) -> None:
    """Do something when so many workers have parts in hand, and again until it says that it is done. Nobody
    gets any parts before so many are ready."""
    hand_out, turn, done = Run.hand_out, Run.turn, []

    def held(run: Run) -> str | None:
        return hand_out(run) if done or run.ready >= workers else None

    def watched(run: Run, doing: str) -> None:
        if not done and sum(m.parts > 0 for m in run.members) == workers and act(run):
            done.append(True)
        turn(run, doing)

    monkeypatch.setattr(Run, "hand_out", held)
    monkeypatch.setattr(Run, "turn", watched)


def kill_first(killed: list[int]) -> Callable[[Run], bool]:
    """SIGKILL for the first worker in the middle of a part; `killed` gets the parts in its hands."""

    def act(run: Run) -> bool:
        victim = run.members[0]
        pid = pid_of(victim.name)
        time.sleep(0.01)  # it begins
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # what it has finished arrives
        killed.extend(
            c.work.part for f, c in run.calls.items() if c.member is victim and c.work and not f.done()
        )
        os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)
        return bool(killed)

    return act


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_one_of_two_processes_is_killed(
    make: Any,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With parts in its hands, which the others make; a new process takes its place."""
    killed: list[int] = []
    when_all_are_busy(monkeypatch, 2, kill_first(killed))
    config, told = make(), []
    launch(config, Spread(processes=2), lambda done, total, doing: told.append((done, doing)))
    assert killed
    assert any("was ended by SIGKILL" in r.message for r in caplog.records)
    assert contents(config.out) == whole
    done = [rows for rows, doing in told if "parts in hand" in doing]
    assert done == sorted(done)
    assert done[-1] >= ROWS - 2 * SIZE


def test_an_interrupted_run_goes_on_in_one_process(
    make: Any, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: the workers are ended with parts in their hands, which a single process makes afterwards."""
    config, pids = make(), []

    def interrupt(run: Run) -> bool:
        pids.extend(pid_of(m.name) for m in run.members)
        raise KeyboardInterrupt

    when_all_are_busy(monkeypatch, 2, interrupt)
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        launch(config, Spread(processes=2))
    assert len(pids) == 2
    assert all(map(gone, pids))
    assert not (config.out / "manifest.json").exists()
    precompute(config)
    assert contents(config.out) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": ExactCodec(), "fidelity": None},
        {"codec": DenseCodec(), "fidelity": None},
        {"codec": SparseCodec(), "fidelity": None, "teacher_kind": "ar"},
        {"codec": SparseCodec(), "fidelity": None, "kind": "cross"},
    ],
    ids=["exact", "dense", "ar", "cross"],
)
def test_every_kind_of_dataset(make: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Two processes make what one makes. Across tokenizers a tokenizer is compared with itself."""
    alone, spread = (make(out=tmp_path / name / "data", **changes) for name in ("alone", "spread"))
    precompute(alone)
    launch(spread, Spread(processes=2))
    assert contents(spread.out) == contents(alone.out)


def test_a_dataset_of_another_codec_is_left_alone(make: Any) -> None:
    """The file that this codec needs is not put into its folder."""
    config = make(codec=SparseCodec(), fidelity=None)
    precompute(config)
    before = contents(config.out)
    with pytest.raises(ConfigMismatch, match=r"codec\.sketch: 0 -> 2"):
        launch(make(), Spread(processes=2))
    assert contents(config.out) == before


def test_errors_of_workers_are_those_of_a_single_run(make: Any, tmp_path: Path, model: Path) -> None:
    """A model that cannot be used, a folder of other settings, a corpus that does not fit: one line each."""
    how = Spread(processes=2)
    with pytest.raises(ModelError, match="no such model folder"):
        launch(make(teacher="/nowhere"), how)
    with pytest.raises(CorpusError, match="no such file"):
        launch(make(corpus="/nowhere.jsonl"), how)
    config = make(codec=SparseCodec(), fidelity=None)
    precompute(replace(config, limit=1))
    with pytest.raises(ConfigMismatch, match=r"other settings \(noise\.seed: 0 -> 1\)"):
        launch(replace(config, seed=1), how)
    with pytest.raises(UsageError, match="--row-tokens allows 8"):
        launch(make(out=tmp_path / "short", row_tokens=8, codec=SparseCodec(), fidelity=None), how)
    cut = make(out=tmp_path / "cut", max_teacher_length=24, codec=SparseCodec(), fidelity=None)
    with pytest.raises(CorpusError, match=r"target tokens in the first \d+ rows have no teacher counterpart"):
        launch(cut, how)


def test_a_worker_with_another_teacher_is_refused(
    make: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The teacher's folder changes while the run goes on, and the worker that takes a dead one's place reads
    the new one: both hashes are told, the other worker does it all."""
    teacher = tmp_path / "teacher"
    shutil.copytree(model, teacher)
    alone = make(teacher=str(teacher), out=tmp_path / "alone" / "data")
    precompute(alone)
    kill = kill_first([])

    def change_and_kill(run: Run) -> bool:
        file = teacher / "config.json"
        file.write_text(file.read_text() + "\n")
        if killed := kill(run):  # there is work left when the new one comes
            os.kill(pid_of(run.members[1].name), signal.SIGSTOP)
        return killed

    refuse = Run.refuse

    def refused(run: Run, member: Any, why: Exception) -> None:
        refuse(run, member, why)
        os.kill(pid_of(run.members[0].name), signal.SIGCONT)

    when_all_are_busy(monkeypatch, 2, change_and_kill)
    monkeypatch.setattr(Run, "refuse", refused)
    config = make(teacher=str(teacher))
    launch(config, Spread(processes=2))
    (line,) = (r.message for r in caplog.records if "is refused" in r.message)
    assert re.search(r'teacher\.weights_hash: "[0-9a-f]+\.\.\. -> "[0-9a-f]+\.\.\.', line)
    assert contents(config.out) == contents(alone.out)


class Doomed(LocalCrew):
    """Workers that die as soon as they are started."""

    def recruit(self) -> Any:
        came = super().recruit()
        for worker in came:
            os.kill(worker._process.pid, signal.SIGKILL)
        return came


def test_workers_that_cannot_start_end_the_run(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precompute.spread.WAIT_S", 0.01)
    with pytest.raises(
        TideError, match=r"3 workers in a row died before they were ready, .* was ended by SIGKILL; "
    ):
        spread(make(), Doomed(1, "cpu"))


def test_a_part_that_kills_its_workers_ends_the_run(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not handed out for ever."""
    monkeypatch.setattr("precompute.spread.WAIT_S", 0.05)
    ask = Run.ask

    def deadly(run: Run, call: Any, method: str, *args: Any) -> None:
        if method == "make" and call.work.part == 1:
            os.kill(pid_of(call.member.name), signal.SIGKILL)
        ask(run, call, method, *args)

    monkeypatch.setattr(Run, "ask", deadly)
    config = make(codec=SparseCodec(), fidelity=None)
    with pytest.raises(TideError, match=r"part [01]: 3 workers died over it, .* SIGKILL"):
        spread(config, LocalCrew(1, "cpu"))


def test_threads_are_shared_among_processes_and_recorded(make: Any) -> None:
    """A new dataset's; one that is there decides itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert [LocalCrew(n, "cpu").threads for n in (1, 2, 3, 8)] == [4, 2, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", 2), "--gpus 2: there is no CUDA device here; --processes N"),
        (("--gpus", "all"), "--gpus all: there is no CUDA device here"),
        (("--gpus", "two"), "--gpus must be a number or all, got 'two'"),
        (("--gpus", 2, "--device", "cpu"), "--gpus 2 does not go with --device cpu"),
        (("--gpus", 2, "--processes", 2), "leave out --processes"),
        (("--processes", 0), "--processes must be at least 1, got 0"),
        (("--processes", 2, "--device", "cuda:1"), "--device cuda:1 is one device for 2 processes"),
        (("--engine", "slurm"), "--engine must be one of local, ray, got 'slurm'"),
        (("--ray-address", "host:1"), "--ray-address is of no use without --engine ray"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_one_line_refusals(tide: Any, tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    result = tide(
        "precompute", "--teacher", "t", "--student", "s", "--corpus", "c", "--out", tmp_path, *options
    )  # fmt: skip
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert message in result.err


def test_each_process_sees_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this process may use, by the names that it knows them by."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7")
    assert visible_devices() == ["GPU-a", "GPU-b", "7"]
