"""Fresh noise: whose it is, how it is distributed, and that only the step decides it."""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import BLOCK, CONFIG, MASK, SHARED, synthetic, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from shards.errors import UsageError
from shards.noise import EPSILON
from shards.reader import LogitDataset
from shards.row import Row
from student.batch import FRESH, collate, counts_of
from student.fresh import SHARE, FreshNoise, redraw, share_for
from student.loader import BatchStream, DatasetRows
from student.objective import parse_objective
from student.trainer import CONFIG_FILE, train


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> DatasetRows:
    path = write_dataset(tmp_path_factory.mktemp("data") / "d", student_tokenizer, samples=64)
    return DatasetRows(LogitDataset(path), 0)


def key(row: Row) -> tuple[object, ...]:
    return row.sample_id, row.view, row.t, row.masked.tobytes()


def test_a_share_of_the_rows_is_redrawn(rows: DatasetRows) -> None:
    """The others are the stored rows, untouched and in the same order; fresh ones keep their sample."""
    stored = [row for row, _ in islice(rows(None), 1000)]
    mixed = [row for row, _ in islice(FreshNoise(rows, 0.3, 5)(None), 1000)]
    fresh = [row.view == FRESH for row in mixed]
    assert abs(np.mean(fresh) - 0.3) < 0.05
    for before, after, is_fresh in zip(stored, mixed, fresh):
        assert after.sample_id == before.sample_id
        if is_fresh:
            assert np.array_equal(after.input_ids, before.input_ids)
            assert after.positions is None
            assert after.chunks is None
            assert not (after.masked & ~after.maskable).any()
        else:
            assert key(after) == key(before)
            assert after.positions is not None


def test_timesteps_are_uniform_and_masks_iid() -> None:
    """Over many epochs of one sample: t as every stored view's marginal, each token masked with probability t
    by itself, and no two epochs alike."""
    row = next(r for r in synthetic("shared", 40) if r.maskable.sum() >= 30)
    drawn = [redraw(row, 3, epoch) for epoch in range(4000)]
    t = np.array([r.t for r in drawn])
    uniform = np.linspace(EPSILON, 1, len(t))
    assert np.abs(np.sort(t) - uniform).max() < 0.03  # 1.36 / sqrt(4000) is the 5 % bound
    masked = np.stack([r.masked[r.maskable] for r in drawn])
    residual = masked - t[:, None]
    assert np.abs(residual.mean(0)).max() < 0.03
    together = np.corrcoef(residual.T) - np.eye(masked.shape[1])
    assert np.abs(together).max() < 0.08
    assert len({r.masked.tobytes() for r in drawn}) > 3000


@pytest.mark.parametrize("given", [0, 7, 47, 48, 100])
def test_noise_follows_from_seed_sample_and_epoch(rows: DatasetRows, given: int) -> None:
    """A stream opened in the middle, or at the edge, of an epoch (48 rows) goes on with the same rows;
    another epoch or seed redraws others."""
    source = FreshNoise(rows, 0.5, 1)
    whole = list(islice(source(None), 150))
    state = asdict(whole[given - 1][1]) if given else None
    for (a, _), (b, _) in zip(whole[given:], islice(source(state), 150 - given)):
        assert key(a) == key(b)
    redrawn = [{r.sample_id for r, _ in whole[e * 48 : (e + 1) * 48] if r.view == FRESH} for e in range(3)]
    assert redrawn[0] != redrawn[1] != redrawn[2]
    other = {r.sample_id for r, _ in islice(FreshNoise(rows, 0.5, 2)(None), 48) if r.view == FRESH}
    assert other != redrawn[0]


def test_global_batches_do_not_depend_on_ranks(rows: DatasetRows) -> None:
    """Cut with the new masks' costs, before dealing: one process, or two ranks of two micro-batches."""

    def steps(world: int, accumulation: int) -> list[list[str]]:
        streams = [
            BatchStream(
                FreshNoise(rows, 0.5, 1),
                lambda part, **_: part,
                batch_tokens=300,
                block_size=BLOCK,
                rank=rank,
                world=world,
                accumulation=accumulation,
            )
            for rank in range(world)
        ]
        taken = [list(islice(s, 10 * accumulation)) for s in streams]
        return [
            sorted(str(key(row)) for hand in taken for part in hand[n * accumulation : (n + 1) * accumulation]
                   for row in part)
            for n in range(10)
        ]  # fmt: skip

    assert steps(1, 1) == steps(2, 2)


@pytest.mark.parametrize(("kind", "objective"), [("shared", "tidal+calm"), ("cross", "calm")])
def test_fresh_rows_carry_ce_alone(kind: str, objective: str) -> None:
    """They count in CE's denominators like every view and leave the other terms what they are without them; a
    micro-batch of fresh rows alone is no error."""
    stored = [row for row in synthetic(kind, 16)[::2] if row.masked.any()]  # type: ignore[arg-type]
    fresh = [redraw(row, 0, 0) for row in stored[:3]]
    loss = parse_objective(objective)

    def terms(rows: list[Row], counted: list[Row]) -> dict[str, float]:
        batch = collate(
            rows,
            block_size=BLOCK,
            mask_token_id=MASK,
            row_tokens=64,
            shared_vocab_size=SHARED if kind == "shared" else None,
            temperatures=(1.0, 2.0),
            counts=counts_of(counted, BLOCK),
        )
        torch.manual_seed(0)
        table = torch.randn(304, 304)  # logits that depend on the true token alone
        return {k: float(v) for k, v in loss(table[batch.gold], batch, 0.5).terms.items()}

    mixed = [*stored[:2], *fresh, *stored[2:]]
    counts = counts_of(mixed, BLOCK)
    assert counts.views == len(mixed)
    assert counts.maskable == sum(int(row.maskable.sum()) for row in mixed)
    assert (counts.distilled, counts.chunks) == (
        counts_of(stored, BLOCK).distilled,
        counts_of(stored, BLOCK).chunks,
    )
    together, without, alone = terms(mixed, mixed), terms(stored, mixed), terms(fresh, mixed)
    for name, value in together.items():
        assert value == pytest.approx(without[name] + alone[name], rel=1e-5)
        if not name.startswith("ce"):
            assert alone[name] == 0.0
    assert alone["ce"] > 0


def test_shares_that_make_no_sense_are_refused() -> None:
    kl, without_ce = parse_objective("kl"), parse_objective("kl", ce_weight=0.0)
    for repeated in (False, True):
        assert share_for(parse_objective("ce"), None, repeated=repeated) == float(repeated)
        assert share_for(parse_objective("ce-uniform"), None, repeated=repeated) == float(repeated)
        assert share_for(kl, None, repeated=repeated) == (SHARE if repeated else 0.0)
        assert share_for(kl, 0.5, repeated=repeated) == 0.5
        assert share_for(without_ce, None, repeated=repeated) == 0.0
    with pytest.raises(UsageError, match="CE of weight 0"):
        share_for(without_ce, 0.5, repeated=True)
    with pytest.raises(UsageError, match="no teacher target to kl"):
        share_for(kl, 1.0, repeated=True)


def test_the_default_asks_whether_views_repeat(
    tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two views, twelve training samples: 24 rows before the first is met again."""
    student = write_student(tmp_path / "student", student_tokenizer)
    data = write_dataset(tmp_path / "data", student_tokenizer, samples=16)
    shares = []
    for steps in (2, 12):
        config = replace(CONFIG, steps=steps, batch_tokens=200)
        train(data, student, tmp_path / str(steps), config, parse_objective("kl"))
        settings = json.loads((tmp_path / str(steps) / CONFIG_FILE).read_text())
        shares.append(settings["config"]["fresh_noise"])
    assert shares == [0.0, SHARE]


def test_messages_say_which_rows_were_redrawn(tmp_path: Path) -> None:
    row = synthetic("shared", 2)[0]
    batch = collate(
        [row, redraw(row, 0, 0)],
        block_size=BLOCK,
        mask_token_id=MASK,
        row_tokens=64,
        shared_vocab_size=SHARED,
        temperatures=(1.0, 2.0),
    )
    assert batch.rows == (f"{row.sample_id}/0", f"{row.sample_id}/fresh")
