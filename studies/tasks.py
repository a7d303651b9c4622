"""Tasks: pieces of work with a folder each, named by a hash of all that decides them.

A task's folder holds `task.json`, what it is, and `result.json`, written last and whole: a folder without one
was interrupted, counts for nothing and is made again. So a run may be killed at any moment, goes on where it
was, and two configurations share what they have in common.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.atomic import write_atomic
from tools.workers import Event, Job, Report, run_jobs

RESULT, TASK = "result.json", "task.json"
WORK = {
    "corpus": "studies.making:make_corpus",
    "tokenizer": "studies.making:make_tokenizers",
    "model": "studies.making:make_model",
    "data": "studies.making:make_data",
    "judge": "studies.training:judge",
    "arm": "studies.training:train_arm",
    "why": "studies.why:explain",
    "codec": "studies.why:measure_codecs",
}
"""Kind of task -> the function that does it: (task, out, report) to a result of plain JSON values."""


@cache
def versions() -> tuple[str, ...]:
    """Of what computes: results of others are not mixed with these."""
    return platform.python_version(), version("torch"), version("transformers")


@dataclass(frozen=True)
class Task:
    """A piece of work; equal if its hash is."""

    kind: str
    name: str
    """For people; decides nothing."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    needs: Mapping[str, Task] = field(default_factory=dict)
    """Role -> what must be done before."""

    @cached_property
    def key(self) -> str:
        decides = [
            self.kind,
            self.spec,
            {role: task.key for role, task in self.needs.items()},
            versions(),
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, out: Path) -> Path:
        return out / "tasks" / f"{self.kind}-{self.key}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """None = not done."""
        file = self.folder(out) / RESULT
        return json.loads(file.read_text()) if file.is_file() else None

    def done(self, out: Path) -> bool:
        return (self.folder(out) / RESULT).is_file()

    def perform(self, out: Path, report: Report) -> None:
        """Do it, unless it is done."""
        folder = self.folder(out)
        if self.done(out):
            return
        if self.kind != "data":  # a dataset that was begun is gone on with, part by part
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        what = {"kind": self.kind, "name": self.name, "spec": self.spec}
        what |= {"needs": {role: f"{t.kind}-{t.key}" for role, t in self.needs.items()}}
        write_atomic(folder / TASK, json.dumps(what, indent=1).encode())
        module, _, function = WORK[self.kind].partition(":")
        work: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), function)
        start, cpu = time.monotonic(), time.process_time()
        result = work(self, out, report)
        spent = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
        write_atomic(folder / RESULT, json.dumps(result | spent).encode())


def perform(*, task: Task, out: str, report: Report) -> None:
    """A worker's share."""
    task.perform(Path(out), report)


def missing(tasks: Iterable[Task], out: Path) -> list[list[Task]]:
    """What is not done of the tasks and of all they need, in waves: each needs only what came before it."""
    depth: dict[str, int] = {}
    found: dict[str, Task] = {}

    def visit(task: Task) -> int:
        if task.key not in depth:
            if task.done(out):
                depth[task.key] = 0
            else:
                depth[task.key] = 1 + max((visit(t) for t in task.needs.values()), default=0)
                found[task.key] = task
        return depth[task.key]

    for task in tasks:
        visit(task)
    waves: list[list[Task]] = [[] for _ in range(max((depth[k] for k in found), default=0))]
    for key, task in found.items():
        waves[depth[key] - 1].append(task)
    return [wave for wave in waves if wave]


def run_tasks(tasks: Sequence[Task], out: Path, *, jobs: int, on_event: Callable[[Event], None]) -> None:
    """Do what is missing, `jobs` processes at once, each computing in one thread; a single job in this one.
    The first failure is raised; what was done stays done."""
    for wave in missing(tasks, out):
        named = {f"{t.name} ({t.key[:6]})": t for t in wave}
        if jobs > 1:
            work = [Job(name, perform, {"task": t, "out": str(out)}) for name, t in named.items()]
            run_jobs(work, on_event=on_event, workers=jobs)
            continue
        import torch

        torch.set_num_threads(1)
        for name, task in named.items():
            task.perform(out, lambda *told, job=name: on_event(Event(job, *told)))
