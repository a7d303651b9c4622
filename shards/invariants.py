"""What every row of a logit dataset must satisfy: checked on write and on read, a record batch at once.

Shapes, over the whole batch: L tokens, N distilled positions, K kept entries, C chunks, A active chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.codec import EMPTY_TAIL, Codec, DenseCodec, SparseCodec, dequantise_head, dequantise_tail
from shards.columns import Columns, Ragged
from shards.errors import RowError
from shards.noise import EPSILON

SPLITS = ("train", "heldout")
ID_LIMIT = 1 << 24
"""Token ids are stored as a 16-bit and an 8-bit plane."""
MASS_SLACK = 1e-2
"""A distribution's stored mass may differ from 1 by this, beyond what its codec's rounding explains."""
LOGP_SLACK = 1e-3
"""Log-probs may exceed 0 by this (float32 normalisation)."""


@dataclass(frozen=True, slots=True)
class Checker:
    """Raises RowError for the first offender, by column, row, expected and got."""

    labels: Sequence[str]
    """One per row: `sample ID view V`."""

    def error(self, column: str, row: int, expected: str, got: Any) -> RowError:
        got = got.item() if isinstance(got, np.generic) else got
        return RowError(f"row {row} ({self.labels[row]}): column {column}: expected {expected}, got {got}")

    def rows(self, bad: np.ndarray, column: str, expected: str, got: np.ndarray) -> None:
        """`bad`, `got`: [rows]."""
        if bad.any():
            i = int(np.argmax(bad))
            raise self.error(column, i, expected, got[i])

    def items(self, bad: np.ndarray, column: str, of: Ragged, expected: str) -> None:
        """`bad`: one per value of `of`."""
        if bad.any():
            k = int(np.argmax(bad))
            row = int(np.searchsorted(of.offsets, k, side="right")) - 1
            raise self.error(f"{column}[{k - of.offsets[row]}]", row, expected, of.values[k])

    def lengths(self, c: Columns, names: Sequence[str], expected: np.ndarray, what: str) -> None:
        """Every named list has `expected[row]` values."""
        for name in names:
            got = c.lists[name].lengths
            if (bad := got != expected).any():
                i = int(np.argmax(bad))
                raise self.error(name, i, f"{expected[i]} values (one per {what})", got[i])


def check_noise(c: Columns, check: Checker, vocab_size: int) -> np.ndarray:
    """Ids, timestep, spans and mask. Returns `maskable` [L] bool. Raises: RowError."""
    check.rows(c.scalars["sample_id"] == "", "sample_id", "a name", c.scalars["sample_id"])
    split = c.scalars["split"]
    check.rows(~np.isin(split, SPLITS), "split", " or ".join(SPLITS), split)
    t = c.scalars["t"]
    check.rows(~((t >= np.float32(EPSILON)) & (t < 1)), "t", f"a timestep in [{EPSILON}, 1)", t)
    masked = c.lists["masked"]
    length = masked.lengths
    check.lengths(c, ("input_lo", "input_hi"), length, "token")
    ids = c.ids("input")
    check.items(ids.values >= vocab_size, "input", ids, f"an id below the vocabulary's {vocab_size}")
    real = c.scalars["real_length"]
    check.rows((real < 1) | (real > length), "real_length", "a length within the sample", real)
    check.rows(c.scalars["content_bytes"] < 0, "content_bytes", "at least 0", c.scalars["content_bytes"])
    maskable = _span_mask(c.lists["maskable"], masked, check)
    check.items(masked.values & ~maskable, "masked", masked, "masked positions inside the maskable spans")
    return maskable


def _span_mask(spans: Ragged, tokens: Ragged, check: Checker) -> np.ndarray:
    """[L] bool of spans [start, end, start, end, ...] per row: in order, apart, inside the row."""
    check.rows(spans.lengths % 2 == 1, "maskable", "pairs of start and end", spans.lengths)
    edge, row = spans.values, spans.row
    outside = (edge < 0) | (edge > tokens.lengths[row])
    check.items(outside, "maskable", spans, "span edges inside the sample")
    # Within a row every edge exceeds the one before: spans are not empty, in order, and do not touch.
    follows = np.append(False, row[1:] == row[:-1])[: len(row)]
    falling = follows & (np.diff(edge, prepend=edge[:1]) <= 0)
    check.items(falling, "maskable", spans, "span edges in ascending order")
    flat = edge + tokens.offsets[row]
    steps = np.zeros(len(tokens.values) + 1, dtype=np.int32)
    steps[flat[::2]] += 1
    steps[flat[1::2]] -= 1
    return np.cumsum(steps[:-1]).astype(bool)


def check_shared(c: Columns, check: Checker, codec: Codec, shared_vocab_size: int) -> Ragged:
    """Targets per distilled position. Returns the positions [N] (in their samples). Raises: RowError."""
    masked, distilled = c.lists["masked"], c.lists["distilled"]
    check.lengths(c, ("distilled",), masked.sums(masked.values), "masked position")
    n = distilled.sums(distilled.values)
    check.lengths(c, ("half_a", "gold_logp"), n, "distilled position")
    at = np.flatnonzero(masked.values)[distilled.values]  # into the L tokens
    gold = c.lists["gold_logp"]
    shared = c.ids("input").values[at] < shared_vocab_size
    _check_logp(gold, "gold_logp", check, allowed=~shared & np.isnan(gold.values))
    check.items(
        ~shared & ~np.isnan(gold.values),
        "gold_logp",
        gold,
        f"null (the true id lies outside the shared vocabulary of {shared_vocab_size})",
    )
    if isinstance(codec, DenseCodec):
        _check_dense(c, check, n, shared_vocab_size)
    else:
        _check_heads(c, check, codec, n, shared_vocab_size)
    return Ragged.of(masked.index[at].astype(np.int32), n)


def _check_logp(x: Ragged, name: str, check: Checker, allowed: np.ndarray | None = None) -> None:
    bad = ~(np.isfinite(x.values) & (x.values <= LOGP_SLACK))
    check.items(bad if allowed is None else bad & ~allowed, name, x, "a finite log-prob, at most 0")


def _check_dense(c: Columns, check: Checker, n: np.ndarray, vocab_size: int) -> None:
    logp = c.lists["dense_logp"]
    check.lengths(c, ("dense_logp",), n * vocab_size, "distilled position and token")
    _check_logp(logp, "dense_logp", check)
    mass = np.exp(logp.values.reshape(-1, vocab_size)).sum(axis=1)
    check.items(
        np.abs(mass - 1) > MASS_SLACK, "dense_logp", Ragged.of(mass, n), "probabilities that sum to 1"
    )


def _check_heads(c: Columns, check: Checker, codec: SparseCodec, n: np.ndarray, vocab_size: int) -> None:
    tail_names = [f"tail_{i}" for i in range(len(codec.temperatures))]
    check.lengths(c, ("counts", *tail_names), n, "distilled position")
    counts = c.lists["counts"]
    cap = min(codec.cap, vocab_size)
    check.items((counts.values < 1) | (counts.values > cap), "counts", counts, f"1 to {cap} kept entries")
    kept = counts.sums(counts.values)
    check.lengths(c, ("top_lo", "top_hi", "top_logp"), kept, "kept entry")
    ids, codes = c.ids("top"), c.lists["top_logp"]
    check.items(ids.values >= vocab_size, "top", ids, f"an id below the shared vocabulary's {vocab_size}")
    owner = np.repeat(np.arange(len(counts.values)), counts.values)  # position of each kept entry
    inside = np.append(False, owner[1:] == owner[:-1])[: len(owner)]
    rising = inside & (np.diff(codes.values.astype(np.int16), prepend=np.int16(0)) < 0)
    check.items(rising, "top_logp", codes, "entries from most to least probable")
    key = owner.astype(np.int64) * ID_LIMIT + ids.values
    order = np.sort(key)
    if (twice := order[1:] == order[:-1]).any():
        check.items(key == order[1:][twice][0], "top", ids, "different ids in one head")
    full = counts.values == vocab_size
    for name in tail_names:
        tail = c.lists[name]
        wrong = (tail.values == EMPTY_TAIL) != full
        check.items(
            wrong, name, tail, f"the empty code {EMPTY_TAIL} exactly where the head holds every token"
        )
    if not len(counts.values):
        return
    starts = np.cumsum(counts.values, dtype=np.int64) - counts.values
    mass = np.add.reduceat(np.exp(dequantise_head(codes.values, codec.step)), starts)
    rounding = codec.step / 2
    whole = 1.0 in codec.temperatures
    if whole:
        tail = c.lists[f"tail_{codec.temperatures.index(1.0)}"]
        mass = mass + np.exp(dequantise_tail(tail.values, codec.tail_step))
        rounding = max(codec.step, codec.tail_step) / 2
    bad = mass > np.exp(rounding) + MASS_SLACK
    if whole:
        bad |= mass < np.exp(-rounding) - MASS_SLACK
    check.items(bad, "top_logp", Ragged(mass, counts.offsets), "head and tail that sum to a mass of 1")


def check_cross(c: Columns, check: Checker, maskable: np.ndarray) -> None:
    """Chunks: in order, disjoint, masked whole, a log-prob for each active one. Raises: RowError."""
    start, length = c.lists["chunk_start"], c.lists["chunk_length"]
    active = c.lists["chunk_active"]
    names = ("chunk_length", "chunk_teacher_length", "chunk_masked", "chunk_active", "chunk_half_a")
    check.lengths(c, names, start.lengths, "chunk")
    for name in ("chunk_length", "chunk_teacher_length"):
        check.items(c.lists[name].values < 1, name, c.lists[name], "at least one token")
    tokens, row = c.lists["masked"], start.row
    first = start.values.astype(np.int64)
    end = first + length.values
    check.items(end > tokens.lengths[row], "chunk_start", start, "chunks inside the sample")
    before = np.append(0, np.where(row[1:] == row[:-1], end[:-1], 0))[: len(row)]
    check.items(first < before, "chunk_start", start, "chunks in order and disjoint")
    hidden, base = c.lists["chunk_masked"], tokens.offsets[row]

    def inside(flags: np.ndarray) -> np.ndarray:
        running = np.concatenate([[0], np.cumsum(flags)])
        return running[base + end] - running[base + first]

    n_masked, n_maskable = inside(tokens.values), inside(maskable)
    check.items(hidden.values != (n_masked > 0), "chunk_masked", hidden, "masked iff one of its tokens is")
    check.items(hidden.values & (n_masked < n_maskable), "chunk_masked", hidden, "a chunk masked whole")
    check.items(active.values & ~hidden.values, "chunk_active", active, "active chunks among the masked")
    prompt = n_maskable < length.values
    check.items(active.values & prompt, "chunk_active", active, "active chunks without unmaskable tokens")
    half = c.lists["chunk_half_a"]
    check.items(half.values & ~hidden.values, "chunk_half_a", half, "half A among the masked chunks")
    check.lengths(c, ("chunk_logp",), active.sums(active.values), "active chunk")
    _check_logp(c.lists["chunk_logp"], "chunk_logp", check)
