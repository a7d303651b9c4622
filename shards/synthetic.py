"""Rows with invented text and targets but a real noise plan: what tests and benchmarks of the format use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from shards.codec import Codec, ExactCodec, SparseCodec, codec_to_json, sketch_limits, table_of
from shards.noise import NoiseConfig, make_plan
from shards.row import ChunkTargets, DenseTarget, ExactTarget, PositionTargets, Row, SparseTarget, Target
from shards.schema import Kind


def synthetic_config(
    noise: NoiseConfig, codec: Codec, *, vocab_size: int = 304, shared_vocab_size: int | None = 300
) -> dict[str, Any]:
    """A dataset configuration that rows of `synthetic_rows` fit. A codec's table is named, not made."""
    table = table_of(codec)
    file = {"file": table[0], "bytes": 1024, "sha256": table[1], "what": "synthetic"} if table else {}
    return {
        "student": {
            "tokenizer_hash": "a" * 64,
            "vocab_size": vocab_size,
            "mask_token_id": vocab_size - 1,
            "eos_token_id": vocab_size - 2,
            "pad_token_id": vocab_size - 2,
            "template_hash": "b" * 64,
            "max_length": 512,
        },
        "teacher": {"name": "synthetic", "revision": None, "mask_token_id": vocab_size - 1, "shifted": False},
        "noise": {**asdict(noise), "source": "philox"},
        "block_size": 8,
        "loss_on": "last",
        "shared_vocab_size": shared_vocab_size,
        "codec": codec_to_json(codec),
        **({"files": [file]} if file else {}),
        "source": {"spec": "synthetic", "fingerprint": "0", "licence": None},
        "holdout": 0.25,
        "samples_per_part": 256,
    }


def synthetic_rows(
    first: int,
    last: int,
    *,
    kind: Kind,
    noise: NoiseConfig,
    codec: Codec,
    vocab_size: int = 304,
    shared_vocab_size: int = 300,
    max_length: int = 64,
) -> Iterator[Row]:
    """Every view of the samples [first, last), sample after sample; every fourth sample is held out.

    Logits are normal with a standard deviation of 3; where `kind` is cross, chunks have one to three tokens.
    """
    for i in range(first, last):
        rng = np.random.Generator(np.random.PCG64([7, i]))
        length = 8 * int(rng.integers(2, max_length // 8 + 1))
        prompt = int(rng.integers(1, length // 2))
        ids = rng.integers(0, vocab_size - 2, length).astype(np.int32)
        maskable = np.arange(length) >= prompt
        sizes = rng.integers(1, 4, length)
        edges = np.minimum(np.concatenate([[0], np.cumsum(sizes)]), length)
        edges = np.unique(edges).astype(np.int32)
        for view in range(noise.views):
            plan = make_plan(
                noise,
                f"s{i:06d}",
                view,
                maskable,
                chunk_start=edges[:-1] if kind == "cross" else None,
                chunk_length=np.diff(edges) if kind == "cross" else None,
            )
            positions, chunks = None, None
            if kind == "cross":
                chunks = ChunkTargets(
                    start=edges[:-1],
                    length=np.diff(edges),
                    teacher_length=sizes[: len(edges) - 1].astype(np.int32),
                    masked=plan.chunk_masked,
                    active=plan.chunk_active,
                    half_a=plan.chunk_half_a,
                    logp=-rng.exponential(2.0, int(plan.chunk_active.sum())).astype(np.float32),
                )
            else:
                at = np.flatnonzero(plan.masked & (rng.random(length) < 0.9)).astype(np.int32)
                logits = rng.normal(0, 3, (len(at), shared_vocab_size))
                logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
                gold = ids[at]
                known = gold < shared_vocab_size
                true_logp = logp[np.arange(len(at)), np.where(known, gold, 0)]
                positions = PositionTargets(
                    positions=at,
                    half_a=plan.half_a[at],
                    gold_logp=np.where(known, true_logp, np.nan).astype(np.float32),
                    target=_target(logp, codec, np.random.default_rng([8, i, view])),
                )
            yield Row(
                sample_id=f"s{i:06d}",
                view=view,
                split="heldout" if i % 4 == 3 else "train",
                t=float(plan.t),
                input_ids=ids,
                real_length=length - int(rng.integers(0, 4)),
                content_bytes=3 * (length - prompt),
                maskable=maskable,
                masked=plan.masked,
                positions=positions,
                chunks=chunks,
            )


def _target(logp: np.ndarray, codec: Codec, rng: np.random.Generator) -> Target:
    """What a codec keeps of [N, V] log-probs; sketches and hidden states are noise."""
    if isinstance(codec, ExactCodec):
        return ExactTarget((rng.integers(-512, 513, (len(logp), codec.width)) / 64).astype(np.float32))
    if not isinstance(codec, SparseCodec):
        return DenseTarget(logp.astype(np.float32))
    head = _head(logp, codec)
    if not codec.sketch:
        return head
    limits = sketch_limits(codec).astype(int)
    return replace(head, sketch=rng.integers(-limits, limits + 1, (len(logp), codec.sketch)).astype(np.int8))


def _head(logp: np.ndarray, codec: SparseCodec) -> SparseTarget:
    """The sparse target of [N, V] log-probs."""
    order = np.argsort(-logp, axis=1, kind="stable")
    top = np.take_along_axis(logp, order, axis=1)
    dropped = 1 - np.cumsum(np.exp(top), axis=1)
    counts = np.minimum((dropped >= codec.tail_bound).sum(axis=1) + 1, min(codec.cap, logp.shape[1]))
    keep = np.arange(logp.shape[1]) < counts[:, None]
    tails = [
        np.logaddexp.reduce(np.where(keep, -np.inf, top / temperature), axis=1)
        for temperature in codec.temperatures
    ]
    return SparseTarget(
        counts=counts.astype(np.int32),
        ids=order[keep].astype(np.int32),
        logp=top[keep].astype(np.float32),
        tails=np.stack(tails, axis=1).astype(np.float32),
    )


REALISTIC_VOCAB = 157_184
"""Vocabulary of `realistic_rows`, the student's and the shared one."""
_CANDIDATES, _MOST, _TAIL_BOUND = 512, 64, 1e-3


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
    spread: float = 2.8,
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
        input_ids = _zipf(rng, length)
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
    spread: float = 2.8,
    spread_sd: float = 0.7,
) -> tuple[SparseTarget, np.ndarray]:
    """Sparse targets of `n` positions, and the log-probs [n] float32 of their true tokens: see
    `realistic_rows`."""
    logp, counts, tails = _sharp_heads(rng, n, spread, spread_sd, codec.temperatures)
    ids = _distinct_ids(rng, n, vocab_size)
    keep = np.arange(_MOST) < counts[:, None]
    # The true token is the most probable one or lies deep in the tail.
    gold = np.where(extra.random(n) < 0.7, logp[:, 0], -1 - extra.exponential(6.0, n))
    target = SparseTarget(
        counts=counts.astype(np.int32),
        ids=ids[keep],
        logp=logp[keep].astype(np.float32),
        tails=tails.astype(np.float32),
    )
    return target, gold.astype(np.float32)


def _zipf(
    rng: np.random.Generator, shape: int | tuple[int, ...], vocab_size: int = REALISTIC_VOCAB
) -> np.ndarray:
    """int32 ids by the inverse distribution function of (x + 30)^-1.05."""
    exponent, shift = -0.05, 30.0
    low, high = shift**exponent, (vocab_size + shift) ** exponent
    u = rng.random(shape, dtype=np.float32)
    return np.clip((low + u * (high - low)) ** (1 / exponent) - shift, 0, vocab_size - 1).astype(np.int32)


def _distinct_ids(rng: np.random.Generator, n: int, vocab_size: int) -> np.ndarray:
    """[n, 64] ids, none twice in a row: such rows are drawn again with an offset."""
    ids = _zipf(rng, (n, _MOST), vocab_size)
    while (bad := (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1)).any():
        shape = (int(bad.sum()), _MOST)
        ids[bad] = _zipf(rng, shape, vocab_size) + rng.integers(0, 400, shape).astype(np.int32)
        ids = np.minimum(ids, vocab_size - 1)
    return ids


def _sharp_heads(
    rng: np.random.Generator, n: int, spread: float, spread_sd: float, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs [n, 64] of the most probable candidates, how many are kept [n], tails [n, temperatures]."""
    sd = np.exp(rng.normal(spread, spread_sd, (n, 1))).astype(np.float32)
    logits = rng.standard_normal((n, _CANDIDATES), dtype=np.float32) * sd
    top = -np.sort(-logits, axis=1)[:, :_MOST]
    peak = logits.max(axis=1, keepdims=True)
    norm = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    logp = top - norm
    mass = np.cumsum(np.exp(logp), axis=1)
    counts = np.minimum((mass < 1 - _TAIL_BOUND).sum(axis=1) + 1, _MOST)
    at = np.arange(n), counts - 1
    tails = [np.log(np.maximum(1 - mass[at], 1e-9))]
    for temperature in temperatures[1:]:
        whole = np.exp((logits - norm) / temperature).sum(axis=1)
        kept = np.cumsum(np.exp(logp / temperature), axis=1)[at]
        tails.append(np.log(np.maximum(whole - kept, 1e-9)))
    return logp, counts, np.stack(tails, axis=1)


def endless(
    rows: Sequence[Row],
) -> Callable[[Mapping[str, Any] | None], Iterator[tuple[Row, dict[str, int]]]]:
    """A source of training rows without end, as a loader takes it; its state is the number of rows given."""

    def source(at: Mapping[str, Any] | None) -> Iterator[tuple[Row, dict[str, int]]]:
        given = at["given"] if at else 0
        while True:
            yield rows[given % len(rows)], {"given": given + 1}
            given += 1

    return source
