"""Run a program that a model wrote: in a process of its own, with little time, memory and disk, no network.

The program gets an isolated interpreter in an empty temporary folder (`sandbox_child` says what is
taken from it and how). It reads files as this user may, but can neither write outside its folder nor send
anything anywhere, and what it prints is thrown away. A limit reached is an outcome, not an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Wall-clock time, the interpreter's start included."""
    memory_bytes: int = 1 << 30
    """Address space."""
    disk_bytes: int = 16 << 20
    """Size of a file, and of all files together where the folder is a memory disk."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """It ran to its end and raised nothing."""
    reason: str
    """Why not: the exception, `timed out`, or how the process ended."""
    network: bool = False
    """It ran in a network namespace of its own (else sockets were refused in Python)."""
    files: bool = False
    """All but its folder was mounted read-only (else writing elsewhere was refused in Python)."""


def run_code(code: str, limits: Limits | None = None) -> Outcome:
    """Run Python source text to its end and say whether it raised anything.

    Returning early (`sys.exit`, `os._exit`) is not passing: the answer carries a key that only a run to the
    end gives back.
    """
    limits = limits or Limits()
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tide-code-", ignore_cleanup_errors=True) as folder:
        request = Path(folder) / "request.json"
        settings = {name: getattr(limits, name) for name in ("seconds", "memory_bytes", "disk_bytes")}
        request.write_text(json.dumps({"code": code, "key": key, **settings}), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD), str(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {limits.seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return _outcome(said, key, process.returncode)


def _outcome(said: bytes, key: str, code: int) -> Outcome:
    try:
        answer = json.loads(said.splitlines()[-1])
        if answer["key"] != key:
            raise ValueError
    except (ValueError, LookupError, TypeError):
        return Outcome(False, f"the process ended before the program did (exit code {code})")
    reason = str(answer["reason"])
    return Outcome(not reason, reason, bool(answer["network"]), bool(answer["files"]))


@cache
def isolation(limits: Limits | None = None) -> str:
    """What holds programs here, in words, as a run of an empty one finds it."""
    limits = limits or Limits()
    found = run_code("", limits)
    return (
        f"a separate process with {limits.seconds:g} s, {limits.memory_bytes >> 20} MB of memory and "
        f"{limits.disk_bytes >> 20} MB of disk; network: "
        + ("none (a namespace of its own)" if found.network else "sockets refused in Python")
        + "; writing outside its folder: "
        + ("mounted read-only" if found.files else "refused in Python")
    )
