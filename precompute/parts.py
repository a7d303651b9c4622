"""A corpus in parts, fixed ranges of its rows, and which of them this process makes.

Any number of processes work on one folder: each goes through the corpus and takes the parts that nobody has
made or claimed. At the end it waits for those of others, and takes over what a process that died left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from precompute.corpus import Corpus
from precompute.sample import Conversation
from shards.errors import CorpusError
from shards.locks import Claim
from shards.writer import DatasetWriter


@dataclass(frozen=True, slots=True)
class Range:
    """Corpus rows [first, last): one part's work."""

    part: int
    first: int
    last: int
    conversations: list[Conversation]
    skipped: Counter[str]
    """Unusable corpus rows met on the way to its last row, by reason."""
    skipped_at: dict[str, list[str]] = field(default_factory=dict)
    """Where those are that the corpus remembers, by reason."""


def cut(corpus: Corpus, size: int) -> Iterator[Range]:
    """The corpus in ranges of `size` rows, the last one shorter.

    Unusable rows belong to the range of the next usable one, so that a whole range is the same whatever the
    corpus's limit; those after the corpus's last row belong to its last range.
    """
    rows = iter(corpus)
    skipped, places = Counter[str](), dict[str, int]()
    row, first = next(rows, None), 0
    while row is not None:
        taken = [row]
        while len(taken) < size and (row := next(rows, None)) is not None:
            taken.append(row)
        now = Counter(corpus.skipped)
        counts = {reason: len(found) for reason, found in corpus.skipped_at.items()}
        if row is not None and (row := next(rows, None)) is None:
            now, counts = Counter(corpus.skipped), {r: len(found) for r, found in corpus.skipped_at.items()}
        at = {
            r: corpus.skipped_at[r][places.get(r, 0) : n] for r, n in counts.items() if n > places.get(r, 0)
        }
        yield Range(first // size, first, first + len(taken), taken, now - skipped, at)
        skipped, places, first = now, counts, first + len(taken)


def begun(corpus: Corpus, size: int) -> Iterator[Range]:
    """`cut`, its first range already read.

    Raises: CorpusError: the corpus cannot be read, or has no rows.
    """
    ranges = cut(corpus, size)
    first = next(ranges, None)
    if first is None:
        raise CorpusError(f"{corpus.spec}: no rows to use")
    return chain([first], ranges)


def unfinished(
    ranges: Iterable[Range], writer: DatasetWriter, *, mine: Callable[[int], bool]
) -> Iterator[tuple[Range, Claim | None]]:
    """Every range that is to be made here, with its claim, which is to be closed when the part is written.

    Where all that is left is claimed by others (or by this process, which has not written it yet), one such
    range comes without a claim: do something else for a while, or wait, and ask again. The end means that
    every range of `mine` parts is on disk or was given out.

    Args:
        mine: whether a part is to be made here at all.
    """
    others: list[Range] = []
    for work in ranges:
        if not mine(work.part) or writer.has(work.part, work.last):
            continue
        if claim := writer.claim(work.part, work.last):
            yield work, claim
        else:
            others.append(work)
        others = [w for w in others if not writer.has(w.part, w.last)]
    while others:
        free = ((w, claim) for w in others if (claim := writer.claim(w.part, w.last)))
        work, claim = next(free, (others[0], None))
        if claim:
            others.remove(work)
        yield work, claim
        others = [w for w in others if not writer.has(w.part, w.last)]
