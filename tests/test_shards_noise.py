"""The noise plan: pinned values (both stages and every machine must agree on them), marginals, and halves."""

import numpy as np
import pytest

from shards.codec import SparseCodec
from shards.columns import Ragged, RowBatch
from shards.encoding import decode, encode
from shards.errors import PlanMismatch, UsageError
from shards.noise import (
    EPSILON,
    NoiseConfig,
    check_plan,
    check_plans,
    iid_mask,
    make_plan,
    timestep,
    uniform01,
)
from shards.row import Row
from shards.schema import Kind
from shards.synthetic import synthetic_rows


def test_uniforms_are_pinned() -> None:
    # Recorded once: a change of these values makes every existing dataset unreadable (PlanMismatch).
    expected = [0.4045621712537544, 0.8702249505615807, 0.7367142008996118, 0.9482882941003912]
    assert uniform01(7, "sample-a", "mask|0", 4).tolist() == expected


def test_a_shorter_draw_is_a_prefix_and_names_separate_streams() -> None:
    long = uniform01(0, "s", "mask|0", 100)
    assert np.array_equal(uniform01(0, "s", "mask|0", 10), long[:10])
    others = [
        uniform01(1, "s", "mask|0", 10),
        uniform01(0, "r", "mask|0", 10),
        uniform01(0, "s", "mask|1", 10),
    ]
    assert not any(np.array_equal(o, long[:10]) for o in others)
    assert ((long >= 0) & (long < 1)).all()


def test_a_plan_is_pinned() -> None:
    plan = make_plan(NoiseConfig(seed=3), "sample-b", 2, np.arange(24) >= 4)
    assert float(plan.t) == 0.35530954599380493
    assert np.flatnonzero(plan.masked).tolist() == [8, 9, 11, 15, 17]
    assert np.flatnonzero(plan.half_a).tolist() == [8, 9, 11, 17]


def test_every_view_is_uniform_and_the_views_of_a_sample_cover_the_range() -> None:
    config = NoiseConfig(views=4)
    t = np.array(
        [[timestep(uniform01(0, f"s{i}", "t", 1)[0], v, config) for v in range(4)] for i in range(2000)]
    )
    grid = np.linspace(0.05, 0.95, 19)
    for view in range(4):
        # Kolmogorov-Smirnov distance to uniform; 1.63 / sqrt(n) is the 1 % level.
        assert max(abs((t[:, view] < x).mean() - x) for x in grid) < 1.63 / np.sqrt(2000)
    spacing = np.diff(np.sort(t, axis=1), axis=1)
    assert np.allclose(spacing, (1 - EPSILON) / 4, atol=1e-6)


def test_iid_views_are_independent() -> None:
    config = NoiseConfig(views=2, timesteps="iid")
    maskable = np.ones(1, dtype=bool)
    t = np.array([[make_plan(config, f"s{i}", v, maskable).t for v in range(2)] for i in range(1000)])
    assert abs(np.corrcoef(t.T)[0, 1]) < 0.1


def test_timesteps_stay_below_one() -> None:
    # In float32 the largest uniforms round up to 1, where 1/t and the mask would leave their range.
    largest = timestep(1 - 2**-53, 0, NoiseConfig(views=1))
    assert largest.dtype == np.float32
    assert EPSILON < largest < 1


def test_the_masked_share_is_t() -> None:
    maskable = np.ones(4000, dtype=bool)
    for i in range(5):
        plan = make_plan(NoiseConfig(views=1), f"s{i}", 0, maskable)
        assert abs(plan.masked.mean() - plan.t) < 0.04


def test_halves_are_complementary_and_only_maskable_positions_are_masked() -> None:
    maskable = np.arange(400) >= 100
    plan = make_plan(NoiseConfig(), "s", 0, maskable)
    half_b = plan.masked & ~plan.half_a
    assert not plan.masked[~maskable].any()
    assert not plan.half_a[~plan.masked].any()
    assert np.array_equal(plan.half_a | half_b, plan.masked)
    assert plan.half_a.any()
    assert half_b.any()
    assert not make_plan(NoiseConfig(compdemo=False), "s", 0, maskable).half_a.any()


def test_chunks_are_masked_whole_and_halved_whole() -> None:
    start, length = np.arange(0, 96, 3), np.full(32, 3)
    maskable = np.arange(96) >= 10  # cuts the chunk [9, 12)
    config = NoiseConfig(unit="chunk")
    seen_straddling = False
    for i in range(20):
        plan = make_plan(config, f"s{i}", 0, maskable, chunk_start=start, chunk_length=length)
        for c, (a, n) in enumerate(zip(start, length)):
            inside = slice(a, a + n)
            assert plan.chunk_masked[c] == plan.masked[inside].any()
            if plan.chunk_masked[c]:
                assert np.array_equal(plan.masked[inside], maskable[inside])
                assert len(set(plan.half_a[inside][maskable[inside]].tolist())) == 1
        seen_straddling |= bool(plan.chunk_masked[3])
        assert not plan.chunk_active[:4].any()
        assert np.array_equal(plan.chunk_active[4:], plan.chunk_masked[4:])
        assert not (plan.chunk_half_a & ~plan.chunk_masked).any()
    assert seen_straddling


def test_evaluation_masks_differ_from_stored_ones() -> None:
    maskable = np.ones(500, dtype=bool)
    plan = make_plan(NoiseConfig(), "s", 0, maskable)
    fresh = iid_mask(0, "s", "eval", maskable, float(plan.t))
    assert not np.array_equal(fresh, plan.masked)
    assert np.array_equal(fresh, iid_mask(0, "s", "eval", maskable, float(plan.t)))


def test_a_changed_row_is_told_from_its_plan() -> None:
    config, maskable = NoiseConfig(), np.ones(32, dtype=bool)
    plan = make_plan(config, "s", 2, maskable)

    def row(masked: np.ndarray) -> Row:
        return Row("s", 2, "train", float(plan.t), np.zeros(32, np.int32), 32, 32, maskable, masked)

    check_plan(config, row(plan.masked))
    changed = plan.masked.copy()
    changed[0] ^= True
    with pytest.raises(PlanMismatch, match="sample s view 2: stored mask differ"):
        check_plan(config, row(changed))


@pytest.mark.parametrize(
    "bad", [{"views": 0}, {"timesteps": "even"}, {"unit": "word"}, {"demo_ratio": 1.0}], ids=str
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        NoiseConfig(**bad)


@pytest.mark.parametrize("config", [
    NoiseConfig(seed=4), NoiseConfig(timesteps="iid"), NoiseConfig(compdemo=False), NoiseConfig(unit="chunk")
], ids=str)  # fmt: skip
def test_plans_of_a_record_batch_are_checked_as_those_of_its_rows(config: NoiseConfig) -> None:
    """`check_plans` computes all rows at once, another way than `check_plan`; one changed flag is found."""
    kind: Kind = "cross" if config.unit == "chunk" else "shared"
    codec = SparseCodec()
    rows = list(synthetic_rows(0, 12, kind=kind, noise=config, codec=codec))
    sizes = {"vocab_size": 304, "shared_vocab_size": 300 if kind == "shared" else None}
    batch = decode(encode(rows, kind, codec, "", **sizes), kind, codec, **sizes)
    check_plans(config, batch)
    names = ("masked", "chunk_half_a") if kind == "cross" else ("masked", "half_a")
    for name in names:
        flags = batch.lists[name].values.copy()
        k = len(flags) // 2
        flags[k] ^= True
        changed = {**batch.lists, name: Ragged(flags, batch.lists[name].offsets)}
        row = int(batch.lists[name].row[k])
        sample, view = batch.scalars["sample_id"][row], batch.scalars["view"][row]
        with pytest.raises(PlanMismatch, match=f"sample {sample} view {view}: stored"):
            check_plans(config, RowBatch(batch.scalars, changed))
    other = {**batch.scalars, "t": np.roll(batch.scalars["t"], 1)}
    with pytest.raises(PlanMismatch, match="timestep"):
        check_plans(config, RowBatch(other, batch.lists))
