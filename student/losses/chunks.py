"""The CALM family: chunk-level likelihood matching between two tokenizations.

Source: TIDE paper, CALM; ALM, arXiv 2503.20083. A chunk's probability p = exp(LP / T), LP the log-prob of its
tokens, is compared as a Bernoulli variable: p against 1 - p. Every loss is a cross entropy between two such
variables, [C] nats, without a factor T^2. C chunks.

Two ways to keep log(1 - p) finite. `log` (default): the student stays in log space, at most -1e-7, with the
gradient of the unclamped value; the teacher's log p and log(1 - p) are clipped constants. No gradient dies,
and the teacher's coefficient stays bounded. `reference`: exp, clamp to [1e-7, 1 - 1e-7], log, on both sides,
as the reference implementation has it: the gradient is exactly 0 once p is clamped. 1 - 1e-7 is not a float32
number, so its clamp is asymmetric by an ulp.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Clamp = Literal["log", "reference"]

P_MIN = 1e-7


class Bernoulli(NamedTuple):
    """p, 1 - p and their logarithms, each accurate on its own. All [C]."""

    p: Tensor
    not_p: Tensor
    log_p: Tensor
    log_not_p: Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (branches meet at -log 2)."""
    near = x > -math.log(2)
    far_x = torch.where(near, -1.0, x)  # the unused branch must not overflow: its gradient is multiplied by 0
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far_x)))


def chunk_log_probs(token_logp: Tensor, chunk: Tensor, n: int) -> Tensor:
    """[n] log-prob of each chunk: the sum of its tokens'.

    Args:
        token_logp: [M] log-probs of the true tokens of all chunks.
        chunk: [M] int64, the chunk of each token, in [0, n).
    """
    return token_logp.new_zeros(n).index_add(0, chunk, token_logp)


def _reference_side(p: Tensor) -> Bernoulli:
    p = p.clamp(P_MIN, 1 - P_MIN)
    return Bernoulli(p, 1 - p, p.log(), (1 - p).log())


def student_side(logp: Tensor, temperature: float, clamp: Clamp = "log") -> Bernoulli:
    """The student's chunks, with gradient, from chunk log-probs [C]."""
    x = logp / temperature
    if clamp == "reference":
        return _reference_side(x.exp())
    x = x + (x.clamp_max(-P_MIN) - x).detach()
    p = x.exp()
    # expm1 is exact near 0; far from it its derivative, computed as expm1 + 1, is lost, and 1 - p is exact.
    return Bernoulli(p, torch.where(x > -math.log(2), -torch.expm1(x), 1 - p), x, log1mexp(x))


def teacher_side(logp: Tensor, temperature: float, clamp: Clamp = "log") -> Bernoulli:
    """The teacher's chunks, constants, from chunk log-probs [C]."""
    x = logp.detach() / temperature
    if clamp == "reference":
        return _reference_side(x.exp())
    low, high = math.log(P_MIN), math.log1p(-P_MIN)
    log_p, log_not_p = x.clamp(low, high), log1mexp(x.clamp_max(high)).clamp(low, high)
    return Bernoulli(log_p.exp(), log_not_p.exp(), log_p, log_not_p)


def interpolate(student: Bernoulli, teacher: Bernoulli, lambda_t: Tensor, clamp: Clamp = "log") -> Bernoulli:
    """p_mix = (1 - lambda_t) p_s + lambda_t p_t, detached and clipped like a teacher; lambda_t [C]."""
    p = ((1 - lambda_t) * student.p + lambda_t * teacher.p).detach()
    if clamp == "reference":
        return _reference_side(p)
    not_p = ((1 - lambda_t) * student.not_p + lambda_t * teacher.not_p).detach()
    p, not_p = p.clamp(P_MIN, 1 - P_MIN), not_p.clamp(P_MIN, 1 - P_MIN)
    return Bernoulli(p, not_p, p.log(), not_p.log())


def cross_entropy(target: Bernoulli, prediction: Bernoulli) -> Tensor:
    """[C] -(p log p' + (1 - p) log(1 - p')), the primed ones predicted."""
    return -(target.p * prediction.log_p + target.not_p * prediction.log_not_p)


def calm(student_lp: Tensor, teacher_lp: Tensor, temperature: float, *, clamp: Clamp = "log") -> Tensor:
    """[C] cross entropy with the teacher as target; chunk log-probs [C] of both sides."""
    student = student_side(student_lp, temperature, clamp)
    return cross_entropy(teacher_side(teacher_lp, temperature, clamp), student)


def reverse_calm(
    student_lp: Tensor, teacher_lp: Tensor, temperature: float, *, clamp: Clamp = "log"
) -> Tensor:
    """[C] cross entropy with the student as target: linear in p_s, with the coefficient log(p_t / (1 - p_t)).

    It has no balance point: below p_t = 1/2 it pushes the student's probability of the right text down, above
    it up.
    """
    student = student_side(student_lp, temperature, clamp)
    return cross_entropy(student, teacher_side(teacher_lp, temperature, clamp))


def bernoulli_kl(
    student_lp: Tensor, teacher_lp: Tensor, temperature: float, *, clamp: Clamp = "log"
) -> Tensor:
    """[C] KL(student || teacher): `reverse_calm` less the student's entropy: balances at p_s = p_t."""
    student = student_side(student_lp, temperature, clamp)
    teacher = teacher_side(teacher_lp, temperature, clamp)
    return cross_entropy(student, teacher) - cross_entropy(student, student)


def calm_tidal(
    student_lp: Tensor, teacher_lp: Tensor, temperature: float, lambda_t: Tensor, *, clamp: Clamp = "log"
) -> Tensor:
    """[C] `calm` with the interpolated probability as target; lambda_t [C]."""
    student = student_side(student_lp, temperature, clamp)
    mixed = interpolate(student, teacher_side(teacher_lp, temperature, clamp), lambda_t, clamp)
    return cross_entropy(mixed, student)


def reverse_calm_tidal(
    student_lp: Tensor, teacher_lp: Tensor, temperature: float, lambda_t: Tensor, *, clamp: Clamp = "log"
) -> Tensor:
    """[C] `reverse_calm` with the interpolated probability in the teacher's place; lambda_t [C]."""
    student = student_side(student_lp, temperature, clamp)
    mixed = interpolate(student, teacher_side(teacher_lp, temperature, clamp), lambda_t, clamp)
    return cross_entropy(student, mixed)
