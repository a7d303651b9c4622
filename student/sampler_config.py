"""Settings and results of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shards.errors import UsageError

Remasking = Literal["low-confidence", "random"]
BlockOrigin = Literal["sequence", "prompt"]
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How text is drawn."""

    max_new_tokens: int = 256
    """Tokens after the prompt, at most."""
    steps: int | None = None
    """Denoising passes for `max_new_tokens`, spread evenly; None = one per token."""
    threshold: float | None = None
    """Fill every token whose probability reaches this, at least one a pass, instead of fixed steps."""
    block_size: int = 32
    """Tokens per block, as in training."""
    block_origin: BlockOrigin = "sequence"
    """Blocks count from the sequence start (training), or from the prompt's end (the reference sampler)."""
    remasking: Remasking = "low-confidence"
    """Which tokens of a pass stay: the most probable ones, or random ones."""
    temperature: float = 0.0
    """Of the softmax that tokens are drawn from; 0 = the most probable token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability."""
    guidance: float = 0.0
    """Classifier-free guidance: away from the prediction with a hidden prompt, by this much."""
    seed: int = 0
    """Of what is random; row i draws from seed + i, whatever runs beside it."""
    stop: tuple[str, ...] = ()
    """Text that ends a completion, and is cut off."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and not 1 <= self.steps <= self.max_new_tokens:
            raise UsageError(
                f"steps must lie in 1..{self.max_new_tokens} (max-new-tokens: a pass fills at least one "
                f"token), got {self.steps}"
            )
        if self.threshold is not None and self.steps is not None:
            raise UsageError("threshold and steps exclude one another: drop one of them")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(f"threshold must lie in (0, 1], got {self.threshold}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must lie in (0, 1], got {self.top_p}")
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be 0 or more and finite, got {value}")
        for name, kind in (("block_origin", BlockOrigin), ("remasking", Remasking)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"{name.replace('_', '-')} must be one of {', '.join(get_args(kind))}, "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, slots=True)
class Completion:
    """What followed one prompt."""

    ids: list[int]
    """New token ids, without the end-of-text token and what follows it."""
    text: str
    finish: Finish
    passes: int
    """Forward passes that this row took part in, prefill included."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A row after a denoising pass, for those who watch."""

    row: int
    ids: list[int]
    """New tokens so far, the block at work included; mask ids where not filled yet."""
    done: bool
    """Its block is finished."""
