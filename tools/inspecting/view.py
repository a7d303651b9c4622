"""One row as people look at it: tokens with their state, what the teacher said at each masked one, chunks.

The terminal (`row`), `--json` and the page's browser (`browser`) all show this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.row import Row, SparseTarget
from tools.inspecting.pairs import teacher_pieces
from tools.inspecting.targets import Said, Teller
from tools.inspecting.text import TokenTexts

PROMPT, SHOWN, HALF_A, HALF_B, MASKED, SILENT = "prompt", "shown", "A", "B", "masked", "silent"
"""States of a token: may not be masked; could be and is not; masked, in a half; masked, there are no halves;
masked without a target."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One masked position that has a target."""

    position: int
    state: str
    token: int
    p: float | None
    """The teacher's probability of the true token; None = its id lies outside the shared vocabulary."""
    rank: int | None
    """Of the true token, 1 = the most probable; None = not among the kept ones, or not known."""
    entropy: float
    """Nats; of a sparse target a lower bound."""
    top: list[tuple[int, float]]
    """Ids and probabilities of the most probable tokens."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Student tokens and teacher tokens over the same bytes."""

    start: int
    length: int
    teacher_length: int
    state: str
    active: bool
    logp: float | None
    """None = not active."""
    teacher_texts: list[str] | None
    """Of its teacher tokens; None = not known."""


@dataclass(frozen=True, slots=True)
class View:
    """A row, explained."""

    row: Row
    states: list[str]
    """[L]"""
    asked: list[Asked]
    chunks: list[Chunk]

    def to_json(self) -> dict[str, Any]:
        row = self.row
        return {
            "sample_id": row.sample_id,
            "view": row.view,
            "split": row.split,
            "t": row.t,
            "real_length": row.real_length,
            "input_ids": row.input_ids,
            "states": self.states,
            "positions": [{name: getattr(a, name) for name in Asked.__slots__} for a in self.asked],
            "chunks": [{name: getattr(c, name) for name in Chunk.__slots__} for c in self.chunks],
        }


def view_of(
    row: Row, teller: Teller, *, compdemo: bool, student: TokenTexts, teacher: TokenTexts | None = None
) -> View:
    """
    Args:
        student, teacher: the two tokenizers, for the teacher's side of chunks.

    Raises: ShardError: see `Teller.at`.
    """

    def half(in_a: bool) -> str:
        return (HALF_A if in_a else HALF_B) if compdemo else MASKED

    states = [SILENT if masked else SHOWN if may else PROMPT for masked, may in zip(row.masked, row.maskable)]
    asked: list[Asked] = []
    chunks: list[Chunk] = []
    if (at := row.positions) is not None:
        said = teller.at(at)
        ranks, gold = _ranks(row, said.ids), np.exp(at.gold_logp.astype(np.float64))
        for i, position in enumerate(at.positions.tolist()):
            states[position] = half(bool(at.half_a[i]))
            asked.append(
                Asked(
                    position=position,
                    state=states[position],
                    token=int(row.input_ids[position]),
                    p=float(gold[i]) if np.isfinite(gold[i]) else None,
                    rank=ranks[i],
                    entropy=float(said.entropy[i]),
                    top=_top(said, i, int(row.input_ids[position]), gold[i]),
                )
            )
    if (c := row.chunks) is not None:
        pieces = teacher_pieces(row.input_ids, c, student, teacher or TokenTexts())
        logp = np.full(len(c.start), np.nan)
        logp[c.active] = c.logp
        for i in range(len(c.start)):
            start, length, masked = int(c.start[i]), int(c.length[i]), bool(c.masked[i])
            state = half(bool(c.half_a[i])) if masked else SHOWN
            chunks.append(
                Chunk(
                    start,
                    length,
                    int(c.teacher_length[i]),
                    state,
                    bool(c.active[i]),
                    float(logp[i]) if c.active[i] else None,
                    pieces[i],
                )
            )
            for position in range(start, start + length):
                if row.masked[position]:
                    states[position] = state
    return View(row, states, asked, chunks)


def _top(said: Said, i: int, token: int, gold: float) -> list[tuple[int, float]]:
    """The most probable tokens of a position; the true one by its own log-prob, which is stored exactly."""
    found = zip(said.ids[i].tolist(), said.p[i].tolist())
    return [(t, gold if t == token and np.isfinite(gold) else p) for t, p in found if t >= 0]


def _ranks(row: Row, top: np.ndarray) -> list[int | None]:
    """Rank of the true token at each distilled position, as far as the target tells it."""
    at = row.positions
    assert at is not None
    gold = row.input_ids[at.positions]
    if isinstance(at.target, SparseTarget):
        ends = np.cumsum(at.target.counts)
        heads = [at.target.ids[end - n : end] for end, n in zip(ends, at.target.counts)]
    else:
        heads = list(top)
    found = [np.flatnonzero(head == token) for head, token in zip(heads, gold)]
    return [int(x[0]) + 1 if len(x) else None for x in found]
