"""Rows whose sizes and statistics are those of real targets: for measuring the format, and for planning.

Ids follow Zipf's law; heads are those of normal logits, as sharp as wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shards.codec import SparseCodec
from shards.noise import NoiseConfig, make_plan
from shards.row import PositionTargets, Row, SparseTarget
from shards.synthetic import synthetic_config

REALISTIC_VOCAB = 157_184
"""Vocabulary of `realistic_rows`, the student's and the shared one."""
SPREAD = 2.8
"""Mean of the logarithm of the logits' standard deviation; at 2.8, 9.6 entries are kept on average."""
_CANDIDATES, _MOST, _TAIL_BOUND = 512, 64, 1e-3
SMALL_VOCAB = 1 << 13
"""Ids, below which those of a position are drawn as a whole."""


def realistic_config(codec: SparseCodec, noise: NoiseConfig | None = None) -> dict[str, Any]:
    """A dataset configuration that rows of `realistic_rows` fit. Arguments as there."""
    config = synthetic_config(
        noise or NoiseConfig(views=1), codec, vocab_size=REALISTIC_VOCAB, shared_vocab_size=REALISTIC_VOCAB
    )
    if noise is None:
        config["noise"]["source"] = "explicit"
    return config


def realistic_rows(
    seed: int,
    n: int,
    codec: SparseCodec,
    *,
    noise: NoiseConfig | None = None,
    spread: float = SPREAD,
    spread_sd: float = 0.7,
    length: int = 512,
) -> list[Row]:
    """Rows whose sizes and statistics are those of real targets, for measuring the format.

    Ids follow Zipf's law; every position has 512 candidates with normal logits, whose standard deviation is
    itself log-normal (parameters `spread`, `spread_sd`), and keeps the head that leaves less than 1e-3, at
    most 64 entries: with the defaults 9.6 on average, 3 in the median, 64 at one position of twenty.

    Args:
        codec: only its temperatures count.
        noise: the plans of which the rows follow, in view 0; None = masks without a plan.
    """
    rng, extra = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    rows = []
    for r in range(n):
        prompt = int(rng.integers(48, 192))
        t = float(rng.uniform(0.05, 0.95))
        masked = np.zeros(length, dtype=bool)
        masked[prompt:] = rng.random(length - prompt) < t
        if not masked.any():
            masked[prompt] = True
        sample_id, maskable, plan = f"s{seed * 10**6 + r:010d}", np.arange(length) >= prompt, None
        if noise is not None:
            plan = make_plan(noise, sample_id, 0, maskable)
            t, masked = float(plan.t), plan.masked
        count = int(masked.sum())
        target, gold_logp = realistic_targets(rng, extra, count, codec, spread=spread, spread_sd=spread_sd)
        input_ids = zipf(rng, length)
        half_a = rng.random(count) < 0.5 if plan is None else plan.half_a[masked]
        rows.append(
            Row(
                sample_id=sample_id,
                view=0,
                split="train",
                t=float(np.float32(t)),
                input_ids=input_ids,
                real_length=length,
                content_bytes=4 * (length - prompt),
                maskable=maskable,
                masked=masked,
                positions=PositionTargets(
                    positions=np.flatnonzero(masked).astype(np.int32),
                    half_a=half_a,
                    gold_logp=gold_logp,
                    target=target,
                ),
            )
        )
    return rows


def realistic_targets(
    rng: np.random.Generator,
    extra: np.random.Generator,
    n: int,
    codec: SparseCodec,
    *,
    vocab_size: int = REALISTIC_VOCAB,
    spread: float = SPREAD,
    spread_sd: float = 0.7,
    most: int = _MOST,
    tail_bound: float = _TAIL_BOUND,
) -> tuple[SparseTarget, np.ndarray]:
    """Sparse targets of `n` positions, and the log-probs [n] float32 of their true tokens: see
    `realistic_rows`. `most`, `tail_bound`: instead of its 64 and 1e-3."""
    heads = _sharp_heads(rng, n, spread, spread_sd, codec.temperatures, most, tail_bound)
    logp, counts, tails = heads
    ids = _distinct_ids(rng, n, vocab_size, most)
    keep = np.arange(most) < counts[:, None]
    # The true token is the most probable one or lies deep in the tail.
    gold = np.where(extra.random(n) < 0.7, logp[:, 0], -1 - extra.exponential(6.0, n))
    target = SparseTarget(
        counts=counts.astype(np.int32),
        ids=ids[keep],
        logp=logp[keep].astype(np.float32),
        tails=tails.astype(np.float32),
    )
    return target, gold.astype(np.float32)


def zipf(
    rng: np.random.Generator, shape: int | tuple[int, ...], vocab_size: int = REALISTIC_VOCAB
) -> np.ndarray:
    """int32 ids by the inverse distribution function of (x + 30)^-1.05."""
    exponent, shift = -0.05, 30.0
    low, high = shift**exponent, (vocab_size + shift) ** exponent
    u = rng.random(shape, dtype=np.float32)
    return np.clip((low + u * (high - low)) ** (1 / exponent) - shift, 0, vocab_size - 1).astype(np.int32)


def mean_kept(codec: SparseCodec, spread: float, *, spread_sd: float = 0.7, positions: int = 2048) -> float:
    """Entries that the heads of `realistic_targets` keep on average, under a codec's cap and tail bound."""
    rng = np.random.default_rng(0)
    heads = _sharp_heads(rng, positions, spread, spread_sd, codec.temperatures, codec.cap, codec.tail_bound)
    return float(heads[1].mean())


def _distinct_ids(rng: np.random.Generator, n: int, vocab_size: int, most: int = _MOST) -> np.ndarray:
    """[n, most] ids, none twice in a row: such rows are drawn again with an offset, or, of a vocabulary so
    small that this would not end, all at once."""
    if vocab_size < SMALL_VOCAB:
        keys = rng.random((n, vocab_size), dtype=np.float32) * np.arange(1, vocab_size + 1)
        return np.argsort(keys, axis=1)[:, :most].astype(np.int32)
    ids = zipf(rng, (n, most), vocab_size)
    while (bad := (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1)).any():
        shape = (int(bad.sum()), most)
        ids[bad] = zipf(rng, shape, vocab_size) + rng.integers(0, 400, shape).astype(np.int32)
        ids = np.minimum(ids, vocab_size - 1)
    return ids


def _sharp_heads(
    rng: np.random.Generator,
    n: int,
    spread: float,
    spread_sd: float,
    temperatures: tuple[float, ...],
    most: int = _MOST,
    tail_bound: float = _TAIL_BOUND,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs [n, most] of the most probable candidates, how many are kept [n], tails [n, temperatures]."""
    sd = np.exp(rng.normal(spread, spread_sd, (n, 1))).astype(np.float32)
    logits = rng.standard_normal((n, _CANDIDATES), dtype=np.float32) * sd
    top = -np.sort(-logits, axis=1)[:, :most]
    peak = logits.max(axis=1, keepdims=True)
    norm = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    logp = top - norm
    mass = np.cumsum(np.exp(logp), axis=1)
    counts = np.minimum((mass < 1 - tail_bound).sum(axis=1) + 1, most)
    at = np.arange(n), counts - 1
    tails = [np.log(np.maximum(1 - mass[at], 1e-9))]
    for temperature in temperatures[1:]:
        whole = np.exp((logits - norm) / temperature).sum(axis=1)
        kept = np.cumsum(np.exp(logp / temperature), axis=1)[at]
        tails.append(np.log(np.maximum(whole - kept, 1e-9)))
    return logp, counts, np.stack(tails, axis=1)
