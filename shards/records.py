"""A part's record: what `parts/part-00007.json` says of the shard that was made for one range of corpus rows.

The manifest follows from the records, so a folder that has them can be continued and merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from shards.errors import ManifestError
from shards.manifest import ShardRecord, shard_from_json
from shards.settings import identity_of
from shards.untrusted import parse

PARTS = "parts"


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One part that is done."""

    shard: ShardRecord
    totals: dict[str, Any]
    """`shards.build.count_rows` of its rows."""
    report: dict[str, Any]
    """Numbers, lists and nested dicts of them; added up over all parts in the manifest."""

    @classmethod
    def parse(cls, data: bytes, where: str) -> PartRecord:
        """Raises: ManifestError: not a record, or one that was changed."""
        body = parse(data, where)
        digest = body.pop("sha256", None)
        shard = shard_from_json(body.get("shard"), where)
        totals, report = body.get("totals"), body.get("report")
        if identity_of(body) != digest or not (isinstance(totals, dict) and isinstance(report, dict)):
            raise ManifestError(f"{where} was changed")
        try:
            return cls(shard, add_counts({}, totals), add_counts({}, report))
        except ValueError as e:
            raise ManifestError(f"{where}: {e}") from e

    def to_bytes(self) -> bytes:
        body = asdict(self)
        return json.dumps({**body, "sha256": identity_of(body)}, indent=1).encode()

    @property
    def name(self) -> str:
        """Its file, inside the dataset."""
        return record_name(self.shard.part)


def record_name(part: int) -> str:
    return f"{PARTS}/part-{part:05d}.json"


def add_counts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts in one: numbers are summed, lists joined. Raises: ValueError where a value is
    something else, or of another kind on the other side."""
    out = dict(a)
    for key, value in b.items():
        before = out.get(key)
        if isinstance(value, dict) and isinstance(before, dict | None):
            out[key] = add_counts(before or {}, value)
        elif isinstance(value, list) and isinstance(before, list | None):
            out[key] = [*(before or []), *value]
        elif _is_number(value) and (before is None or _is_number(before)):
            out[key] = (before or 0) + value
        else:
            raise ValueError(f"part reports hold numbers, lists and dicts of them, got {key}={value!r}")
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(theirs: Any, mine: Any, path: str = "") -> Iterator[str]:
    """Each setting in which two configurations differ, as `name: theirs -> mine`."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted(theirs.keys() | mine.keys()):
            yield from differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
    elif theirs != mine:
        yield f"{path}: {short(theirs)} -> {short(mine)}"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
