"""Held-out likelihood: the packed computation against a plain one, bits per byte by hand, and the bootstrap.

The plain twin runs [noisy, clean] of one sample at one timestep, with a dense mask written from BD3LM's
definition.
"""

import json
import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from shards.errors import UsageError
from shards.noise import iid_mask
from shards.row import Row
from student.evaluate import EvalResult, bootstrap, evaluate, paired_bootstrap

BLOCK, MASK, EOS, VOCAB = 4, 60, 61, 64
GRID = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).float().train()


def make_row(name: str, length: int, prompt: int, real: int, seed: int, view: int = 0) -> Row:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 60, length).astype(np.int32)
    ids[real:] = EOS
    return Row(
        sample_id=name,
        view=view,
        split="heldout",
        t=0.5,
        input_ids=ids,
        real_length=real,
        content_bytes=3 * (real - prompt),
        maskable=np.arange(length) >= prompt,
        masked=np.zeros(length, dtype=bool),
    )


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [
        make_row("a", 24, 6, 22, 0),
        make_row("b", 8, 3, 8, 1),
        make_row("c", 20, 9, 17, 2),
        make_row("d", 12, 1, 10, 3),
    ]


def plain_nll(model: Qwen3ForCausalLM, row: Row, t: float, seed: int) -> float:
    """NLL_t of one sample from one unpacked forward pass over [noisy, clean]."""
    n = len(row.input_ids)
    hidden = iid_mask(seed, row.sample_id, "eval", row.maskable, t)
    noisy = np.where(hidden, MASK, row.input_ids)
    noisy[row.real_length :] = MASK
    ids = torch.from_numpy(np.concatenate([noisy, row.input_ids]).astype(np.int64))[None]
    allowed = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for q in range(2 * n):
        for k in range(2 * n):
            bq, bk = q % n // BLOCK, k % n // BLOCK
            clean_q, clean_k = q >= n, k >= n
            if clean_q:
                allowed[q, k] = clean_k and bk <= bq
            else:
                allowed[q, k] = (not clean_k and bk == bq) or (clean_k and bk < bq)
    position = torch.arange(n).repeat(2)[None]
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=position, attention_mask=allowed[None, None], use_cache=False)
    logp = out.logits[0, :n].double().log_softmax(-1)
    counted = [i for i in range(row.real_length) if hidden[i]]
    return sum(-float(logp[i, int(row.input_ids[i])]) for i in counted) / t


def run(model: Qwen3ForCausalLM, rows: list[Row], **kwargs) -> EvalResult:
    return evaluate(model, rows, mask_token_id=MASK, block_size=BLOCK, grid=GRID, **kwargs)


@pytest.mark.parametrize("shape", [{}, {"row_tokens": 16, "batch_rows": 1, "head_rows": 3}])
def test_packed_equals_plain(model, rows, shape) -> None:
    """All timesteps on one clean stream, packed with other samples, against one plain pass per timestep; and
    pieces longer than a row, one sample per batch, with the head in tiny chunks."""
    result = run(model, rows, seed=3, **shape)
    assert model.training
    want = np.array([[plain_nll(model, row, t, seed=3) for t in GRID] for row in rows])
    assert result.sample_ids == ("a", "b", "c", "d")
    np.testing.assert_allclose(result.nll_nats, want, rtol=1e-4, atol=1e-4)
    assert (want.sum(0) > 0).all()
    assert result.bytes.tolist() == [row.content_bytes for row in rows]


def test_the_length_does_not_leak(model) -> None:
    """What fills the last block is hidden at every t and not counted: its token ids change nothing."""
    row = make_row("a", 24, 6, 21, 0)
    other = make_row("a", 24, 6, 21, 0)
    other.input_ids[21:] = 7
    np.testing.assert_array_equal(run(model, [row]).nll_nats, run(model, [other]).nll_nats)
    longer = make_row("a", 24, 6, 24, 0)
    longer.input_ids[:] = row.input_ids
    assert (run(model, [longer]).nll_nats >= run(model, [row]).nll_nats).all()


def test_masks_are_fresh_and_views_are_not_repeated(model, rows) -> None:
    """The stored mask is never used; several views of a sample count once; another seed gives other masks."""
    again = [*rows, *(make_row("a", 24, 6, 22, 0, view=v) for v in (1, 2))]
    again[0].masked[10:20] = True
    done: list[int] = []
    result = run(model, again, progress=done.append)
    np.testing.assert_array_equal(result.nll_nats, run(model, rows).nll_nats)
    assert done[-1] == 4
    assert not np.array_equal(result.nll_nats, run(model, rows, seed=1).nll_nats)


def test_uniform_model_gives_log_vocabulary(model, rows) -> None:
    """Logits all equal: every hidden token costs log V, whatever the mask."""
    head = model.get_output_embeddings()
    saved = head.weight.data.clone()
    head.weight.data.zero_()
    try:
        result = run(model, rows)
    finally:
        head.weight.data.copy_(saved)
    for g, t in enumerate(GRID):
        n = [iid_mask(0, row.sample_id, "eval", row.maskable, t)[: row.real_length].sum() for row in rows]
        np.testing.assert_allclose(result.nll_nats[:, g], np.array(n) * math.log(VOCAB) / t, rtol=1e-5)


def hand_made(shift: float = 0.0, seed: int = 0) -> EvalResult:
    rng = np.random.default_rng(0)
    size = rng.integers(50, 150, 80)
    nll = size[:, None] * math.log(2) * (2.0 + 0.3 * rng.standard_normal((80, 2)))
    noise = 0.02 * np.random.default_rng(1).standard_normal((80, 1)) if shift else 0.0
    return EvalResult(
        grid=(0.3, 0.7),
        seed=seed,
        sample_ids=tuple(f"s{i}" for i in range(80)),
        nll_nats=nll + size[:, None] * math.log(2) * (shift + noise),
        bytes=size,
    )


def test_bits_per_byte_by_hand() -> None:
    """Ratio of sums, in bits, averaged over the grid; not the mean of per-sample ratios."""
    result = EvalResult(
        grid=(0.3, 0.7),
        seed=0,
        sample_ids=("a", "b"),
        nll_nats=np.array([[10.0, 20.0], [30.0, 60.0]]) * math.log(2),
        bytes=np.array([10, 30]),
    )
    assert result.by_t == pytest.approx({0.3: 1.0, 0.7: 2.0})
    assert result.bits_per_byte == pytest.approx(1.5)


def test_json_round_trip_and_bad_input() -> None:
    result = hand_made()
    data = json.loads(json.dumps(result.to_json()))
    again = EvalResult.from_json(data)
    np.testing.assert_array_equal(again.nll_nats, result.nll_nats)
    assert (again.grid, again.seed, again.sample_ids) == (result.grid, result.seed, result.sample_ids)
    assert data["bits_per_byte"] == result.bits_per_byte
    for broken in ({}, {**data, "nll_nats": data["nll_nats"][:3]}, {**data, "bytes": "many"}):
        with pytest.raises(UsageError, match="not an evaluation result"):
            EvalResult.from_json(broken)


def test_bootstrap_intervals() -> None:
    """Around the estimate, of the size theory gives; the same seed gives the same interval."""
    result = hand_made()
    value, low, high = bootstrap(result)
    assert value == result.bits_per_byte
    assert low < value < high
    per_sample = result.nll_nats.mean(1) / result.bytes / math.log(2)
    width = 2 * 1.96 * per_sample.std() / math.sqrt(80)
    assert high - low == pytest.approx(width, rel=0.25)
    assert bootstrap(result) == (value, low, high)
    assert bootstrap(result, seed=1) != (value, low, high)


def test_pairing_sees_what_single_intervals_hide() -> None:
    """A shift of 0.02 bits, far inside either interval, is found because both share samples and draws."""
    a, b = hand_made(0.02), hand_made()
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(0.02, abs=0.006)
    assert 0 < low < difference < high
    assert bootstrap(a)[1] < bootstrap(b)[2]
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="cannot be compared"):
        paired_bootstrap(a, hand_made(seed=1))


def test_refusals(model, rows) -> None:
    with pytest.raises(UsageError, match="nothing to evaluate: 0 held-out samples"):
        run(model, [])
    with pytest.raises(UsageError, match=r"must lie in \(0, 1\], got 0.5, 1.5"):
        evaluate(model, rows, mask_token_id=MASK, block_size=BLOCK, grid=(0.5, 1.5))
