"""The files that some codecs need beside the shards (the teacher's head, a sketch's basis): named, with size
and sha256, by the configuration, and so part of the dataset's identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from shards.atomic import TEMPORARY
from shards.errors import CorruptShard, ShardError
from shards.files import Files
from shards.guard import plain_file
from shards.manifest import Manifest, ShardRecord
from shards.parallel import Work
from shards.ranges import blocks
from shards.settings import FileRecord

PIECE = 1 << 23
"""Bytes asked for at once."""


def all_files(manifest: Manifest) -> list[ShardRecord | FileRecord]:
    """What a dataset consists of, those beside the shards first: without them no row can be used."""
    return [*manifest.settings.files, *manifest.shards]


def reason(record: FileRecord, files: Files, work: Work) -> str | None:
    """Why the file of a place cannot be used; None where it can.

    Raises: ShardError: a remote place cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for piece in _pieces(record, files):
            digest.update(piece)
            size += len(piece)
            work.add(len(piece))
    except FileNotFoundError:
        return "missing"
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"
    except ShardError as e:  # a link or a device; from afar, the connection
        if files.remote:
            raise
        return str(e)
    if size != record.bytes:
        return f"expected {record.bytes} bytes, got {size}"
    return None if digest.hexdigest() == record.sha256 else f"sha256 differs (manifest {record.sha256[:12]})"


def bring(record: FileRecord, files: Files, folder: Path, work: Work) -> int:
    """Copy the file into a folder unless it is there, from where an earlier attempt ended; bytes of it, or 0.

    Raises: CorruptShard: the source has another one, or none. ShardError: it cannot be read.
    """
    if reason(record, Files(folder), Work(0)) is None:
        work.add(record.bytes)
        return 0
    temporary = folder / f"{TEMPORARY}{record.file}"
    for _ in range(2):  # once more from the first byte: the beginning may be that of an older attempt
        digest = hashlib.sha256()
        with open(temporary, "a+b") as out:
            out.seek(0)
            for piece in blocks(out):
                digest.update(piece)
            work.add(done := out.tell())
            try:
                for data in _pieces(record, files, done):
                    digest.update(data)
                    out.write(data)
                    work.add(len(data))
            except FileNotFoundError as e:
                raise CorruptShard(
                    f"{record.file} is missing from {files.url}, and no row can be used without it: ask its "
                    "owner to run tide push again"
                ) from e
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        if digest.hexdigest() == record.sha256:
            os.replace(temporary, folder / record.file)
            return record.bytes
        work.add(-size)
        temporary.unlink()
    raise CorruptShard(
        f"{files.url}/{record.file} is not what its manifest says: ask its owner to run tide verify and to "
        "push it again"
    )


def _pieces(record: FileRecord, files: Files, start: int = 0) -> Iterator[memoryview | bytes]:
    """The file from a byte on; of a remote one no more than its record says.

    Raises: FileNotFoundError. ShardError.
    """
    folder = files.location.folder
    if folder is not None:
        plain_file(str(folder / record.file))
        with open(folder / record.file, "rb", buffering=0) as file:
            file.seek(start)
            yield from blocks(file)
        return
    for offset in range(start, record.bytes, PIECE):
        yield files.range(record.file, offset, min(PIECE, record.bytes - offset))
