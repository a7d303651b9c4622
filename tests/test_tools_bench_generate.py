"""`tide bench generate` at a toy size: its keys, and that all samplers write the same; no times."""

import json

from commands import Tide, refused

TINY = ("--size", "tiny", "--prompt-tokens", 5, "--new-tokens", 20, "--thresholds", "")


def test_every_sampler_writes_the_same(tide: Tide) -> None:
    record = json.loads(tide("bench", "generate", *TINY, "--steps", 5, "--json").out)
    assert record["equal"]
    assert set(record["sides"]) == {"ours", "copying", "cachefree", "autoregressive"}
    assert record["ratio_copying"] > 0
    assert record["ratio_cachefree"] > 0


def test_against_leaves_samplers_out(tide: Tide) -> None:
    record = json.loads(tide("bench", "generate", *TINY, "--steps", 2, "--against", "copying", "--json").out)
    assert record["equal"]
    assert set(record["sides"]) == {"ours", "copying", "autoregressive"}
    assert "ratio_cachefree" not in record


def test_an_unknown_sampler_is_named(tide: Tide) -> None:
    refused(tide("bench", "generate", "--against", "copying,slow"), 2, "--against", "cachefree", "'slow'")
