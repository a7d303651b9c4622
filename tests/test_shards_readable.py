"""Datasets are readable without this project: other programs give the columns that FORMAT.md describes, and
its formulas give back the teacher's distribution. Nothing below `distribution` comes from `shards`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards.codec import DenseCodec, SparseCodec
from shards.noise import NoiseConfig
from shards.row import DenseTarget, Row
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE = NoiseConfig(views=2)
CODEC = SparseCodec(cap=12, tail_bound=0.05, temperatures=(1.0, 2.0))
Rows = list[dict[str, Any]]


def token_ids(row: dict[str, Any], name: str) -> list[int]:
    planes = [row[f"{name}_{i}"] for i in range(3)]
    return [int(a) + 256 * int(b) + 65536 * int(c) for a, b, c in zip(*planes, strict=True)]


def distribution(
    row: dict[str, Any], position: int, codec: dict[str, Any], temperature: float
) -> tuple[dict[int, float], float]:
    """Probabilities of the kept tokens at a temperature, and the share of all others, of one position."""
    first = sum(row["counts"][:position])
    kept = slice(first, first + row["counts"][position])
    codes = np.cumsum(np.array(row["top_logp"], np.uint8), dtype=np.uint8)
    logp = [-int(code) * codec["step"] for code in codes[kept]]
    tail_code = row[f"tail_{codec['temperatures'].index(temperature)}"][position]
    tail = 0.0 if tail_code == -128 else math.exp(tail_code * codec["tail_step"])
    weights = [math.exp(x / temperature) for x in logp]
    norm = tail + sum(weights)
    return {i: w / norm for i, w in zip(token_ids(row, "top")[kept], weights, strict=True)}, tail / norm


def with_pyarrow(files: list[str], cache: Path) -> Rows:
    return pa.concat_tables(pa.ipc.open_file(pa.memory_map(f)).read_all() for f in files).to_pylist()


def with_datasets(files: list[str], cache: Path) -> Rows:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    return list(datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(cache)))


def with_streaming_datasets(files: list[str], cache: Path) -> Rows:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    return list(datasets.load_dataset("arrow", data_files=files, split="train", streaming=True))


def with_polars(files: list[str], cache: Path) -> Rows:
    polars = pytest.importorskip("polars", reason="needs polars")
    return polars.concat([polars.read_ipc(f) for f in files]).to_dicts()


def with_duckdb(files: list[str], cache: Path) -> Rows:
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    table = pa.concat_tables(pa.ipc.open_file(pa.memory_map(f)).read_all() for f in files)
    found = duckdb.connect().from_arrow(table).query("t", "select * from t")
    return [dict(zip(found.columns, values, strict=True)) for values in found.fetchall()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readable") / "data"
    with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
        for p in range(2):
            rows = list(synthetic_rows(6 * p, 6 * p + 6, kind="shared", noise=NOISE, codec=CODEC))
            writer.write_part(p, 6 * p, 6 * p + 6, rows, {})
        writer.finish()
    return out


@pytest.fixture(scope="module")
def truth() -> dict[tuple[str, int], Row]:
    """The same samples with the whole distribution of every position."""
    rows = synthetic_rows(0, 12, kind="shared", noise=NOISE, codec=DenseCodec())
    return {(r.sample_id, r.view): r for r in rows}


@pytest.mark.parametrize(
    "read",
    [with_pyarrow, with_datasets, with_streaming_datasets, with_polars, with_duckdb],
    ids=lambda f: f.__name__,
)
def test_other_programs_give_the_teachers_distribution(
    made: Path, truth: dict[tuple[str, int], Row], read: Callable[[list[str], Path], Rows], tmp_path: Path
) -> None:
    """Tolerances are the codec's own: half a step of the head, half a step of what it is normalised by."""
    manifest = json.loads((made / "manifest.json").read_text())
    rows = read([str(made / s["file"]) for s in manifest["shards"]], tmp_path)
    assert len(rows) == manifest["totals"]["rows"] == len(truth)
    codec = manifest["config"]["codec"]
    positions = 0
    for row in rows:
        true = truth[row["sample_id"], row["view"]]
        assert true.positions is not None
        assert isinstance(true.positions.target, DenseTarget)
        assert token_ids(row, "input") == true.input_ids.tolist()
        assert list(row["masked"]) == true.masked.tolist()
        assert (row["split"], np.float32(row["t"])) == (true.split, true.t)
        spans = list(zip(row["maskable"][::2], row["maskable"][1::2]))
        assert [i for a, b in spans for i in range(a, b)] == np.flatnonzero(true.maskable).tolist()
        masked = [i for i, m in enumerate(row["masked"]) if m]
        assert [
            i for i, d in zip(masked, row["distilled"], strict=True) if d
        ] == true.positions.positions.tolist()
        gold = [math.nan if g is None else g for g in row["gold_logp"]]
        np.testing.assert_array_equal(np.array(gold, np.float32), true.positions.gold_logp)
        for i, logp in enumerate(true.positions.target.logp):
            for temperature in codec["temperatures"]:
                weights = np.exp(logp.astype(np.float64) / temperature)
                weights /= weights.sum()
                kept, tail = distribution(row, i, codec, temperature)
                slack = math.exp((codec["step"] + codec["tail_step"]) / 2) * 1.001
                for token, p in kept.items():
                    assert weights[token] / slack <= p <= weights[token] * slack
                rest = 1 - sum(weights[token] for token in kept)
                assert rest / slack <= tail <= rest * slack
            positions += 1
    assert positions > 50


def test_duckdb_asks_a_shard_in_sql(made: Path) -> None:
    """Columns are plain enough for a query over lists, without any of our code."""
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    shard = pa.ipc.open_file(pa.memory_map(str(min(made.glob("*.arrow"))))).read_all()
    query = "select sum(list_sum(counts)), sum(len(top_logp)) from t"
    ((kept, entries),) = duckdb.connect().from_arrow(shard).query("t", query).fetchall()
    assert kept == entries > 0
