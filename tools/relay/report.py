"""The relay's tables: what was made and moved, and what students came of it."""

from __future__ import annotations

from typing import Any

from tools.tables import Column, Table, interval


def tables(result: dict[str, Any]) -> list[Table]:
    """Of `tools.relay.run.run_relay`'s result."""
    moved: list[tuple[Any, ...]] = []
    judged: list[tuple[Any, ...]] = []
    for name, leg in result["legs"].items():
        totals = leg["precompute"]["totals"]
        moved.append(
            (
                name,
                totals["rows"],
                totals["masked"],
                totals["bytes"],
                totals["bytes"] / max(1, totals["masked"]),
                *(leg[step]["cpu_s"] for step in ("precompute", "verify", "push", "pull")),
            )
        )
        start = leg["start"]
        judged.append((name, "its start", bits(start), None, None, None))
        for objective, student in leg["students"].items():
            trained, against = student["train"], student["eval"].get("difference")
            compared = (
                None
                if against is None
                else interval(against, *student["eval"]["difference_interval"], digits=3)
            )
            judged.append(
                (name, objective, bits(student["eval"]), compared, trained["steps"], trained["cpu_s"])
            )
    return [
        Table(
            title="Datasets: scored on machine one, pulled by machine two",
            columns=(
                Column(label="dataset", align="left"),
                Column(label="rows"),
                Column(label="masked positions"),
                Column(label="bytes"),
                Column(label="bytes per position", digits=1),
                Column(label="scored in CPU s", digits=0),
                Column(label="verified", digits=1),
                Column(label="pushed", digits=1),
                Column(label="pulled", digits=1),
            ),
            rows=tuple(moved),
        ),
        Table(
            title="Students of machine two, on held-out samples",
            columns=(
                Column(label="dataset", align="left"),
                Column(label="objective", align="left"),
                Column(label="bits per byte [95 %]"),
                Column(label="against the control [95 %, paired]"),
                Column(label="steps"),
                Column(label="trained in CPU s", digits=0),
            ),
            rows=tuple(judged),
            note="Lower is better; the two kinds cut the corpus differently, so compare within one.",
        ),
    ]


def bits(evaluated: dict[str, Any]) -> str:
    return interval(evaluated["bits_per_byte"], *evaluated["interval"], digits=3)
