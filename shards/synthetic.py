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
