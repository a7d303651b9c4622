"""`tide inspect --html`: a dataset on one page, from a sample of its rows and, beside it, of another's."""

from __future__ import annotations

from pathlib import Path

from shards.codec import SparseCodec
from shards.errors import UsageError
from shards.reader import LogitDataset
from student.schedule import LambdaSchedule
from tools.console import Progress
from tools.inspecting import figures
from tools.inspecting.browser import browsed, browser
from tools.inspecting.sample import Sampled, sample
from tools.inspecting.stats import Chunks, Positions, chunks_of, positions_of
from tools.inspecting.summary import Summary
from tools.inspecting.text import TokenTexts, visible
from tools.options import megabytes
from tools.pages.report import write_report


def write_page(
    path: Path,
    dataset: LogitDataset,
    sampled: Sampled,
    summary: Summary,
    *,
    texts: TokenTexts,
    teacher_texts: TokenTexts | None = None,
    schedule: LambdaSchedule,
    rows: int,
    beside: LogitDataset | None,
    progress: Progress,
) -> Path:
    """
    Args:
        sampled, summary: of the dataset. rows: sampled of the one beside it.

    Raises:
        UsageError: the two datasets are of different kinds; plotly is missing.
        ShardError: see `LogitDataset.read`.
    """
    m = dataset.manifest
    if beside is not None and beside.manifest.kind != m.kind:
        raise UsageError(
            f"--beside {beside.path} is of kind {beside.manifest.kind}, {dataset.path} of kind {m.kind}: "
            "give one of the same kind"
        )
    sides = [_side(dataset, sampled, "", progress)]
    if beside is not None:
        other = sample(beside, rows, megabytes(progress, "reading the other dataset"))
        same = beside.manifest.noise.compdemo == m.noise.compdemo
        if same:
            sides[0] = figures.Side("this dataset, ", m.noise.compdemo, sides[0].numbers)
        sides.append(_side(beside, other, "the other dataset, " if same else "", progress))
    first = sides[0].numbers
    tables = [table for table in summary.tables if table is not summary.timesteps]
    if len(sides) > 1 and (table := figures.difference(sides)):
        tables.append(table)
    drawn = [figures.timesteps(summary.histogram)]
    if len(first.t):
        drawn += figures.confidence(sides, figures.which_is_which(sides, beside is not None))
    if isinstance(first, Chunks):
        drawn += figures.chunk_figures(first)
    elif isinstance(m.codec, SparseCodec):
        drawn += figures.kept(first, m.codec.cap)
    drawn += [figures.schedule_figure(schedule), figures.size_figure(sampled.columns, sampled.bytes)]
    with progress.doing("writing the page"):
        return write_report(
            path,
            title=f"Logit dataset {dataset.path.rstrip('/').rsplit('/', 1)[-1]}",
            intro=_intro(dataset, beside),
            tables=tables,
            widgets=[browser(dataset, browsed(dataset), texts, teacher_texts)],
            figures=drawn,
            notes=_notes(sides),
        )


def _side(dataset: LogitDataset, sampled: Sampled, name: str, progress: Progress) -> figures.Side:
    line = progress.line("the teacher's distributions", "rows")
    numbers: Positions | Chunks = (
        chunks_of(sampled.rows)
        if dataset.manifest.kind == "cross"
        else positions_of(dataset, sampled.rows, line)
    )
    return figures.Side(name, dataset.manifest.noise.compdemo, numbers)


def _intro(dataset: LogitDataset, beside: LogitDataset | None) -> str:
    m = dataset.manifest
    how = "with" if m.noise.compdemo else "without"
    text = (
        f"{dataset.path}: what teacher {visible(str(m.teacher.get('name', '(not named)')))} said of masked "
        f"samples, made {how} CompDemo."
    )
    if beside is not None:
        other = "with" if beside.manifest.noise.compdemo else "without"
        text += f"\n\nBeside it: {beside.path}, made {other} CompDemo."
    return text


def _notes(sides: list[figures.Side]) -> list[str]:
    notes = [
        "Intervals are 95 %, by the spread between samples; they say how well this sample of rows knows the "
        "dataset's mean, not how another teacher or corpus would come out.",
    ]
    left_out = sum(s.numbers.left_out for s in sides if isinstance(s.numbers, Positions))
    if left_out:
        notes.append(
            "Distributions of exact targets are computed from hidden states: to keep that short, "
            f"{left_out:,} positions of the sampled rows were left out, evenly."
        )
    if isinstance(sides[0].numbers, Positions) and sides[0].numbers.kept is not None:
        notes.append(
            "Head log-probs are stored in steps, so top-1 probabilities and entropies carry its rounding (a "
            "step of 1/8 nat: up to 6 % of a probability, either way); the true token's is stored exactly."
        )
    return notes
