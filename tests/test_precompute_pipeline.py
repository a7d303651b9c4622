"""What goes on beside the model changes nothing but the time: any number of workers and a slow encoder give
the same bytes, an error anywhere is told as itself and keeps the parts before it, and no process is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from precompute import loop, recipe, runner
from precompute.busy import Busy
from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.inputs import Asking
from precompute.parts import cut
from precompute.pipeline import Behind, Workers, one_ahead
from precompute.ready import join_prepared, prepare
from precompute.runner import precompute
from shards.errors import CorpusError, ModelError, ShardError, TideError, UsageError
from shards.noise import NoiseConfig
from shards.writer import DatasetWriter

ROWS, SIZE = 13, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Usable rows, unusable ones, and some that give no sample."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines: list[dict[str, Any]] = []
    for i in range(ROWS):
        lines += [{f"hole {i}": 0}] * (i in (3, 8))
        answer = "" if i in (2, 9) else f"{i}, {i + 1} and {i + 2} follow."
        lines.append({"prompt": f"Say {i}. " + "word " * (40 * (i == 6)), "completion": answer})
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


@pytest.fixture(scope="module")
def given(model: Path, corpus: Path) -> dict[str, Any]:
    return {
        "teacher": str(model), "student": str(model), "corpus": str(corpus), "views": 2, "block_size": 8,
        "max_length": 64, "samples_per_part": SIZE, "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def make(given: dict[str, Any], tmp_path: Path) -> Callable[..., PrecomputeConfig]:
    return lambda **changes: PrecomputeConfig(**{**given, "out": tmp_path / "data", **changes})


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run without workers."""
    out = tmp_path_factory.mktemp("whole") / "data"
    precompute(PrecomputeConfig(**given, out=out, workers=0))
    return contents(out)


def children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def workers_left() -> list[int]:
    """Worker processes of this one, which are children of the process they are forked from."""
    servers = [p for p in children(os.getpid()) if b"forkserver" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return [pid for server in servers for pid in children(server)]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    make: Any, whole: dict[str, bytes], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of parts, reports and places of drops included; with a slow writer too."""
    monkeypatch.setattr("precompute.pipeline.SLICE", 3)
    real = DatasetWriter.publish

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return real(*args)

    if workers == 1:
        monkeypatch.setattr(DatasetWriter, "publish", slow)
    config = make(workers=workers)
    busy = Busy()
    precompute(config, busy=busy)
    assert contents(config.out) == whole
    assert not workers_left()
    assert busy.share is not None
    assert 0 < busy.model.seconds < busy.working_s
    again = Busy()
    precompute(config, busy=again)
    assert again.share is None, "there was nothing for the model to do"


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_one_part_at_most_is_behind(
    make: Any, whole: dict[str, bytes], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model works on part n while n - 1 is encoded, never on n + 1; a slow encoder changes no byte."""
    events: list[tuple[str, int]] = []
    build, ask = loop.build, recipe.ask_all

    def slow(builder: Any, work: Any, *args: Any) -> Any:
        events.append(("encoded", work.part))
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(seconds)
        events.append(("done", work.part))
        return build(builder, work, *args)

    def asked(*args: Any, **kwargs: Any) -> Any:
        events.append(("asked", sum(name == "asked" for name, _ in events)))
        return ask(*args, **kwargs)

    monkeypatch.setattr(loop, "build", slow)
    monkeypatch.setattr(recipe, "ask_all", asked)
    config = make(workers=0)
    precompute(config)
    assert contents(config.out) == whole
    at = {event: i for i, event in enumerate(events)}
    for part in range(2, 4):
        assert at["done", part - 2] < at["asked", part]
    if seconds:
        assert at["asked", 1] < at["done", 0]


def test_slices_of_a_part_are_the_part(model: Path, corpus: Path) -> None:
    """Samples, noise, jobs, and what was lost, counted in the same order."""
    preparer = runner.make_preparer(
        PrecomputeConfig(
            teacher=str(model), student=str(model), corpus="", out=Path(), block_size=8, max_length=64
        )
    )
    asking = Asking(
        mask_id=294, attention="staircase", block_size=8, shifted=True, row_tokens=100, compdemo=True
    )
    noise = NoiseConfig(views=2)
    for work in cut(open_corpus(str(corpus)), 7):
        talks = work.conversations
        one = prepare(talks, preparer, noise, asking)
        many = join_prepared([prepare(talks[i : i + 2], preparer, noise, asking) for i in range(0, 7, 2)])
        assert repr(many) == repr(one)
        assert list(many.dropped) == list(one.dropped)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_the_runs_own(make: Any, whole: dict[str, bytes], workers: int) -> None:
    """One line, the same with and without workers, and whatever was finished before stays."""
    with pytest.raises(
        UsageError, match=r"needs \d+ teacher tokens for view \d, --row-tokens allows 40"
    ) as e:
        precompute(make(workers=workers, row_tokens=40))
    assert "\n" not in str(e.value)
    assert not workers_left()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_drop_limit_is_checked_in_order(make: Any, tmp_path: Path, workers: int) -> None:
    """A part that is over it stops the run where it would without workers, though it was prepared before."""
    path = tmp_path / "late.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": "It follows."} for i in range(9)]
    rows += [{"prompt": f"Say {i}.", "completion": "It follows at greater length. " * 8} for i in range(3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = make(corpus=str(path), workers=workers, max_teacher_length=48, max_dropped=0.01, max_length=256)
    with pytest.raises(CorpusError, match="target tokens in the first 12 rows have no teacher counterpart"):
        precompute(config)
    assert sorted(p.name for p in config.out.glob("parts/*")) == ["part-00000.json", "part-00001.json"]


def test_a_killed_worker_is_one_line(make: Any, whole: dict[str, bytes]) -> None:
    """As the kernel does when memory is short. The same call goes on."""
    config = make(workers=2)

    def progress(done: int, total: int | None, message: str) -> None:
        if done > SIZE:
            for pid in workers_left():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(TideError, match=r"a worker process was killed, .* fewer --workers") as e:
        precompute(config, progress)
    assert "\n" not in str(e.value)
    assert not workers_left()
    precompute(replace(config, workers=0))
    assert contents(config.out) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_write_stops_the_run_at_the_next_row(
    make: Any, whole: dict[str, bytes], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error, finished parts kept, nothing begun after it; the same call goes on."""
    config, real = make(workers=workers), DatasetWriter.publish

    def full(writer: Any, built: Any, report: Any) -> Any:
        if built.shard.part == 1:
            raise ShardError("no space left")
        return real(writer, built, report)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "publish", full)
        with pytest.raises(ShardError, match="no space left"):
            precompute(config)
    assert sorted(p.name for p in config.out.glob("parts/*")) == ["part-00000.json"]
    precompute(config)
    assert contents(config.out) == whole


def test_an_error_of_the_model_waits_for_the_part_behind_it(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part 0 is being encoded when the model fails on part 1: it gets on disk, the model's error is told."""
    build, ask = loop.build, recipe.ask_all
    failed = threading.Event()

    def late(*args: Any) -> Any:
        failed.wait(10)
        return build(*args)

    def broken(teacher: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        if calls["asked"]:
            failed.set()
            raise ModelError("the model fails")
        calls["asked"] += 1
        return ask(teacher, samples, *args, **kwargs)

    calls: Counter[str] = Counter()
    monkeypatch.setattr(loop, "build", late)
    monkeypatch.setattr(recipe, "ask_all", broken)
    config = make(workers=0)
    with pytest.raises(ModelError, match="the model fails"):
        precompute(config)
    assert [p.name for p in config.out.glob("parts/*")] == ["part-00000.json"]


def command(config: PrecomputeConfig) -> list[str]:
    words = [
        sys.executable, "-m", "tools.cli", "precompute", "--teacher", config.teacher, "--student",
        config.student, "--corpus", config.corpus, "--out", config.out, "--views", 2, "--block-size", 8,
        "--student-max-length", 64, "--samples-per-part", SIZE, "--device", "cpu", "--workers", 2,
    ]  # fmt: skip
    return list(map(str, words))


def begun(config: PrecomputeConfig) -> subprocess.Popen[str]:
    """The command as a terminal starts it, in a process group of its own, with its first part on disk."""
    run = subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (config.out / "parts" / "part-00000.json").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)
    return run


def group(leader: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def many(make: Any, tmp_path: Path) -> PrecomputeConfig:
    """A run of many parts, so that it can be caught in the middle."""
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}.", "completion": f"{i} and so on."}) + "\n" for i in range(4000)
        )
    )
    config: PrecomputeConfig = make(corpus=str(path))
    return config


def test_ctrl_c_ends_the_workers_and_keeps_finished_parts(many: PrecomputeConfig) -> None:
    """Of the whole group, as a terminal sends it: exit code 130, one line, nobody left, records whole."""
    run = begun(many)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    lines = [line for line in error.splitlines() if not line.startswith("precompute:")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: interrupted; finished parts in")
    assert not group(run.pid)
    parts = {p.stem for p in many.out.glob("parts/*.json")}
    assert parts >= {"part-00000"}
    assert {p.name[:10] for p in many.out.glob("part-*.arrow")} == parts
    assert not list(many.out.rglob(".tmp-*"))


def test_workers_end_with_a_killed_run(many: PrecomputeConfig) -> None:
    run = begun(many)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while group(run.pid):
        assert time.monotonic() < deadline, f"still there: {group(run.pid)}"
        time.sleep(0.05)


def test_one_ahead_fetches_the_next_while_the_caller_works() -> None:
    fetched: list[int] = []

    def items() -> Iterator[int]:
        for i in range(4):
            fetched.append(i)
            yield i

    got = []
    for i in one_ahead(items()):
        deadline = time.monotonic() + 10
        while len(fetched) < min(4, i + 2):
            assert time.monotonic() < deadline
        assert len(fetched) <= i + 2, "no more than one"
        got.append(i)
    assert got == [0, 1, 2, 3]


def test_one_ahead_raises_after_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise CorpusError("broken")

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(CorpusError, match="broken"):
        next(ahead)


def test_behind_tells_an_error_once_and_the_block_first() -> None:
    def fail() -> None:
        raise ShardError("behind")

    with pytest.raises(ShardError, match="behind"), Behind() as behind:
        behind.start(fail)

    def both() -> None:
        with Behind() as behind:
            behind.start(fail)
            raise ModelError("in front")

    with pytest.raises(ModelError, match="in front"):
        both()
    with Behind() as behind:
        behind.start(fail)
        with pytest.raises(ShardError, match="behind"):
            behind.start(print)
        behind.check()


def test_negative_workers(make: Any) -> None:
    with pytest.raises(UsageError, match="workers must be at least 0, got -1"):
        make(workers=-1)


def test_no_worker_is_started_for_none(model: Path) -> None:
    with Workers(0, None) as workers:  # type: ignore[arg-type]
        assert workers.start(os.getpid)() == os.getpid()
