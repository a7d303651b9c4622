"""Pieces as requests to an engine that knows plain sequences only, and answers as bytes. numpy only.

A stream that stands alone is a request. A staircase is one request for each noisy block, the clean blocks
before it and then the block itself: read block by block, that is what the block sees. All the blocks of a
sample begin with the same clean text, whose keys and values the engine computes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from safetensors.numpy import load, save

from shards.codec import Codec, DenseCodec, ExactCodec
from shards.row import DenseTarget, ExactTarget, SparseTarget, Target
from student.layout import SHARED_CLEAN, Attention, Piece


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence. Token n is at position n."""

    ids: np.ndarray
    """[n] int32."""
    read: np.ndarray
    """[m] int, ascending: positions whose output is wanted."""
    answers: np.ndarray
    """[k] int: which of the piece's reads it answers."""
    source: np.ndarray
    """[k] int: which of `read` each of them is; several noisy streams may read one clean token."""
    clean: bool = False
    """The start of other requests, to be computed before them; they begin where it ends, so none of what they
    read is in it."""


def requests_of(piece: Piece, attention: Attention) -> list[Request]:
    """What to ask for a piece's reads; every one of them once.

    Clean text comes first, whether or not it is read.
    """
    shared = attention in SHARED_CLEAN
    stream, block = piece.stream[piece.read], piece.block[piece.read]
    unit = np.where((stream > 0) & shared, block, 0)  # a noisy block; else the whole stream
    found = []
    clean = piece.ids[piece.stream == 0]
    if len(clean):
        found.append(_request(piece, clean, np.flatnonzero(stream == 0), clean=True))
    for v, b in sorted({(int(v), int(b)) for v, b in zip(stream, unit) if v}):
        ids = piece.ids[(piece.stream == v) & (piece.block == b) if shared else piece.stream == v]
        if shared:
            before = piece.position[(piece.stream == v) & (piece.block == b)][0]
            ids = np.append(clean[:before], ids)
        found.append(_request(piece, ids, np.flatnonzero((stream == v) & (unit == b))))
    return found


def _request(piece: Piece, ids: np.ndarray, answers: np.ndarray, *, clean: bool = False) -> Request:
    read, source = np.unique(piece.position[piece.read[answers]], return_inverse=True)
    return Request(ids, read, answers, source, clean)


def to_bytes(logp: np.ndarray, target: Target | None) -> bytes:
    """Log-probs [m] of the true tokens and what is kept of the distributions."""
    arrays = {"": logp}
    if target is not None:
        arrays |= {f.name: v for f in fields(target) if (v := getattr(target, f.name)) is not None}
    return save({name: np.ascontiguousarray(x) for name, x in arrays.items()})


def from_bytes(data: bytes, codec: Codec | None) -> tuple[np.ndarray, Target | None]:
    """The inverse of `to_bytes`."""
    arrays = load(data)
    logp = arrays.pop("")
    if codec is None:
        return logp, None
    if isinstance(codec, DenseCodec):
        return logp, DenseTarget(**arrays)
    return logp, ExactTarget(**arrays) if isinstance(codec, ExactCodec) else SparseTarget(**arrays)


def in_order(requests: Sequence[Request], answers: Sequence[tuple[np.ndarray, Target | None]]) -> np.ndarray:
    """Where among the requests' answers, one after another, each of the piece's reads is found."""
    size = sum(len(r.answers) for r in requests)
    where = np.zeros(size, dtype=np.int64)
    before = 0
    for request, (logp, _) in zip(requests, answers):
        where[request.answers] = before + request.source
        before += len(logp)
    return where
