"""A student, a dataset and settings small enough that a training run takes a fraction of a second.

Rows are synthetic, with random targets: tests compare one way of training with another.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from shards.row import Row
from shards.schema import Kind
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from student.config import METRICS, TrainConfig
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from student.objective import parse_objective
from student.tokenizer import tokenizer_hash

BLOCK, VOCAB, SHARED, MASK = 8, 304, 300, 303  # as in shards.synthetic
NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12)
CONFIG = TrainConfig(steps=6, batch_tokens=200, row_tokens=64, learning_rate=3e-3, log_every=2, save_every=3)
TIDAL = parse_objective("tidal+reverse-calm:0.5")
TIMES = ("tokens_per_s", "data_wait")


def synthetic(kind: Kind, n: int, noise: NoiseConfig = NOISE) -> list[Row]:
    noise = replace(noise, unit="chunk" if kind == "cross" else "token")
    return list(synthetic_rows(0, n, kind=kind, noise=noise, codec=CODEC, max_length=40))


def small_student(*, tied: bool = True) -> A2DQwen3LMHeadModel:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return A2DQwen3LMHeadModel(config)


def write_student(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny student with its tokenizer."""
    small_student().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_dataset(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind = "shared",
    *,
    samples: int = 32,
    parts: int = 1,
    noise: NoiseConfig = NOISE,
    **student: Any,
) -> Path:
    """A dataset for a student with this tokenizer; `student` changes what its manifest says of it."""
    noise = replace(noise, unit="chunk" if kind == "cross" else "token")
    config = synthetic_config(noise, CODEC, shared_vocab_size=SHARED if kind == "shared" else None)
    config["student"] |= {"tokenizer_hash": tokenizer_hash(tokenizer), "max_length": 40, **student}
    rows, size = synthetic(kind, samples, noise), samples // parts
    ids = list(dict.fromkeys(row.sample_id for row in rows))
    with DatasetWriter(out, kind, config) as writer:
        for i in range(parts):
            mine = set(ids[i * size : (i + 1) * size])
            writer.write_part(i, i * size, (i + 1) * size, [r for r in rows if r.sample_id in mine], {})
        writer.finish()
    return out


def records(out: Path) -> list[dict[str, Any]]:
    """A run's metrics lines, without what a clock decides."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
