"""Merge: one dataset of the parts that several workers or sites made with the same configuration.

Shards are linked, or copied across file systems; each is verified on the way. The same merge goes on after an
interruption, and with more sources later.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shards import beside
from shards.atomic import TEMPORARY, sync_folder
from shards.build import count_rows
from shards.errors import ConfigMismatch, CorruptShard, ManifestError, ShardError, UsageError
from shards.files import Files
from shards.location import failing, locate, no_manifest, read_manifest
from shards.manifest import Manifest, ShardRecord
from shards.parallel import Report, Work, processors
from shards.ranges import check_file
from shards.reader import LogitDataset
from shards.records import PartRecord, add_counts, record_name
from shards.stores import AGAIN
from shards.transfer import local_shards, manifest_of, outgrown, refuse_remote, setting_differences
from shards.writer import DatasetWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What `merge` did."""

    manifest: Manifest
    added: int
    """Parts that came in now; the others were there."""
    repeated: int
    """Parts that more than one source had."""
    replaced: tuple[int, ...]
    """Parts of which sources had other bytes, and the first one's were taken."""


@dataclass(frozen=True, slots=True)
class _Source:
    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A part, and where it comes from."""

    shard: ShardRecord
    source: _Source | None
    """None = it is in the output already."""


def merge(
    out: str | Path,
    sources: Sequence[str | Path],
    *,
    prefer_first: bool = False,
    report: Report | None = None,
) -> Merged:
    """Make, or go on with, the dataset in `out`: the parts of all sources, and those it has.

    Args:
        sources: folders of finished datasets, in order of preference.
        prefer_first: where sources have the same part with other bytes, take that of the first one (`out`
            itself comes before all). Otherwise that is an error.
        report: called with bytes verified, and all of them.

    Raises:
        ConfigMismatch: the datasets were made with other settings (names each).
        CorruptShard: a shard of a source differs from its manifest.
        ShardError: sources disagree about a part; `out` is being written, or cannot be written.
    """
    target = refuse_remote(out, locate(out))
    opened = [_open(s) for s in sources]
    if not opened:
        raise UsageError("nothing to merge: name the folders of one or more datasets")
    first = opened[0]
    for source in opened:
        if source.folder.resolve() == target.resolve():
            raise UsageError(f"{source.folder} is both a source and the output: name another folder for one")
        if differs := setting_differences(first.manifest, source.manifest):
            raise ConfigMismatch(
                f"{first.folder} and {source.folder} were made with other settings ({differs}): only "
                "datasets of one configuration can be merged"
            )
    with (
        failing(f"cannot write to {target}", AGAIN),
        DatasetWriter(target, first.manifest.kind, first.manifest.config) as writer,
    ):
        chosen, repeated, disputed = _choose(target, local_shards(target), opened)
        if disputed and not prefer_first:
            raise ShardError(_dispute(disputed))
        _disjoint(target, chosen)
        for record in first.manifest.settings.files:
            beside.bring(record, Files(first.folder), target, Work(0))
        added = _bring(writer, target, chosen, report)
        manifest = writer.finish(_rest(opened), fidelity=_fidelity(opened))
    return Merged(
        manifest=manifest, added=added, repeated=repeated, replaced=tuple(sorted({d[0] for d in disputed}))
    )


def _open(path: str | Path) -> _Source:
    place = locate(path)
    folder = refuse_remote(path, place)
    text = read_manifest(place)
    if text is None:
        raise no_manifest(place)
    return _Source(folder, manifest_of(text, place))


def _choose(
    target: Path, there: Sequence[ShardRecord], sources: Sequence[_Source]
) -> tuple[list[_Chosen], int, list[tuple[int, Path, Path]]]:
    """The parts in order, how many came twice, and (part, place taken, place not taken) of the disputed.

    Of a part that has grown, the longer version is taken: it says the same and more.
    """
    chosen = {s.part: _Chosen(s, None) for s in there}
    repeated: set[int] = set()
    disputed = []
    for source in sources:
        for shard in source.manifest.shards:
            taken = chosen.setdefault(shard.part, _Chosen(shard, source))
            if taken.source is source:
                continue
            if taken.source is not None:
                repeated.add(shard.part)
            if outgrown(taken.shard, shard):
                chosen[shard.part] = _Chosen(shard, source)
            elif taken.shard != shard and not outgrown(shard, taken.shard):
                place = taken.source.folder if taken.source else target
                disputed.append((shard.part, place, source.folder))
    return [chosen[n] for n in sorted(chosen)], len(repeated), disputed


def _dispute(disputed: Sequence[tuple[int, Path, Path]]) -> str:
    part, mine, theirs = disputed[0]
    others = len({d[0] for d in disputed}) - 1
    more = f" (and {others} more parts)" if others else ""
    return (
        f"{mine} and {theirs} have part {part} with other bytes{more}: made on other hardware, or of other "
        "lengths; --prefer first takes that of the folder named first"
    )


def _disjoint(target: Path, chosen: Sequence[_Chosen]) -> None:
    for a, b in pairwise(chosen):
        if b.shard.first < a.shard.last:
            places = [c.source.folder if c.source else target for c in (a, b)]
            raise ManifestError(
                f"part {a.shard.part} of {places[0]} (rows {a.shard.first}..{a.shard.last}) and part "
                f"{b.shard.part} of {places[1]} (rows {b.shard.first}..{b.shard.last}) overlap: one was cut "
                "otherwise; merge without it"
            )


def _bring(writer: DatasetWriter, target: Path, chosen: Sequence[_Chosen], report: Report | None) -> int:
    """Bring every part that is not there yet: its verified shard first, then its record."""
    missing = [c for c in chosen if c.source is not None]
    work = Work(sum(c.shard.bytes for c in missing), report)
    for one, _ in work.each(lambda c: _place(c, target, work), missing, processors()):
        sync_folder(target)
        writer.adopt(_record(one))
    return len(missing)


def _place(one: _Chosen, target: Path, work: Work) -> None:
    """Link or copy a shard, under its name once its bytes are verified."""
    if one.source is None:
        raise ValueError("the part is there")
    name = one.shard.file
    source, temporary = (one.source.folder / name).resolve(), target / f"{TEMPORARY}{name}"
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
        reason = check_file(temporary, one.shard, work.add).reason()
    except FileNotFoundError:
        reason = "missing"
    if reason:
        temporary.unlink(missing_ok=True)
        raise CorruptShard(f"{one.source.folder}/{name}: {reason}; make or fetch it again, then merge again")
    os.replace(temporary, target / name)


def _record(one: _Chosen) -> PartRecord:
    """The part's record as its maker wrote it, or one made of its rows, without its maker's report."""
    if one.source is None:
        raise ValueError("the part is there")
    with suppress(FileNotFoundError, NotADirectoryError, ManifestError):
        name = record_name(one.shard.part)
        record = PartRecord.parse((one.source.folder / name).read_bytes(), name)
        if record.shard == one.shard:
            return record
    totals: dict[str, Any] = count_rows([])
    for rows in LogitDataset(one.source.folder).shard_rows(one.source.manifest.shards.index(one.shard)):
        totals = add_counts(totals, count_rows(rows))
    return PartRecord(one.shard, totals, {})


def _rest(sources: Sequence[_Source]) -> dict[str, Any]:
    """Facts about whole runs: what a source's manifest reports and none of its parts does."""
    rest: dict[str, Any] = {}
    for source in sources:
        summed: set[str] = set()
        for shard in source.manifest.shards:
            with suppress(FileNotFoundError, NotADirectoryError, ManifestError):
                name = record_name(shard.part)
                summed |= PartRecord.parse((source.folder / name).read_bytes(), name).report.keys()
        for key, value in source.manifest.report.items():
            if key not in summed:
                rest.setdefault(key, value)
    return rest


def _fidelity(sources: Sequence[_Source]) -> dict[str, Any] | None:
    """As the first source that measured it did: the codec is the same for all."""
    return next((s.manifest.fidelity for s in sources if s.manifest.fidelity is not None), None)
