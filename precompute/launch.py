"""`tide precompute` on as many processes as it is told: one, several on this machine, or a Ray cluster's."""

from __future__ import annotations

from dataclasses import replace

import torch

from precompute.busy import Busy
from precompute.config import PrecomputeConfig
from precompute.crew import Spread
from precompute.loop import Progress
from precompute.runner import choose_device, precompute
from shards.agreement import recorded_config
from shards.errors import UsageError
from shards.manifest import Manifest


def launch(
    config: PrecomputeConfig, how: Spread, progress: Progress | None = None, *, busy: Busy | None = None
) -> Manifest:
    """`precompute.runner.precompute`, spread as `how` says; the dataset does not depend on it.

    Raises:
        UsageError: more GPUs than there are, or none; no Ray cluster. Others: see `precompute` and
        `precompute.spread.spread`.
    """
    device = _device(config, how)
    if how.engine == "ray":
        from precompute.ray_engine import RayCrew
        from precompute.spread import spread

        begun = (recorded_config(config.out) or {}).get("compute", {})
        device = device or begun.get("device")
        crew = RayCrew(how.ray_address, most=how.most, device=device, threads=begun.get("threads"))
        return spread(config, crew, progress, busy=busy)
    count = local_count(how)
    if count == 1:
        return precompute(replace(config, device=device), progress, busy=busy)
    from precompute.local_crew import LocalCrew  # a single process needs none of it
    from precompute.spread import spread

    kind = torch.device(device) if device else choose_device(config)
    if kind.index is not None:
        raise UsageError(
            f"--device {device} is one device for {count} processes: give --device {kind.type}, and choose "
            "among several with CUDA_VISIBLE_DEVICES"
        )
    return spread(config, LocalCrew(count, kind.type), progress, busy=busy)


def _device(config: PrecomputeConfig, how: Spread) -> str | None:
    """As told; None = nothing is said of it."""
    if how.gpus is None:
        return config.device
    if config.device is not None and torch.device(config.device).type != "cuda":
        raise UsageError(f"--gpus {how.gpus} does not go with --device {config.device}: use --processes N")
    return config.device or "cuda"


def local_count(how: Spread) -> int:
    """Processes on this machine.

    Raises:
        UsageError: more GPUs are asked for than there are.
    """
    if how.gpus is None:
        return how.processes or 1
    there = torch.cuda.device_count()
    if not there:
        raise UsageError(
            f"--gpus {how.gpus}: there is no CUDA device here; --processes N runs the model on the CPU"
        )
    if how.gpus == "all":
        return there
    if how.gpus > there:
        raise UsageError(f"--gpus {how.gpus}: there are {there} CUDA devices here: give --gpus all")
    return how.gpus
