"""A bounded local cache of verified bytes, shared by every process of the machine.

Remote record batches are kept as files named by their sha256, `ROOT/ab/abcd...`, so a name can hold nothing
else: what is read is hashed before it is used, and a file that fails is moved to `ROOT/quarantine`. Files
appear whole or not at all, and one process fetches what several ask for at the same time. A cache that cannot
be written (full disk, no permission) is only slow: bytes are then fetched again each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from shards.atomic import TEMPORARY
from shards.errors import UsageError

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 20_000_000_000
LOCATION, LIMIT = "TIDE_CACHE", "TIDE_CACHE_BYTES"
"""Environment variables: folder, and bytes (0 = no cache)."""
QUARANTINE, LOCKS = "quarantine", "locks"
SWEEP_SHARE = 32
"""A process looks at the cache's size whenever it has added 1/32 of the limit."""
KEPT_SHARE = 0.9
"""Of the limit, after a sweep that had to remove something."""
ABANDONED_S = 3600.0
"""Age at which an unpublished file belongs to a process that was killed."""


class HashMismatch(Exception):
    """Fetched bytes are not those of the hash; `str()` is the hash they have."""


class BlobCache:
    """Byte strings by their sha256.

    Args:
        root: folder; None = `TIDE_CACHE`, or the platform's folder for caches.
        limit: bytes kept, least recently used removed first; processes that write at the same time may
            exceed it by 1/32 each. None = `TIDE_CACHE_BYTES`, or 20 GB; 0 = keep nothing.

    Raises:
        UsageError: `TIDE_CACHE_BYTES` is not a number of bytes.
    """

    def __init__(self, root: str | Path | None = None, limit: int | None = None) -> None:
        self.root = Path(root or os.environ.get(LOCATION) or _platform_folder() / "tide").expanduser()
        self.limit = _limit() if limit is None else limit
        self._unswept: int | None = None  # bytes added since the last sweep; None = never swept
        self._refused = False

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes with this hash: cached ones, or else what `fetch` returns.

        Two copies are looked at, at most: a cached one that fails is quarantined and fetched again once, a
        fetched one that fails likewise.

        Raises:
            HashMismatch: the last copy failed too. Whatever `fetch` raises.
        """
        data, looks = self._read(sha256)
        if data is not None:
            return data
        with self._one_process(sha256):
            data, _ = self._read(sha256)  # another process may have fetched it meanwhile
            if data is not None:
                return data
            for _ in range(looks):
                data = fetch()
                found = hashlib.sha256(data).hexdigest()
                if found == sha256:
                    self._keep(sha256, data)
                    return data
        raise HashMismatch(found)

    def _file(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def _read(self, sha256: str) -> tuple[bytes | None, int]:
        """The cached bytes, and how often a copy may be fetched in their place."""
        if not self.limit:
            return None, 2
        file = self._file(sha256)
        try:
            data = file.read_bytes()
        except OSError:
            return None, 2
        if hashlib.sha256(data).hexdigest() == sha256:
            with suppress(OSError):
                os.utime(file)  # of use now: removed last
            return data, 0
        self._quarantine(file)
        return None, 1

    def _quarantine(self, file: Path) -> None:
        away = self.root / QUARANTINE / f"{file.name}-{time.time_ns()}"
        try:
            away.parent.mkdir(exist_ok=True)
            os.replace(file, away)
        except OSError:
            return  # another process was first, or the folder is read-only: it is not used in any case
        logger.warning("cached %s was damaged: moved to %s and fetched again", file.name[:12], away)

    def _keep(self, sha256: str, data: bytes) -> None:
        """Publish verified bytes under their hash."""
        if len(data) > self.limit:
            return
        file = self._file(sha256)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=TEMPORARY, delete=False) as f:
                try:
                    f.write(data)
                    f.close()
                    os.replace(f.name, file)
                except BaseException:
                    os.unlink(f.name)
                    raise
        except OSError as e:
            if not self._refused:
                logger.warning(
                    "cannot write to the cache %s (%s): going on without it", self.root, e.strerror
                )
            self._refused = True
            return
        if self._unswept is not None:
            self._unswept += len(data)
        if self._unswept is None or self._unswept > self.limit // SWEEP_SHARE:
            self._unswept = 0
            self._sweep()

    def _sweep(self) -> None:
        """Remove the least recently used files, if all together exceed the limit."""
        found, total = [], 0
        for folder in _scan(self.root):
            for entry in _scan(folder.path) if folder.name != LOCKS else ():
                try:
                    stat = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if entry.name.startswith(TEMPORARY):
                    if time.time() - stat.st_mtime > ABANDONED_S:
                        _remove(entry.path)
                    continue
                found.append((stat.st_mtime_ns, stat.st_size, entry.path))
                total += stat.st_size
        if total <= self.limit:
            return
        for _, size, path in sorted(found):
            if total <= KEPT_SHARE * self.limit:
                return
            _remove(path)
            total -= size

    @contextmanager
    def _one_process(self, sha256: str) -> Iterator[None]:
        """Hold the lock of the hash's first byte; without one, where the file system has no locks."""
        lock = None
        if self.limit:
            try:
                (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
                lock = FileLock(self.root / LOCKS / sha256[:2])
                lock.acquire()
            except (OSError, NotImplementedError):
                lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def _scan(path: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: str) -> None:
    with suppress(OSError):  # another process may have been first
        os.unlink(path)


def _limit() -> int:
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"{LIMIT} must be a number of bytes, 0 for no cache, got {text!r}")
    return value


def _platform_folder() -> Path:
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
