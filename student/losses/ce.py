"""Masked cross entropy of block diffusion: the timestep's weight and the three normalisations.

CE = sum over masked positions of w(t) * CE_i, divided by what `ce_share` says (TIDE paper, masked diffusion
loss; MDLM's weight -alpha'(t) / (1 - alpha(t)) for a noise schedule alpha).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

NoiseSchedule = Literal["linear", "cosine"]
Normalisation = Literal["token", "sequence", "batch"]


def gold_log_probs(logits: Tensor, gold: Tensor) -> Tensor:
    """[N] log-probs, in float32 or wider, of the true tokens `gold` [N] under `logits` [N, V]."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return x.gather(-1, gold[:, None])[:, 0] - x.logsumexp(-1)


def timestep_weight(t: Tensor, schedule: NoiseSchedule = "linear") -> Tensor:
    """-alpha'(t) / (1 - alpha(t)) for timesteps `t` of any shape; about 1/t when linear.

    The 1e-6 and the order of the float32 operations are the reference's: at t = 1e-3 the result is not
    exactly 1/t.
    """
    if schedule == "linear":
        alpha = 1 - t
        slope = torch.ones_like(t)
    else:
        angle = math.pi / 2 * (1 - t)
        alpha = 1 - torch.cos(angle)
        slope = math.pi / 2 * torch.sin(angle)
    return slope / ((1 - alpha) + 1e-6)


def ce_share(
    normalisation: Normalisation, view: Tensor, maskable: Tensor, *, total_maskable: int, total_views: int
) -> Tensor:
    """[N] factor of each masked position's cross entropy, so that their plain sum is the loss.

    `token` divides by the maskable (not the masked) tokens of the global batch, `sequence` by those of the
    view and by the number of views, `batch` by the number of views alone.

    Args:
        view: [N] int64, the view each position belongs to.
        maskable: [B] int64, maskable tokens of each view.
        total_maskable, total_views: counts of the global batch.
    """
    ones = torch.ones_like(view, dtype=torch.float32)
    if normalisation == "token":
        return ones / max(total_maskable, 1)
    if normalisation == "sequence":
        return ones / maskable[view].clamp_min(1) / max(total_views, 1)
    return ones / max(total_views, 1)
