"""A training run's folder, read as far as the run got: finished, still going, or interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shards.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run's folder, read."""

    name: str
    settings: dict[str, Any]
    """train_config.json: `dataset`, `objective`, `config`."""
    records: tuple[dict[str, Any], ...]
    """Training records, in order of `step`."""
    evaluations: tuple[dict[str, Any], ...]
    texts: tuple[dict[str, Any], ...]
    written: bool
    """The student is there."""
    updated: datetime | None
    """When the last record was written."""

    @property
    def steps(self) -> int:
        return int(self.settings["config"]["steps"])

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def finished(self) -> bool:
        return self.written and self.step >= self.steps

    @property
    def objective(self) -> str:
        """`tidal+kl:4`."""
        return "+".join(
            term["name"] + (f":{term['weight']:g}" if term["weight"] != 1 else "") for term in self.terms
        )

    @property
    def terms(self) -> list[dict[str, Any]]:
        """Added terms with their weights; `ce` where there are none."""
        return self.settings["objective"]["terms"] or [{"name": "ce", "weight": 1}]


def read_run(folder: Path, name: str | None = None) -> Run:
    """
    Raises:
        UsageError: no run of tide train is there.
    """
    from student.config import CONFIG_FILE, METRICS, SAMPLES

    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        named = [(str(t["name"]), float(t["weight"])) for t in settings["objective"]["terms"]]
        settings["objective"]["terms"] = [{"name": name, "weight": weight} for name, weight in named]
        if int(settings["config"]["steps"]) < 1:
            raise ValueError("no steps")
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        raise UsageError(
            f"{folder}: no training run ({CONFIG_FILE}: {reason}); pass a folder that tide train --out made"
        ) from e
    metrics = folder / METRICS
    lines = _lines(metrics)
    return Run(
        name=name or folder.resolve().name,
        settings=settings,
        records=tuple(r for r in lines if "loss" in r),
        evaluations=tuple(r for r in lines if "heldout_bits_per_byte" in r),
        texts=tuple(
            t for t in _lines(folder / SAMPLES) if {"sample_id", "prompt", "answer", "text"} <= set(t)
        ),
        written=any(folder.glob("*.safetensors")),
        updated=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None,
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines with a step; not the one that a writer at work, or a kill, has left half."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        found.append(record)
    return found


def state_of(run: Run, now: datetime) -> str:
    """Finished, or how far it got and when: a folder does not tell whether a run still goes."""
    if run.finished:
        return f"finished, {run.steps:,} steps"
    if run.updated is None or not run.records:
        return f"not finished: no record yet of its {run.steps:,} steps; still going, or interrupted"
    old = max(0, int((now - run.updated).total_seconds()))
    ago = next(
        f"{old // n:,} {unit}" for n, unit in ((3600, "h"), (60, "min"), (1, "s")) if old >= n or n == 1
    )
    return (
        f"not finished: step {run.step:,} of {run.steps:,}; still going, or interrupted: its last record was "
        f"{ago} old when this page was made ({now:%Y-%m-%d %H:%M} UTC)"
    )
