"""Numbers of a sample of rows: what the teacher was sure of, by timestep and half, and what was kept of it.

Positions of one sample say similar things, so intervals treat samples as the units: a mean over positions is
a ratio of sums over samples, and its standard error follows from the samples' residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shards.reader import LogitDataset
from shards.row import Row
from tools.inspecting.targets import Teller
from tools.pages.report import Series

BINS = 10
"""Of the timestep."""
Z = 1.96
"""Standard errors on either side of a 95 % interval."""
Report = Callable[[float, float | None], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Distilled positions of a sample of rows, [n] each."""

    sample: np.ndarray
    """Number of the sample each lies in."""
    key: list[tuple[str, int, int]]
    """Sample id, view, position."""
    t: np.ndarray
    half_a: np.ndarray
    gold: np.ndarray
    """Probability of the true token; NaN where its id lies outside the shared vocabulary."""
    top: np.ndarray
    """Probability of the most probable token."""
    entropy: np.ndarray
    """Nats; of sparse targets a lower bound."""
    entropy_most: np.ndarray
    kept: np.ndarray | None
    tail: dict[float, np.ndarray]
    """Temperature -> share of the mass outside the head; empty where there is no head."""
    left_out: int
    """Positions of the rows that are not here: their distributions were too much to compute."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of a sample of rows: all of them, [c], and the active ones, [a]."""

    length: np.ndarray
    """[c] student tokens."""
    teacher_length: np.ndarray
    """[c] teacher tokens."""
    sample: np.ndarray
    """[a]"""
    key: list[tuple[str, int, int]]
    """[a] sample id, view, first student position."""
    t: np.ndarray
    half_a: np.ndarray
    logp: np.ndarray
    """[a] nats."""
    active_teacher_length: np.ndarray


def positions_of(dataset: LogitDataset, rows: Sequence[Row], report: Report) -> Positions:
    """Raises: ShardError: see `Teller.at`."""
    teller = Teller(dataset)
    given = [(row, row.positions) for row in rows if row.positions is not None]
    total = sum(len(p.positions) for _, p in given)
    share = 1.0 if teller.affordable is None else min(1.0, teller.affordable / max(1, total))
    number = _numbers(rows)
    said, columns, key = [], [], []
    for done, (row, p) in enumerate(given):
        report(done, len(given))
        n = len(p.positions)
        pick = (
            np.unique((np.arange(int(np.ceil(n * share))) / share).astype(int)) if share < 1 else np.arange(n)
        )
        said.append(teller.at(p, pick))
        gold = np.exp(p.gold_logp[pick].astype(np.float64))
        columns.append(
            (np.full(len(pick), number[row.sample_id]), np.full(len(pick), row.t), p.half_a[pick], gold)
        )
        key += [(row.sample_id, row.view, int(i)) for i in p.positions[pick]]
    report(len(given), len(given))
    sample, t, half_a, gold = (_flat([c[i] for c in columns]) for i in range(4))
    kept = [x.kept for x in said if x.kept is not None]
    tails = [x.tail for x in said if x.tail is not None]
    return Positions(
        sample=sample,
        key=key,
        t=t,
        half_a=half_a.astype(bool),
        gold=gold,
        top=_flat([x.p[:, 0] for x in said]),
        entropy=_flat([x.entropy for x in said]),
        entropy_most=_flat([x.entropy_most for x in said]),
        kept=_flat(kept) if kept else None,
        tail={T: _flat([x[T] for x in tails]) for T in (tails[0] if tails else ())},
        left_out=total - len(gold),
    )


def chunks_of(rows: Sequence[Row]) -> Chunks:
    number = _numbers(rows)
    given = [(row, row.chunks) for row in rows if row.chunks is not None]
    active = [c.active for _, c in given]
    sizes = [int(a.sum()) for a in active]
    return Chunks(
        length=_flat([c.length for _, c in given]),
        teacher_length=_flat([c.teacher_length for _, c in given]),
        sample=np.repeat(np.array([number[r.sample_id] for r, _ in given], int), sizes),
        key=[(r.sample_id, r.view, int(s)) for r, c in given for s in c.start[c.active]],
        t=np.repeat(np.array([r.t for r, _ in given]), sizes),
        half_a=_flat([c.half_a[c.active] for _, c in given]).astype(bool),
        logp=_flat([c.logp for _, c in given]).astype(np.float64),
        active_teacher_length=_flat([c.teacher_length[c.active] for _, c in given]),
    )


def _numbers(rows: Sequence[Row]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(row.sample_id for row in rows))}


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def mean_interval(values: np.ndarray, sample: np.ndarray) -> tuple[float, float, float]:
    """Mean over positions with its 95 % interval over samples; NaN bounds for fewer than two samples.

    Args:
        values: [n]; NaN = not there. sample: [n] which sample each belongs to.
    """
    there = np.isfinite(values)
    values, sample = values[there], sample[there].astype(np.int64)
    if not len(values):
        return np.nan, np.nan, np.nan
    counts = np.bincount(sample)
    mean = float(values.mean())
    residuals = np.bincount(sample, values) - mean * counts
    samples = int((counts > 0).sum())
    if samples < 2:
        return mean, np.nan, np.nan
    error = np.sqrt(samples / (samples - 1) * np.square(residuals).sum()) / counts.sum()
    return mean, mean - Z * float(error), mean + Z * float(error)


def by_t(name: str, t: np.ndarray, values: np.ndarray, sample: np.ndarray) -> Series:
    """Means in `BINS` equal bins of the timestep, each at the mean timestep of what it holds."""
    which = np.minimum((t * BINS).astype(int), BINS - 1)
    points = []
    for b in range(BINS):
        here = (which == b) & np.isfinite(values)
        if here.any():
            points.append((float(t[here].mean()), *mean_interval(values[here], sample[here])))
    x, y, low, high = (list(column) for column in zip(*points)) if points else ([], [], [], [])
    known = bool(points) and bool(np.isfinite([*low, *high]).all())
    return Series(name=name, x=x, y=y, low=low if known else None, high=high if known else None)


def paired(
    a: np.ndarray, a_key: list[tuple[str, int, int]], b: np.ndarray, b_key: list[tuple[str, int, int]]
) -> tuple[int, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]] | None:
    """Positions of both datasets: how many, the two means, and the mean difference, each with its interval.

    None where they have no two samples in common.
    """
    other = dict(zip(b_key, b))
    both = [(k, x, other[k]) for k, x in zip(a_key, a) if k in other]
    number = {name: i for i, name in enumerate(dict.fromkeys(k[0] for k, _, _ in both))}
    if len(number) < 2:
        return None
    sample = np.array([number[k[0]] for k, _, _ in both])
    mine, theirs = (np.array([pair[i] for pair in both], float) for i in (1, 2))
    return (
        len(both),
        mean_interval(mine, sample),
        mean_interval(theirs, sample),
        mean_interval(mine - theirs, sample),
    )
