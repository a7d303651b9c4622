"""Divergences between student and teacher at single positions: KL, reverse KL and TIDAL.

All take the log weights of *classes* (`student.losses.sparse.classes`): tokens of a dense target, or the
classes of a sparse one, [D, C], unnormalised, already divided by the temperature, -inf where a class does not
exist. Each returns [D] nats times T^2, which keeps gradients of one size for every temperature. D positions,
C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """[D] sum of p (log p - log q) from log-probs [D, C]; a class that either side lacks contributes nothing.

    Masked before the product: 0 * inf would be NaN, in the gradient even where the value is masked
    afterwards. Only -inf is masked, so a NaN among the logits still shows in the loss.
    """
    both = ~(p.isneginf() | q.isneginf())
    return (p.exp().where(both, 0.0) * (p - q).where(both, 0.0)).sum(-1)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[D] T^2 KL(teacher || student)."""
    return temperature**2 * _divergence(teacher.detach().log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[D] T^2 KL(student || teacher).

    On sparse targets a lower bound of the dense value: what the teacher says about the student's favourite
    tail tokens is not stored, and the tail is taken to have the student's own shape.
    """
    return temperature**2 * _divergence(student.log_softmax(-1), teacher.detach().log_softmax(-1))


def tidal(student: Tensor, teacher: Tensor, temperature: float, lambda_t: Tensor) -> Tensor:
    """[D] T^2 KL(r || student), r = softmax((1 - lambda_t) student + lambda_t teacher), detached.

    Source: TIDE paper, TIDAL. Inside a class of student-shaped tokens teacher and student differ by one
    constant, so interpolating class weights is the same as interpolating token logits.

    Args:
        lambda_t: [D] interpolation weight of each position (`student.schedule`).
    """
    both = ~(student.isneginf() | teacher.isneginf())
    weight = lambda_t[:, None]
    mixed = ((1 - weight) * student + weight * teacher).detach().where(both, -torch.inf)
    return temperature**2 * _divergence(mixed.log_softmax(-1), student.log_softmax(-1))


def mid_range_weight(t: Tensor) -> Tensor:
    """exp(-(t - 0.5)^2 / (2 * 0.15^2)): favours half-hidden answers (TIDE paper, TIDAL)."""
    return torch.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))
