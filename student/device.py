"""Where a network runs."""

from __future__ import annotations

import torch

from shards.errors import UsageError


def pick_device(name: str | torch.device | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(f"device {str(name)!r} is not here; there is {', '.join(here)}") from e
    return device
