"""What push and pull share: what they tell, whether one dataset may take another's place, part records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.beside import all_files
from shards.errors import ConfigMismatch, ManifestError, ShardError
from shards.location import Location, read_text
from shards.manifest import MANIFEST, Manifest, ShardRecord
from shards.records import PartRecord, differences, record_name
from shards.untrusted import parse

CARD = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Transferred:
    """What a push or a pull did."""

    manifest: Manifest
    url: str
    """Of the other end, a hub repo without its revision."""
    revision: str
    """Of the other end: a commit on the hub, an entity tag on S3, elsewhere the manifest's sha256."""
    moved: int
    """Files that were sent or fetched, of `files`; the others were there."""
    moved_bytes: int
    continuable: bool
    """Whether all parts' records came along, so that the copy can be continued and merged."""

    @property
    def files(self) -> int:
        """Shards, and what the codec needs beside them."""
        return len(all_files(self.manifest))


def manifest_of(text: bytes, location: Location) -> Manifest:
    """Raises: ManifestError, VersionError: naming the place."""
    where = f"{location.url}/{MANIFEST}"
    return Manifest.from_json(parse(text, where), where)


def sha256_of(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def same_dataset(theirs: Manifest, mine: Manifest, place: str) -> None:
    """Raises: ConfigMismatch: `place` holds `theirs`, which is not an older or newer version of `mine`."""
    if differs := setting_differences(theirs, mine):
        raise ConfigMismatch(f"{place} holds another dataset ({differs}): choose another place for this one")


def setting_differences(theirs: Manifest, mine: Manifest) -> str:
    """Each setting that keeps two datasets from being versions of one; empty where none does."""
    kinds = [] if theirs.kind == mine.kind else [f"kind: {theirs.kind} -> {mine.kind}"]
    return "; ".join([*kinds, *differences(theirs.config, mine.config)])


def only_in(theirs: Sequence[ShardRecord], mine: Sequence[ShardRecord]) -> list[ShardRecord]:
    """The shards of `theirs` that `mine` has not, or has with other bytes."""
    known = {(s.file, s.sha256) for s in mine}
    return list(dict.fromkeys(s for s in theirs if (s.file, s.sha256) not in known))


def outgrown(old: ShardRecord, new: ShardRecord) -> bool:
    """Whether a part was made again because its corpus rows have become more: the last one may be short."""
    return old.part == new.part and old.first == new.first and old.last < new.last


def not_outgrown(old: Sequence[ShardRecord], new: Sequence[ShardRecord]) -> list[ShardRecord]:
    """Those of `old` that would be lost with `new` in their place."""
    by_part = {s.part: s for s in new}
    return [s for s in old if s.part not in by_part or not outgrown(s, by_part[s.part])]


def parts(shards: Sequence[ShardRecord]) -> str:
    """`part 7` or `parts 1, 2, 3 and 5 more`, for messages."""
    numbers = [str(s.part) for s in shards]
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"part{'s' * (len(numbers) > 1)} {', '.join(numbers[:8])}{more}"


def part_records(location: Location, manifest: Manifest) -> Iterator[tuple[PartRecord, bytes]]:
    """The records of a dataset's parts that are there and agree with its manifest. Raises: ShardError."""
    for shard in manifest.shards:
        name = record_name(shard.part)
        try:
            data = read_text(location, name)
            record = PartRecord.parse(data, name)
        except (FileNotFoundError, NotADirectoryError):
            return  # a place has all of them or none: asking for thousands one by one would take minutes
        except ManifestError:
            continue
        if record.shard == shard:
            yield record, data


def local_shards(folder: Path) -> list[ShardRecord]:
    """What the part records of a folder name, published or not."""
    found = []
    for path in sorted((folder / "parts").glob("part-*.json")):
        try:
            found.append(PartRecord.parse(path.read_bytes(), path.name).shard)
        except ManifestError:
            continue
    return found


def licences(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(setting, licence) for every licence that a configuration states."""
    if isinstance(config, dict):
        for key, value in config.items():
            where = f"{path}.{key}" if path else key
            if key in ("licence", "license") and isinstance(value, str) and value:
                yield path, value
            else:
                yield from licences(value, where)
    elif isinstance(config, list):
        for item in config:
            yield from licences(item, path)


def refuse_remote(text: str | Path, location: Location) -> Path:
    """The folder of a local place. Raises: ShardError: it is somewhere else."""
    if location.folder is None:
        raise ShardError(f"{text} is not a local folder: tide pull copies it into one")
    return location.folder
