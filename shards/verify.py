"""Verify: is a dataset, local or remote, what its manifest says? Every damaged shard is named, not the first.

Hash-only reads every byte once and hashes it once. Full also decodes every row, checks every invariant and
noise plan, and that parts' records, manifest and card agree.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shards import beside
from shards.agreement import DATASET
from shards.atomic import TEMPORARY
from shards.beside import PIECE
from shards.build import count_rows
from shards.cache import BlobCache
from shards.errors import CorruptShard, ManifestError, PlanMismatch, RowError, ShardError
from shards.files import Files
from shards.journal import CLAIMS
from shards.location import Location, failing, no_manifest, read_manifest, read_text
from shards.manifest import MANIFEST, Manifest, ShardRecord
from shards.parallel import Report, Work, processors
from shards.pull import ORIGIN, REMOTE_WORKERS
from shards.ranges import ShardCheck, check_file, wrong_size
from shards.reader import LogitDataset
from shards.records import PARTS, PartRecord, add_counts, differences, record_name
from shards.transfer import CARD, manifest_of
from shards.untrusted import parse

PROCESSES_PAY = 1 << 26
"""Bytes of shards above which decoding them is worth starting processes for."""
OPTIONS = "tide-precompute.yaml"
"""Options of the command that made a dataset, saved beside it."""
_OURS = {MANIFEST, CARD, DATASET, ORIGIN, OPTIONS, ".lock", ".gitattributes"}


_Check = Callable[[tuple[int, ShardRecord]], tuple[str | None, dict[str, Any]]]
"""A numbered shard -> what is wrong with it, and the counts of its rows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file of a dataset cannot be used."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found."""

    manifest: Manifest
    full: bool
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    """What no reader minds: files that nothing names, left-overs, records that are not there."""
    seconds: float


def verify(path_or_url: str | Path, *, full: bool = False, report: Report | None = None) -> Verdict:
    """Check a finished dataset.

    Args:
        full: every row too; else every byte.
        report: called with bytes checked, and all of them.

    Raises:
        ManifestError, VersionError: there is no usable manifest.
        ShardError: the place cannot be read.
    """
    files = Files(path_or_url)
    place = files.location
    text = read_manifest(place)
    if text is None:
        raise no_manifest(place)
    manifest = manifest_of(text, place)
    work = Work(sum(f.bytes for f in beside.all_files(manifest)), report)
    problems: list[Problem] = []
    counts: dict[int, dict[str, Any]] = {}
    numbered = list(enumerate(manifest.shards))
    with _workers(files, manifest, full, work) as (check, pool):
        for (i, shard), (reason, totals) in work.each(check, numbered, pool):
            if reason:
                problems.append(Problem(shard.file, reason))
            counts[i] = totals
            if full:
                work.add(shard.bytes)
    for record in manifest.settings.files:
        if said := beside.reason(record, files, work):
            problems.append(Problem(record.file, said))
    problems.sort(key=lambda p: p.file)
    names = _listing(place)
    warnings = list(_strays(names, manifest))
    if full:
        if not problems:
            problems += _totals(manifest, counts)
        for found in _texts(place, names, manifest, counts):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                warnings.append(found)
    return Verdict(
        manifest=manifest,
        full=full,
        problems=tuple(problems),
        warnings=tuple(warnings),
        seconds=work.seconds,
    )


@contextmanager
def _workers(
    files: Files, manifest: Manifest, full: bool, work: Work
) -> Iterator[tuple[_Check, Executor | int]]:
    """What is done to every shard, and where: threads for hashing, which releases the interpreter; processes
    for decoding many rows."""
    url = files.location.url
    if not full:
        yield partial(_bytes, files, work), REMOTE_WORKERS if files.remote else processors()
    elif processors() == 1 or len(manifest.shards) == 1 or manifest.totals["bytes"] < PROCESSES_PAY:
        yield partial(_rows, _open(url)), 1
    else:
        workers = min(processors(), len(manifest.shards))
        context = mp.get_context("spawn")  # a fork would copy the threads of storage libraries, half-way
        with ProcessPoolExecutor(workers, context, _start, (url,)) as pool:
            yield _rows_here, pool


_dataset: LogitDataset | None = None
"""Of a process that decodes."""


def _start(url: str) -> None:
    global _dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C stops
    _dataset = _open(url)


def _open(url: str) -> LogitDataset:
    """Nothing is cached: the bytes that lie there matter."""
    return LogitDataset(url, cache=BlobCache(limit=0))


def _rows_here(numbered: tuple[int, ShardRecord]) -> tuple[str | None, dict[str, Any]]:
    """`_rows` in a process that `_start` prepared."""
    if _dataset is None:
        raise ValueError("the process was not prepared")
    return _rows(_dataset, numbered)


def _bytes(files: Files, work: Work, numbered: tuple[int, ShardRecord]) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a shard's bytes."""
    _, shard = numbered
    try:
        if files.location.folder is not None:
            check = check_file(files.location.folder / shard.file, shard, work.add)
        else:
            check = ShardCheck(shard)
            size = files.size(shard.file)
            if size is not None and size != shard.bytes:
                return wrong_size(shard, size), {}
            while check.bytes < shard.bytes:
                data = files.range(shard.file, check.bytes, min(PIECE, shard.bytes - check.bytes))
                if not data:
                    break
                check.update(data)
                work.add(len(data))
    except FileNotFoundError:
        return "missing", {}
    except ShardError as e:  # a link or a device; from afar, the connection
        if files.remote:
            raise
        return str(e), {}
    except OSError as e:
        return f"cannot be read: {e.strerror or e}", {}
    return check.reason(), {}


def _rows(dataset: LogitDataset, numbered: tuple[int, ShardRecord]) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a shard's bytes or rows, and its counts."""
    i, shard = numbered
    totals: dict[str, Any] = {}
    views: dict[str, list[int]] = {}
    splits: dict[str, str] = {}
    try:
        for rows in dataset.shard_rows(i):
            totals = add_counts(totals, count_rows(rows))
            for row in rows:
                views.setdefault(row.sample_id, []).append(row.view)
                if splits.setdefault(row.sample_id, row.split) != row.split:
                    return f"sample {row.sample_id} is in two splits", {}
    except (CorruptShard, RowError, PlanMismatch) as e:
        return str(e).removeprefix(f"{shard.file}: "), {}
    except ShardError as e:  # as in `_bytes`
        if "://" in dataset.path:
            raise
        return str(e), {}
    wanted = list(range(dataset.manifest.noise.views))
    for sample, found in views.items():
        if sorted(found) != wanted:
            return f"sample {sample} has views {sorted(found)}, expected {wanted}", {}
    return None, totals


def _listing(place: Location) -> list[str]:
    """Names of all files there; none where a web server does not list them."""
    if place.url.startswith(("http://", "https://")):
        return []
    with failing(f"cannot list {place.url}"):
        return sorted(str(path)[len(place.root) :].lstrip("/") for path in place.fs.find(place.root))


def _strays(names: Sequence[str], manifest: Manifest) -> Iterator[str]:
    named = _OURS | {f.file for f in beside.all_files(manifest)}
    for name in names:
        if name.rpartition("/")[2].startswith(TEMPORARY):
            yield f"{name}: left by a command that was interrupted"
        elif name not in named and not name.startswith((f"{PARTS}/part-", f"{CLAIMS}/")):
            yield f"{name}: not part of the dataset"


def _totals(manifest: Manifest, counts: dict[int, dict[str, Any]]) -> Iterator[Problem]:
    """The manifest's totals against those of all rows."""
    found: dict[str, Any] = {}
    for totals in counts.values():
        found = add_counts(found, totals)
    declared = {k: v for k, v in manifest.totals.items() if k != "bytes"}
    if differs := list(differences(_nonzero(declared), _nonzero(found))):
        yield Problem(MANIFEST, f"its totals are not those of its rows ({'; '.join(differs)})")


def _texts(
    place: Location, names: Sequence[str], manifest: Manifest, counts: dict[int, dict[str, Any]]
) -> Iterator[Problem | str]:
    """Problems and warnings of the parts' records, `dataset.json` and the card."""
    shards = {record_name(s.part): (s, counts.get(i, {})) for i, s in enumerate(manifest.shards)}
    records = [n for n in names if n.startswith(f"{PARTS}/") and n.endswith(".json")]
    for name in records:
        try:
            record = PartRecord.parse(read_text(place, name), name)
        except ManifestError as e:
            yield Problem(name, str(e).removeprefix(f"{name} "))
            continue
        shard, totals = shards.get(name, (None, {}))
        if shard is None:
            yield f"{name}: done since the manifest was published; the same tide precompute publishes it"
        elif record.shard != shard:
            yield Problem(name, f"names other bytes than {MANIFEST}")
        elif totals and (differs := list(differences(_nonzero(record.totals), _nonzero(totals)))):
            yield Problem(name, f"its totals are not those of its rows ({'; '.join(differs)})")
    if names and (without := shards.keys() - set(records)):
        yield f"{len(without)} of {len(shards)} parts have no record: this copy cannot be continued"
    if DATASET in names:
        about = parse(read_text(place, DATASET), DATASET)
        if (about.get("identity"), about.get("config")) != (manifest.identity, manifest.config):
            yield Problem(DATASET, f"is of another dataset than {MANIFEST}")
    try:
        if manifest.identity not in read_text(place, CARD).decode(errors="replace"):
            yield f"{CARD}: does not name this dataset's identity: another one's, or written by hand"
    except FileNotFoundError:
        yield f"{CARD}: missing; the dataset has no card"


def _nonzero(counts: dict[str, Any]) -> dict[str, Any]:
    """Counts without zeros: one that is not there is one of nothing."""
    deep = {k: _nonzero(v) if isinstance(v, dict) else v for k, v in counts.items()}
    return {k: v for k, v in deep.items() if v not in (0, {})}
