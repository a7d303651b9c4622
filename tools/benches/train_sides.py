"""A student's training step in the layouts that `tide bench train` compares, on the same rows.

- `online`: the reference's step: rows padded to one length, the teacher's two CompDemo passes over [x0, xt],
  its LM head at every position, the student over [xt, x0] with its head at every position, CE and TIDAL on
  whole distributions;
- `sft`: the same without the teacher, CE alone;
- `fair`: `sft` with rows sorted by length and padded to the batch's longest;
- `ours`: rows read from a logit dataset, packed, the loss fused with the head; CE and TIDAL.

The reference's losses are written as it would want them at their best: on the masked positions' logits alone.
Every step ends with clipping and AdamW, the same on all sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.codec import SparseCodec
from shards.reader import LogitDataset
from shards.row import Row
from student.attention import Coordinates, dense_mask
from student.batch import collate, counts_of, packed_tokens
from student.config import TrainConfig
from student.forward import mask_argument
from student.fused import FusedLoss
from student.losses.ce import timestep_weight
from student.objective import parse_objective
from student.run_attention import RUNS
from student.tensors import Batch, LossOut, to_device
from tools.benches.train_rows import Setting

PROGRESS = 0.5
"""Share of training done, which decides lambda."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows in a rectangle, [B, L] each unless stated otherwise."""

    clean: Tensor
    masked: Tensor
    half_a: Tensor
    weight: Tensor
    """[N] CE weight of each masked position, its share of the maskable tokens included."""
    t: Tensor
    """[N] timestep of each masked position."""
    mask_id: int

    @classmethod
    def of(cls, rows: Sequence[Row], length: int, mask_id: int) -> Padded:
        clean = np.zeros((len(rows), length), dtype=np.int64)
        masked, half_a = np.zeros(clean.shape, bool), np.zeros(clean.shape, bool)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            clean[i, :n], masked[i, :n] = row.input_ids, row.masked
            if row.positions is not None:
                half_a[i, row.positions.positions] = row.positions.half_a
        t = torch.tensor([row.t for row in rows]).repeat_interleave(torch.from_numpy(masked.sum(1)))
        weight = timestep_weight(t) / max(1, sum(int(row.maskable.sum()) for row in rows))
        ids, hidden, first = (torch.from_numpy(a) for a in (clean, masked, half_a))
        return cls(ids, hidden, first, weight, t, mask_id)

    def to(self, device: str) -> Padded:
        return to_device(self, device)

    def noisy(self, hidden: Tensor) -> Tensor:
        return self.clean.masked_fill(hidden, self.mask_id)


def run_both(model: Any, first: Tensor, second: Tensor, stream: tuple[int, int], block_size: int) -> Tensor:
    """[B, 2L, V] logits over two streams beside one another, numbered `stream` (0 = clean). Padding needs no
    mask of its own: samples end with a block, and no earlier block looks at a later one."""
    length = first.shape[1]
    where = torch.arange(length, device=first.device).repeat(1, 2)
    streams = torch.tensor(stream, device=first.device).repeat_interleave(length)[None]
    at = Coordinates(torch.zeros_like(where), streams, where // block_size, where)
    return model(
        input_ids=torch.cat([first, second], 1),
        position_ids=where.expand(len(first), -1),
        attention_mask=dense_mask("staircase", at),
        use_cache=False,
    ).logits


def dense_tidal(student: Tensor, teacher: Tensor, lambda_t: Tensor, temperature: float) -> Tensor:
    """TIDAL on whole distributions, from logits [N, V] of both and lambda_t [N]; its mean over positions."""
    s, t, weight = student / temperature, teacher / temperature, lambda_t[:, None]
    target = ((1 - weight) * s + weight * t).detach().log_softmax(-1)
    each = F.kl_div(s.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return temperature**2 * each.sum() / max(1, len(each))


class Sides:
    """The four sides' work on one student; each `Callable` does whole optimiser steps."""

    def __init__(
        self, student: Any, teacher: Any | None, rows: list[Row], dataset: LogitDataset, setting: Setting
    ) -> None:
        self.student, self.teacher, self.rows, self.dataset = student.train(), teacher, rows, dataset
        self.setting, self.objective = setting, parse_objective("tidal")
        self.config = TrainConfig(steps=1, batch_tokens=2 * setting.length * setting.batch).resolved()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=self.config.learning_rate)
        self.fused = FusedLoss(self.objective)
        self.mask_id = student.config.vocab_size - 1
        self.wait_s: list[float] = []
        """Of each pass of `ours`: seconds until its batches were there."""
        self.asked = 0

    def batches(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        return [rows[i : i + self.setting.batch] for i in range(0, len(rows), self.setting.batch)]

    def online(self) -> None:
        """One step, of the next batch in turn."""
        batches = self.batches(self.rows)
        self.step(self.online_loss, batches[self.asked % len(batches)])
        self.asked += 1

    def sft(self) -> None:
        for rows in self.batches(self.rows):
            self.step(self.padded_loss, rows, self.setting.length)

    def fair(self) -> None:
        for rows in self.batches(sorted(self.rows, key=lambda row: len(row.input_ids))):
            self.step(self.padded_loss, rows, max(len(row.input_ids) for row in rows))

    def ours(self) -> None:
        self.wait_s.append(0.0)
        batches = self.packed()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait_s[-1] += time.perf_counter() - start
            if batch is None:
                return
            self.step(self.packed_loss, batch)

    def largest(self, name: str) -> None:
        """One step of a side, of the batch that needs most memory."""
        batches, lengths = self.batches(self.rows), [len(row.input_ids) for row in self.rows]
        if name == "online":
            self.step(self.online_loss, batches[0])
        elif name == "ours":
            block = self.setting.block_size
            rows = max(batches, key=lambda rows: sum(packed_tokens(row, block) for row in rows))
            self.step(self.packed_loss, self.collate(rows))
        else:
            length = self.setting.length if name == "sft" else max(lengths)
            self.step(self.padded_loss, batches[0], length)

    def step(self, loss: Callable[..., LossOut | Tensor], *args: Any) -> None:
        """An optimiser step on `loss(*args)`."""
        with self.setting.autocast():
            made = loss(*args)
        total = made.total if isinstance(made, LossOut) else made
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def padded(self, rows: Sequence[Row], length: int) -> tuple[Padded, Tensor]:
        """The rectangle, and the student's logits [N, V] at its masked positions."""
        self.student.set_attn_implementation("sdpa")
        x = Padded.of(rows, length, self.mask_id).to(self.setting.device)
        logits = run_both(self.student, x.noisy(x.masked), x.clean, (1, 0), self.setting.block_size)
        return x, logits[:, :length][x.masked].float()

    def padded_loss(self, rows: Sequence[Row], length: int) -> Tensor:
        """CE of the padded form."""
        x, logits = self.padded(rows, length)
        return (F.cross_entropy(logits, x.clean[x.masked], reduction="none") * x.weight).sum()

    def online_loss(self, rows: Sequence[Row]) -> Tensor:
        """CE and TIDAL against the teacher, which sees one half of the masked tokens at a time."""
        length, block = self.setting.length, self.setting.block_size
        x, logits = self.padded(rows, length)
        with torch.no_grad():
            said = [
                run_both(self.teacher, x.clean, x.noisy(hidden), (0, 1), block)[:, length:]
                for hidden in (x.masked & ~x.half_a, x.half_a)
            ]
            teacher = torch.where(x.half_a[..., None], said[1], said[0])[x.masked].float()
            del said
        ce = (F.cross_entropy(logits, x.clean[x.masked], reduction="none") * x.weight).sum()
        lambda_t = self.objective.schedule.at(PROGRESS, x.t)
        return ce + dense_tidal(logits, teacher, lambda_t, self.objective.temperature)

    def packed(self) -> Iterator[Batch]:
        """Every row once, in the order of a training run, read from disk with every check."""
        stream = (row for row, _ in self.dataset.stream(self.setting.seed, check=False))
        rows = islice(stream, len(self.rows))
        while part := list(islice(rows, self.setting.batch)):
            for row in part:
                self.dataset.check(row)
            yield self.collate(part)

    def collate(self, rows: Sequence[Row]) -> Batch:
        assert self.config.row_tokens is not None
        vocab = self.student.config.vocab_size
        return collate(
            rows,
            block_size=self.setting.block_size,
            mask_token_id=self.mask_id,
            row_tokens=self.config.row_tokens,
            shared_vocab_size=vocab,
            temperatures=SparseCodec().temperatures,
            counts=counts_of(rows, self.setting.block_size),
            width_multiple=128 if self.setting.device == "cuda" else 1,
        )

    def packed_loss(self, batch: Batch) -> LossOut:
        self.student.set_attn_implementation("flex_attention" if self.setting.device == "cuda" else RUNS)
        batch = to_device(batch, self.setting.device)
        loss: LossOut = self.student(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            read=batch.read,
            loss_head=self.fused.about(batch, PROGRESS),
            use_cache=False,
            **mask_argument("staircase", batch.at, self.student),
        )
        return loss

    @torch.no_grad()
    def equality(self) -> dict[str, float]:
        """CE of the first batch, padded and packed, in float32."""
        rows = self.batches(self.rows)[0]
        padded = float(self.padded_loss(rows, self.setting.length))
        ours = float(self.packed_loss(self.collate(rows)).terms["ce"])
        return {"ce_padded": padded, "ce_ours": ours, "relative": abs(ours - padded) / padded}

    def tokens(self) -> dict[str, int]:
        """Tokens through the student's layers in a pass over all rows, by side."""
        by_length = sorted(self.rows, key=lambda row: len(row.input_ids))
        fair = ((len(rows), max(len(row.input_ids) for row in rows)) for rows in self.batches(by_length))
        whole = 2 * self.setting.length * len(self.rows)
        return {
            "online": whole,
            "sft": whole,
            "fair": sum(2 * n * longest for n, longest in fair),
            "ours": sum(packed_tokens(row, self.setting.block_size) for row in self.rows),
        }
