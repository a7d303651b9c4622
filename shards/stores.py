"""Places a dataset is sent to. Shards go first, under names that hold their hash; the manifest is last and
decides: until it is there a reader sees what was there before, and one of two senders at once loses.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.atomic import TEMPORARY, sync_folder, write_atomic
from shards.errors import ShardError, UsageError
from shards.location import Location, failing, is_s3, read_manifest
from shards.locks import lock
from shards.manifest import MANIFEST
from shards.parallel import Work, processors
from shards.ranges import blocks

AGAIN = "the same command goes on from there"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to send, its bytes known by their hash."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, data: bytes) -> Upload:
        return cls(name, data, len(data), hashlib.sha256(data).hexdigest())


class Store(Protocol):
    """What `push` needs of a place."""

    def close(self) -> None:
        """Let others write there again."""

    def published(self) -> bytes | None:
        """The manifest that is there now, which `publish` will replace and nothing else."""

    def send(self, files: Sequence[Upload], work: Work) -> Iterator[int]:
        """Bring files there, in any order; gives for each the bytes that had to be sent, 0 = it was there."""

    def publish(
        self, manifest: Upload, records: Sequence[Upload], card: Upload, dropped: Sequence[str]
    ) -> str | None:
        """Make what was sent the dataset of this place; its revision, where the place counts them.

        Args:
            dropped: shards that the manifest before names and this one does not.

        Raises: ShardError: somebody else published since `published` was asked.
        """


def lost_race(location: Location) -> ShardError:
    return ShardError(
        f"{location.url} was published by somebody else meanwhile, and is theirs now; nothing that readers "
        "see was changed by this push: run it again to compare with what is there"
    )


class FolderStore:
    """A local folder, locked against other writers for as long as this lives."""

    def __init__(self, location: Location) -> None:
        if location.folder is None:
            raise ValueError("not a folder")
        self.location, self.folder = location, location.folder
        with failing(f"cannot write to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = SoleUse(self.folder)

    def close(self) -> None:
        self._lock.close()

    def published(self) -> bytes | None:
        return read_manifest(self.location)

    def send(self, files: Sequence[Upload], work: Work) -> Iterator[int]:
        with failing(f"cannot write to {self.folder}", AGAIN):
            for _, sent in work.each(lambda file: self._send(file, work), files, processors()):
                yield sent

    def publish(
        self, manifest: Upload, records: Sequence[Upload], card: Upload, dropped: Sequence[str]
    ) -> str | None:
        with failing(f"cannot write to {self.folder}", AGAIN):
            for file in (*records, manifest, card):
                path = self.folder / file.name
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, bytes_of(file))
        return None

    def _send(self, file: Upload, work: Work) -> int:
        path = self.folder / file.name
        if path.exists() and path.stat().st_size == file.size and _sha256(path) == file.sha256:
            work.add(file.size)
            return 0
        temporary = path.with_name(TEMPORARY + file.name)
        digest = hashlib.sha256()
        with open(_path(file), "rb") as source, open(temporary, "wb") as target:
            for piece in blocks(source):
                digest.update(piece)
                target.write(piece)
                work.add(len(piece))
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != file.sha256:
            temporary.unlink()
            raise changed(file)
        os.replace(temporary, path)
        sync_folder(self.folder)
        return file.size


class UrlStore:
    """Any other file system of fsspec. Sizes are all it tells of what is there; a manifest that appears in
    the instant between looking and writing is not noticed unless the file system can create exclusively."""

    workers = 4

    def __init__(self, location: Location) -> None:
        self.location = location
        self._before: bytes | None = None

    def close(self) -> None:
        """Nothing is held."""

    def published(self) -> bytes | None:
        self._before = read_manifest(self.location)
        return self._before

    def send(self, files: Sequence[Upload], work: Work) -> Iterator[int]:
        with failing(f"cannot write to {self.location.url}", AGAIN):
            self.location.fs.makedirs(self.location.root, exist_ok=True)
            for _, sent in work.each(lambda file: self._send(file, work), files, self.workers):
                yield sent

    def publish(
        self, manifest: Upload, records: Sequence[Upload], card: Upload, dropped: Sequence[str]
    ) -> str | None:
        fs = self.location.fs
        with failing(f"cannot publish {self.location.url}", AGAIN):
            for file in records:
                fs.makedirs(self.location.path(file.name).rpartition("/")[0], exist_ok=True)
                fs.pipe_file(self.location.path(file.name), bytes_of(file))
            fs.invalidate_cache()
            if (there := read_manifest(self.location)) not in (self._before, manifest.content):
                raise lost_race(self.location)
            if there != manifest.content:
                try:
                    mode = "overwrite" if self._before else "create"
                    fs.pipe_file(self.location.path(MANIFEST), bytes_of(manifest), mode=mode)
                except FileExistsError as e:
                    raise lost_race(self.location) from e
            fs.pipe_file(self.location.path(card.name), bytes_of(card))
        return None

    def _send(self, file: Upload, work: Work) -> int:
        missing = self._size(file) != file.size
        if missing:
            self.location.fs.put_file(str(_path(file)), self.location.path(file.name))
            self.location.fs.invalidate_cache()
            if (found := self._size(file)) != file.size:
                raise ShardError(
                    f"{self.location.url}/{file.name} has {found} bytes after {file.size} were sent; "
                    "run the same push again"
                )
        work.add(file.size)
        return file.size if missing else 0

    def _size(self, file: Upload) -> int | None:
        try:
            return int(self.location.fs.size(self.location.path(file.name)))
        except FileNotFoundError:
            return None


def open_store(location: Location, *, private: bool = True) -> Store:
    """Raises: UsageError: nothing can be written there."""
    if location.hub is not None:
        from shards.hub import HubStore  # huggingface_hub takes a while to import

        return HubStore(location, private=private)
    if location.folder is not None:
        return FolderStore(location)
    if location.url.startswith(("http://", "https://")):
        raise UsageError(f"{location.url} can only be read; push to a folder, s3:// or hf://")
    if is_s3(location):
        from shards.bucket import S3Store

        return S3Store(location)
    return UrlStore(location)


class SoleUse:
    """Keeps writers, pulls and pushes out of a folder, by the lock that `DatasetWriter` shares.

    Raises: ShardError: one of them is at work.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        if lock(self._handle) is False:
            os.close(self._handle)
            raise ShardError(f"{folder} is being written by another tide: wait for it, then run this again")

    def close(self) -> None:
        os.close(self._handle)


def changed(file: Upload) -> ShardError:
    return ShardError(f"{file.name} changed while it was sent: wait for its writer, then push again")


def bytes_of(file: Upload) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def _path(file: Upload) -> Path:
    if isinstance(file.content, bytes):
        raise ValueError(f"{file.name} is not a file on disk")
    return file.content


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
