"""What goes on beside the model, so that it never waits: parts prepared ahead of it, encoded behind it.

Neither changes a byte: parts are taken up, checked and published in the order they were claimed in. Encoding
goes to a process as well, as a thread that holds the interpreter would hold up the model's launches.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

from precompute.inputs import Asking
from precompute.prepare import Preparer
from precompute.ready import Prepared, join_prepared, prepare
from precompute.sample import Conversation
from shards.errors import TideError
from shards.noise import NoiseConfig

P = ParamSpec("P")
T = TypeVar("T")

WORKERS = {"cpu": 0, "cuda": 2}
"""Processes where none are asked for. On a CPU the model uses every core itself. One process prepares about
700,000 teacher tokens a second and encodes what was said about 400,000, so two keep up with any teacher."""
SLICE = 32
"""Conversations that a worker prepares at a time: a part is shared among all of them."""

_preparer: Preparer
"""A worker's own."""


class Workers:
    """Processes that prepare and encode; a context manager. With `count` 0 whoever asks for a result makes
    it.

    Raises:
        TideError: of what they were asked for, their own; or one of them was killed.
    """

    def __init__(self, count: int, preparer: Preparer) -> None:
        self.count, self._preparer = count, preparer
        self._pool: ProcessPoolExecutor | None = None
        if count:
            self._pool = ProcessPoolExecutor(
                count, mp_context=worker_context(), initializer=_begin, initargs=(preparer,)
            )
            with interrupts_ignored():
                for _ in range(count):  # starts one each, while the teacher loads
                    self._pool.submit(int)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Begin a call, arguments and result picklable; returns what waits for its result."""
        if self._pool is None:
            return partial(function, *args, **kwargs)
        try:
            return partial(_result, self._pool.submit(function, *args, **kwargs))
        except BrokenProcessPool as e:
            raise _killed() from e

    def prepare(
        self, conversations: Sequence[Conversation], noise: NoiseConfig, asking: Asking
    ) -> Callable[[], Prepared]:
        """Begin `precompute.ready.prepare`."""
        if self._pool is None:
            return partial(prepare, conversations, self._preparer, noise, asking)
        slices = [
            self.start(_prepare, conversations[i : i + SLICE], noise, asking)
            for i in range(0, len(conversations), SLICE)
        ]
        return lambda: join_prepared([result() for result in slices])


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BrokenProcessPool as e:
        raise _killed() from e


def _killed() -> TideError:
    return TideError(
        "a worker process was killed, or could not start (out of memory?): finished parts are kept; run the "
        "same command again with fewer --workers"
    )


def worker_context(module: str = __name__) -> BaseContext:
    """Workers are not forked from this process, which has threads and perhaps an accelerator, but from one
    that has done nothing but import a module, once: the one that this is first called with."""
    if "forkserver" not in mp.get_all_start_methods():  # Windows
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes started inside never hear of Ctrl-C, which their parent handles for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(preparer: Preparer) -> None:
    """A worker's start."""
    global _preparer
    _preparer = preparer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare(conversations: Sequence[Conversation], noise: NoiseConfig, asking: Asking) -> Prepared:
    return prepare(conversations, _preparer, noise, asking)


def one_ahead(items: Iterator[T]) -> Generator[T]:
    """The items, the next one fetched in a thread while the caller is busy with one; closed, it waits for
    that."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following: Future[T | object] = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


class Behind:
    """One call at a time, in a thread beside the caller; a context manager, whose end waits for the last.

    A call's error is raised by what comes next: `start`, `check`, or the end, where the block's own error
    goes first.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def start(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Wait for the last call, and begin this one."""
        self._wait()
        self._last = self._thread.submit(function, *args, **kwargs)

    def check(self) -> None:
        """Raise the error of the last call, if it has failed by now."""
        if self._last is not None and self._last.done():
            self._wait()

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._thread.shutdown()
