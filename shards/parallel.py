"""A function over many items at once, with the bytes it handles counted in one place and a prompt stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[float, float | None], None]
"""Called with bytes done and bytes in all, from the main thread."""

REPORT_S = 0.2


class Stopped(Exception):
    """Raised in a worker because another one failed or the user pressed Ctrl-C."""


class Work:
    """Counts the bytes that workers handle, and stops them all when one fails.

    Args:
        total: bytes in all.
        report: where progress goes; None = nowhere.
    """

    def __init__(self, total: int, report: Report | None = None) -> None:
        self.total, self.done = total, 0
        self._began = time.monotonic()
        self._report = report
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def add(self, size: int) -> None:
        """Count bytes; negative ones are to be handled again. Raises: Stopped, where the work is over."""
        with self._lock:
            self.done += size
        if self._stop.is_set():
            raise Stopped

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._began

    def each(
        self, function: Callable[[T], R], items: Sequence[T], pool: Executor | int
    ) -> Iterator[tuple[T, R]]:
        """(item, result) in order of completion. Leaving the loop, by whatever way, stops what is running.

        Args:
            pool: an executor, which is left open, or a number of threads.
        """
        if isinstance(pool, int):
            with ThreadPoolExecutor(max(1, min(pool, len(items)))) as threads:
                yield from self.each(function, items, threads)
            return
        pending = {pool.submit(function, item): item for item in items}
        try:
            while pending:
                finished, _ = wait(pending, timeout=REPORT_S, return_when=FIRST_COMPLETED)
                self.tell()
                for future in finished:
                    yield pending.pop(future), future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            for future in pending:
                future.cancel()
            self.tell()

    def tell(self) -> None:
        """Report progress."""
        if self._report:
            self._report(self.done, self.total)


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
