"""Networks, rows and their dataset for `tide bench train`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.codec import SparseCodec
from shards.noise import NoiseConfig, make_plan
from shards.reader import LogitDataset
from shards.realistic import realistic_targets
from shards.row import PositionTargets, Row
from shards.synthetic import synthetic_config
from shards.writer import DatasetWriter
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from tools.benches.layouts import Sizes, sft_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A network in Qwen3's structure."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is measured."""

    rows: int = 32
    batch: int = 8
    """Rows per optimiser step."""
    length: int = 512
    """Most tokens of a row; what `online` and `sft` pad to."""
    block_size: int = 32
    seed: int = 0
    device: str = "cpu"

    def autocast(self) -> AbstractContextManager[Any]:
        """How both student and teacher compute: bfloat16 on CUDA, float32 elsewhere."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


def make_model(shape: Shape, device: str, *, dtype: torch.dtype = torch.float32) -> A2DQwen3LMHeadModel:
    """Random weights: what a step costs does not depend on them."""
    config = A2DQwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return A2DQwen3LMHeadModel._from_config(config, dtype=dtype)


def make_rows(setting: Setting, vocab: int) -> list[Row]:
    """Views of instruction data's lengths with sparse targets whose sizes are those of real ones."""
    sizes = Sizes(vocab=vocab, samples=setting.rows, length=setting.length, block_size=setting.block_size)
    rng, extra = (np.random.default_rng([setting.seed, i]) for i in (1, 2))
    rows = []
    for sample in sft_samples(sizes):
        plan = make_plan(NoiseConfig(seed=setting.seed, views=1), sample.sample_id, 0, sample.maskable)
        where = np.flatnonzero(plan.masked).astype(np.int32)
        target, gold = realistic_targets(rng, extra, len(where), SparseCodec(), vocab_size=vocab)
        rows.append(
            Row(
                sample_id=sample.sample_id,
                view=0,
                split="train",
                t=float(plan.t),
                input_ids=sample.student_ids,
                real_length=sample.real_length,
                content_bytes=sample.content_bytes,
                maskable=sample.maskable,
                masked=plan.masked,
                positions=PositionTargets(
                    positions=where, half_a=plan.half_a[where], gold_logp=gold, target=target
                ),
            )
        )
    return rows


def write_rows(rows: Sequence[Row], setting: Setting, vocab: int, out: Path) -> LogitDataset:
    """The rows as a logit dataset, whose noise plans are computed again when they are read."""
    noise = NoiseConfig(seed=setting.seed, views=1)
    config = synthetic_config(noise, SparseCodec(), vocab_size=vocab, shared_vocab_size=vocab)
    config |= {"block_size": setting.block_size, "samples_per_part": len(rows)}
    config["student"]["max_length"] = setting.length
    with DatasetWriter(out, "shared", config) as writer:
        writer.write_part(0, 0, len(rows), rows, {})
        writer.finish()
    return LogitDataset(out)
