"""What a stored target says of the teacher's distribution at each position: its most probable tokens, its
entropy, and what was kept of it.

A sparse target knows the tail's mass, not how it is spread. With that mass as one symbol the entropy is a
lower bound; spread evenly over the tokens not kept it is an upper one. Dense and exact targets give the
entropy itself, so both bounds are it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shards.codec import ExactCodec, SparseCodec
from shards.errors import ShardError
from shards.reader import LogitDataset
from shards.row import DenseTarget, ExactTarget, PositionTargets, SparseTarget

MOST = 5
"""Top tokens that are shown."""
HEAD_WORK = 1 << 40
"""Products of the teacher's head that a sample of exact targets may cost: half a minute or so on a CPU."""
LEAST_POSITIONS = 256
CHUNK_VALUES = 1 << 24
"""Logits that exist at once."""


@dataclass(frozen=True, slots=True)
class Said:
    """The teacher at N positions. Probabilities at temperature 1, over the shared vocabulary."""

    ids: np.ndarray
    """[N, MOST] int64, most probable first; -1 where the target has fewer."""
    p: np.ndarray
    """[N, MOST] float64: their probabilities; 0 where there is none."""
    entropy: np.ndarray
    """[N] nats; of sparse targets a lower bound."""
    entropy_most: np.ndarray
    """[N] nats: an upper bound."""
    kept: np.ndarray | None = None
    """[N] entries; None = the target is no head."""
    tail: dict[float, np.ndarray] | None = None
    """Temperature -> [N] share of the mass that is outside the head; None as for `kept`."""


class Teller:
    """Reads the targets of one dataset."""

    def __init__(self, dataset: LogitDataset) -> None:
        self._dataset = dataset
        self.vocab_size = dataset.manifest.shared_vocab_size or dataset.manifest.student.vocab_size

    @property
    def affordable(self) -> int | None:
        """Positions whose distributions may be computed for statistics; None = they are stored."""
        codec = self._dataset.manifest.codec
        if not isinstance(codec, ExactCodec):
            return None
        return max(LEAST_POSITIONS, HEAD_WORK // (self.vocab_size * codec.width))

    def at(self, positions: PositionTargets, pick: np.ndarray | None = None) -> Said:
        """The targets of a row, or of its positions `pick` [n].

        Raises: ShardError: the teacher's head, which exact targets need, is missing or unusable.
        """
        target = positions.target
        if isinstance(target, SparseTarget):
            codec = self._dataset.manifest.codec
            said = _sparse(
                target, codec.temperatures if isinstance(codec, SparseCodec) else (), self.vocab_size
            )
            return said if pick is None else _rows(said, pick)
        wanted = np.arange(len(positions.positions)) if pick is None else pick
        chunk = max(1, CHUNK_VALUES // self.vocab_size)
        parts = [self._whole(target, wanted[i : i + chunk]) for i in range(0, max(1, len(wanted)), chunk)]
        ids, p, entropy = (np.concatenate(column) for column in zip(*parts))
        return Said(ids, p, entropy, entropy)

    def _whole(
        self, target: DenseTarget | ExactTarget, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Top ids, their probabilities, and the entropy."""
        logits = target.logp[at] if isinstance(target, DenseTarget) else self._logits(target.hidden[at])
        logits = logits.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True, initial=-np.inf)
        p = np.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        logp = logits - np.log(total)
        entropy = -np.where(p > 0, p * logp, 0.0).sum(axis=1)
        k = min(MOST, self.vocab_size)
        top = np.argpartition(-p, k - 1, axis=1)[:, :k]
        top = np.take_along_axis(top, np.argsort(-np.take_along_axis(p, top, 1), axis=1, kind="stable"), 1)
        ids, values = _blank(len(at))
        ids[:, :k], values[:, :k] = top, np.take_along_axis(p, top, 1)
        return ids, values, entropy

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        import torch

        return self._head.logits(torch.from_numpy(np.array(hidden)), torch.float32).numpy()

    @cached_property
    def _head(self) -> Any:
        from student.tables import dataset_table
        from student.tensors import TeacherHead

        head = dataset_table(self._dataset)
        if not isinstance(head, TeacherHead):
            raise ShardError(f"{self._dataset.path}: codec exact without the teacher's head: fetch it again")
        return head


def _blank(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((n, MOST), -1, np.int64), np.zeros((n, MOST))


def _sparse(target: SparseTarget, temperatures: tuple[float, ...], vocab_size: int) -> Said:
    counts = target.counts.astype(np.int64)
    n = len(counts)
    first = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(n), counts)
    logp = target.logp.astype(np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, minlength=n)

    def tail(temperature: float) -> np.ndarray:
        """[n] mass outside the head, in the head's units at this temperature."""
        if temperature in temperatures:
            return np.exp(target.tails[:, temperatures.index(temperature)].astype(np.float64))
        return np.maximum(0.0, 1 - total(np.exp(logp)))  # temperature 1: what is missing

    mass = tail(1.0)
    whole = total(np.exp(logp)) + mass  # 1 but for the codec's rounding
    q = np.exp(logp) / whole[owner]
    rest = mass / whole
    # H = log Z - sum of q log p: the rounding of the codes cancels as far as it can.
    inside = total(q * (logp - np.log(whole)[owner]))
    entropy = np.maximum(0.0, -(inside + np.where(rest > 0, rest * np.log(np.where(rest > 0, rest, 1)), 0.0)))
    left = np.maximum(vocab_size - counts, 1)
    rank = np.arange(len(owner)) - first[owner]
    ids, p = _blank(n)
    shown = rank < MOST
    ids[owner[shown], rank[shown]] = target.ids[shown]
    p[owner[shown], rank[shown]] = q[shown]
    shares = {}
    for temperature in temperatures:
        outside = tail(temperature)
        shares[temperature] = outside / (outside + total(np.exp(logp / temperature)))
    return Said(ids, p, entropy, entropy + rest * np.log(left), counts, shares or {1.0: rest})


def _rows(said: Said, at: np.ndarray) -> Said:
    return Said(
        said.ids[at],
        said.p[at],
        said.entropy[at],
        said.entropy_most[at],
        None if said.kept is None else said.kept[at],
        None if said.tail is None else {t: x[at] for t, x in said.tail.items()},
    )
