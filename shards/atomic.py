"""Files that exist whole or not at all, even if the machine stops in the middle of writing them."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp-"
"""Prefix of names under which files are written before they exist."""


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write beside the target, flush to disk, rename over it, flush the folder."""
    temporary = path.with_name(TEMPORARY + path.name)
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder (new, renamed, removed) durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
