"""Rows to batches and global batches to micro-batches: every tensor against plain loops over the rows."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import ConfigMismatch
from shards.row import ChunkTargets, DenseTarget, PositionTargets, Row, SparseTarget
from shards.synthetic import endless
from student.batch import collate, counts_of, packed_tokens
from student.layout import Stream, lay_out
from student.loader import BatchStream, deal, global_batches
from student.tensors import Batch, Dense, TopK

BLOCK, VOCAB, SHARED, MASK = 4, 40, 30, 39
TEMPERATURES = (1.0, 2.0)
SPEC: dict[str, Any] = {"block_size": BLOCK, "mask_token_id": MASK, "row_tokens": 32}
SHARED_SPEC = {**SPEC, "shared_vocab_size": SHARED, "temperatures": TEMPERATURES}


def noise_row(
    rng: np.random.Generator, name: str, *, blocks: int | None = None, rate: float | None = None
) -> Row:
    length = (blocks or int(rng.integers(1, 6))) * BLOCK
    maskable = np.arange(length) >= 2
    masked = maskable & (rng.random(length) < (rng.random() if rate is None else rate))
    return Row(
        sample_id=name,
        view=1,
        split="train",
        t=float(np.float32(rng.uniform(0.1, 0.9))),
        input_ids=rng.integers(0, MASK, length).astype(np.int32),
        real_length=length,
        content_bytes=length,
        maskable=maskable,
        masked=masked,
    )


def shared_row(rng: np.random.Generator, name: str, *, dense: bool = False, **kwargs: Any) -> Row:
    """Some masked positions are not distilled; gold ids of SHARED and above have no gold log-prob."""
    row = noise_row(rng, name, **kwargs)
    at = np.flatnonzero(row.masked)
    at = at[rng.random(len(at)) < 0.8]
    logp = rng.normal(size=(len(at), SHARED)).astype(np.float32)
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    gold = row.input_ids[at]
    gold_logp = np.where(gold < SHARED, logp[np.arange(len(at)), gold % SHARED], np.nan).astype(np.float32)
    target: SparseTarget | DenseTarget = DenseTarget(logp)
    if not dense:
        order, counts = np.argsort(-logp, axis=1), rng.integers(1, 6, len(at)).astype(np.int32)
        target = SparseTarget(
            counts=counts,
            ids=np.concatenate([o[:k] for o, k in zip(order, counts)] or [np.zeros(0)]).astype(np.int32),
            logp=np.concatenate([p[o[:k]] for p, o, k in zip(logp, order, counts)] or [np.zeros(0)]).astype(
                np.float32
            ),
            tails=rng.normal(size=(len(at), 2)).astype(np.float32),
        )
    return replace(row, positions=PositionTargets(at.astype(np.int32), at % 2 == 0, gold_logp, target))


def cross_row(rng: np.random.Generator, name: str) -> Row:
    """Chunks of one to three tokens, masked whole; the first straddles the prompt and is never active."""
    row = noise_row(rng, name, blocks=4)
    start = np.array([0, 4, 5, 8, 11, 13], dtype=np.int32)
    length = np.array([3, 1, 3, 2, 2, 1], dtype=np.int32)
    masked = np.array([row.masked[s : s + n].any() for s, n in zip(start, length)])
    hidden = row.masked.copy()
    for s, n, m in zip(start, length, masked):
        hidden[s : s + n] |= m
    active = masked & (start >= 2)
    return replace(
        row,
        masked=hidden & row.maskable,
        chunks=ChunkTargets(
            start=start,
            length=length,
            teacher_length=length,
            masked=masked,
            active=active,
            half_a=np.zeros(6, dtype=bool),
            logp=-rng.random(int(active.sum())).astype(np.float32),
        ),
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_tokens_reads_and_gold(rng: np.random.Generator) -> None:
    rows = [noise_row(rng, f"s{i}") for i in range(6)]
    batch = collate(rows, **SPEC)
    flat = {name: x.flatten() for name, x in batch.at._asdict().items()}
    ids, position = batch.input_ids.flatten(), batch.position_ids.flatten()
    n = 0
    for k, row in enumerate(rows):
        for i in np.flatnonzero(row.masked):
            where = batch.read[n]
            assert (ids[where], position[where], flat["stream"][where]) == (MASK, i, 1)
            assert (batch.gold[n], batch.view[n]) == (row.input_ids[i], k)
            n += 1
    assert n == len(batch.read) == len(batch.gold)
    assert batch.t.tolist() == [row.t for row in rows]
    assert batch.maskable.tolist() == [row.maskable.sum() for row in rows]
    assert batch.rows[2] == "s2/1"
    assert batch.positions is None
    assert batch.chunks is None


def test_counts(rng: np.random.Generator) -> None:
    rows = [shared_row(rng, f"s{i}") for i in range(5)] + [shared_row(rng, "empty", rate=0.0)]
    batch = collate(rows, **SHARED_SPEC)
    c = batch.counts
    assert (c.views, c.masked, c.maskable) == (6, len(batch.read), sum(int(r.maskable.sum()) for r in rows))
    assert batch.positions is not None
    assert batch.chunks is not None
    assert (c.distilled, c.chunks) == (len(batch.positions.index), len(batch.chunks.logp))
    assert 0 < c.chunks < c.distilled < c.masked
    assert c.tokens == int((batch.at.sample >= 0).sum())
    for row in rows:
        stream = Stream(row.input_ids, np.flatnonzero(row.masked))
        piece = lay_out(row.input_ids, [stream], attention="staircase", block_size=BLOCK)
        assert packed_tokens(row, BLOCK) == len(piece)


def test_sparse_targets(rng: np.random.Generator) -> None:
    rows = [shared_row(rng, f"s{i}") for i in range(5)] + [shared_row(rng, "empty", rate=0.0)]
    batch = collate(rows, **SHARED_SPEC)
    at = batch.positions
    assert at is not None
    assert isinstance(at.target, TopK)
    d = 0
    for k, row in enumerate(rows):
        p = row.positions
        assert p is not None
        assert isinstance(p.target, SparseTarget)
        first = np.cumsum(p.target.counts) - p.target.counts
        for j, i in enumerate(p.positions):
            kept = slice(first[j], first[j] + p.target.counts[j])
            assert batch.gold[at.index[d]] == row.input_ids[i] == at.target.gold[d]
            assert batch.view[at.index[d]] == k
            assert at.target.ids[d][at.target.keep[d]].tolist() == p.target.ids[kept].tolist()
            assert at.target.logp[d][at.target.keep[d]].tolist() == p.target.logp[kept].tolist()
            assert (at.target.ids[d][~at.target.keep[d]] == p.target.ids[first[j]]).all()
            assert [at.target.tails[T][d] for T in TEMPERATURES] == p.target.tails[j].tolist()
            np.testing.assert_equal(at.gold_logp[d].item(), p.gold_logp[j])
            assert at.t[d] == row.t
            d += 1
    assert d == len(at.index) > 0
    chunks = batch.chunks
    assert chunks is not None
    known = at.gold_logp.isfinite()
    assert chunks.vocab_size == SHARED
    assert torch.equal(chunks.token, at.index[known])
    assert torch.equal(chunks.chunk, torch.arange(int(known.sum())))
    assert torch.equal(chunks.logp, at.gold_logp[known])


def test_dense_targets(rng: np.random.Generator) -> None:
    rows = [shared_row(rng, f"s{i}", dense=True) for i in range(3)]
    at = collate(rows, **SHARED_SPEC).positions
    assert at is not None
    assert isinstance(at.target, Dense)
    stored = [
        r.positions.target.logp for r in rows if r.positions and isinstance(r.positions.target, DenseTarget)
    ]
    assert np.array_equal(at.target.logp.numpy(), np.concatenate(stored))
    with pytest.raises(ValueError, match="mixes"):
        collate([rows[0], shared_row(rng, "x")], **SHARED_SPEC)


def test_chunks(rng: np.random.Generator) -> None:
    """Each active chunk's tokens, in order, point at its masked positions; inactive ones appear nowhere."""
    rows = [cross_row(rng, f"s{i}") for i in range(5)]
    batch = collate(rows, **SPEC)
    chunks = batch.chunks
    assert chunks is not None
    c = 0
    for k, row in enumerate(rows):
        assert row.chunks is not None
        logp = iter(row.chunks.logp)
        for start, length, active in zip(row.chunks.start, row.chunks.length, row.chunks.active):
            if not active:
                continue
            tokens = chunks.token[chunks.chunk == c]
            where = batch.read[tokens]
            assert batch.position_ids.flatten()[where].tolist() == list(range(start, start + length))
            assert batch.view[tokens].tolist() == [k] * length
            assert (chunks.logp[c].item(), chunks.t[c].item()) == (next(logp), row.t)
            c += 1
    assert c == len(chunks.logp) == batch.counts.chunks > 0
    assert chunks.vocab_size is None


def test_no_rows_make_a_batch_that_runs(rng: np.random.Generator) -> None:
    """A rank without rows still takes part in the step: one padding token, empty targets of every kind."""
    shared, cross = collate([], **SHARED_SPEC), collate([], **SPEC)
    assert shared.input_ids.shape == (1, 1)
    assert len(shared.read) == len(shared.t) == 0
    assert shared.positions is not None
    assert isinstance(shared.positions.target, TopK)
    assert shared.positions.target.tails.keys() == {1.0, 2.0}
    assert cross.chunks is not None
    assert len(cross.chunks.token) == 0


def test_wider_rows_read_the_same(rng: np.random.Generator) -> None:
    rows = [noise_row(rng, f"s{i}") for i in range(6)]
    plain, wide = collate(rows, **SPEC), collate(rows, width_multiple=50, **SPEC)
    assert wide.input_ids.shape[1] == 50
    for a, b in zip((plain.position_ids, *plain.at), (wide.position_ids, *wide.at)):
        assert torch.equal(a.flatten()[plain.read], b.flatten()[wide.read])
    assert (wide.at.sample[:, plain.input_ids.shape[1] :] == -1).all()


# the loader


def test_global_batches_keep_to_the_budget(rng: np.random.Generator) -> None:
    """Order and budgets are kept; a row over budget stands alone; views with nothing masked end too."""
    rows = [noise_row(rng, f"s{i}", rate=0.5) for i in range(40)]
    rows[7] = noise_row(rng, "big", blocks=30, rate=0.9)
    cut = list(global_batches(((r, i) for i, r in enumerate(rows)), batch_tokens=60, block_size=BLOCK))
    assert [r for batch, _ in cut for r in batch] == rows
    cost = [sum(max(1, packed_tokens(r, BLOCK)) for r in batch) for batch, _ in cut]
    for (batch, _), n, (following, _) in zip(cut, cost, cut[1:]):
        assert n <= 60 or [r.sample_id for r in batch] == ["big"]
        assert n + packed_tokens(following[0], BLOCK) > 60
    assert [state for _, state in cut][-1] == len(rows) - 1
    nothing = noise_row(rng, "nothing", rate=0.0)
    stream = endless([nothing])(None)
    assert len(next(global_batches(stream, batch_tokens=50, block_size=BLOCK))[0]) == 50


def test_dealing_is_even_and_complete() -> None:
    costs = [9, 1, 1, 1, 8, 2, 7, 3, 0]
    hands = deal(costs, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(9))
    assert sorted(sum(costs[i] for i in hand) for hand in hands) == [10, 11, 11]
    assert all(hand == sorted(hand) for hand in hands)
    assert deal(costs, 1) == [list(range(9))]
    assert deal([5], 3) == [[0], [], []]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_the_global_batch_is_the_same_for_every_split(
    rng: np.random.Generator, world: int, accumulation: int
) -> None:
    rows = [shared_row(rng, f"s{i}") for i in range(30)]

    def steps(rank: int, world: int, accumulation: int) -> list[list[Batch]]:
        stream = BatchStream(
            endless(rows),
            partial(collate, **SHARED_SPEC),
            batch_tokens=100,
            block_size=BLOCK,
            rank=rank,
            world=world,
            accumulation=accumulation,
        )
        parts = list(islice(stream.loader(), 5 * accumulation))
        return [parts[i : i + accumulation] for i in range(0, len(parts), accumulation)]

    whole = steps(0, 1, 1)
    dealt = [steps(rank, world, accumulation) for rank in range(world)]
    for s, [one] in enumerate(whole):
        parts = [batch for rank in dealt for batch in rank[s]]
        assert len(parts) == world * accumulation
        assert sorted(name for p in parts for name in p.rows) == sorted(one.rows)
        assert all(p.counts == one.counts and p.state == one.state for p in parts)
        assert one.counts == counts_of([r for r in rows if f"{r.sample_id}/1" in one.rows], BLOCK)


def test_resuming_goes_on_without_replay(rng: np.random.Generator) -> None:
    rows = [noise_row(rng, f"s{i}") for i in range(23)]
    opened: list[Any] = []

    def source(at: Mapping[str, Any] | None) -> Any:
        opened.append(at)
        return endless(rows)(at)

    def stream(start: Mapping[str, Any] | None) -> BatchStream:
        return BatchStream(source, partial(collate, **SPEC), batch_tokens=70, block_size=BLOCK, start=start)

    whole = [batch.rows for batch in islice(stream(None), 12)]
    halfway = list(islice(stream(None), 5))[-1].state
    resumed = [batch.rows for batch in islice(stream(json.loads(json.dumps(halfway))), 7)]
    assert whole[5:] == resumed
    assert opened[-1] == halfway


def test_rows_longer_than_the_student_are_refused(rng: np.random.Generator) -> None:
    source = endless([noise_row(rng, "fits", blocks=2), noise_row(rng, "long", blocks=9)])
    stream = BatchStream(source, partial(collate, **SPEC), batch_tokens=1, block_size=BLOCK, max_positions=32)
    with pytest.raises(ConfigMismatch, match=r"sample long view 1 has 36 tokens, the student 32"):
        list(islice(stream, 5))
