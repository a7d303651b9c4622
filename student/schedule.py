"""The interpolation weight lambda_t of the TIDAL objectives, over training and timesteps (TIDE paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shards.errors import UsageError

Decay = Literal["cosine", "linear"]
Axes = Literal["both", "training_only", "timestep_only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LambdaSchedule:
    """lambda_t = lambda_train * (1 - t): the target stays near the student early on and at high noise."""

    initial: float = 0.1
    """lambda_train at the first step."""
    maximum: float = 0.9
    """lambda_train at the last step."""
    decay: Decay = "cosine"
    """How lambda_train goes from one to the other."""
    axes: Axes = "both"
    """`training_only`: lambda_train alone; `timestep_only`: maximum * (1 - t)."""

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.maximum <= 1:
            raise UsageError(
                f"lambda must satisfy 0 <= initial <= maximum <= 1, got {self.initial} and {self.maximum}"
            )
        if self.decay not in get_args(Decay):
            raise UsageError(f"lambda decay must be one of {', '.join(get_args(Decay))}, got {self.decay!r}")
        if self.axes not in get_args(Axes):
            raise UsageError(f"lambda axes must be one of {', '.join(get_args(Axes))}, got {self.axes!r}")

    def train(self, progress: float) -> float:
        """lambda_train at `progress` = step / total steps. Not clamped: linear exceeds `maximum` beyond 1."""
        ramp = progress if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        return self.initial + (self.maximum - self.initial) * ramp

    def at(self, progress: float, t: Tensor) -> Tensor:
        """lambda_t, of the shape of the timesteps `t`."""
        if self.axes == "training_only":
            return torch.full_like(t, self.train(progress))
        top = self.maximum if self.axes == "timestep_only" else self.train(progress)
        return top * (1 - t)
