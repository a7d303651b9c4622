"""How many rows a corpus has, where that can be told without reading them all: for a progress bar's end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from precompute.builtin import BUILTIN, FOUND
from precompute.mixture import Term, parse_mixture
from precompute.sources import SUFFIXES

BLOCK = 1 << 22


def rows_in(spec: str) -> int | None:
    """Rows of a corpus, those that cannot be used among them; None where only reading tells: filters,
    mixtures, compressed files, data sets that do not state their size.

    Raises: whatever opening the files or the data set does.
    """
    terms = parse_mixture(spec)
    if len(terms) > 1 or terms[0].filters:
        return None
    return _rows(terms[0])


def _rows(term: Term) -> int | None:
    path = Path(term.name).expanduser()
    if term.name in BUILTIN:  # making it twice at once would take seconds
        return len(FOUND[term.name]) if term.name in FOUND else None
    if path.exists() and term.config is None and term.split is None:
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.name.endswith(SUFFIXES)]
        if any(file.name.endswith(".zst") for file in files) or not files:
            return None
        return sum(map(_count, files))
    if path.exists():
        return None
    import datasets

    splits = datasets.load_dataset_builder(term.name, term.config).info.splits or {}
    found = splits.get(term.split or "train")
    return None if found is None else found.num_examples


def _count(file: Path) -> int:
    if file.name.endswith(".parquet"):
        return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as f:
        count, last = 0, b"\n"
        while block := f.read(BLOCK):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def told_total(report: Callable[..., None], spec: str) -> Callable[..., None]:
    """A progress report, (done, total, what), that is told the corpus's rows as soon as they are counted,
    beside the work; a count that fails is none."""
    counted: list[int] = []

    def count() -> None:
        with suppress(Exception):  # the run itself says what is wrong with its corpus
            while (found := rows_in(spec)) is None and spec in BUILTIN:
                time.sleep(1)
            if found:
                counted.append(found)

    threading.Thread(target=count, daemon=True).start()

    def told(done: float, total: float | None = None, note: str = "", **more: Any) -> None:
        known = [n for n in (total, *counted) if n is not None]
        report(done, min(known, default=None), note, **more)

    return told
