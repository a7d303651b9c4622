"""Which program this is: processes that make parts of one dataset must agree on it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("precompute", "shards", "student")
"""What decides a dataset's bytes; they lie side by side."""


def _release() -> str:
    root = Path(__file__).parent.parent
    code = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            code.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"{version('tide')} (code {code.hexdigest()[:12]})"


RELEASE = _release()
"""The version, and a hash of the code as it was when this process began, which tells checkouts of one version
apart."""
