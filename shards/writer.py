"""Writes logit datasets: a part's shard, then its record, at last the manifest that follows from the records.

A killed run loses at most the part it was writing. `parts/part-00007.json` exists only if its shard does:
first the shard is written under a temporary name, flushed, and renamed to one that holds its hash. What no
record names is removed by the next writer. A shard's bytes are a pure function of its rows.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from shards.atomic import TEMPORARY, sync_folder, write_atomic
from shards.build import build_shard, count_rows
from shards.card import card
from shards.errors import ConfigMismatch, ManifestError, ShardError
from shards.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    check_version,
    identity_of,
    shard_from_json,
)
from shards.noise import check_plan
from shards.row import Row
from shards.schema import FORMAT_VERSION, Kind
from shards.settings import settings_of
from shards.untrusted import parse

DATASET = "dataset.json"
PARTS = "parts"


@dataclass(frozen=True, slots=True)
class _Part:
    """What a part's record holds."""

    shard: ShardRecord
    totals: dict[str, Any]
    report: dict[str, Any]


class DatasetWriter:
    """The one writer of a dataset's folder, for as long as it lives (a lock says so); a context manager.

    Opening a folder that has a dataset of the same configuration goes on with it.

    Args:
        out: the dataset's folder, made if missing.
        kind: `shared` or `cross`.
        config: everything that decides the bytes, JSON values only; see `shards.settings`.

    Raises:
        ConfigMismatch: the folder holds a dataset made with other settings (names each).
        ManifestError, VersionError: `config`, or what the folder holds, cannot be used.
        ShardError: another process is writing to the folder, or it holds a copy without part records.
    """

    def __init__(self, out: Path, kind: Kind, config: dict[str, Any]) -> None:
        self.out, self.kind = Path(out), kind
        self.config: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
        self.settings = settings_of(self.config, str(out))
        self.identity = identity_of(self.config)
        (self.out / PARTS).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock)
            raise ShardError(
                f"{out} is being written by another tide precompute: wait for it, or choose another --out"
            ) from e
        try:
            self._agree()
            self._parts = dict(self._records())
            self._sweep(keep=self._published())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock. Nothing else is pending: every part is on disk when `write_part` returns."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def finished(self) -> dict[int, tuple[int, int]]:
        """Part -> its range of corpus rows (first, one past the last), for every part that is on disk."""
        return {n: (p.shard.first, p.shard.last) for n, p in self._parts.items()}

    def write_part(
        self, part: int, first: int, last: int, rows: Sequence[Row], report: dict[str, Any]
    ) -> ShardRecord:
        """Encode and publish the rows of corpus rows [first, last); replaces an earlier record of this part.

        Rows are stored by split, view and order of appearance. `report`: numbers and nested dicts of numbers,
        summed over all parts in the manifest.

        Raises:
            RowError: a row breaks the schema or an invariant.
            PlanMismatch: a row's noise is not that of its plan (noise source `philox`).
        """
        if self._lock < 0:
            raise ValueError("the writer is closed")
        add_counts({}, report)
        if self.settings.noise_source == "philox":
            for row in rows:
                check_plan(self.settings.noise, row)
        s = self.settings
        data, shard = build_shard(
            rows,
            part=part,
            first=first,
            last=last,
            kind=self.kind,
            codec=s.codec,
            identity=self.identity,
            vocab_size=s.student.vocab_size,
            shared_vocab_size=s.shared_vocab_size,
        )
        write_atomic(self.out / shard.file, data)
        done = _Part(shard, count_rows(rows), report)
        body = asdict(done)
        record = {**body, "sha256": identity_of(body)}
        write_atomic(self._record_path(part), json.dumps(record, indent=1).encode())
        self._parts[part] = done
        return shard

    def finish(
        self, report: dict[str, Any] | None = None, *, fidelity: dict[str, Any] | None = None
    ) -> Manifest:
        """Derive the manifest and the card from the part records and publish them.

        Args:
            report: whole-run facts, put over the summed reports of the parts.
            fidelity: measured against dense targets; None = not measured.

        Raises:
            ShardError: no part is finished. ManifestError: parts overlap.
        """
        if not self._parts:
            raise ShardError(f"{self.out}: no part is finished, so there is no dataset to publish")
        parts = [self._parts[n] for n in sorted(self._parts)]
        totals: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for p in parts:
            totals, merged = add_counts(totals, p.totals), add_counts(merged, p.report)
        manifest = Manifest(
            kind=self.kind,
            identity=self.identity,
            config=self.config,
            report={**merged, **(report or {})},
            fidelity=fidelity,
            totals={**totals, "bytes": sum(p.shard.bytes for p in parts)},
            shards=tuple(p.shard for p in parts),
        )
        manifest = Manifest.from_json(json.loads(json.dumps(manifest.to_json())), str(self.out))
        write_atomic(self.out / "README.md", card(manifest, self.out.resolve().name).encode())
        manifest.save(self.out / MANIFEST)
        self._sweep(keep=set())
        return manifest

    def _agree(self) -> None:
        """Write the configuration, or compare it with the one that is there."""
        path = self.out / DATASET
        mine = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "identity": self.identity,
            "config": self.config,
        }
        if path.exists():
            theirs = parse(path.read_bytes(), str(path))
            check_version(theirs, str(path))
            differs = list(_differences(theirs.get("config"), self.config))
            if theirs.get("kind") != self.kind:
                differs.insert(0, f"kind: {_short(theirs.get('kind'))} -> {_short(self.kind)}")
            if differs:
                raise ConfigMismatch(
                    f"{self.out} was made with other settings ({'; '.join(differs)}): choose another --out, "
                    "or repeat the options it was made with"
                )
            return
        if (self.out / MANIFEST).exists() or any(self.out.glob("*.arrow")):
            raise ShardError(
                f"{self.out} holds shards but no {DATASET} (a copy of a finished dataset?), so it cannot be "
                "continued: choose another --out"
            )
        write_atomic(path, json.dumps(mine, indent=1).encode())

    def _record_path(self, part: int) -> Path:
        return self.out / PARTS / f"part-{part:05d}.json"

    def _records(self) -> Iterator[tuple[int, _Part]]:
        """Parts that are done: the record is whole and its shard has the recorded size."""
        for path in sorted((self.out / PARTS).glob("part-*.json")):
            try:
                data = parse(path.read_bytes(), path.name)
                digest = data.pop("sha256", None)
                if identity_of(data) != digest:
                    raise ManifestError(f"{path.name} was changed")
                shard = shard_from_json(data.get("shard"), path.name)
                whole = (self.out / shard.file).stat().st_size == shard.bytes
            except (ManifestError, FileNotFoundError):
                whole = False
            if whole:
                yield shard.part, _Part(shard, data["totals"], data["report"])
            else:
                path.unlink()

    def _published(self) -> set[str]:
        """Files of the manifest that is there: a growing dataset stays readable until the next one is out."""
        try:
            return {s.file for s in Manifest.load(self.out).shards}
        except ShardError:
            return set()

    def _sweep(self, keep: set[str]) -> None:
        """Remove what an interrupted writer left: temporary files, and shards that nothing names."""
        keep = keep | {p.shard.file for p in self._parts.values()}
        for path in (*self.out.glob("part-*.arrow"), *self.out.rglob(f"{TEMPORARY}*")):
            if path.name not in keep:
                path.unlink()
        sync_folder(self.out)
        sync_folder(self.out / PARTS)


def add_counts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Sum of two nested dicts of numbers. Raises: ValueError where a value is something else."""
    out = dict(a)
    for key, value in b.items():
        if isinstance(value, dict):
            out[key] = add_counts(out.get(key, {}), value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[key] = out.get(key, 0) + value
        else:
            raise ValueError(f"part reports hold numbers and dicts of numbers, got {key}={value!r}")
    return out


def _differences(theirs: Any, mine: Any, path: str = "") -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted(theirs.keys() | mine.keys()):
            yield from _differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
    elif theirs != mine:
        yield f"{path}: {_short(theirs)} -> {_short(mine)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
