"""The figures of a dataset's page, from the numbers of its sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student.schedule import LambdaSchedule
from tools.inspecting.stats import BINS, Chunks, Positions, by_t, paired
from tools.pages.report import Bar, Columns, Figure, Series, bar_chart, column_chart, heatmap, line_chart
from tools.tables import Column, Table, interval

LONGEST = 12
"""Chunk lengths that get a bar of their own; longer ones share the last."""
MASSES = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.5, 1.0)
"""Upper bounds of the bars of the tail's mass."""
LEAST_SHARE = 0.005
"""Columns with a smaller share of the bytes are one bar together."""
HALF_TEMPERATURE = 2.0
"""Chunk probabilities are also shown tempered by it, as Reverse CALM sees them."""
GRID = 41
"""Points per axis of the schedule."""
TIME = "timestep t (share of masked tokens)"


@dataclass(frozen=True, slots=True)
class Side:
    """One dataset of the comparison with and without CompDemo."""

    name: str
    """As the legend has it, before the half."""
    compdemo: bool
    numbers: Positions | Chunks

    def groups(self) -> list[tuple[str, np.ndarray]]:
        """What is drawn apart: the halves of CompDemo."""
        if not self.compdemo:
            return [(f"{self.name}without CompDemo", np.ones(len(self.numbers.t), bool))]
        half_a = self.numbers.half_a
        return [(f"{self.name}with CompDemo, half A", half_a), (f"{self.name}with CompDemo, half B", ~half_a)]


def which_is_which(sides: Sequence[Side], beside: bool) -> str:
    """Said below every figure over t."""
    halves = (
        "With CompDemo the teacher predicts half A while half B is shown, and the reverse: at t it sees "
        "about as many masks as without CompDemo at t / 2."
    )
    if beside:
        return halves
    if sides[0].compdemo:
        return f"{halves} Nothing here is without CompDemo: --beside PATH adds a dataset made so."
    return (
        "This dataset was made without CompDemo: the teacher predicts all masked tokens at once. "
        "--beside PATH adds a dataset made with it."
    )


def confidence(sides: Sequence[Side], which: str) -> list[Figure]:
    """Confidence and entropy over t."""
    note = f"Means over positions in tenths of t, with 95 % intervals over samples. {which}"
    kinds: list[tuple[str, str, str, str]]
    if isinstance(sides[0].numbers, Chunks):
        kinds = [
            ("Probability of the chunk against t", "p", "probability of the chunk's text", note),
            (
                "Log-prob per teacher token against t",
                "each",
                "nats per teacher token",
                f"The chunk's log-prob over its number of teacher tokens. {note} Entropy and the most "
                "probable tokens are not stored across tokenizers.",
            ),
        ]
    else:
        gap = np.concatenate(
            [s.numbers.entropy_most - s.numbers.entropy for s in sides if isinstance(s.numbers, Positions)]
        )
        bound = (
            f"A lower bound: the tail counts as one symbol that has its mass. Spread evenly over the tokens "
            f"not kept it would add {gap.mean():.3f} nats on average, the most it can. {note}"
            if gap.max(initial=0) > 0
            else f"Of the whole distribution. {note}"
        )
        kinds = [
            ("Probability of the true token against t", "gold", "probability of the true token", note),
            ("Probability of the most probable token against t", "top", "top-1 probability", note),
            ("Entropy against t", "entropy", "nats", bound),
        ]
    figures = []
    for title, field, label, caption in kinds:
        series: list[Series] = []
        for side in sides:
            values = _values(side.numbers, field)
            series += [
                by_t(name, side.numbers.t[at], values[at], side.numbers.sample[at])
                for name, at in side.groups()
                if at.any()
            ]
        figures.append(line_chart(title, series, x_label=TIME, y_label=label, caption=caption))
    return figures


def _values(numbers: Positions | Chunks, field: str) -> np.ndarray:
    if isinstance(numbers, Positions):
        return np.asarray(getattr(numbers, field))
    return np.exp(numbers.logp) if field == "p" else numbers.logp / numbers.active_teacher_length


def difference(sides: Sequence[Side]) -> Table | None:
    """What CompDemo changes at the positions both datasets have; None where they have none in common."""
    first, second = sides
    fields = ("p", "each") if isinstance(first.numbers, Chunks) else ("gold", "top", "entropy")
    names = {
        "p": "probability of the chunk",
        "each": "log-prob per teacher token (nats)",
        "gold": "probability of the true token",
        "top": "top-1 probability",
        "entropy": "entropy (nats, lower bound)",
    }
    rows: list[tuple[str | int, ...]] = []
    for field in fields:
        found = paired(
            _values(first.numbers, field),
            first.numbers.key,
            _values(second.numbers, field),
            second.numbers.key,
        )
        if found is None:
            return None
        n, *values = found
        rows.append((names[field], n, *(interval(*v, digits=3) for v in values)))
    how = ["with" if s.compdemo else "without" for s in sides]
    return Table(
        title="The same positions in both datasets",
        columns=(
            Column(label="mean of", align="left"),
            Column(label="positions"),
            Column(label=f"this dataset ({how[0]} CompDemo)"),
            Column(label=f"the other ({how[1]} CompDemo)"),
            Column(label="difference [95 %]"),
        ),
        rows=tuple(rows),
        note="Positions masked in both, sample by sample; intervals over samples.",
    )


def kept(numbers: Positions, cap: int) -> list[Figure]:
    """How much of the distribution a sparse codec kept."""
    if numbers.kept is None or not len(numbers.kept):
        return []
    counts = np.bincount(numbers.kept.astype(int), minlength=cap + 1)[1:]
    full = float((numbers.kept >= cap).mean())
    figure = column_chart(
        "Entries kept per position",
        [Columns(name="positions", x=list(range(1, len(counts) + 1)), y=(counts / counts.sum()).tolist())],
        x_label="head entries",
        y_label="share of positions",
        caption=(
            f"{numbers.kept.mean():.1f} on average, {np.median(numbers.kept):.0f} in the median; {full:.1%} "
            f"of the positions have all {cap} the codec allows, so their tail may be heavy."
        ),
    )
    places = ["none", *(f"≤ {m:g}" for m in MASSES)]
    sets, said = [], []
    for temperature, share in numbers.tail.items():
        where = np.where(share <= 0, 0, 1 + np.searchsorted(MASSES, np.minimum(share, 1.0)))
        heights = np.bincount(where, minlength=len(places)) / len(share)
        sets.append(Columns(name=f"temperature {temperature:g}", x=places, y=heights.tolist()))
        said.append(f"{share.mean():.4f} at temperature {temperature:g}")
    tail = column_chart(
        "Mass outside the head",
        sets,
        x_label="share of the probability that the head leaves out",
        y_label="share of positions",
        caption=f"Mean {', '.join(said)}. Stored as one number per position and temperature.",
    )
    return [figure, tail]


def chunk_figures(numbers: Chunks) -> list[Figure]:
    """Lengths and probabilities of chunks."""
    places = [*map(str, range(1, LONGEST)), f"{LONGEST}+"]

    def shares(lengths: np.ndarray) -> list[float]:
        found = np.bincount(np.clip(lengths.astype(int), 1, LONGEST), minlength=LONGEST + 1)[1:]
        return (found / max(1, found.sum())).tolist()

    one = (numbers.length == 1) & (numbers.teacher_length == 1)
    lengths = column_chart(
        "Chunk lengths",
        [
            Columns(name="student tokens", x=places, y=shares(numbers.length)),
            Columns(name="teacher tokens", x=places, y=shares(numbers.teacher_length)),
        ],
        x_label="tokens in a chunk",
        y_label="share of chunks",
        caption=(
            f"{len(numbers.length):,} chunks: {numbers.length.mean() if len(one) else 0:.2f} student and "
            f"{numbers.teacher_length.mean() if len(one) else 0:.2f} teacher tokens on average; "
            f"{one.mean() if len(one) else 0:.0%} are one token on both sides."
        ),
    )
    edges = np.linspace(0, 1, 21)
    sets, said = [], []
    for temperature in (1.0, HALF_TEMPERATURE):
        p = np.exp(numbers.logp / temperature)
        heights = np.histogram(np.clip(p, 0, 1), edges)[0] / max(1, len(p))
        sets.append(
            Columns(
                name=f"temperature {temperature:g}",
                x=((edges[1:] + edges[:-1]) / 2).tolist(),
                y=heights.tolist(),
            )
        )
        said.append(f"{(p > 0.5).mean() if len(p) else 0:.1%} at temperature {temperature:g}")
    probabilities = column_chart(
        "Chunk probabilities",
        sets,
        x_label="the teacher's probability of the chunk's text",
        y_label="share of active chunks",
        caption=(
            f"Above one half: {', '.join(said)}, of {len(numbers.logp):,} active chunks. Reverse CALM "
            "pulls the student towards the text of these and away from that of the others."
        ),
    )
    return [lengths, probabilities]


def schedule_figure(schedule: LambdaSchedule) -> Figure:
    """lambda_t over training and timestep."""
    import torch

    grid = np.linspace(0, 1, GRID)
    t = torch.from_numpy(grid)
    columns = [schedule.at(float(progress), t).tolist() for progress in grid]
    names = {
        "both": "λ_t = λ_train · (1 − t)",
        "training_only": "λ_t = λ_train",
        "timestep_only": f"λ_t = {schedule.maximum:g} · (1 − t)",
    }
    return heatmap(
        "Teacher's share λ_t of the interpolated target",
        grid.tolist(),
        grid.tolist(),
        list(map(list, zip(*columns))),
        x_label="progress of training",
        y_label="timestep t",
        z_label="λ_t",
        caption=(
            f"{names[schedule.axes]}; λ_train from {schedule.initial:g} to {schedule.maximum:g}, "
            f"{schedule.decay}. It is TIDAL's, by the lambda options that tide train has too."
        ),
    )


def size_figure(columns: dict[str, int], whole: int) -> Figure:
    """Compressed bytes by column, of the record batches that were read."""
    shares = {name: n / max(1, whole) for name, n in sorted(columns.items(), key=lambda item: -item[1])}
    small = [name for name, share in shares.items() if share < LEAST_SHARE]
    small = small if len(small) > 1 else []
    bars = [Bar(name, 100 * share) for name, share in shares.items() if name not in small]
    if small:
        bars.append(Bar(f"{len(small)} others", 100 * sum(shares[name] for name in small)))
    said = f" The others are {', '.join(small)}." if small else ""
    return bar_chart(
        "Bytes by column",
        [*bars, Bar("framing", 100 * (1 - sum(shares.values())))],
        x_label="% of the compressed bytes",
        caption=(
            f"Of {whole / 1e6:,.2f} MB of record batches: sizes of buffers, from their metadata. Framing is "
            f"Arrow's headers and padding.{said}"
        ),
    )


def timesteps(histogram: np.ndarray) -> Figure:
    """Rows in each tenth of t."""
    return column_chart(
        "Timesteps",
        [Columns(name="rows", x=((np.arange(BINS) + 0.5) / BINS).tolist(), y=histogram.tolist())],
        x_label=TIME,
        y_label="rows",
        caption=f"{int(histogram.sum()):,} rows in tenths of t.",
    )
