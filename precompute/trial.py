"""A sample of the work of a run, without its models: corpus rows tokenised, aligned, noised and laid out by
the run's own code, or samples of invented text in given lengths. What costs are counted on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from precompute.corpus import Corpus
from precompute.engine import plans_of
from precompute.inputs import Asking, as_read, make_jobs
from precompute.prepare import PrepareConfig
from precompute.ready import Prepared
from precompute.rows import Answers, make_rows, noised
from precompute.sample import ChunkSpans, Conversation, PositionPairs, Sample
from shards.codec import Codec
from shards.errors import CorpusError
from shards.noise import NoiseConfig
from shards.realistic import zipf
from shards.row import Row
from shards.size import assumed_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How long conversations are where there is no corpus: log-normal, as instruction data's."""

    prompt: float
    """Median of the prompt's tokens, template included."""
    response: float
    """Median of the response's."""
    prompt_spread: float = 0.8
    """Standard deviation of the logarithm."""
    response_spread: float = 0.7
    teacher_share: float = 1.0
    """Two tokenizers: the teacher's tokens per token of the student."""
    chunk_share: float = 0.8
    """Two tokenizers: chunks per token of the side that has fewer."""


def drawn(corpus: Corpus, n: int, *, rows: int | None, seed: int = 0) -> tuple[list[Conversation], int]:
    """`n` conversations of a corpus, and how many it has.

    Args:
        rows: how many it has, where that is known; then its first `n` are taken and no more are read. Else it
            is read to its end, and each of its conversations is as likely.

    Raises:
        CorpusError: it cannot be read, or has no usable row.
    """
    rng, taken, seen = random.Random(seed), list[Conversation](), 0
    for conversation in corpus:
        if len(taken) < n:
            taken.append(conversation)
        elif (k := rng.randrange(seen + 1)) < n:
            taken[k] = conversation
        seen += 1
        if rows is not None and seen == n:
            break
    if not taken:
        raise CorpusError(f"{corpus.spec}: no rows to use")
    return taken, max(seen, rows or 0)


def invented(lengths: Lengths, n: int, settings: PrepareConfig, *, vocab_size: int) -> list[Sample]:
    """`n` samples in given lengths; those whose prompt leaves no room for a response are drawn again."""
    rng = np.random.default_rng(settings.seed)
    samples: list[Sample] = []
    while len(samples) < n:
        prompt = max(1, round(lengths.prompt * np.exp(rng.normal(0, lengths.prompt_spread))))
        response = max(1, round(lengths.response * np.exp(rng.normal(0, lengths.response_spread))))
        if prompt >= settings.student_length:
            continue
        real = min(prompt + response, settings.student_length)
        whole = -(-real // settings.block_size) * settings.block_size
        ids = zipf(rng, whole, vocab_size)
        maskable = np.arange(whole) >= prompt
        teacher_ids, alignment = ids[: settings.teacher_length], _pairs(maskable, settings.teacher_length)
        aligned: ChunkSpans | PositionPairs = alignment
        if settings.kind == "cross":
            most = min(settings.teacher_length, round(real * lengths.teacher_share))
            teacher_ids = zipf(rng, max(1, most), vocab_size)
            aligned = _chunks(real, len(teacher_ids), lengths.chunk_share)
        samples.append(
            Sample(
                sample_id=f"{len(samples):032x}",
                split="heldout" if rng.random() < settings.holdout else "train",
                student_ids=ids,
                maskable=maskable,
                real_length=real,
                content_bytes=4 * (real - prompt),
                teacher_ids=teacher_ids,
                alignment=aligned,
            )
        )
    return samples


def _pairs(maskable: np.ndarray, limit: int) -> PositionPairs:
    at = np.flatnonzero(maskable[:limit]).astype(np.int32)
    return PositionPairs(at, at)


def _chunks(student: int, teacher: int, share: float) -> ChunkSpans:
    """Chunks of nearly one length that cover both sides."""
    n = max(1, round(share * min(student, teacher)))
    edges = [np.floor(np.linspace(0, size, n + 1)).astype(np.int32) for size in (student, teacher)]
    (start, length), (t_start, t_length) = ((e[:-1], np.diff(e)) for e in edges)
    return ChunkSpans(start, length, t_start, t_length)


def lay_out_all(samples: Sequence[Sample], noise: NoiseConfig, asking: Asking) -> Prepared:
    """Samples as `precompute.ready.prepare` hands them on.

    Raises:
        UsageError: a sample does not fit `asking.row_tokens`.
    """
    read = [as_read(s, asking) for s in samples]
    plans = [plans_of(s, noise) for s in read]
    jobs = [j for i, s in enumerate(read) for j in make_jobs(s, plans[i], asking, index=i)]
    return Prepared(
        samples=read,
        plans=plans,
        jobs=jobs,
        teacher_tokens=sum(len(j.piece) for j in jobs),
        dropped=Counter(),
        first={},
        content_tokens=sum(int(s.maskable.sum()) for s in read),
        unaligned=Counter(),
        notes=Counter(),
    )


def assumed_rows(
    ready: Prepared, codec: Codec | None, *, vocab_size: int, kept: float | None
) -> list[list[Row]]:
    """The rows of each sample, with targets of the size that real ones have (`shards.size.assumed_targets`);
    codec None = log-probs alone, as across tokenizers.

    Args:
        vocab_size: of the targets.
    """

    def joined(values: Callable[[Any], np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *map(values, ready.jobs)]).astype(np.int64)

    gold = joined(lambda job: job.gold[job.source])
    logp = -np.random.default_rng(0).exponential(2.0, len(gold)).astype(np.float32)
    target = None
    if codec is not None:
        target, logp = assumed_targets(len(gold), codec, vocab_size=vocab_size, kept=kept)
        logp = np.where(gold < vocab_size, logp, np.nan).astype(np.float32)
    answers = Answers(
        sample=joined(lambda job: np.full(len(job.view), job.sample)),
        view=joined(lambda job: job.view),
        slot=joined(lambda job: job.slot),
        gold_logp=logp,
        target=target,
    )
    rows = make_rows(ready.samples, ready.plans, answers)
    views = len(ready.plans[0])
    return [rows[i : i + views] for i in range(0, len(rows), views)]


def without_targets(ready: Prepared) -> list[Row]:
    """Every view of every sample, as far as a student's batches are packed from it."""
    return [row for row, _, _ in noised(ready.samples, ready.plans)]
