"""Locks between processes that share a folder. The kernel gives them back when a process ends, however.

Some network file systems have no such locks. There every lock is granted: work may be done twice, which does
no harm, but nothing is removed that might belong to another process.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from shards.errors import ShardError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""How a file system says that it has no locks."""
CLEANING_S = 60.0
"""Longest that a folder is locked for cleaning it up."""


def lock(fd: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed: True = granted, False = somebody else has it locked, None = the
    file system (or the operating system) has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # NFS refuses with EACCES
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        return None
    return True


class FolderLock:
    """Says who else uses a folder: shared among its users, exclusive for a moment to clean it up.

    Args:
        path: the lock file, made if missing; it stays.

    Raises:
        OSError: it cannot be made or opened.
        ShardError: somebody keeps the folder for himself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            granted = lock(self._fd)
        except BaseException:
            self.close()
            raise
        self.supported = granted is not None
        """False where the file system has no locks."""
        self.alone = granted is True
        """Whether nobody else uses the folder; until `share`."""
        if granted is False:
            self._join()

    def _join(self) -> None:
        """Wait for as long as it takes to clean up; who has the folder longer does something else with it."""
        deadline = time.monotonic() + CLEANING_S
        while lock(self._fd, shared=True) is False:
            if time.monotonic() > deadline:
                self.close()
                raise ShardError(
                    f"{self.path.parent} is being fetched, sent or changed by another tide: wait for it, "
                    "then run this again"
                )
            time.sleep(0.02)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def share(self) -> None:
        """Let others in."""
        if self.alone:
            self.alone = False
            self._join()

    def leave(self) -> bool:
        """Give up the share; whether nobody else has one, and then the folder is locked until `close`.

        Of users that leave at the same time, the last one is told so: a refusal means that somebody else
        still has to leave, or cleans up already.
        """
        if self.supported:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.alone = lock(self._fd) is True
        return self.alone

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Claim:
    """A process's right to do one piece of work, which ends with it; a context manager."""

    def __init__(self, fd: int | None) -> None:
        self._fd, self._closed = fd, False

    @classmethod
    def take(cls, path: Path, *, locks: bool = True) -> Claim | None:
        """Claim what the file `path` stands for; None while somebody else has it.

        Args:
            path: made if missing; it stays, for whoever cleans up the folder.
            locks: whether the file system has any; without them every claim is granted.
        """
        if not locks:
            return cls(None)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(fd) is False:
            os.close(fd)
            return None
        try:
            os.truncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @staticmethod
    def holder(path: Path) -> str:
        """Who took a claim last, in words."""
        try:
            return path.read_text() or "another process"
        except (FileNotFoundError, UnicodeDecodeError):
            return "another process"

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
