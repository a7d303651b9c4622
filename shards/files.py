"""The files of a dataset, wherever they lie: byte ranges of them, with another try where the network failed.

An instance may be pickled and may cross a fork: file system handles hold threads and connections, so each
process opens its own. A dataset repo of the hub is pinned on opening to the commit that its revision is then.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import sync

from shards.errors import ShardError
from shards.guard import plain_file
from shards.location import MAX_MANIFEST, HubRepo, Location, first_line, locate

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
BACKOFF_S = 0.5
"""Longest pause after the first failure; twice that after each further one."""
PATIENCE_S = 30.0
SLOWEST_BYTES_PER_S = 50_000
"""A request may take PATIENCE_S and what its bytes need at this rate; a manifest, ten times PATIENCE_S."""
FULL_COMMIT = 40


class Files:
    """The files of a folder, a hub repo or any fsspec URL (`shards.location.locate`).

    Raises:
        UsageError: an unknown kind of URL, or its library is not installed.
        ShardError: the hub cannot be asked for the revision.
    """

    def __init__(self, path_or_url: str | Path) -> None:
        self._text = str(path_or_url)
        self._location, self._process = locate(path_or_url), os.getpid()
        self.url = self._location.url
        """As messages show it."""
        self.revision: str | None = None
        """Commit of the hub that is read."""
        if (hub := self._location.hub) is not None:
            self.revision = self._commit(hub)
            self._text = HubRepo(hub.name, self.revision).url
            self._location = locate(self._text)
        protocol = self._location.fs.protocol
        self.remote = not {"file", "memory"} & {protocol, *protocol}
        """Whether reading costs requests that may fail."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_location": None, "_process": None}

    @property
    def location(self) -> Location:
        if self._process != os.getpid() or self._location is None:
            self._location, self._process = locate(self._text), os.getpid()
        return self._location

    def text(self, name: str) -> bytes:
        """A small file. Raises: FileNotFoundError, NotADirectoryError. ShardError: it cannot be read."""
        self._plain(name)
        read = partial(self._fetch, name, 0, MAX_MANIFEST + 1, 10 * PATIENCE_S)
        data = self._try(read, f"cannot read {name}")
        if len(data) > MAX_MANIFEST:
            raise ShardError(
                f"{self.url}: {name} has more than {MAX_MANIFEST} bytes: fetch the dataset again"
            )
        return data

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where a server does not say. Raises: see `text`."""

        def ask() -> int | None:
            fs = self.location.fs
            fs.invalidate_cache()  # a listing kept from before may tell of another file
            try:
                found = fs.size(self.location.path(name))
            except FileNotFoundError as e:  # fsspec says so over http whatever went wrong
                if e.__cause__ is None or isinstance(e.__cause__, FileNotFoundError):
                    raise
                if _status(e.__cause__) == 404:
                    raise
                raise e.__cause__ from None
            return None if found is None else int(found)

        self._plain(name)
        return self._try(ask, f"cannot find the size of {name}")

    def range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of a file; fewer, where it ends before them.

        Raises: see `text`.
        """

        def ask() -> bytes:
            try:
                data = self._fetch(name, offset, offset + length, PATIENCE_S + length / SLOWEST_BYTES_PER_S)
            except Exception as e:
                if _status(e) == 416 or "InvalidRange" in str(e):
                    return b""
                raise
            if len(data) < length and self.remote:
                raise Short(data, length)
            return data

        self._plain(name)
        try:
            data = self._try(ask, f"cannot read {name}")
        except Short as e:
            return e.data
        if len(data) > length:
            raise ShardError(
                f"{self.url}: asked for {length} bytes of {name}, got {len(data)}: the server ignores byte "
                "ranges; use one that serves them, or copy the dataset to a local folder"
            )
        return data

    def _fetch(self, name: str, start: int, end: int, patience_s: float) -> bytes:
        fs, path = self.location.fs, self.location.path(name)
        if fs.async_impl:  # libraries wait long, or for ever, on a stalled connection
            return bytes(sync(fs.loop, fs._cat_file, path, start=start, end=end, timeout=patience_s))
        # Without a cache of its own, a file of the hub fetches the range and no more.
        return bytes(fs.cat_file(path, start, end, **({"cache_type": "none"} if self.remote else {})))

    def _plain(self, name: str) -> None:
        """Raises: ShardError: a local file that is a link or no file."""
        if self.location.folder is not None:
            plain_file(self.location.path(name))

    def _commit(self, hub: HubRepo) -> str:
        if hub.revision is not None and len(hub.revision) == FULL_COMMIT:
            return hub.revision
        api = self.location.fs._api

        def ask() -> str:
            try:
                return str(api.dataset_info(hub.name, revision=hub.revision).sha)
            except Exception as e:
                if _status(e) in (401, 403, 404):
                    raise PermissionError(
                        "the hub has no such dataset repo or revision, or it is private (then log in)"
                    ) from e
                raise

        return self._try(ask, "cannot find its revision", remote=True)

    def _try(self, ask: Callable[[], T], what: str, *, remote: bool | None = None) -> T:
        """Once; where that is remote and the failure may pass, `ATTEMPTS` times."""
        attempts = ATTEMPTS if (self.remote if remote is None else remote) else 1
        for attempt in range(1, attempts + 1):
            try:
                return ask()
            except (FileNotFoundError, NotADirectoryError):
                raise
            except Exception as e:  # storage libraries raise exceptions of no common base
                if isinstance(e, Short) and attempt == attempts:
                    raise
                reason = first_line(e)
                if attempt == attempts or not _may_pass(e):
                    remedy = "check the access and the settings of the storage"
                    if attempts > 1 and attempt == attempts:
                        remedy = (
                            f"gave up after {attempts} attempts; once it answers, run the same command again"
                        )
                    raise ShardError(f"{self.url}: {what}: {reason}; {remedy}") from e
            pause = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
            logger.warning("%s: %s: %s; trying again in %.1f s", self.url, what, reason, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")


class Short(Exception):
    """A body that ends too early: a broken connection, or a file that is no longer."""

    def __init__(self, data: bytes, length: int) -> None:
        super().__init__(f"got {len(data)} of {length} bytes")
        self.data = data


def _status(e: BaseException) -> int | None:
    """HTTP status of an error of aiohttp, httpx or botocore, or of the one it was made from."""
    response = getattr(e, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(e, "status", None) or getattr(response, "status_code", None)
    if isinstance(found, int):
        return found
    return None if e.__cause__ is None else _status(e.__cause__)


def _may_pass(e: BaseException) -> bool:
    status = _status(e)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    wrong = (PermissionError, ValueError, TypeError, AttributeError, ImportError)
    return not isinstance(e, wrong) and "Credential" not in type(e).__name__
