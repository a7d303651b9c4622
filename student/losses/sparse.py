"""Targets as classes: one partition of the vocabulary that serves dense and sparse targets alike.

A dense target has one class per token, and so have an exact one, whose logits are made here, a few rows at a
time, and a sparse one with a sketch, whose tail is filled token by token (`student.losses.sketch`). A plain
sparse one knows the teacher's log-probs on the kept tokens K and
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

from student.losses.sketch import sketched_shape
from student.tensors import Dense, Exact, Target, TopK

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
    student_logits: Tensor, target: Target, temperature: float, *, candidates: int = CANDIDATES
) -> Classes:
    """The classes of a batch of positions; see `named_classes`."""
    return named_classes(student_logits, target, temperature, candidates=candidates)[0]


def named_classes(
    student_logits: Tensor, target: Target, temperature: float, *, candidates: int = CANDIDATES
) -> tuple[Classes, Tensor | None]:
    """The classes of a batch of positions, and the token that each class but the last is made of.

    Args:
        student_logits: [D, V], already cut to the shared vocabulary; any float dtype, computed in float32 or
            wider.
        candidates: student-chosen tail tokens with a class of their own (sparse targets).

    Returns:
        The classes, and [D, C - 1] int64 token ids; where a class does not exist its id names the token of
        another. The last class is the rest: every token that is not among the ids. None: class j is token j.

    Raises:
        ValueError: the target has another vocabulary, no tail at this temperature (names the declared
            ones), or lacks its basis or head.
    """
    x = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    if isinstance(target, Exact):
        if target.head is None:
            raise ValueError("an exact target needs the teacher's head (student.tensors.with_table)")
        with torch.no_grad():
            target = Dense(target.head.logits(target.hidden, x.dtype))
    vocab_size = target.logp.shape[-1] if isinstance(target, Dense) else target.vocab_size
    if x.shape[-1] != vocab_size:
        raise ValueError(f"student logits have {x.shape[-1]} columns, the target's vocabulary {vocab_size}")
    if isinstance(target, Dense):
        return Classes(x, target.logp.to(x.dtype) / temperature), None
    if temperature not in target.tails:
        declared = ", ".join(f"{T:g}" for T in target.tails) or "none"
        raise ValueError(f"the target stores no tail at temperature {temperature:g}; it has: {declared}")

    ids, keep = target.ids, target.keep
    own_gold = target.gold_logp.isfinite() & ~((ids == target.gold[:, None]) & keep).any(-1)
    gold = target.gold.where(own_gold, ids[:, 0])
    known = torch.cat([ids, gold[:, None]], -1)  # padding repeats a kept id, so masking it again is harmless
    n_tail = vocab_size - keep.sum(-1) - own_gold.long()
    if target.sketch is not None:
        return Classes(x, _filled(x.detach(), target, temperature, own_gold, n_tail, known)), None
    with torch.no_grad():
        outside = x.detach().scatter(-1, known, -torch.inf)
        best, best_ids = outside.topk(min(candidates, vocab_size), -1)
        del outside
    is_best = ~best.isneginf()  # short tails: the surplus points at tokens that are named already

    rest_empty = n_tail == is_best.sum(-1)
    named = torch.cat([known, best_ids], -1)
    rest = x.scatter(-1, named, -torch.inf)
    # logsumexp of nothing but -inf has a NaN gradient: give it one constant and blank the result.
    rest.scatter_(-1, ids[:, :1], torch.zeros_like(best[:, :1]).where(rest_empty[:, None], -torch.inf))
    rest_student = rest.logsumexp(-1).where(~rest_empty, -torch.inf)

    exists = torch.cat([keep, own_gold[:, None], is_best], -1)
    own = x.gather(-1, named).where(exists, -torch.inf)
    both = Classes(
        torch.cat([own, rest_student[:, None]], -1),
        _teacher(target, temperature, own_gold, n_tail, best, rest_student.detach()),
    )
    return both, named


@torch.no_grad()
def logits_gradient(
    gradient: Tensor, student: Tensor, ids: Tensor, logits: Tensor, temperature: float
) -> Tensor:
    """[D, V] gradient of the logits from that of the class weights: what autograd makes of `named_classes`,
    without its intermediate [D, V] tensors.

    Args:
        gradient: [D, C] of `student`, the class weights [D, C] that `named_classes` returned with `ids`.
        logits: [D, V] that they were made of.
    """
    g = gradient.masked_fill(student.isneginf(), 0.0) / temperature
    rest, own = student[:, -1:], g[:, :-1]
    rest = rest.masked_fill(rest.isneginf(), torch.inf)  # no rest: its softmax is 0 everywhere
    out = torch.add(-rest, logits, alpha=1 / temperature).exp_().mul_(g[:, -1:])
    return out.scatter_(-1, ids, 0.0).scatter_add_(-1, ids, own)


@torch.no_grad()
def filled(student_logits: Tensor, target: Target, temperature: float) -> Tensor:
    """[D, V] log weights, at a temperature, of the distribution that a target stands for beside these student
    logits [D, V]; for measurements, which look at single tokens."""
    both, ids = named_classes(student_logits, target, temperature)
    if ids is None:
        return both.teacher
    shift = (both.teacher[:, -1:] - both.student[:, -1:]).nan_to_num(-torch.inf)  # no rest: nothing to fill
    out = student_logits.to(both.student.dtype) / temperature + shift
    out.scatter_(-1, ids, -torch.inf)
    return out.scatter_reduce_(-1, ids, both.teacher[:, :-1], "amax")


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
    head, gold, tail, cap, has_tail = _given(target, temperature, own_gold, n_tail, best.dtype)
    capped, a = best, torch.zeros_like(tail)
    for _ in range(STEPS):  # the first one from the uncapped tail: student logits have no scale of their own
        mass = torch.logaddexp(capped.logsumexp(-1), rest_student + a)
        a = (a + tail - mass).where(has_tail, 0.0)
        capped = torch.minimum(best + a[:, None], cap)
    return torch.cat(
        [
            head.masked_fill(~target.keep, -torch.inf),
            gold[:, None],
            capped.where(has_tail[:, None], -torch.inf),
            (rest_student + a).where(has_tail, -torch.inf)[:, None],
        ],
        -1,
    )


@torch.no_grad()
def _filled(
    x: Tensor, target: TopK, temperature: float, own_gold: Tensor, n_tail: Tensor, known: Tensor
) -> Tensor:
    """[D, V] teacher log weights of a target with a sketch. Arguments as `_teacher`'s, and:

    Args:
        x: [D, V] student log weights.
        known: [D, K + 1] ids of the head, and the true one (or one of the head).
    """
    if target.basis is None or target.sketch is None:
        raise ValueError("a target with a sketch needs its basis (student.tensors.with_table)")
    head, gold, tail, cap, has_tail = _given(target, temperature, own_gold, n_tail, x.dtype)
    shape = sketched_shape(x * temperature, target.sketch, target.basis).div_(temperature)
    shape.scatter_(-1, known, -torch.inf)
    capped, a = shape, torch.zeros_like(tail)
    for _ in range(STEPS):
        a = (a + tail - capped.logsumexp(-1)).where(has_tail, 0.0)
        capped = torch.minimum(shape + a[:, None], cap)
    capped = capped.where(has_tail[:, None], -torch.inf)
    capped.scatter_(-1, known[:, -1:], gold[:, None])
    return capped.scatter_(-1, target.ids, head.where(target.keep, head[:, :1]))


def _given(
    target: TopK, temperature: float, own_gold: Tensor, n_tail: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a sparse target says at a temperature: log weights of the head [D, K] (undefined where padded), of
    the true token [D] (-inf unless it has a class), of the rest [D] (0 where there is none), the cap on its
    tokens [D, 1], and whether there is any [D]."""
    head = target.logp.to(dtype) / temperature
    gold = (target.gold_logp.to(dtype) / temperature).where(own_gold, -torch.inf)
    zeta = target.tails[temperature].to(dtype)

    left = -torch.expm1(gold - zeta)  # share of the tail that is not the true token
    tail = (zeta + left.clamp_min(MIN_TAIL_SHARE).log()).where(own_gold, zeta).where(n_tail > 0, -torch.inf)
    has_tail = ~tail.isneginf()
    tail = tail.where(has_tail, 0.0)
    cap = head.masked_fill(~target.keep, torch.inf).amin(-1)
    cap = torch.maximum(cap, tail - n_tail.clamp_min(1).to(dtype).log())[:, None]
    return head, gold, tail, cap, has_tail
