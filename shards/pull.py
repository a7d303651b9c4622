"""Pull: copy a dataset into a local folder, shard by shard, each verified before it gets its name, the
manifest last.

Only what is missing or differs is fetched, and a shard cut off in the middle goes on from its last byte.
Nothing that the other side says is trusted: names come from a checked manifest, sizes are bounded by it.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shards import beside
from shards.agreement import DATASET
from shards.atomic import TEMPORARY, sync_folder, write_atomic
from shards.beside import PIECE
from shards.card import card
from shards.errors import CorruptShard, ManifestError, ShardError, UsageError
from shards.files import Files
from shards.location import HubRepo, Location, failing, locate, no_manifest, read_manifest, read_text
from shards.manifest import MANIFEST, Manifest, ShardRecord
from shards.parallel import Report, Work, processors
from shards.ranges import ShardCheck, blocks, check_file
from shards.records import PARTS, record_name
from shards.stores import AGAIN, SoleUse
from shards.transfer import (
    CARD,
    Transferred,
    local_shards,
    manifest_of,
    not_outgrown,
    only_in,
    part_records,
    parts,
    refuse_remote,
    same_dataset,
    sha256_of,
)
from shards.untrusted import parse

ORIGIN = "origin.json"
"""Where a copy came from. It says nothing about what the dataset is, so it is in no hash."""
REMOTE_WORKERS = 8


def pull(
    url: str | Path, folder: str | Path, *, revision: str | None = None, report: Report | None = None
) -> Transferred:
    """Copy the dataset at `url`, or what is missing of it, into `folder`.

    Args:
        revision: on the hub a branch, tag or commit; elsewhere the sha256 of the manifest that is wanted.
        report: called with bytes of shards that are there and verified, and all of them.

    Raises:
        ManifestError, VersionError: there is no usable dataset at `url`.
        ConfigMismatch: `folder` holds another dataset (names each differing setting).
        CorruptShard: what was fetched, twice, is not what the manifest names.
        ShardError: `folder` has parts that `url` has not; the disk is full; the connection is gone.
    """
    source, pin = _source(url, revision)
    text = read_manifest(source)
    if text is None:
        raise no_manifest(source)
    if source.hub is None and revision is not None and not sha256_of(text).startswith(revision.lower()):
        raise UsageError(
            f"{source.url} is not at revision {revision} any more: its manifest's sha256 is {sha256_of(text)}"
        )
    manifest = manifest_of(text, source)
    target = locate(folder)
    here = refuse_remote(folder, target)
    with failing(f"cannot write to {here}", AGAIN):
        here.mkdir(parents=True, exist_ok=True)
        with closing(SoleUse(here)):
            outdated = _may_grow(source, target, here, manifest)
            sizes = _files(Files(source.url), here, manifest, report)
            records = _records(source, here, manifest)
            _publish(source, here, text, manifest, outdated, continuable=records)
            origin = {
                "url": _plain_url(source),
                "revision": pin or sha256_of(text),
                "manifest_sha256": sha256_of(text),
                "pulled": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_atomic(here / ORIGIN, json.dumps(origin, indent=1).encode() + b"\n")
    return Transferred(
        manifest=manifest,
        url=_plain_url(source),
        revision=str(origin["revision"]),
        moved=sum(size > 0 for size in sizes),
        moved_bytes=sum(sizes),
        continuable=records,
    )


def _source(url: str | Path, revision: str | None) -> tuple[Location, str | None]:
    """The place to read from, and the commit it is pinned to on the hub."""
    source = locate(url)
    if source.hub is None:
        return source, None
    from shards.hub import pinned  # huggingface_hub takes a while to import

    if revision is not None and source.hub.revision not in (None, revision):
        raise UsageError(f"{url} names revision {source.hub.revision}, --revision {revision}: give one")
    repo = pinned(HubRepo(source.hub.name, revision or source.hub.revision))
    return locate(repo.url), repo.revision


def _plain_url(source: Location) -> str:
    return source.url if source.hub is None else replace(source.hub, revision=None).url


def _may_grow(source: Location, target: Location, folder: Path, manifest: Manifest) -> list[ShardRecord]:
    """Shards of the version in `folder` that the new one no longer names: removed when it is out.

    Raises: ConfigMismatch, ShardError: what is there must not be replaced.
    """
    text = read_manifest(target)
    there: list[ShardRecord] = []
    if text is not None:
        mine = manifest_of(text, target)
        same_dataset(mine, manifest, str(folder))
        there += mine.shards
    elif (folder / DATASET).exists():
        mine_config = parse((folder / DATASET).read_bytes(), DATASET)
        same_dataset(replace(manifest, config=mine_config.get("config") or {}), manifest, str(folder))
    outdated = only_in([*there, *local_shards(folder)], manifest.shards)
    lost = not_outgrown(outdated, manifest.shards)
    if lost and not (text is not None and _origin(folder).get("manifest_sha256") == sha256_of(text)):
        raise ShardError(
            f"{folder} has {parts(lost)} that {source.url} has not, or has with other bytes: pull "
            "into another folder, then tide merge joins them"
        )
    return outdated


def _origin(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, ManifestError):
        return parse((folder / ORIGIN).read_bytes(), ORIGIN)
    return {}


def _files(files: Files, folder: Path, manifest: Manifest, report: Report | None) -> list[int]:
    """Bring all files into the folder; bytes that had to be fetched of each."""
    named = beside.all_files(manifest)
    missing = sum(s.bytes for s in named if not (folder / s.file).exists())
    partial = sum(p.stat().st_size for p in folder.glob(f"{TEMPORARY}*"))
    free = shutil.disk_usage(folder).free
    if missing - partial > free:
        raise ShardError(
            f"{folder} has room for {free / 1e9:,.2f} GB, but {missing / 1e9:,.2f} GB are missing: make "
            "room, or choose another folder"
        )
    work = Work(sum(s.bytes for s in named), report)
    workers = REMOTE_WORKERS if files.remote else processors()
    try:
        sizes = [beside.bring(record, files, folder, work) for record in manifest.settings.files]
        done = work.each(lambda s: _shard(files, folder, s, work), manifest.shards, workers)
        return [*sizes, *(shard.bytes if new else 0 for shard, new in done)]
    finally:
        sync_folder(folder)


def _shard(files: Files, folder: Path, shard: ShardRecord, work: Work) -> bool:
    """Whether the shard had to be fetched."""
    final = folder / shard.file
    with suppress(FileNotFoundError):
        check = check_file(final, shard, work.add)
        if check.reason() is None:
            return False
        work.add(-check.bytes)
    temporary = folder / f"{TEMPORARY}{shard.file}"
    for again in (True, False):
        check = _fetch(files, temporary, shard, work)
        if (reason := check.reason()) is None:
            os.replace(temporary, final)
            return True
        # Once more from its first byte: the beginning may be that of an older attempt.
        work.add(-check.bytes)
        temporary.unlink()
        if not again:
            break
    raise CorruptShard(
        f"{files.url}/{shard.file} is not what its manifest says: {reason}; ask its owner to run tide verify "
        "and to push it again"
    )


def _fetch(files: Files, temporary: Path, shard: ShardRecord, work: Work) -> ShardCheck:
    """Append to the temporary file what it lacks of the shard, hashing all of it."""
    check = ShardCheck(shard)
    with open(temporary, "a+b") as out:
        out.seek(0)
        for piece in blocks(out):
            check.update(piece)
        work.add(check.bytes)
        while check.bytes < shard.bytes:
            data = _range(files, shard, check.bytes, min(PIECE, shard.bytes - check.bytes))
            if not data:
                break
            check.update(data)
            out.write(data)
            work.add(len(data))
        out.flush()
        os.fsync(out.fileno())
    return check


def _range(files: Files, shard: ShardRecord, offset: int, length: int) -> bytes:
    try:
        return files.range(shard.file, offset, length)
    except FileNotFoundError as e:
        raise CorruptShard(
            f"{shard.file} is missing from {files.url}: ask its owner to run tide push again"
        ) from e


def _records(source: Location, folder: Path, manifest: Manifest) -> bool:
    """Bring the parts' records and, where all are there, what makes the copy one to go on with."""
    found = list(part_records(source, manifest))
    if not found or len(found) < len(manifest.shards):
        return False
    (folder / PARTS).mkdir(exist_ok=True)
    for record, data in found:
        write_atomic(folder / record.name, data)
    return True


def _publish(
    source: Location,
    folder: Path,
    text: bytes,
    manifest: Manifest,
    outdated: list[ShardRecord],
    *,
    continuable: bool,
) -> None:
    """The card, the manifest; then what only the version before it had goes."""
    try:
        words = read_text(source, CARD)
    except FileNotFoundError:
        words = card(manifest, folder.resolve().name).encode()
    write_atomic(folder / CARD, words)
    if continuable:
        about = {n: getattr(manifest, n) for n in ("format_version", "kind", "identity", "config")}
        write_atomic(folder / DATASET, json.dumps(about, indent=1).encode())
    write_atomic(folder / MANIFEST, text)
    named = {s.part for s in manifest.shards}
    for shard in outdated:
        (folder / shard.file).unlink(missing_ok=True)
        if shard.part not in named:
            (folder / record_name(shard.part)).unlink(missing_ok=True)
    sync_folder(folder)
