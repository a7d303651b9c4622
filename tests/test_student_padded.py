"""A packed training step against the padded one it stands for: same loss, same gradient of every weight.

The padded step is written from BD3LM section 3 and shares nothing with the packed one but the network and the
plain objective: every row padded to the longest, [xt, x0] concatenated, a dense mask built from its three
parts, logits of every position, then those of masked ones. Packed steps leave blocks out, put several samples
in a row, and fuse the loss with the head. (`test_golden_offline` compares with the reference's own padded
steps.)
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.codec import DenseCodec, SparseCodec
from shards.noise import NoiseConfig
from shards.row import Row
from shards.schema import Kind
from shards.synthetic import synthetic_rows
from student.batch import collate
from student.forward import mask_argument
from student.fused import FusedLoss
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from student.objective import Objective, parse_objective
from student.run_attention import RUNS
from student.tensors import Batch, LossOut

BLOCK, VOCAB, SHARED, MASK, PAD = 8, 304, 300, 303, 302
ROUNDING = 1e-5
OBJECTIVES: dict[Kind, str] = {
    "shared": "tidal+kl:0.5+reverse-kl+reverse-calm:0.5",
    "cross": "calm+bernoulli-kl+reverse-calm-tidal:0.5",
}


@pytest.fixture(scope="module", params=["sdpa", RUNS])
def student(request: pytest.FixtureRequest) -> A2DQwen3LMHeadModel:
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that attending to a wrong token shows
        attn_implementation=request.param,
    )
    return A2DQwen3LMHeadModel(config)


def draw(kind: Kind, first: int, n: int, *, views: int = 1, dense: bool = False) -> list[Row]:
    noise = NoiseConfig(views=views, unit="chunk" if kind == "cross" else "token")
    codec = DenseCodec() if dense else SparseCodec(cap=12)
    return list(synthetic_rows(first, first + n, kind=kind, noise=noise, codec=codec, max_length=80))


def make_batch(kind: Kind, rows: list[Row], **kwargs: Any) -> Batch:
    return collate(
        rows,
        block_size=BLOCK,
        mask_token_id=MASK,
        row_tokens=150,
        shared_vocab_size=SHARED if kind == "shared" else None,
        temperatures=(1.0, 2.0),
        **kwargs,
    )


def padded_step(model: Any, rows: list[Row], batch: Batch, objective: Objective) -> LossOut:
    """The specification. Positions and counts are taken from `batch`, which has the same rows in order."""
    length = max(len(row.input_ids) for row in rows)
    clean = torch.full((len(rows), length), PAD)
    noisy = clean.clone()
    masked = torch.zeros(len(rows), length, dtype=torch.bool)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        clean[i, :n] = noisy[i, :n] = torch.from_numpy(row.input_ids).long()
        masked[i, :n] = torch.from_numpy(row.masked)
        real[i, :n] = True
    noisy[masked] = MASK
    block = torch.arange(length) // BLOCK
    q, k = block[:, None], block[None]
    both = torch.cat(
        [torch.cat([q == k, q > k], 1), torch.cat([torch.zeros_like(q == k), q >= k], 1)]
    )  # block-diagonal, offset block-causal; nothing, block-causal
    seen = both[None] & real.repeat(1, 2)[:, None, :]
    seen |= torch.eye(2 * length, dtype=torch.bool)  # a pad sees itself: no row of the mask is empty
    logits = model(
        input_ids=torch.cat([noisy, clean], 1),
        position_ids=torch.arange(length).repeat(len(rows), 2),
        attention_mask=seen[:, None],
        use_cache=False,
    ).logits
    return objective(logits[:, :length][masked], batch, 0.4)


def packed_step(model: Any, batch: Batch, objective: Objective) -> LossOut:
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        read=batch.read,
        loss_head=FusedLoss(objective, logits_bytes=4 * VOCAB * 20).about(batch, 0.4),
        use_cache=False,
        **mask_argument("staircase", batch.at, model),
    )


def assert_same_step(model: Any, ours: LossOut, padded: LossOut) -> None:
    torch.testing.assert_close(ours.total, padded.total, rtol=ROUNDING, atol=0)
    for name, value in padded.terms.items():
        torch.testing.assert_close(ours.terms[name], value, rtol=ROUNDING, atol=1e-7)
    weights = dict(model.named_parameters())
    want = torch.autograd.grad(padded.total, list(weights.values()))
    got = torch.autograd.grad(ours.total, list(weights.values()))
    for name, a, b in zip(weights, got, want):
        assert error(a, b) <= ROUNDING, f"{name}: {error(a, b):.1e} of its largest entry"


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_packed_equals_padded(student: Any, kind: Kind, dense: bool, seed: int) -> None:
    """Rows of one to ten blocks, one of them with nothing masked, one with everything."""
    rows = draw(kind, 10 * seed, 7, dense=dense)
    bare: dict[str, Any] = {"positions": None, "chunks": None}
    if seed:
        rows[3] = replace(rows[3], masked=np.zeros_like(rows[3].masked), **empty_targets(kind, rows[3]))
    batch = make_batch(kind, rows)
    objective = parse_objective(OBJECTIVES[kind])
    assert_same_step(
        student, packed_step(student, batch, objective), padded_step(student, rows, batch, objective)
    )
    everything = [replace(row, masked=np.ones_like(row.masked), **bare) for row in rows]
    batch, objective = make_batch("cross", everything), parse_objective("ce-uniform")
    assert_same_step(
        student, packed_step(student, batch, objective), padded_step(student, everything, batch, objective)
    )


def empty_targets(kind: Kind, row: Row) -> dict[str, Any]:
    """No target, of a row with nothing masked."""
    if kind == "cross":
        assert row.chunks is not None
        none = np.zeros_like(row.chunks.active)
        return {"chunks": replace(row.chunks, active=none, masked=none, logp=row.chunks.logp[:0])}
    return {"positions": None}


@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_views_share_a_clean_stream(student: Any, kind: Kind) -> None:
    """Three views of each sample on one clean stream: the padded step's loss and gradients, from fewer
    tokens; views that come apart are put together."""
    rows = draw(kind, 0, 4, views=3)
    order = np.random.default_rng(0).permutation(len(rows))
    mixed = [rows[i] for i in order]
    apart, shared = make_batch(kind, mixed), make_batch(kind, mixed, share_clean=True)
    objective = parse_objective(OBJECTIVES[kind])
    together = sorted(mixed, key=lambda row: [r.sample_id for r in mixed].index(row.sample_id))
    assert shared.rows == tuple(f"{row.sample_id}/{row.view}" for row in together)
    want = padded_step(student, mixed, apart, objective)
    assert_same_step(student, packed_step(student, shared, objective), want)
    tokens = [int((batch.at.sample >= 0).sum()) for batch in (apart, shared)]
    assert tokens[1] < 0.8 * tokens[0]
    assert apart.counts == shared.counts


def test_layers_that_run_twice_give_the_same_gradients(student: Any) -> None:
    """Gradient checkpointing hands the packed rows' attention on to the second run."""
    rows, objective = draw("shared", 0, 4), parse_objective("tidal")
    batch = make_batch("shared", rows)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    try:
        ours = packed_step(student, batch, objective)
        assert_same_step(student, ours, padded_step(student, rows, batch, objective))
    finally:
        student.gradient_checkpointing_disable()
