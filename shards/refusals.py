"""What an operating system may refuse a writer, said in one line with what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ShardError

REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or make parts of fewer samples in another --out",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "make the file system writable",
    errno.ENOTDIR: "choose a folder as --out",
    errno.EEXIST: "choose a folder as --out",
}
"""What to do about the refusals of an operating system; about all others: look at the disk."""


@contextmanager
def explained(out: Path, what: str) -> Iterator[None]:
    """Turn what the operating system refuses inside into a ShardError.

    Args:
        out: the folder that is written.
        what: what comes to nothing by it, such as `part 3 cannot be written`.
    """
    try:
        yield
    except OSError as e:
        remedy = REMEDIES.get(e.errno or 0, "see that its disk is there and sound")
        raise ShardError(
            f"{out}: {what}: {e.strerror or e}; {remedy}, then run the same tide precompute again: finished "
            "parts are kept"
        ) from e
