"""How much of a run's time the model computes: what the pipeline around it is measured by. Never part of a
dataset, whose bytes follow from its configuration alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent inside it; a context manager, entered any number of times."""

    seconds: float = 0.0
    _began: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(slots=True)
class Busy:
    """Where the time of a run's loop went."""

    model: Stopwatch = field(default_factory=Stopwatch)
    """Forward passes and the reduction of what they give, until it lies in main memory."""
    loop: Stopwatch = field(default_factory=Stopwatch)
    """From the first part that is asked for until the last one is on disk."""
    waiting: Stopwatch = field(default_factory=Stopwatch)
    """For parts that other runs make, within `loop`."""

    @property
    def working_s(self) -> float:
        """The loop's seconds, waiting for others apart."""
        return self.loop.seconds - self.waiting.seconds

    @property
    def share(self) -> float | None:
        """Of `working_s`, the model's; None where it had nothing to do."""
        return self.model.seconds / self.working_s if self.model.seconds else None
