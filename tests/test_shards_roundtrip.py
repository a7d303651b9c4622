"""What goes into a dataset comes out: rows, order, and plain columns for readers that do not know us."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest

from shards.codec import Codec, DenseCodec, ExactCodec, SparseCodec, dequantise_head
from shards.errors import RowError, ShardError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset, StreamState
from shards.row import PositionTargets, Row, SparseTarget
from shards.schema import Kind
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE = NoiseConfig(views=2)
CHUNKS = NoiseConfig(views=2, unit="chunk")
SMALL = SparseCodec(cap=12, tail_bound=0.05)


def make(
    out: Path, kind: Kind, codec: Codec, noise: NoiseConfig, parts: int = 2, size: int = 20
) -> list[list[Row]]:
    """A dataset of `parts` parts of `size` samples; returns the rows of each part."""
    given = []
    with DatasetWriter(out, kind, synthetic_config(noise, codec)) as writer:
        for p in range(parts):
            rows = list(synthetic_rows(p * size, (p + 1) * size, kind=kind, noise=noise, codec=codec))
            writer.write_part(p, p * size, (p + 1) * size, rows, {"dropped": {"absent": p + 1}})
            given.append(rows)
        writer.finish({"seconds": 1.5})
    return given


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "shards.build.MAX_BATCH_ROWS", 32
        )  # 90 training samples a part: record batches of 32, 32, 26
        make(out, "shared", SMALL, NOISE, parts=4, size=120)
    return out


def no_targets(row: Row) -> PositionTargets:
    none = np.zeros(0, np.int32)
    target = SparseTarget(none, none, none.astype(np.float32), np.zeros((0, 2), np.float32))
    assert row.positions is not None
    return replace(
        row.positions, positions=none, half_a=none.astype(bool), gold_logp=target.logp, target=target
    )


def leaves(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(x):
        for f in fields(x):
            yield from leaves(getattr(x, f.name), f"{path}.{f.name}")
    else:
        yield path, x


def assert_same(a: Row, b: Row, tolerance: dict[str, float]) -> None:
    """Equal in every field, dtypes included; fields named in `tolerance` within that."""
    for (name, x), (other, y) in zip(leaves(a), leaves(b), strict=True):
        assert name == other
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, name
            bound = next((v for k, v in tolerance.items() if name.endswith(k)), 0.0)
            np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=name)
        else:
            assert x == y, name


@pytest.mark.parametrize(
    ("kind", "codec", "noise", "tolerance"),
    [
        ("shared", SparseCodec(step=1 / 16), NOISE, {"target.logp": 1 / 32, "tails": 1 / 16}),
        ("shared", SparseCodec(), NOISE, {"target.logp": 1 / 16, "tails": 1 / 16}),
        (
            "shared",
            SparseCodec(cap=3, step=1 / 16, temperatures=(2.0,)),
            NOISE,
            {"target.logp": 1 / 32, "tails": 1 / 16},
        ),
        (
            "shared",
            SparseCodec(cap=12, sketch=9, sketch_wide=3, table="a" * 64),
            NOISE,
            {"target.logp": 1 / 16, "tails": 1 / 16},
        ),
        ("shared", ExactCodec(width=24, table="a" * 64), NOISE, {}),
        ("shared", ExactCodec(width=24, dtype="bfloat16", table="a" * 64), NOISE, {"target.hidden": 1 / 64}),
        ("shared", DenseCodec(), NOISE, {}),
        ("cross", SparseCodec(), CHUNKS, {}),
    ],
    ids=["sparse", "sparse-default", "sparse-t2", "sketch", "exact", "exact-bfloat16", "dense", "cross"],
)
def test_rows_come_back(
    tmp_path: Path, kind: Kind, codec: Codec, noise: NoiseConfig, tolerance: dict
) -> None:
    given = {(r.sample_id, r.view): r for part in make(tmp_path, kind, codec, noise) for r in part}
    data = LogitDataset(tmp_path)
    assert data.manifest.totals["rows"] == len(given) == 80
    for s, shard in enumerate(data.manifest.shards):
        for b in range(len(shard.batches)):
            for row in data.read(s, b):
                assert_same(given.pop((row.sample_id, row.view)), row, tolerance)
    assert not given
    assert [data.check_shard(s) for s in range(2)] == [40, 40]


def test_what_is_read_can_be_stored_again_unchanged(tmp_path: Path) -> None:
    make(tmp_path / "a", "shared", SMALL, NOISE, parts=1)
    data = LogitDataset(tmp_path / "a")
    rows = [r for b in range(len(data.manifest.shards[0].batches)) for r in data.read(0, b)]
    with DatasetWriter(tmp_path / "b", "shared", data.manifest.config) as writer:
        writer.write_part(0, 0, 20, rows, {})
        again = writer.finish()
    assert again.shards == data.manifest.shards


def test_bytes_are_a_pure_function_of_rows(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, "shared", SMALL, NOISE)
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    for a, b in zip(*files, strict=True):
        same = a.name == "README.md" or a.read_bytes() == b.read_bytes()  # the card has the folder's name
        assert a.name == b.name
        assert same, a.name


def test_record_batches_hold_one_split_and_view_in_sample_order(shared: Path) -> None:
    data = LogitDataset(shared)
    for s, shard in enumerate(data.manifest.shards):
        keys = [(b.split != "train", b.view) for b in shard.batches]
        assert keys == sorted(keys)
        assert {b.split for b in shard.batches} == {"train", "heldout"}
        assert [b.rows for b in shard.batches] == [32, 32, 26] * 2 + [30] * 2
        for view in range(2):
            train = [r.sample_id for b in range(3 * view, 3 * view + 3) for r in data.read(s, b)]
            assert train == sorted(train)


def test_dense_record_batches_are_small_whatever_the_vocabulary(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shards.build.MAX_BATCH_VALUES", 40_000)
    make(tmp_path, "shared", DenseCodec(), NOISE, parts=1)
    data = LogitDataset(tmp_path)
    for at in (pair for view in range(2) for pair in data.batches("train", view)):
        sizes = [r.positions.target.logp.size for r in data.read(*at) if r.positions]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    assert len(data.batches("train", 0)) > 1


def test_the_manifest_sums_the_parts_and_gives_typed_settings(shared: Path) -> None:
    m = LogitDataset(shared).manifest
    assert m.report == {"dropped": {"absent": 1 + 2 + 3 + 4}, "seconds": 1.5}
    assert m.totals["samples"] == {"train": 360, "heldout": 120}
    assert (m.noise, m.noise_source, m.codec) == (NOISE, "philox", SMALL)
    assert (m.block_size, m.shared_vocab_size, m.student.mask_token_id) == (8, 300, 303)
    assert m.teacher["name"] == "synthetic"


def test_pyarrow_reads_a_shard_without_us(shared: Path) -> None:
    data = LogitDataset(shared)
    record = data.manifest.shards[0]
    table = pa.ipc.open_file(pa.memory_map(str(shared / record.file))).read_all()
    meta = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert (meta["tide.format_version"], meta["tide.kind"]) == ("1", "shared")
    assert meta["tide.identity"] == data.manifest.identity
    assert json.loads(meta["tide.codec"])["name"] == "sparse"
    row, plain = data.read(0, 0)[0], table.slice(0, 1).to_pylist()[0]
    ids = [a + 256 * b + 65536 * c for a, b, c in zip(*(plain[f"input_{i}"] for i in range(3)))]
    assert ids == row.input_ids.tolist()
    assert plain["masked"] == row.masked.tolist()
    spans = plain["maskable"]
    assert spans == [int(np.argmax(row.maskable)), len(ids)]


def test_datasets_reads_the_shards_without_us(shared: Path, tmp_path: Path) -> None:
    data = LogitDataset(shared)
    loaded = datasets.load_dataset(
        "arrow", data_files=str(shared / "part-*.arrow"), split="train", cache_dir=str(tmp_path)
    )
    assert len(loaded) == data.manifest.totals["rows"]
    row, plain = data.read(0, 0)[0], loaded[0]
    assert row.positions is not None
    assert isinstance(row.positions.target, SparseTarget)
    assert plain["counts"] == row.positions.target.counts.tolist()
    codes = np.cumsum(plain["top_logp"], dtype=np.uint8)
    assert dequantise_head(codes, 1 / 8).tolist() == row.positions.target.logp.tolist()
    gold = [np.nan if g is None else g for g in plain["gold_logp"]]
    np.testing.assert_array_equal(np.array(gold, dtype=np.float32), row.positions.gold_logp)


def test_a_dataset_is_read_through_any_filesystem(shared: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(f"{shared}/", "memory://copy/", recursive=True)
    a, b = LogitDataset(shared), LogitDataset("memory://copy")
    assert a.manifest == b.manifest
    assert [r.sample_id for r in a.samples("heldout")] == [r.sample_id for r in b.samples("heldout")]
    assert b.check_shard(0) == 240


def test_samples_gives_view_0_of_each_sample_in_order(shared: Path) -> None:
    data = LogitDataset(shared)
    rows = list(data.samples("heldout"))
    assert [r.sample_id for r in rows] == [f"s{i:06d}" for i in range(3, 480, 4)]
    assert {r.view for r in rows} == {0}
    assert (data.count("train"), data.count("heldout"), data.count("other")) == (360, 120, 0)


def names(
    data: LogitDataset, n: int, seed: int = 0, start: StreamState | None = None
) -> list[tuple[str, int]]:
    return [(r.sample_id, r.view) for r, _ in islice(data.stream(seed, start), n)]


def test_every_epoch_gives_each_sample_once_in_the_view_of_that_epoch(shared: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shards.reader.WINDOW", 2)  # six windows of two record batches
    data = LogitDataset(shared)
    order = names(data, 3 * 360)
    train = {f"s{i:06d}" for i in range(480) if i % 4 != 3}
    for epoch in range(3):
        part = order[epoch * 360 : (epoch + 1) * 360]
        assert {s for s, _ in part} == train
        assert {v for _, v in part} == {epoch % 2}
    first, third = ([s for s, _ in order[a : a + 360]] for a in (0, 720))
    assert first != third  # same view, other order
    assert first != sorted(first)


def test_the_order_depends_on_the_seed_alone(shared: Path) -> None:
    a = names(LogitDataset(shared), 360)
    assert names(LogitDataset(shared), 360) == a
    assert names(LogitDataset(shared), 360, seed=1) != a


def test_datasets_over_the_same_samples_give_the_same_order(tmp_path: Path) -> None:
    """With other targets (codec, halves), so that two objectives are compared on the same batches."""
    make(tmp_path / "a", "shared", SMALL, NOISE)
    make(tmp_path / "b", "shared", DenseCodec(), replace(NOISE, compdemo=False))
    a, b = (LogitDataset(tmp_path / x) for x in "ab")
    assert a.manifest.identity != b.manifest.identity
    assert names(a, 100) == names(b, 100)


def test_resuming_anywhere_equals_going_on(shared: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shards.reader.WINDOW", 2)
    data = LogitDataset(shared)
    pairs = list(islice(data.stream(5), 800))
    order = [(r.sample_id, r.view) for r, _ in pairs]
    for stop in (1, 63, 64, 65, 359, 360, 361, 720):
        state = StreamState(**json.loads(json.dumps(asdict(pairs[stop - 1][1]))))
        assert names(data, 60, seed=5, start=state) == order[stop : stop + 60]
    assert (
        names(data, 5, seed=5, start=StreamState(0, 360)) == order[360:365]
    )  # the end of an epoch, spelt so


def test_resuming_reads_one_window_again_not_the_epoch(shared: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shards.reader.WINDOW", 1)
    data = LogitDataset(shared)
    read: list[tuple[int, int]] = []
    real = data._fetch
    monkeypatch.setattr(data, "_fetch", lambda at: read.append(at) or real(at))
    next(data.stream(0, StreamState(0, 300)))
    assert len(read) == 1


def test_a_stream_says_what_it_cannot_do(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="row 361 of epoch 0, which has 360 rows"):
        next(LogitDataset(shared).stream(0, StreamState(0, 361)))
    with DatasetWriter(tmp_path, "shared", synthetic_config(NOISE, SMALL)) as writer:
        rows = [
            replace(r, split="heldout") for r in synthetic_rows(0, 3, kind="shared", noise=NOISE, codec=SMALL)
        ]
        writer.write_part(0, 0, 3, rows, {})
        writer.finish()
    with pytest.raises(ShardError, match="has no training rows"):
        next(LogitDataset(tmp_path).stream(0))


def test_a_part_without_rows_is_a_part(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, "shared", synthetic_config(NOISE, SMALL)) as writer:
        writer.write_part(0, 0, 5, [], {"dropped": {"rows": 5}})
        writer.write_part(1, 5, 8, list(synthetic_rows(5, 8, kind="shared", noise=NOISE, codec=SMALL)), {})
        manifest = writer.finish()
    assert [s.rows for s in manifest.shards] == [0, 6]
    data = LogitDataset(tmp_path)
    assert data.check_shard(0) == 0
    assert len(list(data.samples("train"))) == 2


def test_rows_where_nothing_is_masked_are_kept(tmp_path: Path) -> None:
    config = synthetic_config(NOISE, SMALL)
    config["noise"]["source"] = "explicit"
    rows = [
        replace(r, masked=np.zeros_like(r.masked), positions=no_targets(r))
        for r in synthetic_rows(0, 4, kind="shared", noise=NOISE, codec=SMALL)
    ]
    with DatasetWriter(tmp_path, "shared", config) as writer:
        writer.write_part(0, 0, 4, rows, {})
        writer.finish()
    back = list(LogitDataset(tmp_path).samples("train"))
    assert len(back) == 3
    assert all(r.positions is not None and len(r.positions.positions) == 0 for r in back)


def test_the_card_tells_people_what_it_is(shared: Path) -> None:
    text = (shared / "README.md").read_text()
    header = text.split("---")[1]
    assert 'data_files: "part-*.arrow"' in header
    for part in ("360 train, 120 heldout", "dropped.absent | 10", "at most 12 entries", "load_dataset"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content_bytes": 2**31}, "column content_bytes: expected a value in"),
        ({"view": 70_000}, "column view: expected a value in 0..65535, got 70000"),
        ({"t": 1.0}, r"column t: expected a timestep in \[0.001, 1\), got 1.0"),
        ({"split": "test"}, "column split: expected train or heldout, got test"),
        ({"input_ids": np.array([0, 1, 304] + [0] * 5)}, "an id below the vocabulary's 304, got 304"),
        ({"input_ids": np.array([0, 1, -1] + [0] * 5)}, r"column input\[2\]: expected an id in \[0, "),
        ({"input_ids": np.zeros(7, np.int32)}, "column maskable: expected one flag per token, got 8"),
        ({"real_length": 9}, "column real_length: expected a length within the sample, got 9"),
        ({"masked": np.arange(8) < 2}, r"column masked\[0\]: expected masked positions inside the maskable"),
        ({"positions": None}, "column positions: expected sparse targets, got none"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_row_that_does_not_fit_is_not_written(tmp_path: Path, change: dict, message: str) -> None:
    config = synthetic_config(NOISE, SMALL)
    config["noise"]["source"] = "explicit"
    good, rest = islice(synthetic_rows(0, 5, kind="shared", noise=NOISE, codec=SMALL), 2)
    assert good.positions is not None
    n = 8
    small = replace(
        good,
        input_ids=np.zeros(n, np.int32),
        maskable=np.arange(n) >= 4,
        masked=np.zeros(n, dtype=bool),
        real_length=n,
        positions=no_targets(good),
    )
    with DatasetWriter(tmp_path, "shared", config) as writer:
        writer.write_part(0, 0, 2, [rest, small], {})
        with pytest.raises(RowError, match=message) as e:
            writer.write_part(1, 2, 4, [rest, replace(small, **change)], {})
    assert "\n" not in str(e.value)
    assert not (tmp_path / "parts" / "part-00001.json").exists()
