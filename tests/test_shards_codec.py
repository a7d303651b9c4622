"""Quantisers against the error they promise, and the codec's JSON."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.codec import (
    EMPTY_TAIL,
    Codec,
    DenseCodec,
    ExactCodec,
    SparseCodec,
    codec_from_json,
    codec_to_json,
    dequantise_head,
    dequantise_tail,
    differences,
    quantise_head,
    quantise_tail,
    undo_differences,
)
from shards.errors import ManifestError, UsageError, VersionError

STEPS = st.sampled_from([1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.1])


@given(st.lists(st.floats(-200, 0), min_size=1), STEPS)
def test_head_error_is_at_most_half_a_step_inside_the_range(values: list[float], step: float) -> None:
    x = np.array(values)
    codes = quantise_head(x, step)
    back = dequantise_head(codes, step)
    inside = x >= -255 * step
    assert (np.abs(back - x)[inside] <= step / 2 + 1e-5).all()
    assert (codes[~inside] == 255).all()
    assert np.array_equal(quantise_head(back, step), codes)  # storing what was read changes nothing


@given(st.lists(st.floats(-60, 60), min_size=1), STEPS)
def test_tail_error_is_at_most_half_a_step_and_keeps_its_sign(values: list[float], step: float) -> None:
    x = np.array(values)
    codes = quantise_tail(x, step)
    back = dequantise_tail(codes, step)
    inside = np.abs(x) <= 127 * step
    assert (np.abs(back - x)[inside] <= step / 2 + 1e-5).all()
    assert np.array_equal(codes[~inside], np.where(x[~inside] > 0, 127, -127))
    assert np.array_equal(quantise_tail(back, step), codes)


@given(st.lists(st.floats(-50, 0), min_size=2, unique=True))
def test_head_order_survives(values: list[float]) -> None:
    x = np.sort(values)[::-1]
    assert (np.diff(quantise_head(x, 1 / 16).astype(int)) >= 0).all()


def test_the_empty_tail_has_a_code_of_its_own() -> None:
    x = np.array([-np.inf, -1e9, 0.0, 5.5], dtype=np.float32)
    codes = quantise_tail(x, 1 / 8)
    assert codes.tolist() == [EMPTY_TAIL, -127, 0, 44]
    assert dequantise_tail(codes, 1 / 8).tolist() == [-np.inf, -15.875, 0.0, 5.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_not_quantised(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        quantise_head(np.array([-1.0, bad]), 1 / 16)
    with pytest.raises(ValueError, match="finite"):
        quantise_tail(np.array([-1.0, bad]), 1 / 8)


@pytest.mark.parametrize(
    "codec", [SparseCodec(), SparseCodec(cap=8, temperatures=(1.0, 2.0, 5.0)), DenseCodec()]
)
def test_json_round_trip(codec: Codec) -> None:
    assert codec_from_json(json.loads(json.dumps(codec_to_json(codec)))) == codec


@pytest.mark.parametrize("data", [{"name": "zfp"}, {}, None, [], {"name": ["sparse"]}], ids=repr)
def test_an_unknown_codec_is_named(data: object) -> None:
    with pytest.raises(VersionError, match="unknown codec"):
        codec_from_json(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cap": "64"}, "cap must be a whole number, got '64'"),
        ({"cap": True}, "cap must be a whole number, got True"),
        ({"cap": 0}, "cap must lie in 1..255"),
        ({"temperatures": [1.0, 1.0]}, "different positive numbers"),
        ({"temperatures": 2.0}, "temperatures must be a list of a number"),
        ({"shape": "flat"}, "unknown setting 'shape'"),
    ],
    ids=str,
)
def test_settings_it_cannot_have_are_named(changed: dict, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        codec_from_json({**codec_to_json(SparseCodec()), **changed})


@pytest.mark.parametrize(
    "bad", [{"cap": 256}, {"step": 0.0}, {"tail_bound": 1.0}, {"temperatures": ()}], ids=str
)
def test_impossible_codecs_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SparseCodec(**bad)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 5], [0, 0, 2], [4, 1, 0], [20_000, 9_000, 5]])
def test_differences_start_anew_in_every_list(lengths: list[int]) -> None:
    """Mod 256, falling and rising; a list is readable without the one before it."""
    codes = np.random.default_rng(1).integers(0, 256, sum(lengths)).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stored = differences(codes, offsets[:-1])
    np.testing.assert_array_equal(undo_differences(stored, offsets), codes)
    for a, b in pairwise(offsets.tolist()):
        np.testing.assert_array_equal(np.cumsum(stored[a:b], dtype=np.uint8), codes[a:b])


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({**codec_to_json(SparseCodec(sketch=4)), "table": ""}, "sha256 of sketch.safetensors"),
        (codec_to_json(ExactCodec(width=4)), "sha256 of head.safetensors"),
        (codec_to_json(ExactCodec(table="a" * 64)), "width must be at least 1"),
        ({**codec_to_json(SparseCodec(sketch=4)), "sketch_wide": 1}, "even number"),
        ({**codec_to_json(ExactCodec(width=4)), "dtype": "float16"}, "float32, bfloat16"),
    ],
)
def test_a_codec_without_its_table_is_refused(codec: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        codec_from_json(codec)
