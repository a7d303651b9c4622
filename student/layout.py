"""Packed sequences: which tokens the network runs, and where each asked output is read. numpy only.

A sample becomes a *piece*: its clean stream (v = 0) and any number of noisy streams (v >= 1), each token with
its coordinates (stream v, block b, order o) and its own position. Pieces are concatenated into *rows* of a
token budget, without padding between them; `student.attention` says who may attend to whom. Exact, not an
approximation: what is left out is what nobody looks at (see `lay_out`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from shards.errors import UsageError

Attention = Literal["staircase", "staircase-causal", "bidirectional", "block-causal", "causal"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
SHARED_CLEAN: tuple[Attention, ...] = ("staircase", "staircase-causal")
"""Kinds whose noisy streams share one clean stream; in the others each stands alone."""
PAD = -1
"""Sample coordinate of padding: pads attend to one another only, so no row of the mask is empty."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One noising of a sample: its token ids and the positions whose prediction is asked for."""

    ids: np.ndarray
    """[L] int: token ids, the mask id where masked."""
    asked: np.ndarray
    """[A] int, ascending: positions to predict."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one sample that must run, with their coordinates. All [P] int32 but `read`."""

    ids: np.ndarray
    position: np.ndarray
    stream: np.ndarray
    block: np.ndarray
    order: np.ndarray
    read: np.ndarray
    """[all asked] int64: index into the piece of the hidden state that predicts each asked position, stream
    after stream, ascending inside a stream."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Pieces packed into R rows of equal length P. All [R, P] int64 but `read`."""

    ids: np.ndarray
    position: np.ndarray
    sample: np.ndarray
    """Index of the piece in its row, `PAD` for padding."""
    stream: np.ndarray
    block: np.ndarray
    order: np.ndarray
    read: np.ndarray
    """[all asked] int64: index into the flattened [R * P], in the order the pieces were given."""
    tokens: int
    """Tokens that are not padding."""


def lay_out(
    clean: np.ndarray,
    streams: Sequence[Stream],
    *,
    attention: Attention,
    block_size: int,
    shifted: bool = False,
) -> Piece:
    """The tokens of one sample that must run to predict every asked position of every stream.

    `staircase` shares the clean stream among all noisy ones (one pass over x0 serves both halves and
    all views); noisy blocks without an asked position and clean blocks at or after the last packed noisy one
    are left out, since nobody reads them. `staircase-causal` is WeDLM's own form of it: inside a noisy block
    the tokens shown (those equal to `clean`) come before those hidden in order, each at its own position.
    The other kinds read one stream each and share nothing: `bidirectional` keeps it whole, `block-causal`
    drops the blocks after the last asked one, `causal` the tokens after the last one read.

    Args:
        clean: [L] clean token ids; read by the staircase kinds alone.
        streams: noisy streams; one without asked positions costs nothing.
        shifted: the output at i - 1 predicts position i (autoregressive and AR-converted models). A block's
            first token is then read from the clean stream of the block before (staircase), or its left
            neighbour.

    Raises:
        UsageError: shifted, and position 0 is asked (it has no left neighbour).
    """
    shared = attention in SHARED_CLEAN
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []  # ids, positions, order, stream
    start: dict[tuple[int, int], int] = {}  # (stream, block) -> index of the block's first token in the piece
    size = 0
    if shifted and any(len(s.asked) and s.asked[0] == 0 for s in streams):
        raise UsageError("a shifted model cannot predict position 0: it has no left neighbour")

    def add(ids: np.ndarray, stream: int, first: int, last: int) -> None:
        nonlocal size
        for b in range(first // block_size, -(-last // block_size)):
            start[stream, b] = size + b * block_size - first
        position = np.arange(first, last)
        order = position
        if stream and attention == "staircase-causal":
            order = np.empty_like(position)
            order[np.argsort(ids[first:last] != clean[first:last], kind="stable")] = position
        parts.append((ids[first:last], position, order, stream))
        size += last - first

    if shared:
        packed = [np.unique(s.asked // block_size) for s in streams]
        last_block = max((int(blocks[-1]) for blocks in packed if len(blocks)), default=0)
        if last_block:
            add(clean, 0, 0, last_block * block_size)
        for v, (s, blocks) in enumerate(zip(streams, packed), start=1):
            for b in blocks:
                add(s.ids, v, int(b) * block_size, min((int(b) + 1) * block_size, len(s.ids)))
    else:
        for v, s in enumerate(streams, start=1):
            if not len(s.asked):
                continue
            final = int(s.asked[-1])
            end = {
                "bidirectional": len(s.ids),
                "block-causal": min((final // block_size + 1) * block_size, len(s.ids)),
                "causal": final if shifted else final + 1,
            }[str(attention)]
            add(s.ids, v, 0, end)

    reads = []
    for v, s in enumerate(streams, start=1):
        where = s.asked - 1 if shifted else s.asked
        for i, w in zip(s.asked, where):
            b = int(w) // block_size
            v_read = 0 if shared and b < int(i) // block_size else v
            reads.append(start[v_read, b] + int(w) % block_size)
    ids, position, order = (
        np.concatenate([part[k] for part in parts] or [np.zeros(0)]).astype(np.int32) for k in range(3)
    )
    return Piece(
        ids=ids,
        position=position,
        stream=np.repeat([v for *_, v in parts], [len(p) for _, p, _, _ in parts]).astype(np.int32),
        block=position // np.int32(block_size),
        order=order,
        read=np.asarray(reads, dtype=np.int64),
    )


def group(lengths: Iterable[int], row_tokens: int) -> Iterator[list[int]]:
    """Cut pieces, in order, into rows of at most `row_tokens`; yields the piece indices of each row.

    A pure function of (lengths, row_tokens). A piece longer than the budget gets a row of its own: refusing
    it, by name, is the caller's business.
    """
    row: list[int] = []
    used = 0
    for i, n in enumerate(lengths):
        if row and used + n > row_tokens:
            yield row
            row, used = [], 0
        row.append(i)
        used += n
    if row:
        yield row


def pack(pieces: Sequence[Piece], row_tokens: int, *, pad_id: int = 0) -> PackedRows:
    """Concatenate pieces into rows of at most `row_tokens`, padded at the end to the longest row."""
    groups = list(group(map(len, pieces), row_tokens)) or [[]]
    width = max(1, max(sum(len(pieces[i]) for i in g) for g in groups))
    shape = (len(groups), width)
    fields = {name: np.zeros(shape, dtype=np.int64) for name in ("position", "stream", "block", "order")}
    ids = np.full(shape, pad_id, dtype=np.int64)
    sample = np.full(shape, PAD, dtype=np.int64)
    reads: list[np.ndarray] = []
    for r, g in enumerate(groups):
        at = 0
        for k, i in enumerate(g):
            piece = pieces[i]
            span = slice(at, at + len(piece))
            ids[r, span] = piece.ids
            sample[r, span] = k
            for name, field in fields.items():
                field[r, span] = getattr(piece, name)
            reads.append(piece.read + r * width + at)
            at += len(piece)
    return PackedRows(
        ids=ids,
        sample=sample,
        read=np.concatenate(reads or [np.zeros(0, dtype=np.int64)]),
        tokens=sum(len(p) for p in pieces),
        **fields,
    )
