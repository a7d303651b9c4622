"""The reference's ways to find message contents, for parity with it alone: by searching the text.

Cross tokenizer: a content is where its text first occurs. That is the prompt instead of an answer that
repeats it, or a piece of a role's name; contents that a tokenizer normalises are not found. Shared tokenizer:
each learned content is searched after the one before, so again the prompt may stand in for the answer. Both
drop all but the first token of a last character that spans several. `precompute.templates` knows each
content's own place instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from precompute.tokens import EdgeTokenizer, Tokens, byte_offsets
from shards.align import Region, outer_spans


@dataclass(frozen=True, slots=True)
class Reading:
    """A rendered chat as one side reads it."""

    side: EdgeTokenizer
    text: str
    tokens: Tokens

    def decode(self, span: slice = slice(None)) -> str:
        """The text of some of its tokens."""
        return str(self.side.tokenizer.decode(self.tokens.ids[span]))

    def covering(self, content: str, at: int) -> tuple[int, int]:
        """[start, end): from the token of the first character of `content`, which stands at character `at`,
        to the first token of its last."""
        characters = byte_offsets(self.text)[[at, at + len(content) - 1]]
        start, last = np.searchsorted(outer_spans(self.tokens.edges)[1], characters, side="right")
        return int(start), int(last) + 1


def first_tokens(reading: Reading, content: str) -> tuple[int, int] | None:
    """The tokens of a content where it first occurs. None = blank, or not in what the tokenizer gives back of
    the text."""
    at = reading.text.find(content)
    return (
        reading.covering(content, at) if content.strip() and at >= 0 and content in reading.decode() else None
    )


def first_ranges(
    contents: Sequence[str], student: Reading, teacher: Reading
) -> list[tuple[int, int, int, int] | None]:
    """Per content, its tokens: student start, student end, teacher start, teacher end. None = not found on
    both sides, or tokens of another text there, surrounding white space apart."""
    found: list[tuple[int, int, int, int] | None] = []
    for content in contents:
        s, t = first_tokens(student, content), first_tokens(teacher, content)
        same = s and t and student.decode(slice(*s)).strip() == teacher.decode(slice(*t)).strip()
        found.append((*s, *t) if s and t and same else None)
    return found


def first_regions(contents: Sequence[str], student: Reading, teacher: Reading) -> list[Region]:
    """Cross tokenizer: the bytes of each content under its tokens of `first_ranges`, in the student's order.
    They overlap where two contents are found in one place."""
    ranges = zip(contents, first_ranges(contents, student, teacher))
    return sorted(
        _region(content, (student, student.text.find(content)), (teacher, teacher.text.find(content)))
        for content, found in ranges
        if found
    )


def next_regions(contents: Sequence[str], student: Reading, teacher: Reading) -> list[Region]:
    """Shared tokenizer: as `first_regions`, each content searched behind the one before."""
    regions, s, t = [], 0, 0
    for content in contents:
        s_at, t_at = student.text.find(content, s), teacher.text.find(content, t)
        if content.strip() and min(s_at, t_at) >= 0:
            regions.append(_region(content, (student, s_at), (teacher, t_at)))
            s, t = s_at + len(content), t_at + len(content)
    return regions


def _region(content: str, student: tuple[Reading, int], teacher: tuple[Reading, int]) -> Region:
    """The bytes of `content`, at a character of each text, as far as the tokens found on both sides reach."""

    def extent(reading: Reading, at: int) -> tuple[int, int]:
        start, end = byte_offsets(reading.text)[at], reading.covering(content, at)[1]
        return int(start), int(np.maximum.accumulate(reading.tokens.edges)[end] - start)

    (s, s_room), (t, t_room) = extent(*student), extent(*teacher)
    return Region(s, t, max(0, min(len(content.encode()), s_room, t_room)))
