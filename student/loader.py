"""From rows in stream order to this rank's micro-batches, each knowing the counts of its whole global batch.

The global batch is cut from the global row order by the token budget first and dealt afterwards, so it is the
same for every number of ranks and micro-batches: only rounding tells those runs apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from shards.errors import ConfigMismatch
from shards.row import Row
from student.batch import counts_of, packed_tokens
from student.tensors import Batch

RowSource = Callable[[Mapping[str, Any] | None], Iterable[tuple[Row, Any]]]
"""Opens the row stream at a state (None = its beginning); yields rows, each with the state after it."""


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
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            collate: called as `collate(rows, counts=..., state=...)`; `student.batch.collate` with its
                settings bound.
            batch_tokens: packed student tokens per optimiser step, over all ranks.
            max_positions: positions the student has; a longer row is refused by name.
            start: state of the row stream to begin at.
        """
        self.source = source
        self.collate = collate
        self.batch_tokens = batch_tokens
        self.block_size = block_size
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.max_positions = max_positions
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            ConfigMismatch: a row is longer than the student's positions.
        """
        rows = self._checked(self.source(self.start))
        cut = global_batches(rows, batch_tokens=self.batch_tokens, block_size=self.block_size)
        for batch, after in cut:
            counts = counts_of(batch, self.block_size)
            costs = [packed_tokens(row, self.block_size) for row in batch]
            hands = deal(costs, self.world * self.accumulation)
            for m in range(self.accumulation):
                mine = hands[m * self.world + self.rank]
                yield self.collate([batch[i] for i in mine], counts=counts, state=_plain(after))

    def _checked(self, rows: Iterable[tuple[Row, Any]]) -> Iterator[tuple[Row, Any]]:
        for row, after in rows:
            if self.max_positions is not None and len(row.input_ids) > self.max_positions:
                raise ConfigMismatch(
                    f"sample {row.sample_id} view {row.view} has {len(row.input_ids)} tokens, the student "
                    f"{self.max_positions} positions; use a student with more (max_position_embeddings) or a "
                    "dataset of shorter samples"
                )
            yield row, after

    def loader(self) -> DataLoader[Batch]:
        """A loader that hands the batches on as they are."""
        return DataLoader(self, batch_size=None, collate_fn=_as_is)


def _plain(state: Any) -> dict[str, Any]:
    return asdict(state) if is_dataclass(state) and not isinstance(state, type) else dict(state or {})


def _as_is(batch: Any) -> Any:
    return batch
