"""Sparse targets against their dense twin: a loop in float64 that fills the teacher's whole distribution.

The twin is written from the definition, one position at a time, and never looks at classes. Every loss over
classes must equal the dense formula applied to the filled distribution, in value and gradient.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from student.losses import divergence
from student.losses.sparse import MIN_TAIL_SHARE, Classes, classes, filled
from student.tensors import Basis, Dense, TopK

V, D = 41, 7
LAMBDA = torch.linspace(0.0, 1.0, D, dtype=torch.float64)


def setup(seed: int = 0, widths=(1, 3, 6, 10, 4, 2, 8), step: float | None = None, scale: float = 2.0):
    """Student logits, dense teacher log-probs and the sparse target made of them; padded rows repeat the
    first id.

    `step` rounds log-probs and tails to multiples, as a codec does. Even rows have their gold token outside
    K.
    """
    gen = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(D, V, generator=gen, dtype=torch.float64)
    teacher = (scale * torch.randn(D, V, generator=gen, dtype=torch.float64)).log_softmax(-1)
    order = teacher.argsort(-1, descending=True)
    counts = torch.tensor(widths)
    keep = torch.arange(int(counts.max())) < counts[:, None]
    ids = torch.where(keep, order[:, : keep.shape[1]], order[:, :1])
    inside = torch.zeros(D, V, dtype=torch.bool).scatter(1, ids, True)
    gold = torch.where(torch.arange(D) % 2 == 0, order[:, 12], order[:, 0])
    round_ = (lambda x: x) if step is None else (lambda x: (x / step).round() * step)
    tails = {T: round_((teacher / T).masked_fill(inside, -torch.inf).logsumexp(-1)) for T in (1.0, 2.0)}
    target = TopK(
        ids=ids,
        logp=round_(teacher.gather(1, ids)).masked_fill(~keep, 123.0),
        keep=keep,
        tails=tails,
        gold=gold,
        gold_logp=teacher.gather(1, gold[:, None])[:, 0],
        vocab_size=V,
    )
    return student, teacher, target


def fill(student: Tensor, target: TopK, T: float, candidates: int) -> Tensor:
    """[D, V] log weights at temperature T of the distribution the target stands for."""
    filled = torch.full(student.shape, -math.inf, dtype=torch.float64)
    for d in range(len(student)):
        kept = [int(i) for i, k in zip(target.ids[d], target.keep[d]) if k]
        logp = [float(x) for x, k in zip(target.logp[d], target.keep[d]) if k]
        tail = [j for j in range(V) if j not in kept]
        mass = math.exp(float(target.tails[T][d]))
        for i, x in zip(kept, logp):
            filled[d, i] = x / T
        gold, gold_logp = int(target.gold[d]), float(target.gold_logp[d])
        if gold in tail and math.isfinite(gold_logp):
            tail.remove(gold)
            filled[d, gold] = gold_logp / T
            mass = max(mass - math.exp(gold_logp / T), MIN_TAIL_SHARE * mass)
        if not tail or mass == 0:
            continue
        cap = max(min(logp) / T, math.log(mass / len(tail)))
        s = {j: float(student[d, j]) / T for j in tail}
        best = sorted(tail, key=lambda j: -s[j])[:candidates]
        a = math.log(mass / sum(math.exp(x) for x in s.values()))
        for _ in range(2):
            now = sum(math.exp(min(s[j] + a, cap) if j in best else s[j] + a) for j in tail)
            a += math.log(mass / now)
        for j in tail:
            filled[d, j] = min(s[j] + a, cap) if j in best else s[j] + a
    return filled


LOSSES = {
    "kl": lambda s, t, T: divergence.kl(s, t, T),
    "reverse-kl": lambda s, t, T: divergence.reverse_kl(s, t, T),
    "tidal": lambda s, t, T: divergence.tidal(s, t, T, LAMBDA.to(s.dtype)),
}


def value_and_gradient(loss, make, logits: Tensor, T: float) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(*make(logits), T)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def assert_same_as_twin(student: Tensor, target: TopK, T: float, candidates: int) -> None:
    filled = fill(student, target, T, candidates)
    for name, loss in LOSSES.items():
        got = value_and_gradient(loss, lambda x: classes(x, target, T, candidates=candidates), student, T)
        want = value_and_gradient(loss, lambda x: (x / T, filled), student, T)
        for ours, twin, what in zip(got, want, ("value", "gradient")):
            error = (ours - twin).abs().max().item()
            assert error <= 1e-9 * max(1.0, twin.abs().max().item()), f"{name} {what} differs by {error}"


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("candidates", [3, 8, 64])
@pytest.mark.parametrize("step", [None, 0.125])
def test_equals_the_dense_formula_on_the_filled_distribution(T, candidates, step) -> None:
    """Ragged K, gold inside and outside, exact and rounded values, with and without a rest class."""
    student, _, target = setup(step=step)
    assert_same_as_twin(student, target, T, candidates)


def test_the_gold_outside_k_matters_and_unknown_gold_does_not() -> None:
    """A stored gold log-prob is used; NaN (outside the shared vocabulary) leaves the token in the tail."""
    student, _, target = setup()
    blind = dataclasses.replace(target, gold_logp=torch.full((D,), math.nan, dtype=torch.float64))
    assert_same_as_twin(student, blind, 2.0, 8)
    with_gold = divergence.kl(*classes(student, target, 2.0), 2.0)
    without = divergence.kl(*classes(student, blind, 2.0), 2.0)
    outside = ~((target.ids == target.gold[:, None]) & target.keep).any(1)
    assert ((with_gold - without).abs() > 1e-6).tolist() == outside.tolist()
    assert outside.any()
    assert not outside.all()
    beyond = dataclasses.replace(blind, gold=torch.full((D,), V + 5))
    torch.testing.assert_close(divergence.kl(*classes(student, beyond, 2.0), 2.0), without)


def test_gold_heavier_than_the_rounded_tail_leaves_a_small_share() -> None:
    """Quantised zeta below the gold's own weight: the remaining tail keeps MIN_TAIL_SHARE of it."""
    student, _, target = setup()
    heavy = dataclasses.replace(target, tails={2.0: target.gold_logp / 2.0 - 0.05})
    assert_same_as_twin(student, heavy, 2.0, 8)


def test_infeasible_cap_is_raised() -> None:
    """A tail heavier than (number of tokens) x (smallest kept entry) cannot be filled below that entry."""
    student, _, target = setup()
    smallest = target.logp.masked_fill(~target.keep, math.inf).amin(1) / 2.0
    impossible = dataclasses.replace(target, tails={2.0: smallest + math.log(V) + 1.0})
    assert_same_as_twin(student, impossible, 2.0, 8)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_every_token_kept_is_the_dense_target(T: float) -> None:
    """K = V, zeta = -inf: no tail at all, equal to the dense target, no NaN in value or gradient."""
    student, teacher, target = setup(widths=(V,) * D)
    assert target.tails[T].isneginf().all()
    for loss in LOSSES.values():
        got = value_and_gradient(loss, lambda x: classes(x, target, T), student, T)
        want = value_and_gradient(loss, lambda x: classes(x, Dense(teacher), T), student, T)
        torch.testing.assert_close(got, want)


def test_one_token_left_is_exact() -> None:
    """K = V - 1 beside a short row: the tail is one token, which its mass determines, so nothing is lost."""
    student, teacher, target = setup(widths=(V - 1,) * (D - 1) + (2,))
    got = value_and_gradient(LOSSES["kl"], lambda x: classes(x, target, 2.0), student, 2.0)
    want = value_and_gradient(LOSSES["kl"], lambda x: classes(x, Dense(teacher), 2.0), student, 2.0)
    torch.testing.assert_close(got[0][:-1], want[0][:-1])
    torch.testing.assert_close(got[1][:-1], want[1][:-1])
    assert got[1].isfinite().all()


def test_empty_tail_code_with_tokens_left_stays_finite() -> None:
    """zeta = -inf although tokens are left (their mass underflowed): student classes keep their mass."""
    student, _, target = setup()
    empty = dataclasses.replace(target, tails={2.0: torch.full((D,), -math.inf, dtype=torch.float64)})
    both = classes(student, empty, 2.0)
    torch.testing.assert_close(both.student.logsumexp(-1), (student / 2.0).logsumexp(-1))
    for loss in LOSSES.values():
        value, gradient = value_and_gradient(loss, lambda x: classes(x, empty, 2.0), student, 2.0)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("candidates", [1, 64])
def test_classes_partition_the_vocabulary(candidates: int) -> None:
    student, _, target = setup(seed=3)
    both = classes(student, target, 2.0, candidates=candidates)
    torch.testing.assert_close(both.student.logsumexp(-1), (student / 2.0).logsumexp(-1))
    assert (both.student.isfinite() == both.teacher.isfinite()).all()


def test_a_perfect_student_has_almost_no_loss() -> None:
    """Student = teacher: the tail has the student's shape, so the filled distribution is the true one."""
    _, teacher, target = setup(seed=5)
    logits = teacher.clone().requires_grad_()
    value = divergence.kl(*classes(logits, target, 2.0), 2.0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.detach().abs().max() < 1e-10
    assert gradient.abs().max() < 1e-8


def test_float32_agrees_with_float64_at_a_large_vocabulary() -> None:
    """bf16-sized student logits at V = 20,000, K = 16: float32 arithmetic against the same in float64."""
    gen = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4, 20_000, generator=gen)
    teacher = (3 * torch.randn(4, 20_000, generator=gen, dtype=torch.float64)).log_softmax(-1)
    logp, ids = teacher.topk(16)
    tail = (teacher / 2).scatter(1, ids, -torch.inf).logsumexp(-1)
    target = TopK(
        ids, logp.float(), torch.ones_like(ids, dtype=torch.bool), {2.0: tail.float()},
        ids[:, 3], logp[:, 3].float(), 20_000,
    )  # fmt: skip
    lam = torch.full((4,), 0.5)
    for dtype, rtol in ((torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
        logits = student.to(dtype)
        got = divergence.tidal(*classes(logits, target, 2.0), 2.0, lam)
        assert got.dtype == torch.float32
        want = divergence.tidal(*classes(logits.double(), target, 2.0), 2.0, lam.double())
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", list(LOSSES))
def test_nan_logits_are_not_masked_away(name: str) -> None:
    """What masks absent classes must not hide a broken network: NaN in, NaN out, in that position alone."""
    student, teacher, target = setup()
    student[2, 5] = math.nan
    for any_target in (target, Dense(teacher)):
        value = LOSSES[name](*classes(student, any_target, 2.0), 2.0)
        assert value.isnan().tolist() == [d == 2 for d in range(D)]


def test_logits_have_no_scale() -> None:
    """A constant added to a position's student logits changes nothing, filled tail included."""
    student, _, target = setup()
    shifted = student + torch.linspace(-30, 30, D, dtype=torch.float64)[:, None]
    torch.testing.assert_close(classes(shifted, target, 2.0).teacher, classes(student, target, 2.0).teacher)


def test_refusals_name_what_is_wrong() -> None:
    student, _, target = setup()
    with pytest.raises(ValueError, match=r"no tail at temperature 3; it has: 1, 2"):
        classes(student, target, 3.0)
    with pytest.raises(ValueError, match=r"40 columns, the target's vocabulary 41"):
        classes(student[:, :40], target, 2.0)


def sketched(target: TopK, teacher: Tensor, rank: int = 5, *, step: float, mix: float) -> TopK:
    """The target with a sketch of the teacher in a random basis, orthonormal in random weights."""
    gen = torch.Generator().manual_seed(9)
    weight = torch.rand(V, generator=gen, dtype=torch.float64).softmax(0)
    root = weight.sqrt()[:, None]
    basis = torch.linalg.qr(root * torch.randn(V, rank, generator=gen, dtype=torch.float64))[0] / root
    mean = torch.randn(V, generator=gen, dtype=torch.float64)
    x = teacher - (teacher @ weight)[:, None] - mean
    codes = ((x * weight) @ basis / step).round().clamp(-127, 127).to(torch.int8)
    return dataclasses.replace(target, sketch=codes, basis=Basis(basis, mean, weight, step=step, mix=mix))


def fill_sketched(student: Tensor, target: TopK, T: float) -> Tensor:
    """[D, V] log weights at T, from the definition in `student.losses.sketch`, token by token."""
    assert target.sketch is not None
    assert target.basis is not None
    U, m, w = (t.double() for t in target.basis.on(student))
    d, b = target.basis.step, target.basis.mix
    out = torch.full(student.shape, -math.inf, dtype=torch.float64)
    for i in range(len(student)):
        mean = sum(float(w[j] * student[i, j]) for j in range(V))
        x = [float(student[i, j]) - mean - float(m[j]) for j in range(V)]
        f = []
        mine = [sum(float(w[j] * U[j, r]) * x[j] for j in range(V)) for r in range(U.shape[1])]
        for j in range(V):
            value = float(m[j]) + b * x[j]
            for r, c_s in enumerate(mine):
                c = float(target.sketch[i, r]) * d
                value += float(U[j, r]) * (min(max(c_s, c - d / 2), c + d / 2) - b * c_s)
            f.append(value / T)
        kept = {int(k): float(v) for k, v, on in zip(target.ids[i], target.logp[i], target.keep[i]) if on}
        tail, mass = [j for j in range(V) if j not in kept], math.exp(float(target.tails[T][i]))
        for j, v in kept.items():
            out[i, j] = v / T
        gold, gold_logp = int(target.gold[i]), float(target.gold_logp[i])
        if gold in tail and math.isfinite(gold_logp):
            tail.remove(gold)
            out[i, gold] = gold_logp / T
            mass = max(mass - math.exp(gold_logp / T), MIN_TAIL_SHARE * mass)
        if not tail or mass == 0:
            continue
        cap = max(min(kept.values()) / T, math.log(mass / len(tail)))
        a = math.log(mass / sum(math.exp(f[j]) for j in tail))
        for _ in range(2):
            a += math.log(mass / sum(math.exp(min(f[j] + a, cap)) for j in tail))
        for j in tail:
            out[i, j] = min(f[j] + a, cap)
    return out


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("mix", [0.0, 0.6, 1.0])
def test_a_sketch_fills_the_tail_as_defined(T: float, mix: float) -> None:
    """Values and gradients of every loss against the twin; ragged heads, one whole, gold inside and not."""
    for widths in ((1, 3, 6, 10, 4, 2, 8), (V, 3, V - 1, V - 2, 4, 2, 8)):
        student, teacher, target = setup(widths=widths, step=0.125)
        target = sketched(target, teacher, step=0.4, mix=mix)
        want = fill_sketched(student, target, T)

        def ours(x: Tensor, target: TopK = target) -> Classes:
            return classes(x, target, T)

        def twin(x: Tensor, want: Tensor = want) -> tuple[Tensor, Tensor]:
            return x / T, want

        for loss in LOSSES.values():
            got, expected = (value_and_gradient(loss, make, student, T) for make in (ours, twin))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_full_sketch_is_the_teacher() -> None:
    """As many directions as tokens, and fine steps: whatever the student, the teacher comes back."""
    student, teacher, target = setup(seed=2)
    target = sketched(target, teacher, V, step=0.02, mix=0.0)
    share = filled(student, target, 1.0).softmax(-1)
    assert (share - teacher.exp()).abs().max() < 0.02


def test_a_sketch_refuses_to_be_filled_without_its_basis() -> None:
    student, teacher, target = setup()
    target = dataclasses.replace(sketched(target, teacher, step=0.4, mix=0.5), basis=None)
    with pytest.raises(ValueError, match="needs its basis"):
        classes(student, target, 2.0)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_filled_is_what_classes_stand_for(T: float) -> None:
    """Token by token, of plain sparse targets: against the twin, a whole head and a short tail among them."""
    student, _, target = setup(widths=(V, 3, V - 1, 10, 4, 2, 8))
    torch.testing.assert_close(filled(student, target, T), fill(student, target, T, 64), rtol=1e-9, atol=1e-9)
