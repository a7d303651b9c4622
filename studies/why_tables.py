"""Tables of `studies.why`: gradients, calibration, chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from tools.tables import Column, Table


def why_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Gradients, calibration and chunks, for every measurement."""
    for found in result["why"]:
        bins = _bins(found)
        for when in ("start", "after"):
            at = "at the start" if when == "start" else f"after training {found['trained']}"
            where = f"data {found['data']}, {at}"
            grads = found[when]["gradients"]
            base = next(g for g in grads if g["objective"] == "ce")["norm"]
            grads = [g | {"over_ce": [n / b if b else None for n, b in zip(g["norm"], base)]} for g in grads]
            measures = (
                ("Gradient norm over CE's", "over_ce"),
                ("Cosine with CE's gradient on the same rows", "with_ce"),
                ("Cosine with KL's gradient", "with_kl"),
                ("Cosine with CE's gradient on other text", "with_other_text"),
            )
            for title, field in measures:
                rows = tuple((g["objective"], *g[field]) for g in grads if g[field] is not None)
                if rows:
                    yield _by_bins(f"{title}: {where}", "objective", bins, rows, digits=3)
            if found[when]["chunks"]:
                yield _chunk_table(f"Chunks: {where}", bins, found[when]["chunks"])
    yield from calibration_tables(result["why"])


def calibration_tables(measured: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Of the student and its teacher, where the teacher was asked as the student is. The text is the same for
    every dataset: the first measurement will do."""
    for found in [w for w in measured if "teacher" in w][:1]:
        bins = _bins(found)
        calibrated = {
            "student, start": found["start"],
            f"student, {found['trained']}": found["after"],
            "teacher": found["teacher"],
        }
        rows = tuple(
            (f"{who}, T {T}: {what}", *(c[f"T {T}"][field] for c in data["calibration"]))
            for who, data in calibrated.items()
            for T in ("1", "2")
            for what, field in (("confidence", "confidence"), ("calibration error", "error"))
        )
        right = tuple(
            (f"{who}: accuracy", *(c["accuracy"] for c in d["calibration"])) for who, d in calibrated.items()
        )
        yield _by_bins("Calibration on validation text", "who", bins, right + rows, digits=3)


def _bins(found: dict[str, Any]) -> list[str]:
    return [f"t {a:g}-{b:g}" for a, b in pairwise(found["edges"])]


def _by_bins(title: str, first: str, bins: Sequence[str], rows: Any, *, digits: int) -> Table:
    columns = (Column(label=first, align="left"), *(Column(label=b, digits=digits) for b in bins))
    return Table(title=title, columns=columns, rows=rows)


def _chunk_table(title: str, bins: Sequence[str], found: Sequence[dict[str, Any]]) -> Table:
    rows = tuple(
        (f"{T}: {what}", *(c.get(T, {}).get(field) for c in found))
        for T in ("T 1", "T 2", "T 5")
        for what, field in (
            ("teacher's probability", "teacher"),
            ("student's probability", "student"),
            ("teacher above ½", "above_half"),
            ("student above teacher", "student_above_teacher"),
        )
    )
    return _by_bins(title, "mean over active chunks", bins, rows, digits=3)
