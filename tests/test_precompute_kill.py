"""SIGKILL at random instants while two processes precompute into one folder, the same call until it is done:
the dataset is the one that a single undisturbed process makes, byte for byte, and nothing else is left.

    python -m pytest tests/test_precompute_kill.py                # a few kills, as in CI
    python -m pytest tests/test_precompute_kill.py -m slow -s     # 200 of them, a line with what was hit

The file is also the program that does it: writers are forked from a process that has everything imported, so
that a cycle takes a fraction of a second. They load the models and call `precompute` like any other process.
Half of the kills come from outside after a random time. Half come at a random system call of the writer, so
that the short moments between a shard, its record and the manifest are hit often too.
"""

import argparse
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PHASES = ("start", "between", "part", "publish", "wait", "finish", "done")
CALLS = ("fsync", "write", "replace", "link", "unlink", "mkdir")
WRITERS = 2


def test_a_few_kills(model: Path, tmp_path: Path) -> None:
    check(model, tmp_path, 8)


@pytest.mark.slow
def test_two_hundred_kills(model: Path, tmp_path: Path) -> None:
    check(model, tmp_path, 200)


def check(model: Path, tmp_path: Path, kills: int) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}, {i + 1} and {i + 2} follow."} for i in range(21)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, __file__, model, corpus, tmp_path / "work", kills]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["runs killed"] >= kills
    if kills >= 200:
        assert {"start", "part", "publish", "finish"} <= counts["killed in"].keys()


class Stage:
    """What each writer is doing, in memory that outlives it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, WRITERS)

    def enter(self, writer: int, phase: str) -> None:
        self.memory[writer] = PHASES.index(phase)

    def of(self, writer: int) -> str:
        return PHASES[self.memory[writer]]


def told(enter: Callable[[str], None], function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """`function`, with its phase entered and left."""

    def call(*args: Any, **kwargs: Any) -> Any:
        enter(phase)
        try:
            return function(*args, **kwargs)
        finally:
            enter("between")

    return call


def write(config: Any, enter: Callable[[str], None], calls_left: int | None) -> None:
    """One writer: `precompute`, which is killed at its n-th system call if `calls_left` says so."""
    from precompute import loop, recipe, runner
    from shards.writer import DatasetWriter

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_left
            if calls_left is not None:
                calls_left -= 1
                if calls_left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    recipe.ask_all = told(enter, recipe.ask_all, "part")
    DatasetWriter.publish = told(enter, DatasetWriter.publish, "publish")
    DatasetWriter.finish = told(enter, DatasetWriter.finish, "finish")
    time.sleep = told(enter, time.sleep, "wait")
    loop.WAIT_S = 0.01
    enter("start")
    runner.precompute(config)
    enter("done")


def fork(config: Any, stage: Stage, number: int, calls_left: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        write(config, lambda phase: stage.enter(number, phase), calls_left)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def contents(out: Path) -> dict[str, bytes]:
    """Every file there is but the empty lock file."""
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def main() -> None:
    """Kill writers until so many runs have lost one or both, and compare every dataset that gets done."""
    import torch

    from precompute.config import PrecomputeConfig
    from precompute.runner import precompute

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("work", type=Path)
    parser.add_argument("kills", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, stage = random.Random(0), Stage()

    def settings(out: Path) -> PrecomputeConfig:
        return PrecomputeConfig(
            teacher=given.model,
            student=given.model,
            corpus=given.corpus,
            out=out,
            views=2,
            block_size=8,
            max_length=64,
            samples_per_part=3,
            row_tokens=256,
            device="cpu",
            holdout=0.2,
        )

    precompute(settings(given.work / "warm"))  # libraries import much on first use
    alone = given.work / "alone" / "data"  # the card names the folder
    began = time.monotonic()
    assert os.waitpid(fork(settings(alone), stage, 0, None), 0)[1] == 0
    longest = time.monotonic() - began
    whole = contents(alone)
    assert "manifest.json" in whole

    runs, killed, datasets = 0, 0, 0
    phases: Counter[str] = Counter()
    while killed < given.kills:
        out = given.work / str(datasets) / "data"
        finished = False
        while not finished:
            runs += 1
            chosen = rng.choice([(0,), (1,), (0, 1)])
            from_outside = rng.random() < 0.5
            calls = {n: rng.randint(1, 60) for n in chosen} if not from_outside else {}
            pids = [fork(settings(out), stage, n, calls.get(n)) for n in range(WRITERS)]
            if from_outside:
                time.sleep(rng.uniform(0, 1.2 * longest))
                for n in chosen:
                    os.kill(pids[n], signal.SIGKILL)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            assert set(codes) <= {0, -signal.SIGKILL}, f"a writer failed: {codes}"
            hit = [stage.of(n) for n, code in enumerate(codes) if code]
            phases.update(hit)
            killed += bool(hit)
            # One writer that is left alone finishes the dataset, what the other had begun included.
            finished = 0 in codes
            if finished:
                assert (out / "manifest.json").exists()
        if hit:  # it may have been there when the other was about to clean up
            runs += 1
            assert os.waitpid(fork(settings(out), stage, 0, None), 0)[1] == 0
        got = contents(out)
        different = sorted(n for n in whole.keys() | got.keys() if whole.get(n) != got.get(n))
        assert not different, f"{out}: {different}"
        assert not (out / ".claims").exists()
        datasets += 1
    print(
        json.dumps(
            {
                "runs": runs,
                "runs killed": killed,
                "writers killed": phases.total(),
                "killed in": dict(phases),
                "datasets": datasets,
                "files compared": datasets * len(whole),
                "one undisturbed run, s": round(longest, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
