"""The loop around the model: parts come in prepared, and what the model says of one is encoded and written
while it works on the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from precompute.busy import Busy
from precompute.config import PrecomputeConfig
from precompute.drops import DropLimit
from precompute.parts import Range
from precompute.pipeline import Behind, Workers, one_ahead
from precompute.ready import Prepared
from precompute.rows import Answers, join, make_rows
from shards.build import BuiltPart, PartBuilder
from shards.codec import DenseCodec
from shards.locks import Claim
from shards.row import Row
from shards.writer import DatasetWriter

Progress = Callable[[int, int | None, str], None]
"""Called with corpus rows done, all of them (None = unknown), and what is being done."""
Begun = tuple[Range, Claim | None, Callable[[], Prepared] | None]
"""A part as from `precompute.parts.unfinished`, with what waits until it is prepared, where it is claimed."""

HALF_TEMPERATURE = 2.0
"""Chunks whose probability, tempered by this, exceeds one half are counted: Reverse CALM pulls the student
towards their text and away from that of all others."""
WAIT_S = 1.0
"""Seconds between two looks at the parts that other processes make."""


def make_parts(
    config: PrecomputeConfig,
    parts: Generator[Begun],
    limit: DropLimit,
    ask: Callable[..., list[Answers]],
    writer: DatasetWriter,
    workers: Workers,
    progress: Progress,
    busy: Busy,
) -> None:
    """The model asks about a part while the next one is prepared and the one before encoded and written.

    Args:
        ask: `precompute.engine.ask_all`, but for samples, jobs and progress.
    """
    # Dense answers are larger than what they would cost to encode here.
    start = partial if config.codec == DenseCodec() else workers.start

    def put_away(work: Range, claim: Claim, ready: Prepared, answers: list[Answers]) -> None:
        with claim:
            writer.publish(*start(build, writer.builder, work, ready, answers)())

    reached = 0
    with Behind() as behind, closing(one_ahead(parts) if workers.count else parts) as ahead:

        def at(work: Range, done: int) -> None:
            behind.check()
            progress(work.first + done, config.limit, f"part {work.part}")

        for work, claim, prepared in ahead:
            reached = max(reached, work.last)
            if claim is None or prepared is None:
                who = writer.claimant(work.part)
                progress(reached, config.limit, f"waiting for part {work.part}, which {who} makes")
                with busy.waiting:
                    time.sleep(WAIT_S)
                continue
            at(work, 0)
            ready = prepared()
            limit.check(work, ready)
            with busy.model:
                answers = ask(ready.samples, ready.jobs, progress=partial(at, work))
            behind.start(put_away, work, claim, replace(ready, jobs=[]), answers)
            at(work, work.last - work.first)


def build(
    builder: PartBuilder, work: Range, ready: Prepared, answers: Sequence[Answers]
) -> tuple[BuiltPart, dict[str, Any]]:
    """A part, encoded, and its report."""
    rows = make_rows(ready.samples, ready.plans, join(answers))
    built = builder.build(rows, part=work.part, first=work.first, last=work.last)
    return built, part_report(work, ready, rows)


def part_report(work: Range, ready: Prepared, rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of a part that the totals of its rows do not show; added up over parts in the manifest."""
    dropped = work.skipped + ready.dropped
    report: dict[str, Any] = {
        "corpus_rows": len(ready.samples) + dropped.total(),
        "dropped": dict(dropped),
        "skipped_at": work.skipped_at,
        "content_tokens": ready.content_tokens,
        "unaligned_tokens": dict(ready.unaligned),
    }
    chunks = [r.chunks.logp for r in rows if r.chunks is not None]
    if chunks:
        logp = np.concatenate(chunks)
        report["active_chunks"] = len(logp)
        report["chunks_above_half"] = int((np.exp(logp / HALF_TEMPERATURE) > 0.5).sum())
    return report | {"teacher_tokens": ready.teacher_tokens, "notes": dict(ready.notes)}
