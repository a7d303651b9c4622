"""Peak memory of the loss and its gradients, fused with the LM head and plain, for `tide bench train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shards.codec import SparseCodec
from shards.realistic import realistic_targets
from shards.row import PositionTargets, Row
from student.batch import collate
from student.fused import fused_loss
from student.objective import parse_objective
from student.tensors import Batch, to_device
from tools.benches import common

PROGRESS = 0.5


def compare_losses(
    device: str,
    *,
    positions: int = 2048,
    hidden: int = 1024,
    vocab: int = 151936,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """CE + TIDAL on sparse targets at `positions` masked positions, gradients of hidden states and head
    included (float32): both peaks in bytes, their ratio, both values of the loss."""
    objective, batch = parse_objective("tidal"), to_device(make_batch(positions, vocab), device)
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocab, bias=False, device=device)
    states = torch.randn(positions, hidden, device=device, requires_grad=True)
    losses: dict[str, float] = {}

    def fused() -> None:
        total = fused_loss(objective, batch, PROGRESS, states, head).total
        total.backward()
        losses["fused"] = float(total.detach())

    def plain() -> None:
        total = objective(head(states), batch, PROGRESS).total
        total.backward()
        losses["plain"] = float(total.detach())

    peaks, seconds = {}, {}
    for i, (name, call) in enumerate((("fused", fused), ("plain", plain))):
        progress(i, 2, name)
        start = time.process_time()
        peaks[name] = common.peak_memory(call)
        seconds[name] = time.process_time() - start
        states.grad = head.weight.grad = None
    progress(2, 2, "")
    return {
        "loss_memory_ratio": peaks["plain"] / max(1, peaks["fused"]),
        "loss_memory": {
            "positions": positions, "hidden": hidden, "vocab": vocab, "peak_bytes": peaks,
            "cpu_s": seconds, "loss": losses,
        },
    }  # fmt: skip


def make_batch(positions: int, vocab: int) -> Batch:
    """One view, every token masked and distilled."""
    rng, extra = (np.random.default_rng([0, i]) for i in (1, 2))
    codec, every = SparseCodec(), np.ones(positions, dtype=bool)
    target, gold = realistic_targets(rng, extra, positions, codec, vocab_size=vocab)
    row = Row(
        sample_id="s0",
        view=0,
        split="train",
        t=0.5,
        input_ids=rng.integers(0, vocab - 1, positions).astype(np.int32),
        real_length=positions,
        content_bytes=positions,
        maskable=every,
        masked=every,
        positions=PositionTargets(
            positions=np.arange(positions, dtype=np.int32), half_a=every, gold_logp=gold, target=target
        ),
    )
    return collate(
        [row],
        block_size=32,
        mask_token_id=vocab - 1,
        row_tokens=2 * positions,
        shared_vocab_size=vocab,
        temperatures=codec.temperatures,
    )
