"""Packed layouts are exact: logits equal those of naive, whole, separate passes, for every attention kind.

The naive side builds each mask by its definition in the paper, one noisy stream at a time, nothing left out,
and never calls `lay_out` or `may_attend`. Differences are float32 rounding of sums over other orders.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shards.errors import UsageError
from student.attention import Coordinates
from student.forward import hidden_at
from student.layout import Attention, Stream, lay_out, pack
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel

BLOCK, VOCAB, MASK = 4, 50, 49


@pytest.fixture(scope="module")
def model() -> A2DQwen3LMHeadModel:
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,  # large enough that attending to a wrong token shows
    )
    return A2DQwen3LMHeadModel(config).eval()


@dataclass
class Case:
    clean: np.ndarray
    streams: list[Stream]


def draw(rng: np.random.Generator, *, streams: int, from_position: int = 0) -> Case:
    length = int(rng.integers(1, 7)) * BLOCK
    clean = rng.integers(0, MASK, length)
    out = []
    for _ in range(streams):
        masked = (rng.random(length) < rng.random()) & (np.arange(length) >= from_position)
        out.append(Stream(np.where(masked, MASK, clean), np.flatnonzero(masked)))
    return Case(clean, out)


def packed_logits(
    model: A2DQwen3LMHeadModel,
    cases: list[Case],
    attention: Attention,
    row_tokens: int,
    shifted: bool = False,
) -> torch.Tensor:
    pieces = [
        lay_out(c.clean, c.streams, attention=attention, block_size=BLOCK, shifted=shifted) for c in cases
    ]
    rows = pack(pieces, row_tokens)
    assert rows.tokens == sum(map(len, pieces))
    ids, position, *at = (
        torch.from_numpy(x)
        for x in (rows.ids, rows.position, rows.sample, rows.stream, rows.block, rows.order)
    )
    hidden = hidden_at(model, ids, position, Coordinates(*at), torch.from_numpy(rows.read), attention)
    return model.lm_head(hidden)


def naive_logits(
    model: A2DQwen3LMHeadModel, case: Case, attention: Attention, shifted: bool = False
) -> torch.Tensor:
    length = len(case.clean)
    i = torch.arange(length)
    b = i // BLOCK
    out = []
    for stream in case.streams:
        noisy = torch.from_numpy(stream.ids)[None]
        where = torch.from_numpy(stream.asked) - int(shifted)
        if attention == "staircase":  # [xt, x0], as BD3LM section 3 draws it
            ids = torch.cat([noisy, torch.from_numpy(case.clean)[None]], dim=1)
            mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
            mask[:length, :length] = b[:, None] == b[None]
            mask[:length, length:] = b[:, None] > b[None]
            mask[length:, length:] = b[:, None] >= b[None]
            position = i.repeat(2)[None]
            crosses = (where // BLOCK) < torch.from_numpy(stream.asked) // BLOCK
            where = where + length * crosses  # the left neighbour lies in a finished block
        elif (
            attention == "staircase-causal"
        ):  # [x0, xt], and every block of xt truly reordered, as WeDLM trains
            clean = torch.from_numpy(case.clean)
            hidden = noisy[0] != clean
            turn = torch.cat([torch.cat([k[~hidden[k]], k[hidden[k]]]) for k in i.split(BLOCK)])
            ids = torch.cat([clean, noisy[0, turn]])[None]
            position = torch.cat([i, turn])[None]
            mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
            mask[:length, :length] = i[:, None] >= i[None]
            mask[length:, length:] = (b[:, None] == b[None]) & (i[:, None] >= i[None])
            mask[length:, :length] = b[:, None] > b[None]
            where = length + turn.argsort()[where]
        else:
            ids, position = noisy, i[None]
            mask = {
                "bidirectional": torch.ones(length, length, dtype=torch.bool),
                "block-causal": b[:, None] >= b[None],
                "causal": i[:, None] >= i[None],
            }[attention]
        logits = model(input_ids=ids, position_ids=position, attention_mask=mask[None, None]).logits
        out.append(logits[0, where])
    return torch.cat(out)


@pytest.mark.parametrize(
    ("attention", "shifted"),
    [
        *((a, s) for a in ("staircase", "bidirectional", "block-causal", "causal") for s in (False, True)),
        ("staircase-causal", False),
    ],
)
def test_packed_equals_naive(model: A2DQwen3LMHeadModel, attention: Attention, shifted: bool) -> None:
    """Several samples per row, several rows, one to three streams per sample, some with nothing masked."""
    rng = np.random.default_rng(1)
    for trial in range(8):
        cases = [draw(rng, streams=int(rng.integers(1, 4)), from_position=int(shifted)) for _ in range(4)]
        with torch.no_grad():
            ours = packed_logits(
                model, cases, attention, row_tokens=int(rng.integers(20, 200)), shifted=shifted
            )
            naive = torch.cat([naive_logits(model, c, attention, shifted) for c in cases])
        assert ours.shape == naive.shape
        torch.testing.assert_close(
            ours, naive, rtol=1e-4, atol=1e-5, msg=lambda m, t=trial: f"trial {t}: {m}"
        )


def test_a_wrong_mask_shows(model: A2DQwen3LMHeadModel) -> None:
    """The control: another attention kind gives other logits, so the equality above means something."""
    case = draw(np.random.default_rng(2), streams=2)
    with torch.no_grad():
        right = packed_logits(model, [case], "staircase", 1000)
        wrong = naive_logits(model, case, "bidirectional")
    assert (right - wrong).abs().max() > 0.1


def test_tokens_saved() -> None:
    """Streams share one clean pass; blocks that nobody reads are not packed."""
    clean = np.arange(8 * BLOCK)
    first = Stream(clean, np.array([9, 10, 21]))  # blocks 2 and 5
    second = Stream(clean, np.array([3]))  # block 0
    piece = lay_out(clean, [first, second], attention="staircase", block_size=BLOCK)
    assert len(piece) == 5 * BLOCK + 2 * BLOCK + 1 * BLOCK
    assert sorted(set(zip(piece.stream.tolist(), piece.block.tolist()))) == [
        *((0, b) for b in range(5)), (1, 2), (1, 5), (2, 0),
    ]  # fmt: skip
    nothing = lay_out(clean, [Stream(clean, np.zeros(0, dtype=int))], attention="staircase", block_size=BLOCK)
    assert len(nothing) == 0
    causal = lay_out(clean, [second], attention="causal", block_size=BLOCK, shifted=True)
    assert len(causal) == 3


def test_rows_keep_to_their_budget() -> None:
    """Pieces stay whole and in order; one that alone exceeds the budget gets a row of its own."""
    clean = np.arange(4 * BLOCK)
    pieces = [
        lay_out(clean, [Stream(clean, np.array([at]))], attention="staircase", block_size=BLOCK)
        for at in (15, 0, 1, 15, 7)
    ]  # 16, 4, 4, 16, 8 tokens
    rows = pack(pieces, row_tokens=12, pad_id=7)
    assert rows.ids.shape == (4, 16)
    assert (rows.sample >= 0).sum(axis=1).tolist() == [16, 8, 16, 8]
    assert (rows.ids[rows.sample < 0] == 7).all()
    assert rows.ids.ravel()[rows.read].tolist() == [15, 0, 1, 15, 7]


def test_shifted_models_cannot_predict_the_first_token() -> None:
    with pytest.raises(UsageError, match="position 0"):
        lay_out(
            np.arange(4),
            [Stream(np.arange(4), np.array([0]))],
            attention="causal",
            block_size=4,
            shifted=True,
        )


def test_eager_attention_gets_the_same_mask(model: A2DQwen3LMHeadModel) -> None:
    """There the mask is added to the scores, in the model's number format, instead of selecting them."""
    cases = [draw(np.random.default_rng(i), streams=2) for i in range(4)]
    with torch.no_grad():
        selected = packed_logits(model, cases, "staircase", 128)
        try:
            model.set_attn_implementation("eager")
            added = packed_logits(model, cases, "staircase", 128)
        finally:
            model.set_attn_implementation("sdpa")
    assert len(selected)
    torch.testing.assert_close(added, selected, rtol=1e-4, atol=1e-4)
