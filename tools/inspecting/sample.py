"""Which rows of a dataset are looked at: a bounded sample spread over its shards, and single samples by name.

Record batches are read whole, each verified, so a sample is cut by record batches: those picked first are
picked for every larger sample too, and two datasets over the same corpus give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.errors import UsageError
from shards.reader import LogitDataset
from shards.row import Row

ROWS = 1024
"""Of a sample, where nothing else is asked for."""
SAMPLE_BYTES = 64 << 20
"""Compressed bytes of a sample of rows: no further record batch is read once it has as many."""
GOLDEN = 0.6180339887498949
"""Multiples of it, mod 1, spread evenly over [0, 1) however many there are."""
SHOWN_IDS = 3
At = tuple[int, int]
"""Shard and record batch in it."""
Report = Callable[[float, float | None], None]
"""Called with bytes done and bytes in all (None = not known)."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rows of a dataset, and what they cost to store."""

    rows: list[Row]
    bytes: int
    """Compressed bytes of the record batches they came from."""
    columns: dict[str, int]
    """Of these, by column; the rest are Arrow's headers and padding."""
    everything: bool
    """The sample is the whole dataset."""


def all_batches(dataset: LogitDataset) -> list[At]:
    """In dataset order."""
    return [(s, b) for s, shard in enumerate(dataset.manifest.shards) for b in range(len(shard.batches))]


def spread(n: int) -> Iterator[int]:
    """0..n-1, each once, every beginning of it spread evenly."""
    seen: set[int] = set()
    k = 0
    while len(seen) < n:
        i = int(k * GOLDEN % 1 * n)
        k += 1
        if i not in seen:
            seen.add(i)
            yield i


def sample(dataset: LogitDataset, rows: int, report: Report) -> Sampled:
    """About `rows` rows, in whole record batches, from all over the dataset; always the same.

    Raises: see `LogitDataset.read`.
    """
    batches = all_batches(dataset)
    picked: list[At] = []
    expected = size = 0
    for i in spread(len(batches)):
        record = dataset.manifest.shards[batches[i][0]].batches[batches[i][1]]
        if picked and (expected >= rows or size + record.length > SAMPLE_BYTES):
            break
        picked.append(batches[i])
        expected += record.rows
        size += record.length
    found: list[Row] = []
    columns: dict[str, int] = {}
    done = 0
    for at in sorted(picked):
        report(done, size)
        found += dataset.read(*at)
        for name, n in dataset.column_bytes(*at).items():
            columns[name] = columns.get(name, 0) + n
        done += dataset.manifest.shards[at[0]].batches[at[1]].length
    report(done, size)
    return Sampled(found, size, columns, len(found) == dataset.manifest.totals["rows"])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    at: At
    index: int
    """In its record batch."""


def find(dataset: LogitDataset, wanted: str, view: int | None, report: Report) -> tuple[Row, At]:
    """The row of a sample, and the record batch that holds it.

    Args:
        wanted: number of a row in dataset order (0 is the first), or a sample id, or the beginning of one.
        view: None = the row's own where a number was given, else 0.

    Raises:
        UsageError: no such sample or view, or several ids begin so. See also `LogitDataset.read`.
    """
    views, rows = dataset.manifest.noise.views, dataset.manifest.totals["rows"]
    if view is not None and not 0 <= view < views:
        raise UsageError(f"--view must lie in 0..{views - 1} ({dataset.path} has {views} views), got {view}")
    if wanted.isdecimal() and int(wanted) < rows:
        place = _numbered(dataset, int(wanted))
    else:
        place = _named(dataset, wanted, report)
    row = dataset.read(*place.at)[place.index]
    if view is None or view == row.view:
        return row, place.at
    other = twin(dataset, place, view)
    found = None if other is None else dataset.read(*other.at)[other.index]
    if other is None or found is None or found.sample_id != row.sample_id:
        raise UsageError(f"--view {view}: {dataset.path} has no such view of sample {row.sample_id}")
    return found, other.at


def twin(dataset: LogitDataset, place: Place, view: int) -> Place | None:
    """Where another view of a sample should be: as many rows into that view's record batches of the same
    shard and split. None = there are not as many rows."""
    shard, batch = place.at
    records = dataset.manifest.shards[shard].batches
    here, before = records[batch], place.index
    before += sum(r.rows for r in records[:batch] if (r.view, r.split) == (here.view, here.split))
    for b, record in enumerate(records):
        if (record.view, record.split) == (view, here.split):
            if before < record.rows:
                return Place((shard, b), before)
            before -= record.rows
    return None


def _numbered(dataset: LogitDataset, number: int) -> Place:
    for at in all_batches(dataset):
        n = dataset.manifest.shards[at[0]].batches[at[1]].rows
        if number < n:
            return Place(at, number)
        number -= n
    raise AssertionError("totals were checked against the record batches")


def _named(dataset: LogitDataset, wanted: str, report: Report) -> Place:
    """Reads view 0 of the whole dataset, unless it comes upon the whole id."""
    found: dict[str, Place] = {}
    records = dataset.manifest.shards
    batches = [at for at in all_batches(dataset) if records[at[0]].batches[at[1]].view == 0]
    size, done = sum(records[s].batches[b].length for s, b in batches), 0
    for at in batches:
        report(done, size)
        for i, row in enumerate(dataset.read(*at)):
            if row.sample_id == wanted:
                return Place(at, i)
            if row.sample_id.startswith(wanted):
                found[row.sample_id] = Place(at, i)
        done += records[at[0]].batches[at[1]].length
    if not found:
        raise UsageError(
            f"sample {wanted!r}: no sample id of {dataset.path} begins so, and its rows have the numbers "
            f"0 to {dataset.manifest.totals['rows'] - 1}"
        )
    if len(found) > 1:
        some = ", ".join([*list(found)[:SHOWN_IDS], *(["..."] if len(found) > SHOWN_IDS else [])])
        raise UsageError(f"sample {wanted!r}: {len(found)} sample ids begin so ({some}); give more of it")
    return next(iter(found.values()))
