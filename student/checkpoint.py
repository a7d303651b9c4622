"""What a checkpoint holds besides transformers' files, which one to resume, and whether a run may resume it.

`tide_state.json` is written last, by rename: a `checkpoint-N` folder that has one is complete, any other is
the rest of a killed save and is never resumed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.atomic import write_atomic
from shards.errors import ConfigMismatch, ModelError
from student.config import CHANGEABLE

STATE_FILE = "tide_state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a run stands after a step."""

    step: int
    stream: dict[str, Any]
    """Position of the row stream after the step's global batch."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of logged values since the last logged step: a resumed run logs the same lines."""
    best: dict[str, float] = field(default_factory=dict)
    """`step` and `bits_per_byte` of the best evaluation so far."""
    run: dict[str, Any] = field(default_factory=dict)
    """What the run is: dataset identity, objective, configuration; see `run_identity`."""


def run_identity(dataset: str, objective: Any, config: Any) -> dict[str, Any]:
    """What must stay the same over a run, as plain JSON values. `objective`, `config`: dataclasses."""
    fields = {k: v for k, v in asdict(config).items() if k not in CHANGEABLE}
    return json.loads(json.dumps({"dataset": dataset, "objective": asdict(objective), "config": fields}))


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """
    Raises:
        ConfigMismatch: dataset, objective or a setting differs from the checkpoint's (names the first one).
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    for name in sorted(before.keys() | after.keys(), key=lambda n: (not n.startswith("dataset"), n)):
        if before.get(name) != after.get(name):
            raise ConfigMismatch(
                f"{where}: the run was started with {name} {before.get(name)!r}, now it is "
                f"{after.get(name)!r}; resume with the same, or train into another folder"
            )


def _flat(x: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(x, Mapping) and x:
        for key, value in x.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name.removeprefix("config."), x


def save_state(folder: Path, state: RunState) -> None:
    """Complete a checkpoint folder."""
    write_atomic(folder / STATE_FILE, json.dumps(asdict(state), indent=1).encode())


def load_state(folder: Path) -> RunState:
    """
    Raises:
        ModelError: the state is unreadable.
    """
    try:
        return RunState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ModelError(f"{folder / STATE_FILE}: unreadable ({e}); remove this checkpoint folder") from e


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in a run's folder with their steps, oldest first."""
    found = [
        (int(m[1]), p) for p in out.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return sorted((step, p) for step, p in found if (p / STATE_FILE).is_file())


def prune(out: Path, keep: int) -> None:
    """Remove complete checkpoints but the newest `keep`."""
    for _, folder in checkpoints(out)[:-keep]:
        (folder / STATE_FILE).unlink()  # first: what is half removed must not look complete
        shutil.rmtree(folder, ignore_errors=True)
