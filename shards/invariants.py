"""What every row of a logit dataset must satisfy: checked on write and on read, a record batch at once.

Shapes, over the whole batch: L tokens, N distilled positions, K kept entries, C chunks, A active chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from shards.arrays import bounds, empty
from shards.codec import (
    EMPTY_TAIL,
    Codec,
    DenseCodec,
    ExactCodec,
    SparseCodec,
    dequantise_head,
    dequantise_tail,
    sketch_limits,
    undo_differences,
    unpack_sketch,
)
from shards.columns import Columns, Ragged, widened
from shards.errors import RowError
from shards.noise import EPSILON
from shards.schema import planes

SPLITS = ("train", "heldout")
ID_LIMIT = 1 << 24
"""Token ids are stored as three bytes."""
BLOCK = 1 << 15
"""Kept entries checked at once: what is computed on the way stays in the processor's cache."""
WINDOW = 256
"""Kept entries sorted together to find repeated ids, at least."""
MASS_SLACK = 1e-2
"""A distribution's stored mass may differ from 1 by this, beyond what its codec's rounding explains."""
LOGP_SLACK = 1e-3
"""Log-probs may exceed 0 by this (float32 normalisation)."""


@dataclass(frozen=True, slots=True)
class Checker:
    """Raises RowError for the first offender, by column, row, expected and got."""

    sample_ids: Sequence[str] | np.ndarray
    """[rows]"""
    views: Sequence[int] | np.ndarray
    """[rows]"""

    def error(self, column: str, row: int, expected: str, got: Any) -> RowError:
        got = got.item() if isinstance(got, np.generic) else got
        where = f"row {row} (sample {self.sample_ids[row]} view {self.views[row]})"
        return RowError(f"{where}: column {column}: expected {expected}, got {got}")

    def rows(self, bad: np.ndarray, column: str, expected: str, got: np.ndarray) -> None:
        """`bad`, `got`: [rows]."""
        if bad.any():
            i = int(np.argmax(bad))
            raise self.error(column, i, expected, got[i])

    def items(self, bad: np.ndarray, column: str, of: Ragged, expected: str, start: int = 0) -> None:
        """`bad`: one per value of `of`, from the value `start` on."""
        if bad.any():
            k = start + int(np.argmax(bad))
            row = int(np.searchsorted(of.offsets, k, side="right")) - 1
            raise self.error(f"{column}[{k - of.offsets[row]}]", row, expected, of.values[k])

    def below(self, limit: int, column: str, ids: Ragged, largest: int, of: str) -> None:
        """Ids and their maximum."""
        if largest >= limit:
            self.items(ids.values >= limit, column, ids, f"an id below {of}'s {limit}")

    def lengths(self, c: Columns, names: Sequence[str], offsets: np.ndarray, what: str) -> None:
        """Every named list has the lengths that `offsets` (from 0 on) give."""
        for name in names:
            if (c.lists[name].offsets != offsets).any():
                got, expected = c.lists[name].lengths, np.diff(offsets)
                i = int(np.argmax(got != expected))
                raise self.error(name, i, f"{expected[i]} values (one per {what})", got[i])


def check_noise(c: Columns, check: Checker, vocab_size: int) -> dict[str, Ragged]:
    """Ids, timestep, spans and mask. Returns input_ids, maskable and masked [L]. Raises: RowError."""
    check.rows(c.scalars["sample_id"] == "", "sample_id", "a name", c.scalars["sample_id"])
    split = c.scalars["split"]
    known = np.logical_or.reduce([split == name for name in SPLITS])
    check.rows(~known, "split", " or ".join(SPLITS), split)
    t = c.scalars["t"]
    check.rows(~((t >= np.float32(EPSILON)) & (t < 1)), "t", f"a timestep in [{EPSILON}, 1)", t)
    masked = c.lists["masked"]
    length = masked.lengths
    check.lengths(c, planes("input"), masked.offsets, "token")
    ids, largest = c.ids("input")
    check.below(vocab_size, "input", ids, largest, "the vocabulary")
    real = c.scalars["real_length"]
    check.rows((real < 1) | (real > length), "real_length", "a length within the sample", real)
    check.rows(c.scalars["content_bytes"] < 0, "content_bytes", "at least 0", c.scalars["content_bytes"])
    maskable = _span_mask(c.lists["maskable"], masked, check)
    check.items(masked.values > maskable, "masked", masked, "masked positions inside the maskable spans")
    return {"input_ids": ids, "maskable": Ragged(maskable, masked.offsets), "masked": masked}


def _span_mask(spans: Ragged, tokens: Ragged, check: Checker) -> np.ndarray:
    """[L] bool of spans [start, end, start, end, ...] per row: in order, apart, inside the row."""
    check.rows(spans.lengths % 2 == 1, "maskable", "pairs of start and end", spans.lengths)
    edge, row = spans.values, spans.row
    outside = (edge < 0) | (edge > tokens.lengths[row])
    check.items(outside, "maskable", spans, "span edges inside the sample")
    # Within a row every edge exceeds the one before: spans are not empty, in order, and do not touch.
    falling = (row[1:] == row[:-1]) & (edge[1:] <= edge[:-1])
    check.items(falling, "maskable", spans, "span edges in ascending order", 1)
    bounds = np.concatenate([[0], edge + tokens.offsets[row], [len(tokens.values)]])
    return np.repeat(np.arange(len(edge) + 1) % 2 == 1, bounds[1:] - bounds[:-1])


def check_shared(
    c: Columns, check: Checker, codec: Codec, input_ids: Ragged, shared_vocab_size: int, *, thorough: bool
) -> dict[str, Ragged]:
    """Targets per distilled position. Returns positions [N] (in their samples), for the sparse codec also ids
    and logp [K]. `thorough`: see `shards.encoding.decode`. Raises: RowError."""
    masked, distilled = c.lists["masked"], c.lists["distilled"]
    at = np.flatnonzero(masked.values)  # into the L tokens
    check.lengths(c, ("distilled",), np.searchsorted(at, masked.offsets), "masked position")
    offsets = distilled.offsets
    if not distilled.values.all():
        at = at[distilled.values]
        offsets = np.searchsorted(at, masked.offsets)
    check.lengths(c, ("half_a", "gold_logp"), offsets, "distilled position")
    gold = c.lists["gold_logp"]
    if input_ids.values.max(initial=0) < shared_vocab_size:
        _check_logp(gold, "gold_logp", check)
    else:
        outside, known = input_ids.values[at] >= shared_vocab_size, ~np.isnan(gold.values)
        _check_logp(gold, "gold_logp", check, allowed=outside & ~known)
        null = f"null (the true id lies outside the shared vocabulary of {shared_vocab_size})"
        check.items(outside & known, "gold_logp", gold, null)
    positions = Ragged(at.astype(np.int32), offsets)
    positions.values[:] -= np.repeat(masked.offsets[:-1].astype(np.int32), positions.lengths)
    if isinstance(codec, DenseCodec):
        _check_dense(c, check, offsets, shared_vocab_size, thorough)
        return {"positions": positions}
    if isinstance(codec, ExactCodec):
        return {"positions": positions, "hidden": _check_hidden(c, check, codec, offsets)}
    return {"positions": positions, **_check_heads(c, check, codec, offsets, shared_vocab_size, thorough)}


def _check_logp(x: Ragged, name: str, check: Checker, allowed: np.ndarray | None = None) -> None:
    bad = ~((x.values > -np.inf) & (x.values <= LOGP_SLACK))
    check.items(bad if allowed is None else bad & ~allowed, name, x, "a finite log-prob, at most 0")


def _check_dense(c: Columns, check: Checker, offsets: np.ndarray, vocab_size: int, thorough: bool) -> None:
    logp = c.lists["dense_logp"]
    check.lengths(c, ("dense_logp",), offsets * vocab_size, "distilled position and token")
    _check_logp(logp, "dense_logp", check)
    if not thorough:
        return
    mass = np.exp(logp.values.reshape(-1, vocab_size)).sum(axis=1)
    check.items(
        np.abs(mass - 1) > MASS_SLACK, "dense_logp", Ragged(mass, offsets), "probabilities that sum to 1"
    )


def _check_hidden(c: Columns, check: Checker, codec: ExactCodec, offsets: np.ndarray) -> Ragged:
    """Hidden states [N, H] float32."""
    check.lengths(c, ("hidden",), codec.width * offsets, f"distilled position and each of {codec.width}")
    stored = c.lists["hidden"]
    values = widened(stored.values)
    check.items(~np.isfinite(values), "hidden", Ragged(values, stored.offsets), "a finite number")
    return Ragged(values.reshape(-1, codec.width), stored.offsets // codec.width)


def _check_heads(
    c: Columns, check: Checker, codec: SparseCodec, offsets: np.ndarray, vocab_size: int, thorough: bool
) -> dict[str, Ragged]:
    tail_names = [f"tail_{i}" for i in range(len(codec.temperatures))]
    check.lengths(c, ("counts", *tail_names), offsets, "distilled position")
    counts = c.lists["counts"]
    cap = min(codec.cap, vocab_size)
    check.items((counts.values < 1) | (counts.values > cap), "counts", counts, f"1 to {cap} kept entries")
    check.lengths(c, (*planes("top"), "top_logp"), bounds(counts.totals()), "kept entry")
    full = counts.values == vocab_size
    for name in tail_names:
        tail = c.lists[name]
        wrong = (tail.values == EMPTY_TAIL) != full
        check.items(
            wrong, name, tail, f"the empty code {EMPTY_TAIL} exactly where the head holds every token"
        )
    sketch = {"sketch": _check_sketch(c, check, codec, offsets)} if codec.sketch else {}
    stored = c.lists["top_logp"]
    codes = Ragged(undo_differences(stored.values, stored.offsets), stored.offsets)
    ids, largest = c.ids("top")
    check.below(vocab_size, "top", ids, largest, "the shared vocabulary")
    logp = Ragged(empty(len(codes.values), np.float32), codes.offsets)
    dequantise_head(codes.values, codec.step, out=logp.values)
    if thorough:
        _check_mass(c, check, codec, _head_mass(bounds(counts.values), ids, codes, logp, check))
    return {"ids": ids, "logp": logp, **sketch}


def _check_sketch(c: Columns, check: Checker, codec: SparseCodec, offsets: np.ndarray) -> Ragged:
    """Codes [N, R] of the sketches, position after position."""
    width = codec.sketch_bytes
    check.lengths(c, ("sketch",), offsets * width, f"distilled position and each of {width} bytes")
    stored = c.lists["sketch"]
    flat = np.empty((int(offsets[-1]), width), np.int8)
    for i, (a, b) in enumerate(pairwise(offsets.tolist())):
        flat[a:b] = stored[i].reshape(width, b - a).T
    codes = unpack_sketch(flat, codec)
    low = (codes < -sketch_limits(codec)).reshape(-1)
    check.items(
        low, "sketch", Ragged(codes.reshape(-1), offsets * codec.sketch), "a code whose negative is one"
    )
    return Ragged(codes, offsets)


def _head_mass(edges: np.ndarray, ids: Ragged, codes: Ragged, logp: Ragged, check: Checker) -> np.ndarray:
    """[N] mass of each head, whose codes are found not to fall and whose ids to differ.

    Args:
        edges: [N + 1], where heads start and end.
    """
    mass = np.zeros(len(edges) - 1, np.float32)
    for first, last in _blocks(edges):
        at = slice(edges[first], edges[last])
        starts, values = edges[first:last] - at.start, codes.values[at]
        falling = values[1:] < values[:-1]
        falling[starts[1:] - 1] = False
        check.items(falling, "top_logp", codes, "entries from most to least probable", at.start + 1)
        if (twice := repeated(ids.values[at], np.diff(edges[first : last + 1]))) is not None:
            check.items(twice, "top", ids, "different ids in one head", at.start)
        np.add.reduceat(np.exp(logp.values[at]), starts, out=mass[first:last])
    return mass


def _check_mass(c: Columns, check: Checker, codec: SparseCodec, mass: np.ndarray) -> None:
    """`mass`: [N] of each head; it may not exceed 1, and adds up to 1 with the tail where that is stored."""
    rounding = codec.step / 2
    whole = 1.0 in codec.temperatures
    if whole:
        tail = c.lists[f"tail_{codec.temperatures.index(1.0)}"]
        mass = mass + np.exp(dequantise_tail(tail.values, codec.tail_step))
        rounding = max(codec.step, codec.tail_step) / 2
    bad = mass > np.exp(rounding) + MASS_SLACK
    if whole:
        bad |= mass < np.exp(-rounding) - MASS_SLACK
    check.items(
        bad, "top_logp", Ragged(mass, c.lists["counts"].offsets), "head and tail that sum to a mass of 1"
    )


def _blocks(edges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of positions with about `BLOCK` kept entries each."""
    cuts = np.searchsorted(edges, np.arange(BLOCK, edges[-1], BLOCK))
    return pairwise(np.unique([0, *cuts, len(edges) - 1]).tolist())


def repeated(ids: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """[K] bool: ids that occur more than once in their head; None where there are none.

    Args:
        ids: [K] int32 in [0, 2^24), head after head. counts: [N], each at least 1.
    """
    # With its position's last byte above an id's three, no two neighbouring positions share a value: sorting
    # windows, each head whole in one of them, brings a repeated id together, many times faster than one sort.
    # Wide windows side by side, then narrow ones over the seams between them. Equal values of positions 256
    # apart are a false alarm, which the full sort settles.
    key = np.repeat(np.arange(len(counts), dtype=np.uint32) << 24, counts)
    key |= ids.view(np.uint32)
    widest = 1 << int(counts.max() - 1).bit_length()
    wide = max(WINDOW, 2 * widest)
    if not (_repeats(key, wide, wide) or _repeats(key[wide - widest :], wide, 2 * widest)):
        return None
    exact = np.repeat(np.arange(len(counts)) * ID_LIMIT, counts) + ids
    order = np.sort(exact)
    twice = order[1:][order[1:] == order[:-1]]
    return np.isin(exact, twice) if len(twice) else None


def _repeats(key: np.ndarray, apart: int, width: int) -> bool:
    """A value occurs twice in one of the windows of `width` that start at every multiple of `apart`."""
    whole = len(key) // apart
    windows = key[: whole * apart].reshape(whole, apart)[:, :width].copy()
    windows.sort(axis=1)
    last = np.sort(key[whole * apart :][:width])
    return bool((windows[:, 1:] == windows[:, :-1]).any() or (last[1:] == last[:-1]).any())


def check_cross(c: Columns, check: Checker, maskable: np.ndarray) -> None:
    """Chunks: in order, disjoint, masked whole, a log-prob for each active one. Raises: RowError."""
    start, length = c.lists["chunk_start"], c.lists["chunk_length"]
    active = c.lists["chunk_active"]
    names = ("chunk_length", "chunk_teacher_length", "chunk_masked", "chunk_active", "chunk_half_a")
    check.lengths(c, names, start.offsets, "chunk")
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
    actives = np.searchsorted(np.flatnonzero(active.values), active.offsets)
    check.lengths(c, ("chunk_logp",), actives, "active chunk")
    _check_logp(c.lists["chunk_logp"], "chunk_logp", check)
