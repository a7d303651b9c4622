"""From rows in stream order to this rank's micro-batches, each knowing the counts of its whole global batch.

The global batch is cut from the global row order by the token budget first and dealt afterwards, so it is the
same for every number of ranks, micro-batches and worker processes: only rounding tells those runs apart.

Every rank and every worker walks the same rows, as far as the cut needs them; what is dear (noise plans
computed again, packing) is done for the rows that a process hands on. Worker w of k makes the global batches
w, w + k, ..., and the state travels in the `Batch`, so a run may go on with other numbers of either.
"""

from __future__ import annotations

import atexit
import heapq
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.errors import ConfigMismatch, TideError
from shards.reader import LogitDataset, StreamState
from shards.row import Row
from student.batch import FRESH, counts_of, packed_tokens
from student.tensors import Batch

RowSource = Callable[[Mapping[str, Any] | None], Iterable[tuple[Row, Any]]]
"""Opens the row stream at a state (None = its beginning); yields rows, each with the state after it."""

GRACE_S = 30.0
"""Time that a worker told to end leaves the trainer for ending in order."""


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """Row source of a logit dataset, for this and for other processes. Noise plans are left to whoever
    collates the rows (`BatchStream`'s `check`)."""

    dataset: LogitDataset
    seed: int

    def __call__(self, at: Mapping[str, Any] | None) -> Iterator[tuple[Row, StreamState]]:
        start = None if at is None else StreamState(**at)
        return self.dataset.stream(self.seed, start, check=False)


def global_batches(
    rows: Iterable[tuple[Row, Any]], *, batch_tokens: int, block_size: int
) -> Iterator[tuple[list[Row], Any]]:
    """Cut rows, in order, into batches of at most `batch_tokens` packed tokens, each with the state after it.

    A row that alone exceeds the budget is a batch of its own. A view with nothing masked runs no token; it
    counts as one, so that no batch goes on for ever.
    """
    batch: list[Row] = []
    used, state = 0, None
    for row, after in rows:
        cost = max(1, packed_tokens(row, block_size))
        if batch and used + cost > batch_tokens:
            yield batch, state
            batch, used = [], 0
        batch.append(row)
        used += cost
        state = after
    if batch:
        yield batch, state


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
    """Indices in groups of similar cost: dearest first, each to the lightest group; ascending inside."""
    out: list[list[int]] = [[] for _ in range(hands)]
    lightest = [(0, h) for h in range(hands)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, h = heapq.heappop(lightest)
        out[h].append(i)
        heapq.heappush(lightest, (total + costs[i], h))
    return [sorted(hand) for hand in out]


class BatchStream(IterableDataset):
    """This rank's micro-batches, `accumulation` per optimiser step, from the global row order.

    Every `Batch` carries the counts of its global batch and, as `state`, where the row stream stands after
    it: starting another stream there goes on with the next global batch, without replay.
    """

    def __init__(
        self,
        source: RowSource,
        collate: Callable[..., Batch],
        *,
        batch_tokens: int,
        block_size: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        max_positions: int | None = None,
        check: Callable[[Row], None] | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            collate: called as `collate(rows, counts=..., state=...)`; `student.batch.collate` with its
                settings bound.
            batch_tokens: packed student tokens per optimiser step, over all ranks.
            max_positions: positions the student has; a longer row is refused by name.
            check: called with every stored row before it is collated (`LogitDataset.check`).
            start: state of the row stream to begin at.
        """
        self.source = source
        self.collate = collate
        self.batch_tokens = batch_tokens
        self.block_size = block_size
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.max_positions = max_positions
        self.check = check
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        """Raises: see `steps`."""
        for parts in self.steps():
            yield from parts

    def steps(self, worker: int = 0, workers: int = 1) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the optimiser steps that `worker` of `workers` makes.

        Raises:
            ConfigMismatch: a row is longer than the student's positions. Whatever the source and `check`
                raise.
        """
        rows = self._checked(self.source(self.start))
        cut = global_batches(rows, batch_tokens=self.batch_tokens, block_size=self.block_size)
        for step, (batch, after) in enumerate(cut):
            if step % workers != worker:
                continue
            counts = counts_of(batch, self.block_size)
            costs = [packed_tokens(row, self.block_size) for row in batch]
            hands = deal(costs, self.world * self.accumulation)
            mine = [[batch[i] for i in hand] for hand in hands[self.rank :: self.world]]
            for row in (row for part in mine for row in part):
                if self.check is not None and row.view != FRESH:
                    self.check(row)
            yield [self.collate(part, counts=counts, state=_plain(after)) for part in mine]

    def _checked(self, rows: Iterable[tuple[Row, Any]]) -> Iterator[tuple[Row, Any]]:
        for row, after in rows:
            if self.max_positions is not None and len(row.input_ids) > self.max_positions:
                raise ConfigMismatch(
                    f"sample {row.sample_id} view {row.view} has {len(row.input_ids)} tokens, the student "
                    f"{self.max_positions} positions; use a student with more (max_position_embeddings) or a "
                    "dataset of shorter samples"
                )
            yield row, after

    def loader(self, workers: int | None = None) -> DataLoader[Batch]:
        """A loader that hands the batches on as they are.

        Args:
            workers: processes that make them, two steps ahead each; 0 = this one; None = 1 where CUDA is
                available (it hides all of the work behind a step there), else 0.
        """
        if workers is None:
            workers = int(torch.cuda.is_available())
        if not workers:
            return DataLoader(self, batch_size=None, collate_fn=_as_is)
        return _WorkerLoader(
            _WorkerSteps(self),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_trainer,
        )


class _WorkerSteps(IterableDataset):
    """What a worker process sends: lists of micro-batches, or the error that ended it."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[list[Batch] | TideError]:
        info: Any = get_worker_info()
        try:
            yield from self.stream.steps(info.id, info.num_workers)
        except TideError as e:
            yield e  # raised in a worker, it would arrive with a traceback for a message


class _WorkerLoader(DataLoader[Any]):
    """Takes turns between the workers: DataLoader asks them one after the other, so steps come in order."""

    def check_worker_number_rationality(self) -> None:
        """No warning: whoever asks for more processes than there are cores means it."""

    def __iter__(self) -> Any:
        batches: Any = self._batches()
        # At exit, workers must be told to end before multiprocessing sends them the signal they wait after.
        left = weakref.ref(batches)
        atexit.register(lambda: None if (still := left()) is None else still.close())
        return batches

    def _batches(self) -> Iterator[Batch]:
        for item in super().__iter__():
            if isinstance(item, TideError):
                raise item
            yield from item


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C, and SIGTERM to a whole job, reach workers too, while the trainer still ends its step and saves.

    A worker ends when the loader does, or its parent; told to end, it does so after `GRACE_S`.
    """

    def later(number: int, frame: Any) -> None:
        timer = threading.Timer(GRACE_S, os._exit, [0])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, later)


def _plain(state: Any) -> dict[str, Any]:
    return asdict(state) if is_dataclass(state) and not isinstance(state, type) else dict(state or {})


def _as_is(batch: Any) -> Any:
    return batch
