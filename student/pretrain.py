"""Train a small network from nothing: an autoregressive warm-up, then masked diffusion. No teacher, fresh
noise.

The demo makes its teachers and its student start this way. The warm-up matters: at this scale a
block-diffusion model trained from scratch learns several times slower than one that has first learnt to
predict the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.noise import EPSILON, uniform01
from student.attention import Coordinates
from student.forward import hidden_at
from student.layout import Attention, Piece, Stream, lay_out, pack


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A short training run from random weights."""

    attention: Attention = "staircase"
    """How the finished model attends: `staircase` (block diffusion) or `bidirectional`."""
    block_size: int = 32
    ar_steps: int = 320
    """Optimiser steps of next-token prediction under a causal mask."""
    diffusion_steps: int = 200
    """Optimiser steps of masked diffusion under `attention`, cross entropy weighted by 1/t."""
    batch_size: int = 24
    """Samples per step."""
    learning_rate: float = 3e-3
    diffusion_learning_rate: float = 2e-3
    warmup: int = 20
    """Linear warm-up steps of each phase; a cosine to a tenth follows."""
    row_tokens: int = 512
    """Packed row length: long enough to fill, short enough for a dense mask."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingText:
    """One tokenised sample."""

    ids: np.ndarray
    """[L] int32."""
    maskable: np.ndarray
    """[L] bool."""


def pretrain(
    model: Any,
    texts: Sequence[TrainingText],
    config: PretrainConfig,
    *,
    mask_token_id: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """Train `model` in place and return its loss at every step (nats per predicted token).

    Args:
        model: a transformers causal language model; batches and masks are ours, so its own mask is never
        used.
        progress: called with (steps done, steps in all, what is being done).

    The order of samples and all noise come from `config.seed` through Philox words: equal seeds, equal
    models.
    """
    device = next(model.parameters()).device
    total = config.ar_steps + config.diffusion_steps
    losses: list[float] = []
    model.train()
    for phase, steps, rate in (
        ("autoregressive warm-up", config.ar_steps, config.learning_rate),
        ("masked diffusion", config.diffusion_steps, config.diffusion_learning_rate),
    ):
        autoregressive = phase.startswith("auto")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(config.warmup, steps))
        for step in range(steps):
            name = f"{phase}/{step}"
            chosen = _choose(config.seed, name, len(texts), config.batch_size)
            if autoregressive:
                pieces, gold, weight = _next_token([texts[i] for i in chosen])
                attention: Attention = "causal"
            else:
                pieces, gold, weight = _masked([texts[i] for i in chosen], config, name, mask_token_id)
                attention = config.attention
            loss = _loss(model, pieces, gold.to(device), weight.to(device), attention, config.row_tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress(len(losses), total, phase)
    model.eval()
    return losses


def _warm_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _choose(seed: int, name: str, n: int, k: int) -> np.ndarray:
    return (uniform01(seed, name, "pretrain", k) * n).astype(np.int64)


def _next_token(texts: Sequence[TrainingText]) -> tuple[list[Piece], Tensor, Tensor]:
    """Predict every token but the first from its left neighbour, all with equal weight."""
    pieces, gold = [], []
    for text in texts:
        asked = np.arange(1, len(text.ids))
        stream = Stream(text.ids, asked)
        pieces.append(lay_out(text.ids, [stream], attention="causal", block_size=1, shifted=True))
        gold.append(text.ids[asked])
    targets = torch.from_numpy(np.concatenate(gold).astype(np.int64))
    return pieces, targets, torch.full((len(targets),), 1 / max(1, len(targets)))


def _masked(
    texts: Sequence[TrainingText], config: PretrainConfig, name: str, mask_token_id: int
) -> tuple[list[Piece], Tensor, Tensor]:
    """Predict masked tokens; weights 1/t over the maskable tokens of the batch."""
    pieces, gold, weight = [], [], []
    for k, text in enumerate(texts):
        u = uniform01(config.seed, f"{name}/{k}", "pretrain-noise", len(text.ids) + 1)
        t = EPSILON + (1 - EPSILON) * u[0]
        masked = text.maskable & (u[1:] < t)
        asked = np.flatnonzero(masked)
        stream = Stream(np.where(masked, mask_token_id, text.ids), asked)
        pieces.append(lay_out(text.ids, [stream], attention=config.attention, block_size=config.block_size))
        gold.append(text.ids[asked])
        weight.append(np.full(len(asked), 1 / t))
    maskable = max(1, sum(int(text.maskable.sum()) for text in texts))
    return (
        pieces,
        torch.from_numpy(np.concatenate(gold).astype(np.int64)),
        torch.from_numpy(np.concatenate(weight) / maskable).float(),
    )


def _loss(
    model: Any, pieces: list[Piece], gold: Tensor, weight: Tensor, attention: Attention, row_tokens: int
) -> Tensor:
    rows = pack(pieces, row_tokens)
    device = gold.device
    ids, position, *at = (
        torch.from_numpy(x).to(device)
        for x in (rows.ids, rows.position, rows.sample, rows.stream, rows.block, rows.order)
    )
    read = torch.from_numpy(rows.read).to(device)
    hidden = hidden_at(model, ids, position, Coordinates(*at), read, attention)
    logits = model.get_output_embeddings()(hidden).float()
    return (F.cross_entropy(logits, gold, reduction="none") * weight).sum()
