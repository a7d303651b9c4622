"""Files that exist whole or not at all, even if the machine stops in the middle of writing them.

A file is written under a temporary name that its process keeps locked. What can be locked was abandoned.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.locks import lock

TEMPORARY = ".tmp-"
"""Prefix of names under which files are written before they exist."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How a file system says that it has no hard links."""


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write beside the target, flush to disk, rename over it, flush the folder.

    Raises: OSError: the target is as it was.
    """
    with _written(path, data) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes | memoryview) -> bool:
    """`write_atomic` where nothing is yet: of several processes one writes, and is told so by True.

    Raises: OSError: the target is as it was.
    """
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    sync_folder(path.parent)
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writers are gone; those of a file system without locks stay."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError, PermissionError):
            fd = os.open(path, os.O_RDWR)
            try:
                if lock(fd):
                    path.unlink()
            finally:
                os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder (new, renamed, removed) durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # file systems whose names need no flushing
            raise
    finally:
        os.close(fd)


@contextmanager
def _written(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A temporary file beside `path` with this content, on disk; removed at the end if it still exists."""
    fd, temporary = _create(path)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
        yield temporary
    except (Exception, KeyboardInterrupt):
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    else:
        temporary.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _create(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f"{TEMPORARY}{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            lock(fd, wait=True)
        except BaseException:
            os.close(fd)
            raise
        if temporary.exists():
            return fd, temporary
        os.close(fd)  # taken for an abandoned one before it was locked
