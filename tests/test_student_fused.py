"""The fused head and loss against the plain form: same values, same gradients, for every term and chunk size.

The plain form is `Objective.__call__` on whole logits with autograd. Batches are random: positions without a
target, gold tokens outside the kept ones and outside the shared vocabulary, chunks of one to four tokens.
"""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shards.errors import UsageError
from student import fused
from student.attention import Coordinates
from student.fused import FusedLoss, fused_loss
from student.losses import sparse
from student.losses.chunks import Clamp
from student.objective import NAMES, Objective, parse_objective
from student.parts import parts
from student.schedule import LambdaSchedule
from student.tensors import (
    Basis,
    Batch,
    ChunkBatch,
    Counts,
    Dense,
    Exact,
    PositionBatch,
    TeacherHead,
    TopK,
    to_device,
)

V, SHARED, H = 23, 20, 5
ALL = "ce-uniform:0.3+kl+reverse-kl:0.5+tidal:2+calm+reverse-calm+bernoulli-kl+calm-tidal+reverse-calm-tidal"
ROW = 4 * V
"""Bytes of one row of logits."""


def make_batch(seed: int, n: int, *, dense: bool = False, cut: bool = False, dtype: torch.dtype) -> Batch:
    """n masked positions of two views.

    Args:
        cut: chunks are normalised over the shared vocabulary.
    """
    gen = torch.Generator().manual_seed(seed)
    none = torch.zeros(1, 1, dtype=torch.long)
    gold = torch.randint(0, V, (n,), generator=gen)
    view = (torch.arange(n) >= n // 2).long()
    t = torch.tensor([0.2, 0.7], dtype=dtype)
    index = torch.arange(n)[torch.rand(n, generator=gen) < 0.8]
    teacher = (2 * torch.randn(len(index), SHARED, generator=gen, dtype=dtype)).log_softmax(-1)
    shared_gold = gold[index].clamp_max(SHARED - 1)
    gold_logp = teacher.gather(1, shared_gold[:, None])[:, 0].where(gold[index] < SHARED, math.nan)
    target: Dense | TopK = Dense(teacher) if dense else topk(teacher, shared_gold, gold_logp, gen)
    token, chunk, first = [], [], 0
    while first < n:
        length = int(torch.randint(1, 5, (), generator=gen))
        inside = range(first, min(n, first + length))
        if torch.rand((), generator=gen) < 0.7 and (not cut or int(gold[inside].max()) < SHARED):
            token += list(inside)
            chunk += [max(chunk, default=-1) + 1] * len(inside)
        first += length
    chunks = max(chunk, default=-1) + 1
    first_token = torch.tensor([token[chunk.index(c)] for c in range(chunks)], dtype=torch.long)
    logp = -3 * torch.rand(chunks, generator=gen, dtype=dtype)
    return Batch(
        input_ids=none,
        position_ids=none,
        at=Coordinates(none, none, none, none),
        read=gold,
        gold=gold,
        view=view,
        t=t,
        maskable=torch.tensor([5, 7]),
        counts=Counts(views=3, maskable=17, masked=n, distilled=len(index) + 2, chunks=chunks + 1),
        positions=PositionBatch(index, t[view[index]], gold_logp, target, SHARED),
        chunks=ChunkBatch(
            torch.tensor(token, dtype=torch.long),
            torch.tensor(chunk, dtype=torch.long),
            logp,
            t[view[first_token]],
            SHARED if cut else None,
        ),
    )


def topk(teacher: Tensor, gold: Tensor, gold_logp: Tensor, gen: torch.Generator) -> TopK:
    order = teacher.argsort(-1, descending=True)
    keep = torch.arange(6) < torch.randint(1, 7, (len(teacher), 1), generator=gen)
    ids = torch.where(keep, order[:, :6], order[:, :1])
    inside = torch.zeros(teacher.shape, dtype=torch.bool).scatter(1, ids, True)
    tails = {T: (teacher / T).masked_fill(inside, -torch.inf).logsumexp(-1) for T in (1.0, 2.0)}
    return TopK(ids, teacher.gather(1, ids), keep, tails, gold, gold_logp, SHARED)


def with_sketch(batch: Batch, seed: int) -> Batch:
    """The same targets, each with a sketch of four coefficients."""
    gen = torch.Generator().manual_seed(seed)
    at = batch.positions
    assert at is not None
    assert isinstance(at.target, TopK)
    codes = torch.randint(-7, 8, (len(at.index), 4), generator=gen).to(torch.int8)
    wide = torch.float64
    basis = Basis(
        torch.randn(SHARED, 4, generator=gen, dtype=wide),
        torch.randn(SHARED, generator=gen, dtype=wide),
        torch.rand(SHARED, generator=gen, dtype=wide).softmax(0),
        step=0.3,
        mix=0.6,
    )
    target = dataclasses.replace(at.target, sketch=codes, basis=basis)
    return dataclasses.replace(batch, positions=dataclasses.replace(at, target=target))


def with_states(batch: Batch, seed: int) -> Batch:
    """Exact targets in place of the batch's."""
    gen = torch.Generator().manual_seed(seed)
    at = batch.positions
    assert at is not None
    dtype = at.t.dtype
    head = TeacherHead(torch.randn(SHARED, 3, generator=gen), torch.randn(SHARED, generator=gen))
    target = Exact(torch.randn(len(at.index), 3, generator=gen, dtype=dtype), head)
    return dataclasses.replace(batch, positions=dataclasses.replace(at, target=target))


@pytest.mark.parametrize("other", [with_sketch, with_states])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_equals_the_plain_form_with_a_table(other: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are filled token by token, in tiles; moving a batch leaves the table whole."""
    monkeypatch.setattr(fused, "TILE_BYTES", 3 * ROW)
    for seed, (dtype, rtol) in enumerate([(torch.float32, 1e-5), (torch.float64, 1e-11)]):
        batch = to_device(other(make_batch(seed, 17, dtype=dtype), seed), "cpu")
        assert_same(parse_objective(ALL), batch, *make_head(seed, 17, dtype), rows, rtol=rtol)


def make_head(seed: int, n: int, dtype: torch.dtype, width: int = H) -> tuple[Tensor, nn.Linear]:
    gen = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, width, generator=gen, dtype=dtype))
    return torch.randn(n, width, generator=gen, dtype=dtype, requires_grad=True), head


def assert_same(
    objective: Objective, batch: Batch, hidden: Tensor, head: nn.Module, rows: int, *, rtol: float
) -> None:
    """Values, terms and gradients of hidden states and head, at most `rows` rows of logits at a time."""
    inputs = [x for x in (hidden, *head.parameters()) if x.requires_grad]
    want = objective(head(hidden), batch, 0.3)
    got = fused_loss(objective, batch, 0.3, hidden, head, ROW * rows)
    assert got.terms.keys() == want.terms.keys()
    close(got.total, want.total, rtol)
    for name, value in want.terms.items():
        close(got.terms[name], value, rtol)
    for ours, theirs in zip(torch.autograd.grad(got.total, inputs), torch.autograd.grad(want.total, inputs)):
        close(ours, theirs, rtol)
    with torch.no_grad():
        values = fused_loss(objective, batch, 0.3, hidden, head, ROW * rows)
    assert not values.total.requires_grad
    close(values.total, want.total, rtol)
    for name, value in want.terms.items():
        close(values.terms[name], value, rtol)


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("text", [*NAMES, ALL])
def test_equals_the_plain_form(text: str, dense: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every term and all together; tiles of three rows, so that chunks of rows have several."""
    monkeypatch.setattr(fused, "TILE_BYTES", 3 * ROW)
    for seed, (dtype, rtol) in enumerate([(torch.float32, 1e-5), (torch.float64, 1e-11)]):
        batch = make_batch(seed, 17, dense=dense, cut=bool(seed), dtype=dtype)
        assert_same(parse_objective(text), batch, *make_head(seed, 17, dtype), rows, rtol=rtol)


@pytest.mark.parametrize("normalisation", ["token", "sequence", "batch"])
@pytest.mark.parametrize("clamp", ["log", "reference"])
@pytest.mark.parametrize("weighting", ["scheduler", "uniform"])
def test_every_setting(normalisation: Any, clamp: Clamp, weighting: Any) -> None:
    objective = parse_objective(
        ALL,
        ce_weight=0.7,
        clamp=clamp,
        ce_normalisation=normalisation,
        ce_weighting=weighting,
        chunk_temperature=5.0,
        timestep_weighting="mid-range",
    )
    batch = make_batch(3, 11, dtype=torch.float64)
    assert_same(objective, batch, *make_head(3, 11, torch.float64), 4, rtol=1e-11)
    without = dataclasses.replace(objective, ce_weight=0.0)
    assert_same(without, batch, *make_head(3, 11, torch.float64), 4, rtol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 20),
    rows=st.integers(1, 25),
    tile=st.integers(1, 8),
    dense=st.booleans(),
    cut=st.booleans(),
    terms=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_any_sizes(seed: int, n: int, rows: int, tile: int, dense: bool, cut: bool, terms: set[str]) -> None:
    """Any number of positions, none included, and any cut into chunks and tiles."""
    batch = make_batch(seed, n, dense=dense, cut=cut, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "TILE_BYTES", tile * ROW)
        objective = parse_objective("+".join(sorted(terms)))
        assert_same(objective, batch, *make_head(seed, n, torch.float64), rows, rtol=1e-9)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numeric derivatives of the whole function. What training holds constant is constant here: lambda is 1,
    so that interpolated targets are the teacher's, and the filled tails are those of the first call."""
    batch = make_batch(5, 5, dense=dense, cut=True, dtype=torch.float64)
    hidden, head = make_head(5, 5, torch.float64, 2)
    always = LambdaSchedule(initial=1.0, maximum=1.0, axes="training_only")
    objective = parse_objective(name, ce_weight=0.0 if name != "ce" else 1.0, schedule=always)
    filled: list[Tensor] = []
    fill = sparse._teacher

    def record(*args: Any) -> Tensor:
        filled.append(fill(*args))
        return filled[-1]

    monkeypatch.setattr(sparse, "_teacher", record)
    fused_loss(objective, batch, 1.0, hidden, head, 3 * ROW)
    again = itertools.cycle(filled)
    monkeypatch.setattr(sparse, "_teacher", lambda *_: next(again))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        head = nn.Linear(1, 1, bias=False)
        del head._parameters["weight"]
        head.weight = weight
        head.out_features = V
        return fused_loss(objective, batch, 1.0, hidden, head, 3 * ROW).total

    assert torch.autograd.gradcheck(loss, (hidden, head.weight.detach().clone().requires_grad_()))


# how rows are cut


def test_chunks_of_text_stay_whole() -> None:
    """Every chunk of text lies in one part with its own numbers, though one alone exceeds the row budget."""
    batch = make_batch(0, 60, dtype=torch.float32)
    cut = parts(batch, 3, {"chunks", "positions"})
    assert [p.first for p in cut] == [0, *(p.end for p in cut[:-1])]
    assert cut[-1].end == 60
    assert max(p.rows for p in cut) == 4
    assert batch.chunks is not None
    assert batch.positions is not None
    seen, spots = [], []
    for p in cut:
        assert p.batch.chunks is not None
        assert p.batch.positions is not None
        for c in range(len(p.batch.chunks.logp)):
            tokens = p.batch.chunks.token[p.batch.chunks.chunk == c] + p.first
            seen.append((tokens.tolist(), p.batch.chunks.logp[c].item(), p.batch.chunks.t[c].item()))
        assert torch.equal(p.batch.positions.index, torch.from_numpy(p.index))
        spots += (p.batch.positions.index + p.first).tolist()
    chunks = batch.chunks
    assert seen == [
        (chunks.token[chunks.chunk == c].tolist(), chunks.logp[c].item(), chunks.t[c].item())
        for c in range(len(chunks.logp))
    ]
    assert spots == batch.positions.index.tolist()
    assert [p.rows for p in parts(batch, 7, set())] == [7] * 8 + [4]
    assert [p.rows for p in parts(make_batch(0, 0, dtype=torch.float32), 7, {"chunks"})] == [0]


def test_chunks_may_come_in_any_order() -> None:
    """Shuffled, and even with tokens in common: values and gradients are those of the plain form."""
    batch = make_batch(1, 20, dtype=torch.float64)
    assert batch.chunks is not None
    n = len(batch.chunks.logp)
    turn, mix = torch.randperm(n), torch.randperm(len(batch.chunks.token) + 3)
    token = torch.cat([batch.chunks.token, torch.tensor([2, 3, 4])])
    chunk = torch.cat([turn[batch.chunks.chunk], torch.tensor([n, n, n])])
    logp = torch.cat([batch.chunks.logp[turn.argsort()], torch.tensor([-1.0], dtype=torch.float64)])
    t = torch.full((n + 1,), 0.4, dtype=torch.float64)
    batch = dataclasses.replace(batch, chunks=ChunkBatch(token[mix], chunk[mix], logp, t))
    for rows in (1, 6, 100):
        assert_same(parse_objective(ALL), batch, *make_head(1, 20, torch.float64), rows, rtol=1e-10)


def test_unordered_positions_are_a_programming_error() -> None:
    batch = make_batch(0, 9, dtype=torch.float32)
    assert batch.positions is not None
    turned = dataclasses.replace(batch.positions, index=batch.positions.index.flip(0))
    batch = dataclasses.replace(batch, positions=turned)
    with pytest.raises(ValueError, match="ascend"):
        fused_loss(parse_objective("kl"), batch, 0.0, *make_head(0, 9, torch.float32))


# gradients: what is asked for, and no more


@pytest.mark.parametrize("text", ["ce", "kl", ALL])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_no_tensor_is_larger_than_a_chunk(text: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tensors that the forward and the backward pass make, none outgrows a chunk's logits."""
    n, rows = 90, 12
    batch = make_batch(0, n, dense=dense, cut=True, dtype=torch.float32)
    hidden, head = make_head(0, n, torch.float32)
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    with Sizes():
        fused_loss(parse_objective(text), batch, 0.3, hidden, head, rows * ROW).total.backward()
    assert hidden.grad is not None
    stored = n * SHARED  # a view of the dense target, or of hidden states; nothing that is made
    assert max(size for size in made if size != stored) <= max(rows * V, n * H)
    assert made.count(stored) == 0


def test_scaled_repeated_and_added() -> None:
    """Any multiple of the loss, backward twice over a kept graph, and two losses at once."""
    batch = make_batch(2, 13, dtype=torch.float64)
    hidden, head = make_head(2, 13, torch.float64)
    objective = parse_objective("tidal+calm")
    (want,) = torch.autograd.grad(objective(head(hidden), batch, 0.3).total, head.weight)
    loss = fused_loss(objective, batch, 0.3, hidden, head, 4 * ROW).total
    for scale in (1.0, -2.5, 0.0, 1.0):
        (got,) = torch.autograd.grad(scale * loss, head.weight, retain_graph=True)
        close(got, scale * want, 1e-11)
    other = fused_loss(parse_objective("ce", ce_weight=1e-9), batch, 0.3, hidden, head, 4 * ROW).total
    (got,) = torch.autograd.grad(loss + other, head.weight)
    close(got, want, 1e-6)


@pytest.mark.parametrize("frozen", ["head", "body", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    batch = make_batch(2, 13, dtype=torch.float64)
    hidden, head = make_head(2, 13, torch.float64)
    hidden = hidden.detach().requires_grad_(frozen == "head")
    head.weight.requires_grad_(frozen == "body")
    on_chunks = fused.chunked_head(head, hidden, 4, grad=True)
    assert (on_chunks.gradients == [None]) == (frozen != "body")
    if frozen == "both":
        loss = fused_loss(parse_objective(ALL), batch, 0.3, hidden, head, 4 * ROW).total
        assert not loss.requires_grad
        close(loss, parse_objective(ALL)(head(hidden), batch, 0.3).total, 1e-11)
    else:
        assert_same(parse_objective(ALL), batch, hidden, head, 4, rtol=1e-10)


@pytest.mark.parametrize("kind", ["bias", "hook", "sequence"])
def test_any_head_will_do(kind: str) -> None:
    """One that is more than a matrix is called as it is, chunk by chunk."""
    batch = make_batch(4, 13, cut=True, dtype=torch.float64)
    hidden, plain = make_head(4, 13, torch.float64)
    head: nn.Module = plain
    if kind == "bias":
        head = nn.Linear(H, V, dtype=torch.float64)
    elif kind == "hook":
        plain.register_forward_hook(lambda module, args, output: 3 * output.tanh())
    else:
        head = nn.Sequential(nn.Linear(H, 3, dtype=torch.float64), nn.Tanh(), nn.Linear(3, V).double())
    assert_same(parse_objective(ALL), batch, hidden, head, 4, rtol=1e-10)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(head_dtype: torch.dtype) -> None:
    """By autocast over float32 weights, and with bfloat16 weights: logits in bfloat16, losses in float32,
    gradients summed in float32 and as close to those of float64 as the plain form's."""
    n = 40
    batch = make_batch(6, n, dtype=torch.float32)
    hidden, head = make_head(6, n, torch.float32)
    objective = parse_objective("ce-uniform+calm")
    double = (hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_())
    exact = torch.autograd.grad(objective(double[0] @ double[1].t(), batch, 0.3).total, double)
    head = head.to(head_dtype)
    hidden = hidden.detach().to(head_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=head_dtype == torch.float32):
        plain = objective(head(hidden), batch, 0.3)
        ours = fused_loss(objective, batch, 0.3, hidden, head, 7 * ROW)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total, plain.total, rtol=2e-3, atol=0)
    inputs = (hidden, head.weight)
    errors = []
    for loss in (plain, ours):
        got = torch.autograd.grad(loss.total, inputs)
        assert all(g.dtype == head_dtype for g in got)
        errors.append([float((g - e).norm() / e.norm()) for g, e in zip(got, exact)])
    assert max(errors[1]) < 2e-2
    assert all(mine < 1.5 * theirs + 1e-3 for theirs, mine in zip(*errors))


# refusals


def test_nothing_to_say() -> None:
    batch = make_batch(0, 5, dtype=torch.float32)
    hidden, head = make_head(0, 5, torch.float32)
    with pytest.raises(ValueError, match="told about a batch"):
        FusedLoss(parse_objective("ce"))(hidden, head)
    bare = dataclasses.replace(batch, positions=None)
    with pytest.raises(ValueError, match="distilled positions"):
        FusedLoss(parse_objective("kl")).about(bare, 0.0)(hidden, head)


def test_a_head_sharded_on_its_own_is_refused() -> None:
    class DTensor(nn.Parameter):
        """As torch's by name, which is all that is asked."""

    head = nn.Linear(H, V, bias=False)
    head.weight = DTensor(head.weight.detach())
    with pytest.raises(UsageError, match="leave it to the root") as caught:
        fused_loss(parse_objective("ce"), make_batch(0, 3, dtype=torch.float32), 0.0, torch.zeros(3, H), head)
    assert "\n" not in str(caught.value)
