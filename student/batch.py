"""Rows of a logit dataset become one `Batch`: packed tokens, where to read, true tokens, padded targets.

numpy until the last line of each part; the only Python loop is over rows. Everything ragged (positions, kept
entries, chunks) is concatenated over the rows and, where a rectangle is needed, spread by one boolean mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.row import DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget
from student.attention import Coordinates
from student.layout import PAD, Stream, lay_out, pack
from student.tensors import Batch, ChunkBatch, Counts, Dense, Exact, PositionBatch, Target, TopK

FRESH = -1
"""`Row.view` of a row whose noise was redrawn (`student.fresh`): no stored view, no targets."""


def packed_tokens(row: Row, block_size: int) -> int:
    """Tokens of the row's packed piece (`lay_out`, staircase) without making it: clean blocks before the last
    masked block, plus the masked blocks."""
    starts = np.arange(0, len(row.masked), block_size)
    blocks = np.flatnonzero(np.logical_or.reduceat(row.masked, starts))
    return (int(blocks[-1]) + len(blocks)) * block_size if len(blocks) else 0


def shared_views(rows: Sequence[Row]) -> list[list[Row]]:
    """Views of one sample together, samples in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.sample_id, []).append(row)
    return list(groups.values())


def counts_of(rows: Sequence[Row], block_size: int) -> Counts:
    """Denominators of these rows; those of a global batch go into every part of it (`Batch.counts`)."""
    counts = Counts()
    for row in rows:
        chunks = 0
        if row.positions is not None:
            chunks = int(np.isfinite(row.positions.gold_logp).sum())
        elif row.chunks is not None:
            chunks = int(row.chunks.active.sum())
        counts += Counts(
            views=1,
            maskable=int(row.maskable.sum()),
            masked=int(row.masked.sum()),
            distilled=0 if row.positions is None else len(row.positions.positions),
            chunks=chunks,
            tokens=packed_tokens(row, block_size),
        )
    return counts


def collate(
    rows: Sequence[Row],
    *,
    block_size: int,
    mask_token_id: int,
    row_tokens: int,
    shared_vocab_size: int | None = None,
    temperatures: Sequence[float] = (),
    counts: Counts | None = None,
    width_multiple: int = 1,
    share_clean: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Batch:
    """One micro-batch on CPU.

    Args:
        rows: views; none at all gives a batch of one padding token, so that every rank always has a forward
            to run.
        row_tokens: packed row length; a longer piece gets a row of its own.
        shared_vocab_size: of a shared-tokenizer dataset; position targets are normalised over it.
        temperatures: of the columns of the sparse targets' tails, in order.
        counts: of the global batch; None = these rows are the whole of it.
        width_multiple: pad packed rows to a multiple of this (CUDA: fewer shapes to compile for).
        share_clean: views of one sample read one clean stream, and come together in the batch. Exact; saves
            tokens where a batch holds several (`Counts.tokens` is what they would be without).
        state: position of the data stream after the global batch.
    """
    groups = shared_views(rows) if share_clean else [[row] for row in rows]
    rows = [row for group in groups for row in group]
    asked = [np.flatnonzero(row.masked) for row in rows]
    streams = (Stream(np.where(row.masked, mask_token_id, row.input_ids), at) for row, at in zip(rows, asked))
    pieces = [
        lay_out(
            group[0].input_ids,
            list(islice(streams, len(group))),
            attention="staircase",
            block_size=block_size,
        )
        for group in groups
    ]
    packed = pack(pieces, row_tokens)
    fields = [packed.ids, packed.position, packed.sample, packed.stream, packed.block, packed.order]
    read = packed.read
    width = packed.ids.shape[1]
    wide = -(-width // width_multiple) * width_multiple
    if wide > width:
        spare = [0, 0, PAD, 0, 0, 0]
        fields = [np.pad(x, ((0, 0), (0, wide - width)), constant_values=v) for x, v in zip(fields, spare)]
        read = read // width * wide + read % width
    ids, position, *at = (torch.from_numpy(x) for x in fields)
    t = np.array([row.t for row in rows], dtype=np.float32)
    offsets = np.cumsum([0, *map(len, asked)])  # of each row's masked positions among all
    positions = _positions(rows, asked, offsets, shared_vocab_size, temperatures)
    return Batch(
        input_ids=ids,
        position_ids=position,
        at=Coordinates(*at),
        read=torch.from_numpy(read),
        gold=_long([row.input_ids[a] for row, a in zip(rows, asked)]),
        view=torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(offsets))),
        t=torch.from_numpy(t),
        maskable=torch.tensor([int(row.maskable.sum()) for row in rows], dtype=torch.int64),
        counts=counts_of(rows, block_size) if counts is None else counts,
        positions=positions,
        chunks=_gold_chunks(positions) if positions is not None else _chunks(rows, asked, offsets),
        rows=tuple(f"{row.sample_id}/{'fresh' if row.view == FRESH else row.view}" for row in rows),
        state=dict(state or {}),
    )


def _positions(
    rows: Sequence[Row],
    asked: Sequence[np.ndarray],
    offsets: np.ndarray,
    shared_vocab_size: int | None,
    temperatures: Sequence[float],
) -> PositionBatch | None:
    """Shared-tokenizer targets of all rows; None where the rows carry none. No rows, or fresh ones alone:
    empty targets."""
    given = [(i, row.positions) for i, row in enumerate(rows) if row.positions is not None]
    if shared_vocab_size is None:
        if given:
            raise ValueError("rows with position targets need shared_vocab_size")
        return None
    if not given and any(row.view != FRESH for row in rows):
        return None
    sizes = np.array([len(p.positions) for _, p in given], dtype=np.int64)
    gold = _long([rows[i].input_ids[p.positions] for i, p in given])
    gold_logp = _float([p.gold_logp for _, p in given])
    return PositionBatch(
        index=_long([np.searchsorted(asked[i], p.positions) + offsets[i] for i, p in given]),
        t=torch.from_numpy(np.repeat(np.array([rows[i].t for i, _ in given], dtype=np.float32), sizes)),
        gold_logp=gold_logp,
        target=position_target([p for _, p in given], gold, gold_logp, shared_vocab_size, temperatures),
        vocab_size=shared_vocab_size,
    )


def position_target(
    given: Sequence[PositionTargets],
    gold: Tensor,
    gold_logp: Tensor,
    vocab_size: int,
    temperatures: Sequence[float],
) -> Target:
    """The targets of several rows, one after the other; no rows: empty sparse ones.

    Args:
        gold, gold_logp: [D] true tokens and their log-probs, of all rows.
        temperatures: see `collate`.
    """
    sparse = [p.target for p in given if isinstance(p.target, SparseTarget)]
    dense = [p.target for p in given if isinstance(p.target, DenseTarget)]
    exact = [p.target for p in given if isinstance(p.target, ExactTarget)]
    if len(given) not in (len(sparse), len(dense), len(exact)):
        raise ValueError("a batch mixes targets of several codecs")
    if exact:
        return Exact(_float([x.hidden for x in exact]))
    if dense:
        return Dense(_float([x.logp for x in dense]))
    counts = _flat([x.counts for x in sparse], np.int64)
    keep = np.arange(max(1, counts.max(initial=1))) < counts[:, None]
    flat_ids = _flat([x.ids for x in sparse], np.int64)
    first = np.cumsum(counts) - counts
    ids = np.repeat(flat_ids[first][:, None], keep.shape[1], axis=1)
    ids[keep] = flat_ids
    logp = np.zeros(keep.shape, dtype=np.float32)
    logp[keep] = _flat([x.logp for x in sparse], np.float32)
    sketches = [x.sketch for x in sparse if x.sketch is not None]
    tails = _flat([x.tails.ravel() for x in sparse], np.float32).reshape(-1, max(1, len(temperatures)))
    return TopK(
        ids=torch.from_numpy(ids),
        logp=torch.from_numpy(logp),
        keep=torch.from_numpy(keep),
        tails={T: torch.from_numpy(tails[:, k].copy()) for k, T in enumerate(temperatures)},
        gold=gold,
        gold_logp=gold_logp,
        vocab_size=vocab_size,
        sketch=torch.from_numpy(_flat(sketches, np.int8)) if sketches else None,
    )


def _gold_chunks(positions: PositionBatch) -> ChunkBatch:
    """With a shared tokenizer each distilled token is a chunk of its own, made of its gold log-prob."""
    known = positions.gold_logp.isfinite()
    return ChunkBatch(
        token=positions.index[known],
        chunk=torch.arange(int(known.sum())),
        logp=positions.gold_logp[known],
        t=positions.t[known],
        vocab_size=positions.vocab_size,
    )


def _chunks(rows: Sequence[Row], asked: Sequence[np.ndarray], offsets: np.ndarray) -> ChunkBatch | None:
    """Active chunks of all rows; None where the rows carry none. No rows, or fresh ones alone: no chunks."""
    given = [(i, row.chunks) for i, row in enumerate(rows) if row.chunks is not None]
    if not given and any(row.view != FRESH for row in rows):
        return None
    tokens: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for i, c in given:
        start, length = c.start[c.active].astype(np.int64), c.length[c.active].astype(np.int64)
        inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        tokens.append(np.searchsorted(asked[i], np.repeat(start, length) + inside) + offsets[i])
        lengths.append(length)
    sizes = _flat(lengths, np.int64)
    per_row = np.array([rows[i].t for i, _ in given], dtype=np.float32)
    return ChunkBatch(
        token=_long(tokens),
        chunk=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        logp=_float([c.logp for _, c in given]),
        t=torch.from_numpy(np.repeat(per_row, np.array([len(x) for x in lengths], dtype=np.int64))),
    )


def _flat(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype=dtype)


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(_flat(parts, np.int64))


def _float(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(_flat(parts, np.float32))
