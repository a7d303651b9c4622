"""Targets as classes: one partition of the vocabulary that serves dense and sparse targets alike.

A dense target has one class per token. A sparse one knows the teacher's log-probs on the kept tokens K and
the mass of everything else at the training temperature, zeta_T = log of the sum of p_j^(1/T) over j outside
K. Its classes:

    each kept token                        the teacher's own log-prob / T
    the true token, when outside K         its stored log-prob / T
    each of the student's best tail tokens min(s_j / T + a, cap): student-shaped, but never above the smallest
                                           kept entry, because a top-k says that no tail token is
    all other tail tokens together         student-shaped: logsumexp(s_j / T) + a

`a` makes the tail's mass right, by three fixed-point steps (the first uncapped). The filled distribution is a
constant in training, and inside the rest it is proportional to the student's: so every loss and gradient over
classes equals the dense formula applied to the filled distribution, and no [D, V] tensor of the teacher's is
ever built.

Shape suffixes: D distilled positions, V shared vocabulary, K kept entries, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from student.tensors import Dense, TopK

CANDIDATES = 64
"""The student's best tail tokens that get a class of their own, hence the cap."""
STEPS = 3
"""Fixed-point steps that make up for the mass the cap cuts off."""
MIN_TAIL_SHARE = 1e-2
"""Least share of the tail left when the true token is taken out of it: the mass is stored in coarse steps,
the true token's log-prob exactly, so their difference may come out empty or negative while there are tokens
left."""


class Classes(NamedTuple):
    """Log weights over a partition of the vocabulary, at temperature T; -inf = no such class here."""

    student: Tensor
    """[D, C], with gradient; logsumexp over classes = logsumexp over the vocabulary of s / T."""
    teacher: Tensor
    """[D, C], constant; as unnormalised as the target is."""


def classes(
    student_logits: Tensor, target: Dense | TopK, temperature: float, *, candidates: int = CANDIDATES
) -> Classes:
    """The classes of a batch of positions.

    Args:
        student_logits: [D, V], already cut to the shared vocabulary; any float dtype, computed in float32 or
            wider.
        candidates: student-chosen tail tokens with a class of their own (sparse targets).

    Raises:
        ValueError: the target has another vocabulary, or no tail at this temperature (names the declared
            ones).
    """
    x = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    vocab_size = target.logp.shape[-1] if isinstance(target, Dense) else target.vocab_size
    if x.shape[-1] != vocab_size:
        raise ValueError(f"student logits have {x.shape[-1]} columns, the target's vocabulary {vocab_size}")
    if isinstance(target, Dense):
        return Classes(x, target.logp.to(x.dtype) / temperature)
    if temperature not in target.tails:
        declared = ", ".join(f"{T:g}" for T in target.tails) or "none"
        raise ValueError(f"the target stores no tail at temperature {temperature:g}; it has: {declared}")

    ids, keep = target.ids, target.keep
    own_gold = target.gold_logp.isfinite() & ~((ids == target.gold[:, None]) & keep).any(-1)
    gold = target.gold.where(own_gold, ids[:, 0])
    named = torch.cat([ids, gold[:, None]], -1)  # padding repeats a kept id, so masking it again is harmless
    with torch.no_grad():
        outside = x.detach().scatter(-1, named, -torch.inf)
        best, best_ids = outside.topk(min(candidates, vocab_size), -1)
        del outside
    is_best = ~best.isneginf()  # short tails: the surplus points at tokens that are named already

    n_tail = vocab_size - keep.sum(-1) - own_gold.long()
    rest_empty = n_tail == is_best.sum(-1)
    rest = x.scatter(-1, torch.cat([named, best_ids], -1), -torch.inf)
    # logsumexp of nothing but -inf has a NaN gradient: give it one constant and blank the result.
    rest.scatter_(-1, ids[:, :1], torch.zeros_like(best[:, :1]).where(rest_empty[:, None], -torch.inf))
    rest_student = rest.logsumexp(-1).where(~rest_empty, -torch.inf)

    exists = torch.cat([keep, own_gold[:, None], is_best], -1)
    own = x.gather(-1, torch.cat([named, best_ids], -1)).where(exists, -torch.inf)
    return Classes(
        torch.cat([own, rest_student[:, None]], -1),
        _teacher(target, temperature, own_gold, n_tail, best, rest_student.detach()),
    )


@torch.no_grad()
def _teacher(
    target: TopK, temperature: float, own_gold: Tensor, n_tail: Tensor, best: Tensor, rest_student: Tensor
) -> Tensor:
    """[D, K + 1 + candidates + 1] teacher log weights: head, true token, candidates, rest.

    Args:
        own_gold: [D] bool, the true token is a class of its own.
        n_tail: [D] tokens outside K, the true one not counted.
        best: [D, candidates] student log weights of the candidates; -inf where there are fewer.
        rest_student: [D] log of the rest's student weight; -inf where nothing is left.
    """
    dtype = best.dtype
    head = target.logp.to(dtype) / temperature
    gold = (target.gold_logp.to(dtype) / temperature).where(own_gold, -torch.inf)
    zeta = target.tails[temperature].to(dtype)

    left = -torch.expm1(gold - zeta)  # share of the tail that is not the true token
    tail = (zeta + left.clamp_min(MIN_TAIL_SHARE).log()).where(own_gold, zeta).where(n_tail > 0, -torch.inf)
    filled = ~tail.isneginf()
    tail = tail.where(filled, 0.0)
    cap = head.masked_fill(~target.keep, torch.inf).amin(-1)
    cap = torch.maximum(cap, tail - n_tail.clamp_min(1).to(dtype).log())[:, None]

    capped, a = best, torch.zeros_like(tail)
    for _ in range(STEPS):  # the first one from the uncapped tail: student logits have no scale of their own
        mass = torch.logaddexp(capped.logsumexp(-1), rest_student + a)
        a = (a + tail - mass).where(filled, 0.0)
        capped = torch.minimum(best + a[:, None], cap)
    return torch.cat(
        [
            head.masked_fill(~target.keep, -torch.inf),
            gold[:, None],
            capped.where(filled[:, None], -torch.inf),
            (rest_student + a).where(filled, -torch.inf)[:, None],
        ],
        -1,
    )
