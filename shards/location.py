"""Where a dataset lies: a folder, a dataset repo of the Hugging Face Hub, or any other URL fsspec knows.

What comes from elsewhere is read with a bound, and a library's or the network's failure becomes one line.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shards.errors import ManifestError, ShardError, TideError, UsageError
from shards.manifest import MANIFEST
from shards.parallel import Stopped

MAX_MANIFEST = 1 << 28
"""Bytes of a manifest: about 200 TB of shards."""
MAX_TEXT = 1 << 24
"""Bytes of a card or a part's record."""
_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/?")
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A dataset repo."""

    name: str
    """`owner/name`"""
    revision: str | None
    """Branch, tag or commit; None = the main branch."""

    @property
    def url(self) -> str:
        return f"hf://datasets/{self.name}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class Location:
    """A place where a dataset is or may be."""

    url: str
    """As messages show it; for a folder, its path."""
    fs: Any
    root: str
    """What `fs` calls it, without a slash at its end."""
    folder: Path | None = None
    """Set where it is local."""
    hub: HubRepo | None = None

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


def locate(text: str | Path) -> Location:
    """`DIR`, `hf://datasets/OWNER/NAME[@REVISION]`, `OWNER/NAME` where no such folder is, or an fsspec URL.

    Raises: UsageError: an unknown kind of URL, or its library is not installed.
    """
    url = str(text)
    hub = _hub(url)
    if hub is not None:
        url = hub.url
    elif url.startswith("hf://"):
        raise UsageError(f"{url} is no dataset repo of the hub: write hf://datasets/OWNER/NAME")
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise UsageError(f"{url}: {first_line(e)}" + _extra(url)) from e
    except ValueError as e:
        raise UsageError(f"{url}: {first_line(e)}; give a folder, s3://, hf:// or another URL") from e
    fs.invalidate_cache()
    folder = Path(root) if "file" in _protocols(fs) else None
    return Location(url if folder is None else str(folder), fs, root.rstrip("/"), folder, hub)


def _hub(url: str) -> HubRepo | None:
    if found := _HUB.fullmatch(url):
        return HubRepo(found[1], found[2])
    # A name of the hub has one slash; a folder of that form wins where its parent exists.
    if _NAME.fullmatch(url) and not Path(url).parent.exists():
        return HubRepo(url, None)
    return None


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_s3(location: Location) -> bool:
    return "s3" in _protocols(location.fs)


def _extra(url: str) -> str:
    return " (pip install s3fs, which tide's extra s3 has)" if url.startswith(("s3://", "s3a://")) else ""


def first_line(e: BaseException) -> str:
    return next((line for line in str(e).splitlines() if line.strip()), type(e).__name__).strip()


@contextmanager
def failing(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a storage library or the system raises inside into one line: `WHAT: reason; REMEDY`.

    Storage libraries raise exceptions of their own, of no common base. FileNotFoundError passes: what it
    means is for the caller to say.
    """
    try:
        yield
    except (TideError, Stopped, FileNotFoundError):
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(f"{what}: the disk is full; make room, then {remedy or 'try again'}") from e
        raise ShardError(_line(what, e, remedy)) from e
    except Exception as e:
        raise ShardError(_line(what, e, remedy)) from e


def _line(what: str, e: BaseException, remedy: str) -> str:
    reason = getattr(e, "strerror", None) or first_line(e)
    return f"{what}: {reason}" + (f"; {remedy}" if remedy else "")


def read_text(location: Location, name: str, limit: int = MAX_TEXT) -> bytes:
    """A small file, never more than `limit` bytes of it in memory.

    Raises: FileNotFoundError. ShardError: unreadable, or longer than `limit`.
    """
    what = f"cannot read {name} from {location.url}"
    try:
        with failing(what), location.fs.open(location.path(name), "rb") as f:
            data = _bounded(f, limit)
    except FileNotFoundError as e:
        # A web server that cannot be reached counts as one without the file, to fsspec.
        if isinstance(e.__cause__, ConnectionError | TimeoutError) or "Connect" in type(e.__cause__).__name__:
            raise ShardError(_line(what, e.__cause__ or e, "")) from e
        raise
    if data is None:
        raise ShardError(f"{location.url}: {name} is longer than {limit} bytes, so it is not one of tide's")
    return data


def _bounded(file: Any, limit: int) -> bytes | None:
    data = bytearray()
    while piece := file.read(1 << 20):
        data += piece
        if len(data) > limit:
            return None
    return bytes(data)


def read_manifest(location: Location) -> bytes | None:
    """The bytes of the manifest; None where there is none. Raises: ShardError."""
    try:
        return read_text(location, MANIFEST, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None


def no_manifest(location: Location) -> ManifestError:
    """Why a place without a manifest is none to read from."""
    from shards.agreement import DATASET  # imports this module's users
    from shards.records import PARTS

    try:
        done = [p for p in location.fs.ls(location.path(PARTS), detail=False) if p.endswith(".json")]
        unfinished = location.fs.exists(location.path(DATASET))
    except (OSError, NotImplementedError):
        done, unfinished = [], False
    if unfinished:
        return ManifestError(
            f"{location.url} is unfinished: {len(done)} parts are done and there is no {MANIFEST} yet; "
            "run the same tide precompute again"
        )
    return ManifestError(f"{location.url} has no {MANIFEST}: not a logit dataset (or not all of one)")
