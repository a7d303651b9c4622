"""Workers that are processes of this machine, one model each, on CUDA one device each."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch

from precompute.crew import Lost
from precompute.part_maker import AT_ONCE, PartMaker
from precompute.pipeline import end_with_parent, interrupts_ignored, worker_context
from shards.errors import TideError

VISIBLE = "CUDA_VISIBLE_DEVICES"
END_S = 5.0
"""Seconds that a process gets to end."""


class LocalCrew:
    """`count` processes; one that dies is replaced.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, count: int, device: str) -> None:
        self.device = device
        self.threads = max(1, torch.get_num_threads() // count) if device == "cpu" else None
        self._count, self._devices = count, visible_devices() if device == "cuda" else []
        self._workers: dict[int, LocalWorker] = {}
        """By place, which decides the CUDA device."""

    def seats(self) -> int:
        return self._count

    def waiting(self) -> str:
        return "starting workers"

    def recruit(self) -> Sequence[LocalWorker]:
        came = []
        for place in range(self._count):
            if place not in self._workers or not self._workers[place].alive:
                visible = self._devices[place % len(self._devices)] if self._devices else None
                self._workers[place] = LocalWorker(visible)
                came.append(self._workers[place])
        return came

    def __enter__(self) -> LocalCrew:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.dismiss()


class LocalWorker:
    """A process with a `PartMaker`, and a pipe to it.

    Args:
        visible: the CUDA device that it may see, as CUDA_VISIBLE_DEVICES names it.
    """

    def __init__(self, visible: str | None) -> None:
        context: Any = worker_context(__name__)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, visible))
        with interrupts_ignored():
            self._process.start()
        theirs.close()
        self._calls: dict[int, Future[Any]] = {}
        self._made, self._lock = 0, threading.Lock()
        self.alive = True
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number, self._made = self._made, self._made + 1
            self._calls[number] = future
        try:
            self._pipe.send((number, method, args))
        except OSError:  # it died; the listener says so too, unless it was gone before this call
            self._lost()
        return future

    def dismiss(self) -> None:
        self._process.terminate()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()

    def _listen(self) -> None:
        try:
            while True:
                number, value, error = self._pipe.recv()
                with self._lock:
                    future = self._calls.pop(number)
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            self._lost()

    def _lost(self) -> None:
        self._process.join(END_S)
        self.alive = False
        code = self._process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        with self._lock:
            calls, self._calls = self._calls, {}
        for future in calls.values():
            future.set_exception(Lost(how))


def _serve(pipe: Connection, visible: str | None) -> None:
    """The process: answers calls until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if visible is not None:
        os.environ[VISIBLE] = visible
    threading.Thread(target=end_with_parent, daemon=True).start()
    maker, sending = PartMaker(), threading.Lock()

    def answer(number: int, method: str, args: tuple[Any, ...]) -> None:
        value = error = None
        try:
            value = getattr(maker, method)(*args)
        except Exception as e:
            error = _portable(e)
        with sending:
            pipe.send((number, value, error))

    with ThreadPoolExecutor(AT_ONCE) as threads:
        while True:
            try:
                call = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            threads.submit(answer, *call)


def _portable(error: Exception) -> Exception:
    """An error as it can be sent. Where a bug is does not travel by itself."""
    if isinstance(error, TideError):
        return error
    text = "".join(traceback.format_exception(error))
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that needs more than its arguments to be made
        same = RuntimeError(f"{type(error).__name__}: {error}")
    same.add_note(text)
    return same


def visible_devices() -> list[str]:
    """CUDA devices of this machine that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get(VISIBLE)
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
