"""Push: publish a finished local dataset, shard by shard, the manifest last.

Only what is missing is sent, so the same push goes on after an interruption.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from shards import beside
from shards.card import card
from shards.errors import CorruptShard, ShardError
from shards.files import Files
from shards.location import Location, failing, locate, no_manifest, read_manifest, read_text
from shards.manifest import MANIFEST, Manifest, ShardRecord
from shards.parallel import Report, Work, processors
from shards.ranges import check_file
from shards.stores import Upload, open_store
from shards.transfer import (
    CARD,
    Transferred,
    manifest_of,
    not_outgrown,
    only_in,
    part_records,
    parts,
    refuse_remote,
    same_dataset,
    sha256_of,
)


def push(
    source: str | Path,
    url: str,
    *,
    replace: bool = False,
    private: bool = True,
    report: Report | None = None,
) -> Transferred:
    """Publish the dataset in the folder `source`. Every shard is verified before it is sent.

    Args:
        url: folder, `hf://datasets/OWNER/NAME[@BRANCH]`, `OWNER/NAME`, `s3://BUCKET/PATH`, other fsspec URL.
        replace: let parts go that `url` has and `source` has not, or has with other bytes.
        private: whether a hub repo made by this can be seen by its owner alone.
        report: called with bytes verified and sent, and twice the dataset's bytes.

    Raises:
        ManifestError: there is no finished dataset in `source`.
        CorruptShard: shards of it differ from its manifest; nothing was sent.
        ConfigMismatch: another dataset is at `url` (names each differing setting).
        ShardError: `url` has parts of its own; somebody else published meanwhile; reading or writing failed.
    """
    here = locate(source)
    folder = refuse_remote(source, here)
    text = read_manifest(here)
    if text is None:
        raise no_manifest(here)
    manifest = manifest_of(text, here)
    target = locate(url)
    if target.folder is not None and target.folder.resolve() == folder.resolve():
        raise ShardError(f"{url} is the dataset itself: name another place")
    work = Work(2 * sum(f.bytes for f in beside.all_files(manifest)), report)
    with closing(open_store(target, private=private)) as store:
        before = store.published()
        dropped = [] if before is None else _given_up(manifest_of(before, target), manifest, target, replace)
        sizes = list(store.send(_verified(folder, manifest, work), work))
        records = [Upload.of(record.name, data) for record, data in part_records(here, manifest)]
        revision = store.publish(Upload.of(MANIFEST, text), records, _card(here, folder, manifest), dropped)
    return Transferred(
        manifest=manifest,
        url=target.url,
        revision=revision or sha256_of(text),
        moved=sum(size > 0 for size in sizes),
        moved_bytes=sum(sizes),
        continuable=len(records) == len(manifest.shards),
    )


def _given_up(theirs: Manifest, mine: Manifest, target: Location, replace: bool) -> list[str]:
    """Files that readers of `target` will no longer be shown."""
    same_dataset(theirs, mine, target.url)
    outdated = only_in(theirs.shards, mine.shards)
    lost = not_outgrown(outdated, mine.shards)
    if lost and not replace:
        raise ShardError(
            f"{target.url} has {parts(lost)} of this dataset with other bytes, or has more than this copy: "
            "tide pull it and tide merge both, or push with --replace to let its own parts go"
        )
    return [s.file for s in outdated]


def _verified(folder: Path, manifest: Manifest, work: Work) -> list[Upload]:
    """All files, read and found to be what the manifest says."""

    def check(shard: ShardRecord) -> tuple[Upload, str | None]:
        path = folder / shard.file
        try:
            found = check_file(path, shard, work.add, whole=True)
        except FileNotFoundError:
            return Upload(shard.file, path, 0, ""), "missing"
        return Upload(shard.file, path, shard.bytes, found.sha256), found.reason()

    with failing(f"cannot read {folder}"):
        checked = dict(work.each(check, manifest.shards, processors()))
    bad = [f"{s.file}: {checked[s][1]}" for s in manifest.shards if checked[s][1]]
    if bad:
        more = f" (and {len(bad) - 1} more shards)" if len(bad) > 1 else ""
        raise CorruptShard(
            f"{folder}: {bad[0]}{more}; nothing was sent: tide verify lists all; make or fetch them again"
        )
    uploads = [checked[s][0] for s in manifest.shards]
    for record in manifest.settings.files:
        if said := beside.reason(record, Files(folder), work):
            raise CorruptShard(
                f"{folder}: {record.file}: {said}; no row can be used without it, so nothing was sent"
            )
        uploads.append(Upload(record.file, folder / record.file, record.bytes, record.sha256))
    return uploads


def _card(here: Location, folder: Path, manifest: Manifest) -> Upload:
    """The folder's card, or a new one."""
    try:
        return Upload.of(CARD, read_text(here, CARD))
    except FileNotFoundError:
        return Upload.of(CARD, card(manifest, folder.resolve().name).encode())
