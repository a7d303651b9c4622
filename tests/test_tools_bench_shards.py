"""`tide bench shards` at a toy size: every side gives back the rows that were put in, and the documented
figures are there. Times are not looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.codec import SparseCodec
from shards.realistic import realistic_rows
from tools.benches.shard_stores import make_stores
from tools.benches.shards import measure, same, table


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return measure(48, repeats=1)


def test_every_documented_figure_is_there(record: dict[str, Any]) -> None:
    assert {"arrow", "arrow_zstd", "parquet", "ours", "ours_thorough"} <= record["sides"].keys()
    for side in record["sides"].values():
        assert {
            "bytes_per_position", "write_rows_per_s", "read_rows_per_s", "read_cpu_rows_per_s"
        } <= side.keys()  # fmt: skip
    assert {"ratio_read", "ratio_read_thorough", "ratio_resume", "ratio_hash"} <= record.keys()
    assert ("mds" in record["sides"]) == ("ratio_shuffled" in record) == ("ratio_shuffled_planned" in record)
    assert record["shuffled"].keys() - {"mds_first"} == {"first", "later", "planned"}
    assert (
        ("mds_first" in record["shuffled"])
        == ("ratio_shuffled_first" in record)
        == ("mds" in record["sides"])
    )
    assert record["resume"].keys() == {"1 %", "99 %"}
    assert record["hash"].keys() == {"ours", "sha256"}
    assert len(table(record).rows) == len(record["sides"]) + len(record["shuffled"])


def test_all_sides_hold_the_same_rows(record: dict[str, Any]) -> None:
    assert record["equal"]
    assert all(record["equal"].values())


def test_less_in_a_row_takes_fewer_bytes(record: dict[str, Any]) -> None:
    sizes = record["bytes"]
    assert sizes["one_tail_gold_null"] < sizes["one_tail"] < sizes["full"]
    assert sizes["full"] < record["sides"]["arrow_zstd"]["bytes_per_position"]


def test_other_rows_are_told_apart(tmp_path: Path) -> None:
    codec = SparseCodec(step=1 / 16)
    rows, others = ([realistic_rows(seed, 4, codec)] for seed in (1, 2))
    for name, store in make_stores(tmp_path, rows, codec).items():
        store.write()
        assert same(rows, store), name
        assert not same(others, store), name
        ids, logp = store.heads()
        assert (ids.dtype, logp.dtype) == (np.int32, np.float32)
