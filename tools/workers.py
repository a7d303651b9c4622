"""Run independent jobs in worker processes, one torch thread each, with their progress in one place.

One thread per job, rather than one job over all threads: small networks gain nothing from more, and a
result then depends on no thread count.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Report = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done."""


@dataclass(frozen=True, slots=True)
class Job:
    """`function(report=..., **arguments)` in a worker; importable, its arguments picklable."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """How far a job is."""

    job: str
    done: int
    total: int
    doing: str


_events: Any = None


def _start(events: Any) -> None:
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C stops
    import torch

    torch.set_num_threads(1)


def _run(job: Job) -> Any:
    def report(done: int, total: int, doing: str) -> None:
        _events.put(Event(job.name, done, total, doing))

    # Off the main thread, where code that handles SIGTERM (training does) leaves it alone: a pool that ends
    # then ends its jobs too.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(job.function, report=report, **job.arguments).result()


def run_jobs(
    jobs: Sequence[Job], *, on_event: Callable[[Event], None], workers: int | None = None
) -> dict[str, Any]:
    """Results by job name. Jobs start in the order given; the first failure stops the rest and is raised
    here.

    Args:
        workers: processes at once; None = the processors this process may use, at most one per job.
    """
    context = mp.get_context("spawn")
    events = context.Queue()
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(len(jobs), workers or processors or 1)
    # Inherited by the workers, whose libraries read it when they are imported.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with context.Pool(
            count, initializer=_start, initargs=(events,)
        ) as pool:  # leaving it ends the workers
            pending = {job.name: pool.apply_async(_run, (job,)) for job in jobs}
            results: dict[str, Any] = {}
            while pending:
                with suppress(queue.Empty):
                    on_event(events.get(timeout=0.2))
                for name in [name for name, result in pending.items() if result.ready()]:
                    results[name] = pending.pop(name).get()
            while not events.empty():
                on_event(events.get())
            return {job.name: results[job.name] for job in jobs}
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
