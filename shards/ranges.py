"""A shard's bytes against its record, in one pass: every byte is hashed once, in the range it belongs to.

Verifying, sending and fetching all feed the same check, so nothing is sent or kept that a reader would
refuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shards.guard import plain_file
from shards.manifest import ShardRecord

BLOCK = 1 << 20
"""Bytes read at once."""


class ShardCheck:
    """Feeds on a shard's bytes in order, in pieces of any size.

    Args:
        whole: also compute the sha256 of the file itself, which stores know it by (a second hash).
    """

    def __init__(self, shard: ShardRecord, *, whole: bool = False) -> None:
        self.shard = shard
        self.bytes = 0
        """Bytes seen."""
        foot, _ = shard.foot
        self._ranges = [
            ("head", shard.head[1], shard.head_sha256),
            *((f"record batch {i}", b.offset + b.length, b.sha256) for i, b in enumerate(shard.batches)),
            ("foot", max(foot, shard.bytes), shard.foot_sha256),
        ]
        self._next = 0
        self._hash = hashlib.sha256()
        self._whole = hashlib.sha256() if whole else None
        self._bad: list[str] = []
        self._close()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the file."""
        left = memoryview(data)
        if self._whole:
            self._whole.update(left)
        while len(left) and self._next < len(self._ranges):
            piece = left[: self._ranges[self._next][1] - self.bytes]
            self._hash.update(piece)
            self.bytes += len(piece)
            left = left[len(piece) :]
            self._close()
        self.bytes += len(left)

    def reason(self) -> str | None:
        """What is wrong with the bytes seen as a whole file; None where nothing is."""
        said = []
        if self.bytes != self.shard.bytes:
            said.append(wrong_size(self.shard, self.bytes))
        if self._bad:
            shown = ", ".join(self._bad[:8]) + (", ..." if len(self._bad) > 8 else "")
            said.append(f"sha256 differs: {shown} ({len(self._bad)} of {len(self._ranges)} ranges)")
        return "; ".join(said) or None

    @property
    def sha256(self) -> str:
        """Of all bytes seen, hex. Only with `whole`."""
        if self._whole is None:
            raise ValueError("the hash of the whole file was not asked for")
        return self._whole.hexdigest()

    def _close(self) -> None:
        """Compare the ranges that end here, empty ones included."""
        while self._next < len(self._ranges) and self.bytes == self._ranges[self._next][1]:
            name, _, expected = self._ranges[self._next]
            if (found := self._hash.hexdigest()) != expected:
                self._bad.append(f"{name} (manifest {expected[:12]}, file {found[:12]})")
            self._hash = hashlib.sha256()
            self._next += 1


def wrong_size(shard: ShardRecord, size: int) -> str:
    """Why a file of `size` bytes is not the shard."""
    word = "truncated" if size < shard.bytes else "too long"
    return f"the file is {word} (expected {shard.bytes} bytes, got {size})"


def blocks(file: BinaryIO, size: int = BLOCK) -> Iterator[memoryview]:
    """The rest of a file in pieces that are valid until the next one."""
    buffer = bytearray(size)
    into = getattr(file, "readinto", None)
    while True:
        if into is not None:
            n = into(buffer)
            piece = memoryview(buffer)[:n]
        else:
            piece = memoryview(file.read(size))
        if not len(piece):
            return
        yield piece


def check_file(
    path: Path, shard: ShardRecord, add: Callable[[int], None], *, whole: bool = False
) -> ShardCheck:
    """Read a local file to its end. `add` is called with the size of every piece.

    Raises: OSError: it cannot be read. ShardError: it is a link or a device.
    """
    check = ShardCheck(shard, whole=whole)
    plain_file(str(path))
    with open(path, "rb", buffering=0) as file:
        for piece in blocks(file):
            check.update(piece)
            add(len(piece))
    return check
