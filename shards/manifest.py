"""The manifest: what a logit dataset is, which files it has, and the hash of every byte range in them.

It is derived from the part records and published last; a reader uses nothing that it does not name. On load
its types are checked, its agreement with itself (sizes, ranges, identity), and that files stay in the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shards.atomic import write_atomic
from shards.codec import Codec
from shards.errors import ManifestError, VersionError
from shards.guard import MAX_BATCH_BYTES, MAX_BATCH_ROWS, Guard, plain_file
from shards.invariants import SPLITS
from shards.noise import NoiseConfig
from shards.schema import FORMAT_VERSION, Kind
from shards.settings import NoiseSource, Settings, StudentInfo, identity_of, settings_of
from shards.untrusted import MAX_JSON_BYTES, build, parse

__all__ = [
    "BatchRecord",
    "Manifest",
    "ShardRecord",
    "StudentInfo",
    "check_version",
    "identity_of",
    "shard_hash",
]

MANIFEST = "manifest.json"
MAX_FRAME_BYTES = 1 << 20
"""Of what Arrow writes before the first record batch of a shard or after its last one."""
_SHA = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.arrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """One record batch: a byte range of a shard, all its rows of one view and split."""

    offset: int
    length: int
    rows: int
    view: int
    split: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard file. Head, batches and foot follow one another and cover every byte."""

    part: int
    first: int
    """First corpus row of the part."""
    last: int
    """One past its last corpus row."""
    file: str
    rows: int
    bytes: int
    head_sha256: str
    """Of the bytes before the first record batch: Arrow's magic and schema."""
    foot_sha256: str
    """Of the bytes after the last one: Arrow's footer."""
    sha256: str
    """Over the digests of head, batches and foot."""
    batches: tuple[BatchRecord, ...]

    @property
    def head(self) -> tuple[int, int]:
        """(offset, length) in bytes; the whole file where there is no record batch."""
        return 0, self.batches[0].offset if self.batches else self.bytes

    @property
    def foot(self) -> tuple[int, int]:
        """(offset, length) in bytes."""
        end = self.batches[-1].offset + self.batches[-1].length if self.batches else self.bytes
        return end, self.bytes - end


def shard_hash(digests: Iterable[str]) -> str:
    """sha256 (hex) over segment digests (hex): head, batches in order, foot."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def check_version(data: dict[str, Any], where: str) -> None:
    """Raises: VersionError unless `data` says it is of this program's format version."""
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise VersionError(
            f"{where}: format version {version!r} is not one this tide reads ({FORMAT_VERSION}); "
            "install the tide that made the dataset, or make it again"
        )


def shard_from_json(data: Any, where: str) -> ShardRecord:
    """Raises: ManifestError for a record that is malformed, contradicts itself or names a file elsewhere."""

    def refuse(message: str) -> ManifestError:
        return ManifestError(f"{where}: {message}; fetch the dataset again")

    batches = data.get("batches") if isinstance(data, dict) else None
    if not isinstance(batches, list):
        raise refuse("no list of record batches")
    records = tuple(build(BatchRecord, b, f"{where}: record batch {i}") for i, b in enumerate(batches))
    shard = build(ShardRecord, {**data, "batches": records}, where)
    if not _FILE.fullmatch(shard.file):
        raise refuse(f"file name {shard.file!r} is not a plain .arrow name inside the dataset's folder")
    if not shard.part >= 0 or not 0 <= shard.first < shard.last:
        raise refuse(f"part {shard.part} has the impossible row range {shard.first}..{shard.last}")
    end = shard.head[1]
    for i, b in enumerate(shard.batches):
        possible = 1 <= b.length <= MAX_BATCH_BYTES and 1 <= b.rows <= MAX_BATCH_ROWS
        if b.offset != end or not possible or b.split not in SPLITS:
            raise refuse(
                f"record batch {i} is impossible: {b.rows} rows of split {b.split!r}, "
                f"{b.length} bytes at {b.offset} (expected at {end})"
            )
        end = b.offset + b.length
    if end > shard.bytes:
        raise refuse(f"record batches end at byte {end} of a file of {shard.bytes}")
    for what, (_, length) in (("before the first", shard.head), ("after the last", shard.foot)):
        if length > MAX_FRAME_BYTES:
            raise refuse(f"{length} bytes {what} record batch, at most {MAX_FRAME_BYTES} are possible")
    if (rows := sum(b.rows for b in shard.batches)) != shard.rows:
        raise refuse(f"{shard.rows} rows declared, {rows} in the record batches")
    digests = [shard.head_sha256, *(b.sha256 for b in shard.batches), shard.foot_sha256]
    if not all(_SHA.fullmatch(d) for d in digests) or shard_hash(digests) != shard.sha256:
        raise refuse(f"the sha256 of {shard.file} does not follow from those of its record batches")
    return shard


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know before it opens a shard."""

    kind: Kind
    identity: str
    """`identity_of(config)`."""
    config: dict[str, Any]
    """Everything that decides the bytes: teacher, student, noise, codec, source, ..."""
    report: dict[str, Any]
    """What happened on the way: dropped spans by reason, timings, diagnostics."""
    totals: dict[str, Any]
    """Sums over all shards: rows, bytes, samples per split, tokens, maskable, masked, ..."""
    shards: tuple[ShardRecord, ...]
    fidelity: dict[str, Any] | None = None
    """Measured against dense targets, where that was asked for."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path_or_url: str | Path, read: Callable[[str], bytes] | None = None) -> Manifest:
        """Read the manifest of a dataset folder (local, or any fsspec URL).

        Args:
            read: gives a file of the folder by its name; None = through fsspec.

        Raises:
            ManifestError: missing, unreadable, or contradicting itself.
            VersionError: made by a program of another format version, or with an unknown codec.
        """
        try:
            if read is None:
                fs, root = fsspec.core.url_to_fs(str(path_or_url))
                path = f"{root.rstrip('/')}/{MANIFEST}"
                if isinstance(fs, LocalFileSystem):
                    plain_file(path)
                text = fs.cat_file(path, start=0, end=MAX_JSON_BYTES + 1)
            else:
                text = read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise ManifestError(
                f"{path_or_url} has no {MANIFEST}: not a logit dataset, or an unfinished one (then run the "
                "same tide precompute again)"
            ) from e
        except OSError as e:
            raise ManifestError(f"cannot read {path_or_url}/{MANIFEST}: {e}") from e
        return cls.from_json(parse(text, MANIFEST), MANIFEST)

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = MANIFEST) -> Manifest:
        """Raises: ManifestError, VersionError (see `load`)."""
        check_version(data, where)
        body = {k: v for k, v in data.items() if k != "sha256"}
        if data.get("sha256") != identity_of(body):
            raise ManifestError(f"{where}: its sha256 is not that of its content; fetch the dataset again")
        shards = data.get("shards")
        if not isinstance(shards, list):
            raise ManifestError(f"{where} has no list of shards; fetch the dataset again")
        records = tuple(shard_from_json(s, f"{where}: shard {i}") for i, s in enumerate(shards))
        manifest = build(cls, {**body, "shards": records}, where)
        manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        settings = self.settings
        if identity_of(self.config) != self.identity:
            raise ManifestError(f"{where}: the identity is not that of its config; fetch the dataset again")
        for a, b in pairwise(self.shards):
            if b.part <= a.part or b.first < a.last:
                raise ManifestError(
                    f"{where}: part {b.part} (rows {b.first}..{b.last}) overlaps or precedes part {a.part} "
                    f"(rows {a.first}..{a.last}); fetch the dataset again"
                )
        for shard in self.shards:
            for i, batch in enumerate(shard.batches):
                if not 0 <= batch.view < settings.noise.views:
                    raise ManifestError(
                        f"{where}: {shard.file}: record batch {i} is of view {batch.view}, but there are "
                        f"{settings.noise.views} views; fetch the dataset again"
                    )
        for name in ("rows", "bytes"):
            found = sum(getattr(s, name) for s in self.shards)
            if self.totals.get(name) != found:
                raise ManifestError(
                    f"{where}: totals say {self.totals.get(name)} {name}, the shards have {found}; "
                    "fetch the dataset again"
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON object, whose `sha256` is that of everything else in it as canonical JSON."""
        names = ["format_version", "kind", "identity", "config", "report", "fidelity", "totals"]
        body = {**{n: getattr(self, n) for n in names}, "shards": [asdict(s) for s in self.shards]}
        return {**body, "sha256": identity_of(body)}

    def save(self, path: Path) -> None:
        """Write the manifest to the file `path`, whole or not at all."""
        write_atomic(path, json.dumps(self.to_json(), indent=1, allow_nan=False).encode() + b"\n")

    @cached_property
    def settings(self) -> Settings:
        return settings_of(self.config, MANIFEST)

    @property
    def noise(self) -> NoiseConfig:
        return self.settings.noise

    @property
    def noise_source(self) -> NoiseSource:
        """`philox`: plans can be computed again; `explicit`: they were given."""
        return self.settings.noise_source

    @cached_property
    def guard(self) -> Guard:
        """Stands between the dataset's record batches and Arrow."""
        return Guard(
            kind=self.kind,
            codec=self.codec,
            max_length=self.student.max_length,
            block_size=self.block_size,
            vocab_size=self.shared_vocab_size or self.student.vocab_size,
        )

    @property
    def codec(self) -> Codec:
        return self.settings.codec

    @property
    def block_size(self) -> int:
        return self.settings.block_size

    @property
    def student(self) -> StudentInfo:
        return self.settings.student

    @property
    def shared_vocab_size(self) -> int | None:
        """Ids both models share; None = not declared (cross tokenizer, or the student's whole vocabulary)."""
        return self.settings.shared_vocab_size

    @property
    def teacher(self) -> dict[str, Any]:
        return self.settings.teacher
