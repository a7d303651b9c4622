"""What `tide plan` is asked about stage one: settings of `tide precompute`, a device, and what is assumed."""

from __future__ import annotations

from dataclasses import dataclass, field

from precompute.config import PrecomputeConfig
from precompute.cost import MemoryAssumptions
from precompute.trial import Lengths
from shards.errors import UsageError
from tools.planning.devices import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is planned."""

    settings: PrecomputeConfig
    """`corpus` empty = text of invented `lengths`."""
    device: Device
    efficiency: float
    """Share of the device's peak that products reach."""
    gpus: int = 1
    sample: int = 256
    """Corpus rows that are looked at."""
    rows: int | None = None
    """Corpus rows in all; None = they are counted."""
    lengths: Lengths | None = None
    like: str | None = None
    """A dataset whose bytes per masked position are taken."""
    kept: float | None = None
    """Entries that the sparse codec keeps per position; None = as sharp distributions as `shards.realistic`
    has."""
    padded_to: int | None = None
    """Of the naive layout; None = the most tokens a sample may have."""
    memory: MemoryAssumptions = field(default_factory=MemoryAssumptions)

    def __post_init__(self) -> None:
        if not 0.0 < self.efficiency <= 1.0:
            raise UsageError(
                f"--efficiency is a share of the peak, above 0 and at most 1, got {self.efficiency:g}"
            )
        counts = {"gpus": self.gpus, "sample": self.sample, "rows": self.rows, "padded-to": self.padded_to}
        for flag, value in (counts | {"kept": self.kept}).items():
            if value is not None and value < 1:
                raise UsageError(f"--{flag} must be at least 1, got {value:g}")
        if not self.settings.corpus and self.lengths is None:
            raise UsageError(
                "give --corpus SPEC, or --lengths PROMPT,RESPONSE (median tokens, such as 74,200)"
            )
        if self.settings.corpus and self.lengths is not None:
            raise UsageError("--corpus and --lengths exclude each other: a corpus has its own lengths")
        if self.lengths is not None and self.settings.kind == "auto":
            raise UsageError("--lengths has no tokenizers to compare: say --kind shared or --kind cross")
