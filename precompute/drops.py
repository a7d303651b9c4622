"""What is lost between corpus and teacher: counted, reported, and too much of it stops the run."""

from __future__ import annotations

from collections import Counter

from precompute.corpus import Corpus
from precompute.parts import Range
from precompute.ready import Prepared
from shards.errors import CorpusError


class DropLimit:
    """Counts what is lost on the way to the teacher, and stops the run when it is too much.

    Corpus rows that give no sample (too long, malformed) are counted and reported. Target tokens without a
    teacher counterpart are counted against a limit: they say that tokenizers or templates do not fit.
    """

    def __init__(self, corpus: Corpus, most: float) -> None:
        self.corpus, self.most = corpus, most
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.content_tokens = 0
        self.unaligned: Counter[str] = Counter()

    def check(self, work: Range, ready: Prepared) -> None:
        """Count a range; ranges come in the order in which they are made.

        Raises:
            CorpusError: of all target tokens so far, more than `most` are unaligned, or no row gave a sample.
        """
        self.rows += len(work.conversations) + work.skipped.total()
        self.dropped += work.skipped + ready.dropped
        self.first = ready.first | self.first
        self.content_tokens += ready.content_tokens
        self.unaligned += ready.unaligned
        if self.dropped.total() == self.rows:
            reason, n = self.dropped.most_common(1)[0]
            where = next(iter(self.corpus.skipped_at.get(reason, ())), None) or self.first[reason]
            raise CorpusError(
                f"{self.corpus.spec}: none of the first {self.rows} rows gives a sample, {n} because: "
                f"{reason} (first in {where}); mend the corpus, or raise --student-max-length"
            )
        lost = self.unaligned.total()
        if lost > self.most * self.content_tokens:
            reason, n = self.unaligned.most_common(1)[0]
            raise CorpusError(
                f"{self.corpus.spec}: {lost} of {self.content_tokens} target tokens in the first {self.rows} "
                f"rows have no teacher counterpart, {n} because: {reason}; look at the two chat templates "
                f"and --teacher-max-length, or raise --max-dropped ({self.most:g})"
            )
