"""The objective: grammar, what it asks of a dataset, and its arithmetic over global counts.

Expected values are computed here from the definitions with plain softmaxes, not with the package's losses.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from shards.errors import UsageError
from student.attention import Coordinates
from student.objective import ABOVE_HALF, NAMES, Objective, Term, check_dataset, parse_objective
from student.schedule import LambdaSchedule
from student.tensors import Batch, ChunkBatch, Counts, Dense, PositionBatch

V, SHARED = 11, 9
T_VIEW = torch.tensor([0.25, 0.8])


def make_batch(rows: int = 6) -> tuple[Tensor, Batch]:
    """Two views; all masked positions but the first are distilled; chunks of 2, 1 and 1 tokens."""
    gen = torch.Generator().manual_seed(0)
    view = (torch.arange(rows) >= rows // 2).long()
    index = torch.arange(1, rows)
    teacher = (2 * torch.randn(len(index), SHARED, generator=gen)).log_softmax(-1)
    gold = torch.randint(0, SHARED, (rows,), generator=gen)
    gold_logp = teacher.gather(1, gold[index][:, None])[:, 0]
    token, chunk = torch.tensor([0, 1, 3, 5]), torch.tensor([0, 0, 1, 2])
    none = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(
        input_ids=none,
        position_ids=none,
        at=Coordinates(none, none, none, none),
        read=torch.zeros(rows, dtype=torch.long),
        gold=gold,
        view=view,
        t=T_VIEW,
        maskable=torch.tensor([5, 7]),
        counts=Counts(views=2, maskable=12, masked=rows, distilled=len(index), chunks=3),
        positions=PositionBatch(index, T_VIEW[view[index]], gold_logp, Dense(teacher), SHARED),
        chunks=ChunkBatch(
            token, chunk, torch.tensor([-0.5, -1.2, -9.0]), T_VIEW[view[torch.tensor([0, 3, 5])]]
        ),
    )
    return torch.randn(rows, V, generator=gen, requires_grad=True), batch


def empty(batch: Batch) -> tuple[Tensor, Batch]:
    """The same batch with nothing masked in it; counts are of a global batch that has more."""
    none = torch.zeros(0, dtype=torch.long)
    floats = torch.zeros(0)
    assert batch.positions is not None
    batch = dataclasses.replace(
        batch,
        read=none,
        gold=none,
        view=none,
        positions=PositionBatch(none, floats, floats, Dense(torch.zeros(0, SHARED)), SHARED),
        chunks=ChunkBatch(none, none, floats, floats),
    )
    return torch.zeros(0, V, requires_grad=True), batch


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", ()),
        ("kl", (Term("kl"),)),
        ("ce+kl", (Term("kl"),)),
        ("tidal+kl", (Term("tidal"), Term("kl"))),
        (" tidal:1 + kl:4 ", (Term("tidal", 1.0), Term("kl", 4.0))),
        ("ce-uniform:0.5", (Term("ce-uniform", 0.5),)),
    ],
)
def test_grammar(text: str, terms: tuple[Term, ...]) -> None:
    assert parse_objective(text) == Objective(terms=terms)


def test_every_name_parses_and_settings_pass_through() -> None:
    for name in NAMES:
        assert parse_objective(name, temperature=3.0).temperature == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tidl", "unknown objective 'tidl'; the valid ones are ce, ce-uniform, kl, reverse-kl, tidal, calm"),
        ("", "unknown objective ''"),
        ("kl+", "unknown objective ''"),
        ("kl:x", "weight of kl must be a number, got 'x'"),
        ("kl:-1", "weight of kl must be positive"),
        ("kl:nan", "weight of kl must be positive"),
        ("kl+kl:2", "names kl more than once"),
        ("ce:2", "--ce-weight 2"),
    ],
)
def test_bad_objectives_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_objective(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"ce_weight": 0.0},
        {"ce_weight": -1.0},
        {"temperature": 0.0},
        {"chunk_temperature": math.inf},
        {"timestep_weighting": "midrange"},
        {"ce_weighting": "1/t"},
        {"ce_schedule": "quadratic"},
        {"ce_normalisation": "tokens"},
        {"clamp": "none"},
    ],
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        Objective(**settings)


@pytest.mark.parametrize("settings", [{"initial": 0.9, "maximum": 0.1}, {"decay": "step"}, {"axes": "none"}])
def test_bad_schedules_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        LambdaSchedule(**settings)


def test_what_a_dataset_must_hold() -> None:
    assert parse_objective("ce+ce-uniform").requirements() == frozenset()
    assert parse_objective("kl+calm").requirements() == {"positions", "chunks"}
    for name in NAMES:
        check_dataset(parse_objective(name), "shared", (1.0, 2.0))
    check_dataset(parse_objective("reverse-calm", chunk_temperature=5.0), "cross", ())
    check_dataset(parse_objective("kl", temperature=3.0), "shared", None)  # dense: any temperature
    check_dataset(parse_objective("ce-uniform"), "noise", ())
    with pytest.raises(
        UsageError, match=r"objective kl needs teacher positions.*'cross'.*can train ce, ce-uniform, calm"
    ):
        check_dataset(parse_objective("calm+kl"), "cross", ())
    with pytest.raises(UsageError, match=r"calm needs teacher chunks"):
        check_dataset(parse_objective("calm"), "noise", ())
    with pytest.raises(UsageError, match=r"tidal at temperature 3: .* for 1, 2;"):
        check_dataset(parse_objective("tidal", temperature=3.0), "shared", (1.0, 2.0))


def test_total_is_ce_plus_weighted_terms_over_their_own_counts() -> None:
    """From the definitions: CE over 12 maskable tokens, KL over 5 distilled, CALM over 3 chunks."""
    logits, batch = make_batch()
    out = parse_objective("kl:3+tidal:2+calm+ce-uniform:0.5", ce_weight=2.0)(logits, batch, 0.5)
    at = batch.positions
    assert at is not None
    assert isinstance(at.target, Dense)
    nll = -logits.log_softmax(-1).gather(1, batch.gold[:, None])[:, 0]
    q = (logits[1:, :SHARED] / 2).softmax(-1)
    lam = (0.5 * (1 - at.t))[:, None]
    r = (((1 - lam) * logits[1:, :SHARED] + lam * at.target.logp) / 2).softmax(-1)
    p_s = torch.exp(-torch.stack([nll[0] + nll[1], nll[3], nll[5]]) / 2)
    p_t = torch.exp(torch.tensor([-0.5, -1.2, -9.0]) / 2)
    want = {
        "ce": (nll / T_VIEW[batch.view]).sum() / 12,
        "ce-uniform": nll.sum() / 12,
        "kl": 4 * kl((at.target.logp / 2).softmax(-1), q).sum() / 5,
        "tidal": 4 * kl(r, q).sum() / 5,
        "calm": -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log()).sum() / 3,
        ABOVE_HALF: torch.tensor(2 / 3),
    }
    assert set(out.terms) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-4, atol=1e-5)
    weights = {"ce": 2.0, "kl": 3.0, "tidal": 2.0, "calm": 1.0, "ce-uniform": 0.5}
    total = sum(w * out.terms[name] for name, w in weights.items())
    torch.testing.assert_close(out.total.detach(), total)
    assert not any(v.requires_grad for v in out.terms.values())


def take(batch: Batch, rows: slice, chunks: slice) -> Batch:
    """The micro-batch of some masked positions, with the global counts kept."""
    assert batch.positions is not None
    assert batch.chunks is not None
    assert isinstance(batch.positions.target, Dense)
    index, token, chunk = batch.positions.index, batch.chunks.token, batch.chunks.chunk
    d = (index >= rows.start) & (index < rows.stop)
    m = (chunk >= chunks.start) & (chunk < chunks.stop)
    return dataclasses.replace(
        batch,
        gold=batch.gold[rows],
        view=batch.view[rows],
        positions=PositionBatch(
            index[d] - rows.start,
            batch.positions.t[d],
            batch.positions.gold_logp[d],
            Dense(batch.positions.target.logp[d]),
            SHARED,
        ),
        chunks=ChunkBatch(
            token[m] - rows.start, chunk[m] - chunks.start, batch.chunks.logp[chunks], batch.chunks.t[chunks]
        ),
    )


def test_micro_batches_add_up_to_the_whole() -> None:
    """Local sums over global counts: two micro-batches give the loss, terms and gradient of one."""
    logits, batch = make_batch()
    objective = parse_objective("tidal+reverse-calm", timestep_weighting="mid-range")
    whole = objective(logits, batch, 0.3)
    (gradient,) = torch.autograd.grad(whole.total, logits)
    parts = [
        objective(logits[:3], take(batch, slice(0, 3), slice(0, 1)), 0.3),
        objective(logits[3:], take(batch, slice(3, 6), slice(1, 3)), 0.3),
    ]
    total = parts[0].total + parts[1].total
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], gradient)
    for name, value in whole.terms.items():
        torch.testing.assert_close(parts[0].terms[name] + parts[1].terms[name], value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [True, False])
def test_nothing_masked_is_a_zero_inside_the_graph(name: str, targets: bool) -> None:
    """Empty M (common at small t), or no rows at all (an idle rank): loss 0, same terms, backward works."""
    full_logits, full = make_batch()
    logits, batch = empty(full)
    if not targets:
        batch = dataclasses.replace(batch, positions=None, chunks=None)
    objective = parse_objective(name)
    out = objective(logits, batch, 0.5)
    assert out.total.item() == 0
    out.total.backward()
    assert set(out.terms) == set(objective(full_logits, full, 0.5).terms)
    nobody = dataclasses.replace(batch, counts=Counts())
    assert objective(logits, nobody, 0.5).total.item() == 0


def test_missing_targets_are_a_programming_error() -> None:
    logits, batch = make_batch()
    bare = dataclasses.replace(batch, positions=None, chunks=None)
    for name, message in (("kl", "distilled positions"), ("calm", "chunks")):
        with pytest.raises(ValueError, match=message):
            parse_objective(name)(logits, bare, 0.0)


def test_distillation_sees_only_the_shared_vocabulary() -> None:
    """Columns beyond it get no gradient from the terms, all from CE; a gold id beyond it feeds no chunk."""
    logits, batch = make_batch()
    gold = batch.gold.clone()
    gold[0] = V - 1
    keep = torch.arange(1, 4)
    one_token = ChunkBatch(keep, torch.arange(3), torch.full((3,), -1.0), torch.full((3,), 0.5), SHARED)
    batch = dataclasses.replace(batch, gold=gold, chunks=one_token)
    out = parse_objective("kl+calm", ce_weight=0.0)(logits, batch, 0.0)
    (gradient,) = torch.autograd.grad(out.total, logits)
    assert gradient[:, SHARED:].abs().max() == 0
    assert gradient[1:, :SHARED].abs().max() > 0
    logp = logits[:, :SHARED].log_softmax(-1)[keep, gold[keep]]
    p_s, p_t = (logp / 2).exp(), math.exp(-0.5)
    want = -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log()).mean()
    torch.testing.assert_close(out.terms["calm"], want.detach())
    (ce_gradient,) = torch.autograd.grad(parse_objective("ce")(logits, batch, 0.0).total, logits)
    assert (ce_gradient[:, SHARED:] != 0).all()


def test_progress_is_clamped() -> None:
    """Beyond the last step lambda stays at its end value, where the pure linear formula would exceed 1."""
    logits, batch = make_batch()
    objective = parse_objective("tidal+calm-tidal", schedule=LambdaSchedule(decay="linear"))
    torch.testing.assert_close(objective(logits, batch, 1.7).total, objective(logits, batch, 1.0).total)
    torch.testing.assert_close(objective(logits, batch, -1.0).total, objective(logits, batch, 0.0).total)


def test_timestep_weighting_applies_to_interpolated_terms_alone() -> None:
    logits, batch = make_batch()
    text = "kl+tidal+calm+calm-tidal+reverse-calm-tidal"
    plain = parse_objective(text)(logits, batch, 0.5).terms
    weighted = parse_objective(text, timestep_weighting="mid-range")(logits, batch, 0.5).terms
    for name in ("ce", "kl", "calm"):
        torch.testing.assert_close(plain[name], weighted[name])
    for name in ("tidal", "calm-tidal", "reverse-calm-tidal"):
        assert weighted[name] < 0.5 * plain[name]  # both timesteps lie away from 1/2


def test_bfloat16_logits_give_float32_losses() -> None:
    logits, batch = make_batch()
    out = parse_objective("tidal+bernoulli-kl")(logits.detach().bfloat16().requires_grad_(), batch, 0.5)
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(
        out.total, parse_objective("tidal+bernoulli-kl")(logits, batch, 0.5).total, rtol=2e-2, atol=1e-2
    )
