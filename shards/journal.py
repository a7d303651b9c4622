"""The records of the parts that are done: what a manifest is derived from.

`parts/part-00007.json` exists only if its shard does. Of several records of a part the first counts, unless a
later one covers more corpus rows: a dataset's last part may be short, and is made again when it grows.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shards.atomic import write_atomic, write_once
from shards.errors import ManifestError
from shards.ranges import check_file
from shards.records import PARTS, PartRecord, record_name

CLAIMS = ".claims"
"""Folder of the files that writers lock while they make a part; a finished dataset has none."""


class Journal:
    """The part records of a dataset's folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / PARTS

    def path(self, part: int) -> Path:
        return self.out / record_name(part)

    def claim_path(self, part: int) -> Path:
        return self.out / CLAIMS / f"part-{part:05d}"

    def numbers(self) -> list[int]:
        """Parts that have a record, whole or not."""
        names = (p.stem.removeprefix("part-") for p in self.folder.glob("part-*.json"))
        return sorted(int(n) for n in names if n.isdecimal())

    def state(self) -> dict[str, tuple[int, int]]:
        """Changes with every record that comes, goes or is replaced."""
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".json") and not entry.name.startswith("."):
                        found[entry.name] = entry.stat().st_mtime_ns, entry.stat().st_size
        return found

    def read(self, part: int, *, verify: bool = False) -> PartRecord | None:
        """A part that is done: its record is whole, and its shard has the recorded size.

        Args:
            verify: read the shard too, and compare all of its hashes.

        Raises:
            OSError: a file is there but cannot be read.
        """
        try:
            done = PartRecord.parse(self.path(part).read_bytes(), record_name(part))
            file = self.out / done.shard.file
            whole = done.shard.part == part and file.stat().st_size == done.shard.bytes
            if whole and verify:
                whole = check_file(file, done.shard, lambda size: None).reason() is None
        except (ManifestError, FileNotFoundError):
            return None
        return done if whole else None

    def read_all(self) -> dict[int, PartRecord]:
        """Every part that is done, in order."""
        found = ((n, self.read(n)) for n in self.numbers())
        return {n: part for n, part in found if part is not None}

    def publish(self, done: PartRecord) -> PartRecord:
        """Write a part's record unless there is one that covers its rows; returns the one that counts."""
        part, last = done.shard.part, done.shard.last
        while not write_once(self.path(part), done.to_bytes()):
            first = self.read(part)
            if first is not None and first.shard.last >= last:
                return first
            if self.path(part).exists():
                write_atomic(self.path(part), done.to_bytes())
                break
        return done

    def discard(self, part: int) -> None:
        """Remove a record that does not hold."""
        self.path(part).unlink(missing_ok=True)
