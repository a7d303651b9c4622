"""Properties of the pure losses: gradients against finite differences and float64, balance points, edge
values.

Values against the reference implementation are in test_golden_losses.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student.losses import chunks, divergence
from student.losses.ce import ce_share, gold_log_probs, timestep_weight
from student.schedule import LambdaSchedule

NEAR = torch.float64


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=NEAR, generator=torch.Generator().manual_seed(seed))


def gradient_of(loss, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x).sum(), x)
    return gradient


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_divergence_gradcheck(name: str, T: float) -> None:
    teacher = rand(3, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: getattr(divergence, name)(s, teacher, T), rand(3, 5).requires_grad_()
    )


def test_tidal_gradient_treats_the_mixed_target_as_constant() -> None:
    """d/ds T^2 KL(r || softmax(s)) = T^2 (softmax(s) - r), r held fixed (so finite differences do not
    apply)."""
    s, t, lam, T = rand(3, 5), rand(3, 5, seed=1), torch.tensor([0.0, 0.4, 1.0], dtype=NEAR), 2.0
    got = gradient_of(lambda x: divergence.tidal(x, t, T, lam), s)
    r = ((1 - lam[:, None]) * s + lam[:, None] * t).softmax(-1)
    torch.testing.assert_close(got, T**2 * (s.softmax(-1) - r))
    assert got[0].abs().max() < 1e-12  # lambda 0: the target is the student itself


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["calm", "reverse_calm", "bernoulli_kl"])
def test_chunk_gradcheck(name: str, T: float) -> None:
    student, teacher = -rand(6).abs() * 4 - 0.05, -rand(6, seed=1).abs() * 4 - 0.05
    assert torch.autograd.gradcheck(lambda s: getattr(chunks, name)(s, teacher, T), student.requires_grad_())


@pytest.mark.parametrize("forward", [True, False])
def test_interpolated_chunk_gradient(forward: bool) -> None:
    """The mixed probability is a constant: the gradient is that of `calm` (`reverse_calm`) with p_mix as
    p_t."""
    student, teacher = (
        torch.tensor([-0.3, -2.0, -6.0], dtype=NEAR),
        torch.tensor([-1.0, -0.1, -3.0], dtype=NEAR),
    )
    lam, T = torch.tensor([0.2, 0.7, 1.0], dtype=NEAR), 2.0
    p_mix = (1 - lam) * (student / T).exp() + lam * (teacher / T).exp()
    plain, mixed = (
        (chunks.calm, chunks.calm_tidal) if forward else (chunks.reverse_calm, chunks.reverse_calm_tidal)
    )
    torch.testing.assert_close(
        gradient_of(lambda s: mixed(s, teacher, T, lam), student),
        gradient_of(lambda s: plain(s, T * p_mix.log(), T), student),
    )


def test_cross_entropy_gradcheck() -> None:
    gold = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda s: gold_log_probs(s, gold), rand(3, 5).requires_grad_())


def test_bernoulli_kl_balances_where_the_teacher_is_and_reverse_calm_does_not() -> None:
    """At p_s = p_t the KL and its gradient vanish; Reverse CALM still pushes, by log(p_t / (1 - p_t)) p_s /
    T."""
    logp, T = torch.tensor([-5.0, -1.0, -0.2]), 2.0
    assert chunks.bernoulli_kl(logp, logp, T).abs().max() < 1e-6
    assert gradient_of(lambda s: chunks.bernoulli_kl(s, logp, T), logp).abs().max() < 1e-6
    p = (logp / T).exp()
    torch.testing.assert_close(
        gradient_of(lambda s: chunks.reverse_calm(s, logp, T), logp), -(p / (1 - p)).log() * p / T
    )


@pytest.mark.parametrize("name", ["calm", "reverse_calm", "bernoulli_kl"])
def test_no_gradient_dies_in_log_space(name: str) -> None:
    """A chunk at log p = -40 (T = 2: p = 2e-9) that the teacher is sure of: the reference's clamp gives
    exactly 0, log space keeps the sign. A saturated student (LP = 0) stays finite in both."""
    loss = getattr(chunks, name)
    wrong, sure = torch.tensor([-40.0]), torch.tensor([-0.01])
    assert gradient_of(lambda s: loss(s, sure, 2.0, clamp="reference"), wrong).item() == 0
    assert gradient_of(lambda s: loss(s, sure, 2.0), wrong).item() < 0
    for clamp in ("log", "reference"):
        for teacher in (torch.tensor([0.0]), torch.tensor([-300.0])):
            value = loss(torch.tensor([0.0]), teacher, 2.0, clamp=clamp)
            slope = gradient_of(lambda s, t=teacher, c=clamp: loss(s, t, 2.0, clamp=c), torch.tensor([0.0]))
            assert value.isfinite().all()
            assert slope.isfinite().all()


def test_saturated_student_is_still_pulled_down() -> None:
    """At p_s = 1 the derivative of the unclamped value is kept, so a doubting teacher moves the student."""
    doubt, certain = torch.tensor([-8.0]), torch.tensor([0.0])
    assert gradient_of(lambda s: chunks.bernoulli_kl(s, doubt, 2.0), certain).item() > 1
    assert gradient_of(lambda s: chunks.calm(s, doubt, 2.0), certain).item() > 1


def by_definition(
    name: str, student: float, teacher: float, lam: float, T: float
) -> tuple[float, float, float]:
    """Value of a chunk loss, its slope in the student's log-prob, and the size of the terms the slope is made
    of; from the definitions, in Python floats. The target's p and 1 - p lie in [1e-7, 1 - 1e-7], the
    student's log p is at most -1e-7."""
    low, high = math.log(1e-7), math.log1p(-1e-7)

    def log1m(x: float) -> float:
        return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))

    x, y = min(student / T, -1e-7), teacher / T
    p, q, log_q = math.exp(x), -math.expm1(x), log1m(x)
    a, b = (math.exp(min(max(v, low), high)) for v in (y, log1m(min(y, high))))
    if "tidal" in name:
        a, b = (min(max((1 - lam) * s + lam * t, 1e-7), 1 - 1e-7) for s, t in ((p, a), (q, b)))
    if name in ("calm", "calm_tidal"):
        parts = [-a / T, b * p / q / T]
        return -(a * x + b * log_q), sum(parts), sum(map(abs, parts))
    parts = [-p * math.log(a) / T, p * math.log(b) / T]
    value = -(p * math.log(a) + q * math.log(b))
    if name == "bernoulli_kl":
        parts += [p * x / T, -p * log_q / T]
        value += p * x + q * log_q
    return value, sum(parts), sum(map(abs, parts))


@pytest.mark.parametrize(("dtype", "tolerance"), [(NEAR, 1e-8), (torch.float32, 3e-5)])
@pytest.mark.parametrize("name", ["calm", "reverse_calm", "bernoulli_kl", "calm_tidal", "reverse_calm_tidal"])
@settings(deadline=None)
@given(
    student=st.floats(min_value=-400.0, max_value=0.0, width=32),
    teacher=st.floats(min_value=-400.0, max_value=0.0, width=32),
    lam=st.floats(min_value=0.0, max_value=1.0, width=32),
    T=st.sampled_from([1.0, 2.0, 5.0]),
)
def test_chunk_losses_everywhere(
    name: str, dtype: torch.dtype, tolerance: float, student: float, teacher: float, lam: float, T: float
) -> None:
    """Value and slope in float64 and float32 against the definitions, from certain to impossible chunks;
    always finite, and with a forward loss the slope never vanishes but at its balance."""
    s = torch.tensor([student], dtype=dtype, requires_grad=True)
    t, weight = torch.tensor([teacher], dtype=dtype), torch.tensor([lam], dtype=dtype)
    arguments = (s, t, T, weight) if "tidal" in name else (s, t, T)
    value = getattr(chunks, name)(*arguments)
    (slope,) = torch.autograd.grad(value.sum(), s)
    want, want_slope, size = by_definition(name, student, teacher, lam, T)
    assert value.item() == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert slope.item() == pytest.approx(want_slope, rel=tolerance, abs=tolerance * size + 1e-37)
    if "reverse" not in name and name != "bernoulli_kl" and student / T < math.log(1e-7):
        assert slope.item() < 0


@given(st.floats(min_value=-80.0, max_value=-1e-7))
def test_log1mexp_is_accurate_everywhere(x: float) -> None:
    """float32 against float64 from the same float32 input, value and slope -1 / (exp(-x) - 1)."""
    x32 = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    exact = float(x32.detach())
    value = chunks.log1mexp(x32)
    (slope,) = torch.autograd.grad(value, x32)
    want = math.log(-math.expm1(exact)) if exact > -0.7 else math.log1p(-math.exp(exact))
    assert value.item() == pytest.approx(want, rel=2e-6, abs=1e-38)
    assert slope.item() == pytest.approx(-1 / math.expm1(-exact), rel=2e-6, abs=1e-38)


def test_chunk_log_probs_sums_spans_and_leaves_others_alone() -> None:
    logp = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    got = chunks.chunk_log_probs(logp, torch.tensor([0, 0, 2, 0]), 3)
    assert got.tolist() == [-11.0, 0.0, -4.0]
    assert chunks.chunk_log_probs(logp[:0], torch.zeros(0, dtype=torch.long), 0).shape == (0,)


def test_absent_classes_give_no_nan() -> None:
    """A class that neither side has (-inf), or only the student: no NaN in value or gradient of any
    divergence."""
    inf = torch.inf
    s = torch.tensor([[0.3, -0.2, -inf], [0.1, 0.5, 1.0]])
    t = torch.tensor([[1.0, 0.0, -inf], [0.2, 0.1, -inf]])
    for loss in (
        lambda x: divergence.kl(x, t, 2.0),
        lambda x: divergence.reverse_kl(x, t, 2.0),
        lambda x: divergence.tidal(x, t, 2.0, torch.tensor([0.0, 0.5])),
        lambda x: divergence.tidal(x, t, 2.0, torch.tensor([1.0, 0.0])),
    ):
        assert loss(s).isfinite().all()
        assert gradient_of(loss, s).isfinite().all()
    torch.testing.assert_close(divergence.kl(s, t, 2.0)[0], divergence.kl(s[:1, :2], t[:1, :2], 2.0)[0])


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = rand(4, 7, scale=3).to(torch.bfloat16)
    gold = torch.tensor([1, 2, 3, 6])
    assert gold_log_probs(logits, gold).dtype == torch.float32
    torch.testing.assert_close(gold_log_probs(logits, gold), gold_log_probs(logits.float(), gold))


def test_linear_weight_is_the_reference_formula_not_one_over_t() -> None:
    t = torch.tensor([1e-3, 0.5])
    weight = timestep_weight(t)
    torch.testing.assert_close(weight, 1 / ((1 - (1 - t)) + 1e-6), rtol=0, atol=0)
    assert abs(weight[0].item() - 1000) > 0.5
    assert weight[1].item() == pytest.approx(2, rel=1e-5)


def test_ce_shares_of_the_three_normalisations() -> None:
    """Two views with 4 and 0 maskable tokens; an empty view counts as a view and never divides by zero."""
    view, maskable = torch.tensor([0, 0]), torch.tensor([4, 0])
    counts = {"total_maskable": 10, "total_views": 3}
    assert ce_share("token", view, maskable, **counts).tolist() == pytest.approx([0.1, 0.1])
    assert ce_share("sequence", view, maskable, **counts).tolist() == pytest.approx([1 / 12, 1 / 12])
    assert ce_share("batch", view, maskable, **counts).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert ce_share("token", view, maskable, total_maskable=0, total_views=0).isfinite().all()


def test_mid_range_weight_peaks_at_one_half() -> None:
    weight = divergence.mid_range_weight(torch.tensor([0.35, 0.5, 0.65]))
    assert weight.tolist() == pytest.approx([math.exp(-0.5), 1.0, math.exp(-0.5)])


def test_schedule_axes_and_ends() -> None:
    t = torch.tensor([0.0, 0.25])
    assert LambdaSchedule().at(0.0, t).tolist() == pytest.approx([0.1, 0.075])
    assert LambdaSchedule().at(1.0, t).tolist() == pytest.approx([0.9, 0.675])
    assert LambdaSchedule(decay="linear").at(0.5, t).tolist() == pytest.approx([0.5, 0.375])
    assert LambdaSchedule(axes="training_only").at(0.5, t).tolist() == pytest.approx([0.5, 0.5])
    assert LambdaSchedule(axes="timestep_only").at(0.0, t).tolist() == pytest.approx([0.9, 0.675])
