"""Writes logit datasets: a part's shard, then its record, at last the manifest that follows from the records.

Any number of writers share a folder. Each claims the part that it makes; a claim ends with its process, so a
part whose writer was killed is free again. A part is first written under a temporary name, flushed, and
renamed to one that holds its hash; then its record is published, and the first one counts. What no record
names is removed by a writer that finds itself alone. A shard's bytes are a pure function of its rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shards.agreement import agree
from shards.atomic import remove_abandoned, sync_folder, write_atomic
from shards.build import BuiltPart, PartBuilder
from shards.card import card
from shards.errors import ShardError
from shards.journal import CLAIMS, Journal
from shards.locks import Claim, FolderLock
from shards.manifest import MANIFEST, Manifest, ShardRecord, identity_of
from shards.records import PARTS, PartRecord, add_counts
from shards.refusals import explained
from shards.row import Row
from shards.schema import Kind
from shards.settings import settings_of

LOCK = ".lock"


class DatasetWriter:
    """One of the writers of a dataset's folder; a context manager.

    Opening a folder that has a dataset of the same configuration goes on with it. To share the work:

        if not writer.has(part, last) and (claim := writer.claim(part, last)):
            with claim:
                writer.write_part(part, first, last, make(part), report)

    A refusal of the operating system (disk full, folder gone, ...) is a ShardError that says how to go on;
    finished parts are kept.

    Args:
        out: the dataset's folder, made if missing.
        kind: `shared` or `cross`.
        config: everything that decides the bytes, JSON values only; see `shards.settings`.
        take_over: settings, as `compute.threads`, whose value is taken from the dataset where there is one.
        verify: count a part as done only where its bytes have the recorded hashes (they are read).

    Raises:
        ConfigMismatch: the folder holds a dataset made with other settings (names each).
        ManifestError, VersionError: `config`, or what the folder holds, cannot be used.
        ShardError: the folder cannot be written, or holds a copy without part records.
    """

    def __init__(
        self,
        out: Path,
        kind: Kind,
        config: dict[str, Any],
        *,
        take_over: Sequence[str] = (),
        verify: bool = False,
    ) -> None:
        self.out, self.kind = Path(out), kind
        given = json.loads(json.dumps(config, allow_nan=False))
        settings_of(given, str(out))
        self._verify = verify
        self._journal = Journal(self.out)
        self._parts: dict[int, PartRecord] = {}
        self._claims: list[Claim] = []
        with explained(self.out, "cannot be opened for writing"):
            (self.out / PARTS).mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.out / LOCK)
            try:
                self.config = agree(self.out, kind, given, take_over=take_over)
                """The dataset's, settings taken over included."""
                self.settings = settings_of(self.config, str(out))
                self.identity = identity_of(self.config)
                self.builder = PartBuilder(kind, self.settings, self.identity)
                """Encodes rows; what it gives is for `publish`."""
                self._before = self._read_published()
                if self._lock.alone:
                    self._sweep(keep=self._published)
                    self._lock.share()
                (self.out / CLAIMS).mkdir(exist_ok=True)
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
        """Give up the claims and the share of the folder. Nothing else is pending: every part is on disk when
        `write_part` returns."""
        for claim in self._claims:
            claim.close()
        self._lock.close()

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """As published before, if ever."""
        published = self._read_published()
        return published.fidelity if published else None

    def finished(self) -> dict[int, tuple[int, int]]:
        """Part -> its range of corpus rows (first, one past the last), for every part that is on disk."""
        with explained(self.out, "cannot be read"):
            return {n: (p.shard.first, p.shard.last) for n, p in self._journal.read_all().items()}

    def has(self, part: int, last: int) -> bool:
        """Whether a part is on disk with its corpus rows up to `last` (exclusive), whoever made it."""
        known = self._parts.get(part)
        if known is None or known.shard.last < last:
            with explained(self.out, "cannot be read"):
                known = self._journal.read(part, verify=self._verify)
            if known is None:
                return False
            self._parts[part] = known
        return known.shard.last >= last

    def claim(self, part: int, last: int) -> Claim | None:
        """The right to make a part, to be closed when it is written; None where it is on disk already, or
        while another claim on it is held, by whichever writer."""
        self._check_open()
        if self.has(part, last):
            return None
        with explained(self.out, f"part {part} cannot be claimed"):
            claim = Claim.take(self._journal.claim_path(part), locks=self._lock.supported)
            if claim is None:
                return None
            self._claims = [c for c in self._claims if not c.closed] + [claim]
            if self.has(part, last):
                claim.close()
                return None
            if self._journal.read(part, verify=self._verify) is None:
                self._journal.discard(part)
        return claim

    def claimant(self, part: int) -> str:
        """Who claimed a part last, in words."""
        with explained(self.out, "cannot be read"):
            return Claim.holder(self._journal.claim_path(part))

    def write_part(
        self, part: int, first: int, last: int, rows: Sequence[Row], report: dict[str, Any]
    ) -> ShardRecord:
        """Encode and publish the rows of corpus rows [first, last); returns the record that counts, which is
        an earlier one where the part is on disk with as many corpus rows.

        Rows are stored by split, view and order of appearance. `report`: numbers, lists and nested dicts of
        them, added up over all parts in the manifest; like the rows it must follow from the part alone.

        Raises:
            RowError: a row breaks the schema or an invariant.
            PlanMismatch: a row's noise is not that of its plan (noise source `philox`).
            ShardError: the folder cannot be written.
        """
        self._check_open()
        add_counts({}, report)
        return self.publish(self.builder.build(rows, part=part, first=first, last=last), report)

    def publish(self, built: BuiltPart, report: dict[str, Any]) -> ShardRecord:
        """`write_part`, for rows that `builder` has encoded. One thread may do so while another one asks for
        claims.

        Raises:
            ShardError: the folder cannot be written.
        """
        self._check_open()
        add_counts({}, report)
        shard, size = built.shard, len(built.data)
        if not self.has(shard.part, shard.last):
            with explained(self.out, f"part {shard.part} ({size / 1e6:.1f} MB) cannot be written"):
                write_atomic(self.out / shard.file, memoryview(built.data))
                self._publish(PartRecord(shard, built.totals, report))
        return self._parts[shard.part].shard

    def adopt(self, done: PartRecord) -> None:
        """Take a part that another folder's writer made, its verified shard already lying in this folder;
        an earlier record of this part counts, unless it covers fewer corpus rows."""
        self._check_open()
        with explained(self.out, f"part {done.shard.part} cannot be written"):
            self._publish(done)

    def _publish(self, done: PartRecord) -> None:
        counts = self._journal.publish(done)
        self._parts[done.shard.part] = counts
        if counts.shard.file not in (done.shard.file, *self._published):
            (self.out / done.shard.file).unlink(missing_ok=True)

    def finish(
        self, report: dict[str, Any] | None = None, *, fidelity: dict[str, Any] | None = None
    ) -> Manifest:
        """Derive the manifest and the card from all part records, publish them, and close the writer.

        Any writer may do so, several at once too: what is published last names every part, and the same
        records give the same bytes.

        Args:
            report: whole-run facts, put over the added-up reports of the parts.
            fidelity: measured against dense targets; None = as published before, if ever.

        Raises:
            ShardError: no part is finished, one has gone, or the folder cannot be written.
            ManifestError: parts overlap.
        """
        self._check_open()
        with explained(self.out, "all its parts are done, but its manifest cannot be written"):
            while True:
                state = self._journal.state()
                manifest = self._manifest(report or {}, fidelity)
                write_atomic(self.out / "README.md", card(manifest, self.out.resolve().name).encode())
                manifest.save(self.out / MANIFEST)
                if self._journal.state() == state:
                    break
            named = {s.file for s in manifest.shards}
            for file in self._published - named:
                (self.out / file).unlink(missing_ok=True)
            if self._lock.leave():
                self._sweep(keep=set())
        self.close()
        return manifest

    def _manifest(self, report: dict[str, Any], fidelity: dict[str, Any] | None) -> Manifest:
        parts = self._journal.read_all()
        if not parts:
            raise ShardError(f"{self.out}: no part is finished, so there is no dataset to publish")
        if gone := sorted(self._parts.keys() - parts.keys()):
            raise ShardError(
                f"{self.out}: part {gone[0]} was finished and is gone or damaged: run the same tide "
                "precompute again, it makes that part again"
            )
        totals: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for p in parts.values():
            totals, merged = add_counts(totals, p.totals), add_counts(merged, p.report)
        manifest = Manifest(
            kind=self.kind,
            identity=self.identity,
            config=self.config,
            report={**merged, **report},
            fidelity=fidelity or (self._before.fidelity if self._before else None),
            totals={**totals, "bytes": sum(p.shard.bytes for p in parts.values())},
            shards=tuple(p.shard for p in parts.values()),
        )
        return Manifest.from_json(json.loads(json.dumps(manifest.to_json())), str(self.out))

    def _read_published(self) -> Manifest | None:
        """The manifest that is there: a growing dataset stays readable until the next one is out."""
        try:
            return Manifest.load(self.out)
        except ShardError:
            return None

    @property
    def _published(self) -> set[str]:
        return {s.file for s in self._before.shards} if self._before else set()

    def _sweep(self, keep: set[str]) -> None:
        """Remove what interrupted writers left: temporary files, claims, records that do not hold, and shards
        that neither a record nor `keep` names. For a writer that is alone."""
        parts = self._journal.read_all()
        for number in self._journal.numbers():
            if number not in parts:
                self._journal.discard(number)
        keep = keep | {p.shard.file for p in parts.values()}
        for path in self.out.glob("part-*.arrow"):
            if path.name not in keep:
                path.unlink()
        shutil.rmtree(self.out / CLAIMS, ignore_errors=True)
        for folder in (self.out, self.out / PARTS):
            remove_abandoned(folder)
            sync_folder(folder)

    def _check_open(self) -> None:
        if self._lock.closed:
            raise ValueError("the writer is closed")
        if not (self.out / LOCK).exists():
            raise ShardError(
                f"{self.out} is gone (unmounted, or removed while it was written): bring it back and run the "
                "same tide precompute again, it goes on from the parts that are there"
            )
