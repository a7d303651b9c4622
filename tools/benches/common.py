"""What every benchmark shares: alternatives timed side by side in one run, peak memory, and the record.

A benchmark compares sides that do the same work on the same data. Sides take turns, so that a machine that
slows down for a while slows all of them, and what is reported first is a ratio; seconds stand beside it with
the device named.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("torch", "transformers", "pyarrow", "numpy", "datasets")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one side, a run each."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Median, the fastest and the slowest run, in seconds."""
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "runs": len(self.seconds),
        }


def compare(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Timing]:
    """Time every side `repeats` times, taking turns (each round in another order), after `warmup` rounds.

    Args:
        progress: called with runs done, all of them, and the side that runs next.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    total, done = (repeats + warmup) * len(names), 0
    for r in range(warmup + repeats):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            progress(done, total, name)
            took = timed(sides[name])
            if r >= warmup:
                seconds[name].append(took)
            done += 1
    progress(done, total, "")
    return {name: Timing(tuple(took)) for name, took in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, what it started on the accelerator included; garbage is collected before."""
    gc.collect()
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def ratio(timings: Mapping[str, Timing], slow: str, fast: str) -> float:
    """How many times longer `slow` takes than `fast`: the median of the ratios of runs of the same round."""
    pairs = zip(timings[slow].seconds, timings[fast].seconds, strict=True)
    return median(a / b for a, b in pairs)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one call needs at its peak beyond what was held before it.

    On CUDA the allocator's peak; otherwise the process's peak resident set (Linux resets it on request).
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps freed memory, in which the call would find room unseen
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def report(
    bench: str,
    *,
    sizes: Mapping[str, Any],
    sides: Mapping[str, Any],
    ratios: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """The record of a benchmark: what ran, on what, how long, and the ratios under their own names.

    Args:
        sizes: what the work was (rows, layers, seeds, ...).
        sides: per side its figures, a `Timing` among them or alone.
        more: further top-level entries, such as `equal`.
    """
    shown = {name: side.to_json() if isinstance(side, Timing) else dict(side) for name, side in sides.items()}
    return {
        "bench": bench,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "device": device(),
        "versions": versions(),
        "sizes": dict(sizes),
        "sides": shown,
        **ratios,
        **more,
    }


def device() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return info


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, its folder made if missing."""
    from shards.atomic import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1).encode() + b"\n")


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status, which counts in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str | None:
    """Of the checkout this file lies in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
