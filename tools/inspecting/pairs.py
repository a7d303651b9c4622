"""The teacher's side of a sample's chunks as text.

A dataset stores how many teacher tokens a chunk has, not which. The content is in the student's ids, so it is
tokenised again, and what comes out is used where it has as many tokens between a chunk's ends as are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from precompute.tokens import EdgeTokenizer, Tokens
from shards.row import ChunkTargets
from tools.inspecting.text import TokenTexts


def teacher_pieces(
    ids: np.ndarray, chunks: ChunkTargets, student: TokenTexts, teacher: TokenTexts
) -> list[list[str] | None]:
    """Texts of each chunk's teacher tokens; None where they cannot be told.

    Args:
        ids: [L] the student's.
    """
    found: list[list[str] | None] = [None] * len(chunks.start)
    if student.tokenizer is None or teacher.tokenizer is None:
        return found
    ours, theirs = EdgeTokenizer(student.tokenizer), EdgeTokenizer(teacher.tokenizer)
    ends = chunks.start + chunks.length
    breaks = np.flatnonzero(chunks.start[1:] != ends[:-1]) + 1
    for run in np.split(np.arange(len(ends)), breaks):
        if not len(run):
            continue
        first, last = int(chunks.start[run[0]]), int(ends[run[-1]])
        text = student.joined(ids[first:last].tolist())
        mine = ours.encode(text)
        if not np.array_equal(mine.ids, ids[first:last]):
            continue  # the neighbourhood decided these tokens: their ends in the text are not known
        other = theirs.encode(text)
        for c in run.tolist():
            start, end = mine.edges[[chunks.start[c] - first, ends[c] - first]].tolist()
            found[c] = _between(other, start, end, int(chunks.teacher_length[c]), teacher)
    return found


def _between(tokens: Tokens, start: int, end: int, wanted: int, texts: TokenTexts) -> list[str] | None:
    at: Sequence[np.ndarray] = [np.flatnonzero(tokens.edges == edge) for edge in (start, end)]
    if min(start, end) < 0 or not all(map(len, at)) or at[1][-1] - at[0][-1] != wanted:
        return None
    return [texts[i] for i in tokens.ids[at[0][-1] : at[1][-1]].tolist()]
