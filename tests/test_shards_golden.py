"""Five tiny datasets, committed byte by byte in `golden_shards/`: what version 1 is.

Reading them must give these rows for ever. Writing them must give these bytes, but with the pyarrow they were
made with only: another version may lay out the same columns otherwise (padding, its encoding of the schema,
its zstd), which changes hashes and harms nobody, so that half is skipped there and the reading half is not.

After a deliberate change of format, `remake()` puts new files in their place.
"""

import hashlib
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards.codec import Codec, DenseCodec, ExactCodec, SparseCodec
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import ChunkTargets, DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget
from shards.schema import Kind
from shards.synthetic import synthetic_config
from shards.writer import DatasetWriter

FOLDER = Path(__file__).parent / "golden_shards"
PYARROW = "26."
SHARDS = {
    "cross": "cc46deb0fff1e88454dd2708ff8eaf7983c66a8d5dfa96cf65c9eb9ccfb9f025",
    "dense": "d2f4e50d2478ded220f965885c230ed89737bfd350243ed6615b72923664fc2c",
    "exact": "977110c4e024048803988371ae57c6c4637383649b633c4e79cfa711ff42effb",
    "sketch": "040e3dd53152d14199df92c4d803426e234018165898ab121c12700349891ae5",
    "sparse": "7fbe1d84d18105e53b8ece4149ad6ddf59db20800ef39c7b17e1ea6d5eddd45c",
}
"""sha256 of the whole shard file."""


def array(*values: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


def logs(*rows: list[float]) -> np.ndarray:
    return np.array([[math.log(p) for p in row] for row in rows], np.float32)


def flags(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text], bool)


def row(i: int, view: int, split: str, masked: str, **targets: Any) -> Row:
    return Row(
        sample_id=f"sample-{i}",
        view=view,
        split=split,
        t=0.25 + 0.5 * view,
        input_ids=array(0, 255, 256, 65_535, 65_536, 131_071, 7, 199_999)
        if "positions" in targets and isinstance(targets["positions"].target, SparseTarget)
        else array(0, 1, 2, 3, 4, 5, 4, 3),
        real_length=7,
        content_bytes=19,
        maskable=flags("00110111"),
        masked=flags(masked),
        **targets,
    )


def sparse(
    at: np.ndarray, gold: np.ndarray, counts: Any, ids: Any, codes: Any, tails: Any
) -> PositionTargets:
    target = SparseTarget(
        counts=array(*counts),
        ids=array(*ids),
        logp=array(*codes, dtype=np.float32) / -8,
        tails=np.array(tails, np.float32).reshape(-1, 2) / 8,
    )
    half_a = np.arange(len(at)) % 2 == 0
    return PositionTargets(at, half_a, gold.astype(np.float32), target)


HALF = 6  # 6/8 nat: a probability of 0.472
DATASETS: dict[str, tuple[Kind, Codec, list[Row]]] = {
    "sparse": (
        "shared",
        SparseCodec(cap=4),
        [
            row(0, 0, "train", "00110001", positions=sparse(
                array(2, 3, 7), array(-0.5, -3.25, np.nan, dtype=np.float32), [1, 2, 4],
                [256, 65_535, 0, 131_071, 65_536, 3, 189_999], [0, HALF, HALF, 11, 11, 11, 11],
                [[-100, -20], [-127, 33], [-127, 40]],
            )),
            row(1, 0, "heldout", "00000000", positions=sparse(array(), array(), [], [], [], [])),
            row(0, 1, "train", "00110111", positions=sparse(
                array(6), array(-15.75, dtype=np.float32), [2], [9, 8], [HALF, HALF], [[-120, 0]],
            )),
        ],
    ),
    "sketch": (
        "shared",
        SparseCodec(cap=2, sketch=6, sketch_wide=2, table="c" * 64),
        [row(0, 0, "train", "00100100", positions=PositionTargets(
            array(2, 5), flags("01"), array(-1.25, -0.5, dtype=np.float32),
            SparseTarget(
                array(1, 2), array(4, 0, 70_000), array(0, -6, -6, dtype=np.float32) / 8,
                np.array([[-24, 33], [-127, 40]], np.float32) / 8,
                np.array([[-127, 3, -7, 7, 0, -1], [127, 0, 1, -2, 6, 5]], np.int8),
            ),
        ))],
    ),
    "exact": (
        "shared",
        ExactCodec(width=3, dtype="bfloat16", table="c" * 64),
        [row(0, 0, "train", "00100100", positions=PositionTargets(
            array(2, 5), flags("01"), array(-1.25, np.nan, dtype=np.float32),
            ExactTarget(array([0.5, -2, 3.140625], [0, 2.0**40, -0.0078125], dtype=np.float32)),
        ))],
    ),
    "dense": (
        "shared",
        DenseCodec(),
        [row(0, 0, "train", "00100100", positions=PositionTargets(
            array(2, 5), flags("01"), array(-1.25, np.nan, dtype=np.float32),
            DenseTarget(logs([.5, .125, .125, .125, .125], [.0625, .0625, .125, .25, .5])),
        ))],
    ),
    "cross": (
        "cross",
        SparseCodec(),
        [row(0, 0, "train", "00110110", chunks=ChunkTargets(
            start=array(0, 3, 5, 7), length=array(3, 1, 2, 1), teacher_length=array(1, 2, 3, 4),
            masked=flags("1110"), active=flags("0110"), half_a=flags("0010"),
            logp=array(-0.125, -9.5, dtype=np.float32),
        ))],
    ),
}  # fmt: skip


def write(name: str, out: Path) -> None:
    kind, codec, rows = DATASETS[name]
    vocab = 200_000 if name in ("sparse", "sketch") else 6
    shared = {"sparse": 190_000, "sketch": 190_000, "dense": 5, "exact": 5, "cross": None}[name]
    noise = NoiseConfig(views=2, unit="chunk" if kind == "cross" else "token")
    config = synthetic_config(noise, codec, vocab_size=vocab, shared_vocab_size=shared)
    config["noise"]["source"] = "explicit"
    with DatasetWriter(out, kind, config) as writer:
        writer.write_part(0, 0, 2, rows, {})
        writer.finish()


def remake() -> None:
    """Put new files into `golden_shards/` and print the hashes for `SHARDS`."""
    for name in DATASETS:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as made:
            write(name, Path(made))
            (FOLDER / name).mkdir(parents=True)
            for file in (*Path(made).glob("*.arrow"), Path(made) / "manifest.json"):
                shutil.copy(file, FOLDER / name)
                print(name, file.name, hashlib.sha256(file.read_bytes()).hexdigest())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if hasattr(a, "__slots__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__slots__)
    return bool(a == b)


@pytest.mark.parametrize("name", DATASETS)
def test_the_committed_files_give_these_rows(name: str) -> None:
    """All values lie on the codecs' grids, so nothing may differ by a bit."""
    data = LogitDataset(FOLDER / name)
    assert data.manifest.format_version == 1
    rows = {(r.sample_id, r.view): r for batch in data.shard_rows(0) for r in batch}
    expected = {(r.sample_id, r.view): r for r in DATASETS[name][2]}
    assert rows.keys() == expected.keys()
    for key, found in rows.items():
        assert same(expected[key], found), key


@pytest.mark.parametrize("name", DATASETS)
def test_the_committed_files_are_the_pinned_ones(name: str) -> None:
    (file,) = (FOLDER / name).glob("*.arrow")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHARDS[name]
    assert Manifest.load(FOLDER / name).shards[0].file == file.name


@pytest.mark.skipif(not pa.__version__.startswith(PYARROW), reason=f"bytes are pinned for pyarrow {PYARROW}x")
@pytest.mark.parametrize("name", DATASETS)
def test_writing_gives_these_bytes(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHARDS[name]
    assert (tmp_path / "manifest.json").read_bytes() == (FOLDER / name / "manifest.json").read_bytes()
