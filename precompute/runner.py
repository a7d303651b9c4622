"""The loop: corpus rows in, parts of a logit dataset out.

Work is cut into parts, fixed ranges of corpus rows. A part's bytes depend on the corpus, the configuration
and the part alone, so an interrupted run goes on where it was, and any part may be made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from precompute.config import DTYPES, PrecomputeConfig
from precompute.corpus import Corpus, open_corpus
from precompute.engine import Targets, default_row_tokens, make_part, plans_of
from precompute.identity import manifest_config
from precompute.inputs import Asking, without_first
from precompute.prepare import Drop, PrepareConfig, Preparer
from precompute.sample import Conversation, Sample
from precompute.teachers.base import Teacher
from precompute.teachers.load import load_teacher, load_teacher_tokenizer
from precompute.tokens import infer_kind
from shards.align import Fate
from shards.errors import CorpusError, TideError, UsageError
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.row import Row
from shards.writer import DatasetWriter
from student.tokenizer import load_tokenizer

Progress = Callable[[int, int | None, str], None]
"""Called with corpus rows done, all of them (None = unknown), and what is being done."""

HALF_TEMPERATURE = 2.0
"""Chunks whose probability, tempered by this, exceeds one half are counted: Reverse CALM pulls the student
towards their text and away from that of all others."""


class Interrupted(TideError):
    """Ctrl-C: what is done stays done."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class Range:
    """Corpus rows [first, last): one part's work."""

    part: int
    first: int
    last: int
    conversations: list[Conversation]
    skipped: Counter[str]
    """Unusable corpus rows met on the way, by reason."""


def cut(corpus: Corpus, size: int) -> Iterator[Range]:
    """The corpus in ranges of `size` rows, the last one shorter. Reads one row ahead, so that unusable rows
    after a range's last one belong to it."""
    rows = iter(corpus)
    seen: Counter[str] = Counter()
    row, first = next(rows, None), 0
    while row is not None:
        taken = [row]
        while (row := next(rows, None)) is not None and len(taken) < size:
            taken.append(row)
        skipped = Counter(corpus.skipped)
        yield Range(first // size, first, first + len(taken), taken, skipped - seen)
        seen, first = skipped, first + len(taken)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A range, ready for the teacher."""

    samples: list[Sample]
    dropped: Counter[str]
    """Corpus rows that give no sample, by reason."""
    content_tokens: int
    """Maskable tokens that a teacher counterpart can be expected of, those of dropped rows included."""
    unaligned: Counter[str]
    """Those of them that have none, by reason."""


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

    def prepare(self, work: Range, preparer: Preparer, *, shifted: bool = False) -> Prepared:
        """The samples of a range, and what is lost. `shifted`: of the teacher's outputs.

        Raises:
            CorpusError: of all target tokens so far, more than `most` are unaligned, or no row gave a sample.
        """
        samples: list[Sample] = []
        dropped = Counter(work.skipped)
        unaligned: Counter[str] = Counter()
        content = 0
        for conversation in work.conversations:
            made = preparer.prepare(conversation)
            if shifted and isinstance(made, Sample):
                made = without_first(made)
            unaligned += made.dropped
            if isinstance(made, Drop):
                content += made.dropped.total()
                dropped[made.reason] += 1
                where = f"{conversation.source} row {conversation.index + 1}"
                why = f": {' '.join(made.detail.split())}" if made.detail else ""
                self.first.setdefault(made.reason, where + why)
            else:
                content += int(made.maskable.sum())
                samples.append(made)
        content -= unaligned.pop(Fate.NOT_CONTENT.label, 0)
        self.rows += len(work.conversations) + work.skipped.total()
        self.dropped += dropped
        self.content_tokens += content
        self.unaligned += unaligned
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
        return Prepared(samples, dropped, content, unaligned)


def make_preparer(config: PrecomputeConfig) -> Preparer:
    """Tokenizers and templates of both models, and the pipeline that they mean."""
    student = load_tokenizer(config.student)
    teacher = load_teacher_tokenizer(config.teacher)
    return Preparer(
        student,
        teacher,
        PrepareConfig(
            kind=infer_kind(student, teacher) if config.kind == "auto" else config.kind,
            block_size=config.block_size,
            student_max_length=config.max_length,
            teacher_max_length=config.max_teacher_length,
            loss_on=config.loss_on,
            content_search=config.content_search,
            holdout=config.holdout,
            seed=config.seed,
        ),
    )


def precompute(config: PrecomputeConfig, progress: Progress | None = None) -> Manifest:
    """Make a logit dataset, or what is left of it to make; returns its manifest.

    Raises:
        CorpusError: nothing usable in the corpus, or more of it dropped than `max_dropped`.
        ModelError: a model folder that cannot be used, or a teacher whose output is not finite.
        ConfigMismatch: `out` holds a dataset made with other settings.
        Interrupted: Ctrl-C; the same call goes on where it was.
    """
    tell = progress or (lambda done, total, message: None)
    tell(0, config.limit, "loading models")
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    corpus = open_corpus(config.corpus, limit=config.limit)
    ranges = cut(corpus, config.samples_per_part)
    first = next(ranges, None)  # a corpus that cannot be read is found out before a teacher is loaded
    if first is None:
        raise CorpusError(f"{config.corpus}: no rows to use")
    preparer = make_preparer(config)
    teacher = load_teacher(
        config.teacher, attention=config.teacher_attention, dtype=DTYPES[config.dtype], device=device
    )
    return make_dataset(config, corpus, chain([first], ranges), preparer, teacher, tell)


def make_dataset(
    config: PrecomputeConfig,
    corpus: Corpus,
    ranges: Iterator[Range],
    preparer: Preparer,
    teacher: Teacher,
    progress: Progress,
) -> Manifest:
    """`precompute`, its corpus and models at hand."""
    spec, kind = teacher.spec, preparer.config.kind
    noise = NoiseConfig(
        seed=config.seed,
        views=config.views,
        timesteps=config.timesteps,
        unit="chunk" if kind == "cross" else "token",
        compdemo=config.compdemo,
        demo_ratio=config.demo_ratio,
    )
    block_size = spec.block_size or config.block_size
    row_tokens = config.row_tokens or default_row_tokens(
        preparer.config.teacher_length,
        streams=config.views * (2 if config.compdemo else 1),
        attention=spec.attention,
        block_size=block_size,
        device=teacher.device,
    )
    asking = Asking(
        mask_id=spec.mask_token_id,
        attention=spec.attention,
        block_size=block_size,
        shifted=spec.shifted,
        row_tokens=row_tokens,
        compdemo=config.compdemo,
    )
    identity = manifest_config(
        config,
        corpus=corpus,
        preparer=preparer,
        noise=noise,
        spec=spec,
        row_tokens=row_tokens,
        device=teacher.device,
    )
    targets = Targets(
        codec=None if kind == "cross" else config.codec,
        vocab_size=identity["shared_vocab_size"] or spec.vocab_size,
        head_rows=config.head_rows,
    )
    worker, workers = config.worker()
    limit = DropLimit(corpus, config.max_dropped)

    def at(work: Range, done: int) -> None:
        progress(work.first + done, config.limit, f"part {work.part}")

    with DatasetWriter(config.out, kind, identity) as writer:
        try:
            for work in ranges:
                done = writer.finished().get(work.part, (0, 0))
                if work.part % workers != worker or done[1] >= work.last:
                    continue
                at(work, 0)
                preparer.notes.clear()
                ready = limit.prepare(work, preparer, shifted=spec.shifted)
                rows, tokens = make_part(
                    teacher,
                    ready.samples,
                    [plans_of(s, noise) for s in ready.samples],
                    asking=asking,
                    targets=targets,
                    progress=partial(at, work),
                )
                counts = part_report(ready, rows)
                counts |= {"teacher_tokens": tokens, "notes": dict(preparer.notes)}
                writer.write_part(work.part, work.first, work.last, rows, counts)
                at(work, work.last - work.first)
        except KeyboardInterrupt as e:
            parts = ", ".join(map(str, sorted(writer.finished()))) or "none"
            raise Interrupted(
                f"interrupted; finished parts in {config.out}: {parts}; the same command goes on from there"
            ) from e
        if not writer.finished():
            raise UsageError(f"part {config.part}: the corpus has no part for this worker; use fewer workers")
        return writer.finish({"skipped_at": corpus.skipped_at})


def part_report(ready: Prepared, rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of a part that the totals of its rows do not show; summed over parts in the manifest."""
    report: dict[str, Any] = {
        "corpus_rows": len(ready.samples) + ready.dropped.total(),
        "dropped": dict(ready.dropped),
        "content_tokens": ready.content_tokens,
        "unaligned_tokens": dict(ready.unaligned),
    }
    chunks = [r.chunks.logp for r in rows if r.chunks is not None]
    if chunks:
        logp = np.concatenate(chunks)
        report["active_chunks"] = len(logp)
        report["chunks_above_half"] = int((np.exp(logp / HALF_TEMPERATURE) > 0.5).sum())
    return report
