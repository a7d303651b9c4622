"""Alignment of two tokenisations of the same message contents, on byte offsets of what each tokenizer really
saw.

Each side gives the *edges* of its tokens: n + 1 byte offsets into its own rendered text (UTF-8), edges[i]
being where token i begins and token i - 1 ends, or -1 where that is no offset of the original text (inside
characters that the tokenizer's normalisation changed). A *region* is a stretch of content that both texts
show. Inside a region:

- a chunk lies between two successive offsets that are edges on both sides: the finest cutting into spans over
  equal bytes. No table of special tokens, no search for text: those lose chunks and find the wrong
  occurrence.
- with one tokenizer and two templates, a chunk whose tokens are equal on both sides gives pairs of equal
  tokens.

What is not aligned is not silently gone: every student token gets a `Fate`, which the caller counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Fate(IntEnum):
    """What became of a student token, and why. `label` names it in counts and reports."""

    ALIGNED = 0
    NOT_CONTENT = 1
    """Template, end-of-turn, filling: has no counterpart by nature. Not a loss: limits on dropped tokens
    ignore it."""
    MERGED = 2
    """Its bytes lie in a token, on either side, that reaches over the edge of the content into the
    template."""
    ABSENT = 3
    """Content that the teacher's template leaves out or changes."""
    IDS_DIFFER = 4
    """One tokenizer, yet other tokens over these bytes (the template's neighbourhood moved the cuts)."""
    TEACHER_TRUNCATED = 5
    STUDENT_TRUNCATED = 6

    @property
    def label(self) -> str:
        return {
            Fate.ALIGNED: "aligned",
            Fate.NOT_CONTENT: "not content",
            Fate.MERGED: "merged with template",
            Fate.ABSENT: "absent from the teacher's text",
            Fate.IDS_DIFFER: "ids differ",
            Fate.TEACHER_TRUNCATED: "teacher truncated",
            Fate.STUDENT_TRUNCATED: "student truncated",
        }[self]


class Region(NamedTuple):
    """The same content bytes in both texts: byte offsets into each, and the length in bytes."""

    student: int
    teacher: int
    length: int


@dataclass(frozen=True, slots=True)
class Alignment:
    spans: np.ndarray
    """[C, 4] int32: student start, student end, teacher start, teacher end; half-open token ranges, ascending
    and disjoint on both sides, at least one token each."""
    fate: np.ndarray
    """[L] int8, a `Fate` for every student token (before truncation)."""


def outer_spans(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] starts and [n] ends of the smallest known byte spans around each token (unknown edges rounded
    outwards)."""
    known = np.where(edges < 0, np.iinfo(np.int64).max, edges)
    later = np.minimum.accumulate(known[::-1])[::-1]
    return np.maximum.accumulate(edges)[:-1], later[1:]


def align_chunks(
    student_edges: np.ndarray,
    teacher_edges: np.ndarray,
    regions: Sequence[Region],
    *,
    student_tokens: int | None = None,
    teacher_tokens: int | None = None,
    contents: Sequence[tuple[int, int]] | None = None,
) -> Alignment:
    """Chunks over equal bytes (paper: chunk alignment of the cross-tokenizer pipeline; ALM).

    Args:
        student_edges, teacher_edges: [n + 1] int64 byte offsets, non-decreasing but for -1 = unknown.
        regions: ascending and disjoint on both sides.
        student_tokens, teacher_tokens: tokens left after truncation; a chunk that reaches beyond is dropped
            whole.
        contents: [start, end) bytes of every content in the student's text; default: the regions.
    """
    cut = [_cut(student_edges, teacher_edges, region) for region in regions]
    spans = np.concatenate(cut) if cut else np.zeros((0, 4), dtype=np.int32)
    fate = _outside(student_edges, regions, contents)
    covered = _members(spans, len(fate))
    fate[covered >= 0] = Fate.ALIGNED
    reason = np.full(len(spans) + 1, Fate.ALIGNED, dtype=np.int8)  # by chunk; the last is "in no chunk"
    if teacher_tokens is not None:
        reason[:-1][spans[:, 3] > teacher_tokens] = Fate.TEACHER_TRUNCATED
    if student_tokens is not None:
        reason[:-1][spans[:, 1] > student_tokens] = Fate.STUDENT_TRUNCATED
    return _drop(Alignment(spans, fate), covered, reason)


def align_positions(
    student_edges: np.ndarray,
    teacher_edges: np.ndarray,
    regions: Sequence[Region],
    student_ids: np.ndarray,
    teacher_ids: np.ndarray,
    *,
    student_tokens: int | None = None,
    teacher_tokens: int | None = None,
    contents: Sequence[tuple[int, int]] | None = None,
) -> Alignment:
    """Pairs of equal tokens over equal bytes: one tokenizer, two templates (paper: shared-tokenizer
    pipeline).

    As `align_chunks`, then only chunks with the same ids on both sides, one span per token. Tokens over
    characters that normalisation changed have no edges of their own, but equal ids in the same order pair up
    all the same.
    """
    chunks = align_chunks(
        student_edges,
        teacher_edges,
        regions,
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
        contents=contents,
    )
    same = np.array(
        [np.array_equal(student_ids[a:b], teacher_ids[c:d]) for a, b, c, d in chunks.spans], dtype=bool
    )
    reason = np.append(np.where(same, Fate.ALIGNED, Fate.IDS_DIFFER), Fate.ALIGNED).astype(np.int8)
    kept = _drop(chunks, _members(chunks.spans, len(chunks.fate)), reason)
    pairs = [(a + i, a + i + 1, c + i, c + i + 1) for a, b, c, _ in kept.spans for i in range(b - a)]
    return Alignment(np.array(pairs, dtype=np.int32).reshape(-1, 4), kept.fate)


def _cut(student_edges: np.ndarray, teacher_edges: np.ndarray, region: Region) -> np.ndarray:
    """[C, 4] chunks of one region."""

    def inside(edges: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero((edges >= start) & (edges <= start + region.length))
        offset = edges[at] - start
        # A token without bytes (a prefix the tokenizer invents) stays with what precedes it: last edge wins.
        last = np.append(offset[1:] != offset[:-1], True)[: len(offset)]
        return at[last], offset[last]

    s_at, s_offset = inside(student_edges, region.student)
    t_at, t_offset = inside(teacher_edges, region.teacher)
    _, s, t = np.intersect1d(s_offset, t_offset, assume_unique=True, return_indices=True)
    s, t = s_at[s], t_at[t]
    return np.stack([s[:-1], s[1:], t[:-1], t[1:]], axis=1).astype(np.int32)


def _outside(
    edges: np.ndarray, regions: Sequence[Region], contents: Sequence[tuple[int, int]] | None
) -> np.ndarray:
    """[L] int8: fate of every student token if no chunk held it."""
    start, end = outer_spans(edges)
    fate = np.full(len(start), Fate.NOT_CONTENT, dtype=np.int8)
    for low, high in contents if contents is not None else ():
        fate[(start < high) & (end > low)] = Fate.ABSENT
    for region in regions:
        fate[(start < region.student + region.length) & (end > region.student)] = Fate.MERGED
    return fate


def _members(spans: np.ndarray, n: int) -> np.ndarray:
    """[n] int: chunk of each student token, -1 = none."""
    length = spans[:, 1] - spans[:, 0]
    before = np.cumsum(length) - length
    owner = np.full(n, -1)
    owner[np.arange(length.sum()) + np.repeat(spans[:, 0] - before, length)] = np.repeat(
        np.arange(len(spans)), length
    )
    return owner


def _drop(alignment: Alignment, owner: np.ndarray, reason: np.ndarray) -> Alignment:
    """Without the chunks whose `reason` [C + 1] is not ALIGNED; their tokens get it as their fate."""
    fate = np.where(reason[owner] == Fate.ALIGNED, alignment.fate, reason[owner]).astype(np.int8)
    return Alignment(alignment.spans[reason[:-1] == Fate.ALIGNED], fate)
