"""How much of a teacher a codec keeps: rows as they are stored, decoded again, against whole distributions.

The first N training samples of part 0, view 0, go through the teacher once. Their hidden states give both the
targets, which are encoded and decoded as in a shard, and the whole distributions, a few rows at a time.
Losses and gradients need a student. The one declared here is the teacher's own logits plus normal noise of
variance 1, seeded: it errs everywhere, and no weights are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from precompute.engine import Targets, reduce
from precompute.reduce import Head
from precompute.tables import once
from shards.codec import Codec, SparseCodec
from shards.encoding import decode, encode
from shards.journal import CLAIMS
from shards.row import ExactTarget, PositionTargets, Row
from student.batch import position_target
from student.losses import divergence
from student.losses.sparse import Classes, classes, filled
from student.tensors import Basis, Dense, Target, TeacherHead, TopK, take_rows, to_device, with_table

LAMBDAS = (0.1, 0.45, 0.9)
TEMPERATURE = 2.0
"""Of TIDAL, KL and reverse KL, where the codec stores it; else the first it stores."""
LEAST_GRADIENT = 1e-5
"""Positions whose dense gradient has a smaller squared norm have no direction to compare."""
STUDENT = "the teacher's logits + N(0, 1), seed 0"
GROUPS = {
    "input_": "clean ids",
    "masked": "masks",
    "maskable": "masks",
    "distilled": "masks",
    "half_a": "masks",
    "top_logp": "log-probs",
    "top_": "ids",
    "counts": "counts",
    "tail_": "tails",
    "sketch": "sketch",
    "gold_logp": "gold log-probs (float32)",
    "dense_logp": "dense log-probs",
    "hidden": "hidden states",
}
"""Names of columns begin so -> what their bytes are counted as; the rest are `scalars`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coder:
    """How a dataset's rows are made and read."""

    codec: Codec
    targets: Targets
    table: Basis | TeacherHead | None
    head: Head
    vocab_size: int
    """The student's."""
    device: torch.device

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.codec.temperatures if isinstance(self.codec, SparseCodec) else (1.0, TEMPERATURE)


def coded(rows: Sequence[Row], coder: Coder) -> tuple[pa.RecordBatch, Sequence[Row]]:
    """Rows with hidden states as their targets, as this codec stores them, and what is read back."""
    made = []
    for row in rows:
        at = row.positions
        if at is None or not isinstance(at.target, ExactTarget):
            raise ValueError("fidelity is measured from hidden states")
        hidden = torch.from_numpy(at.target.hidden).to(coder.device)
        gold_logp, target = reduce(hidden, row.input_ids[at.positions], coder.head, coder.targets)
        if target is None:
            raise ValueError("fidelity needs distributions")
        made.append(replace(row, positions=PositionTargets(at.positions, at.half_a, gold_logp, target)))
    sizes: dict[str, Any] = {
        "vocab_size": coder.vocab_size,
        "shared_vocab_size": coder.targets.vocab_size,
    }
    batch = encode(made, "shared", coder.codec, "", **sizes)
    return batch, decode(batch, "shared", coder.codec, **sizes)


def column_bytes(batch: pa.RecordBatch) -> dict[str, int]:
    """Compressed bytes of a record batch's columns, as a shard stores them, by what they hold; without
    Arrow's headers, which are of one size whatever the batch."""
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 3), use_threads=False)
    found: dict[str, int] = {}
    for field in batch.schema:
        one = pa.RecordBatch.from_arrays([batch.column(field.name)], schema=pa.schema([field]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, one.schema, options=options) as stream:
            stream.write_batch(one)
        messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
        size = sum(message.body.size for message in messages if message.body is not None)
        name = next((what for prefix, what in GROUPS.items() if field.name.startswith(prefix)), "scalars")
        found[name] = found.get(name, 0) + size
    return found


def students(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`STUDENT` of the teacher's logits [q, V]; drawn position by position, so that chunks do not matter."""
    noise = [torch.randn(logits.shape[1], generator=generator) for _ in range(len(logits))]
    return logits + torch.stack(noise).to(logits.device) if noise else logits


def measured_once(out: Path, asked: int, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`measure`, by one of the processes that share a dataset's folder, for all of them.

    Args:
        asked: samples to measure on. measured: does so.
    """

    def make() -> bytes:
        return json.dumps({"asked": asked, **measured()}).encode()

    # Beside the claims on parts: gone when the last writer leaves, and the manifest has it.
    found: dict[str, Any] = json.loads(once(out, f"{CLAIMS}/fidelity-{asked}.json", make))
    return found


def measure(rows: Sequence[Row], coder: Coder, *, chunk: int = 32) -> dict[str, Any]:
    """The record of a dataset's fidelity.

    Args:
        rows: with `ExactTarget`s.
        chunk: positions whose whole distributions exist at once.
    """
    batch, back = coded(rows, coder)
    meter = Meter(TEMPERATURE if TEMPERATURE in coder.temperatures else coder.temperatures[0])
    generator = torch.Generator().manual_seed(0)
    for row, read in zip(rows, back):
        if (
            row.positions is None
            or read.positions is None
            or not isinstance(row.positions.target, ExactTarget)
        ):
            raise ValueError("fidelity is measured at distilled positions")
        hidden = torch.from_numpy(row.positions.target.hidden).to(coder.device)
        gold = torch.from_numpy(row.input_ids[row.positions.positions].astype(np.int64))
        gold_logp = torch.tensor(read.positions.gold_logp)
        made = position_target(
            [read.positions], gold, gold_logp, coder.targets.vocab_size, coder.temperatures
        )
        whole = with_table(made, coder.table)
        for part in _slices(len(hidden), chunk):
            logits = coder.head(hidden[part])[:, : coder.targets.vocab_size].float()
            student = students(logits, generator)
            target = to_device(take_rows(whole, part), coder.device)
            teacher = logits.log_softmax(-1)
            meter.add(student, teacher, target, meter.dense(student, teacher))
    masked = sum(int(row.masked.sum()) for row in rows)
    sizes = column_bytes(batch)
    sizes["all"] = sum(sizes.values())
    return {
        "rows": f"the first {len(rows)} training samples of part 0, view 0",
        "positions": meter.positions,
        "student": STUDENT,
        "bytes_per_masked_position": {name: size / max(masked, 1) for name, size in sizes.items()},
        **meter.result(),
    }


Losses = dict[str, Callable[[Classes], Tensor]]


def tidal_and_kl(temperature: float) -> Losses:
    """Name -> [q] loss of classes: TIDAL at `LAMBDAS`, KL and reverse KL."""

    def tidal(lam: float) -> Callable[[Classes], Tensor]:
        return lambda c: divergence.tidal(*c, temperature, c.student.new_full((len(c.student),), lam))

    return {
        **{f"tidal {lam:g}": tidal(lam) for lam in LAMBDAS},
        "kl": lambda c: divergence.kl(*c, temperature),
        "reverse-kl": lambda c: divergence.reverse_kl(*c, temperature),
    }


def gradients(student: Tensor, target: Target, temperature: float, losses: Losses) -> dict[str, Tensor]:
    """Loss -> [q, V] gradient of the student's logits [q, V]."""
    found = {}
    for name, loss in losses.items():
        leaf = student.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = loss(classes(leaf, target, temperature)).sum()
        (found[name],) = torch.autograd.grad(value, leaf)
    return found


class Meter:
    """Divergences and gradients of decoded targets against dense ones, position by position."""

    def __init__(self, temperature: float, losses: Losses | None = None) -> None:
        self.temperature, self.positions = temperature, 0
        self.losses = tidal_and_kl(temperature) if losses is None else losses
        self._kl: list[Tensor] = []
        self._cosine: dict[str, list[Tensor]] = {}
        self._error: dict[str, list[Tensor]] = {}

    def dense(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """What `add` compares with; the same for every codec."""
        return gradients(student, Dense(teacher), self.temperature, self.losses)

    def add(self, student: Tensor, teacher: Tensor, target: Target, want: dict[str, Tensor]) -> None:
        """
        Args:
            student: [q, V] logits. teacher: [q, V] log-probs. target: the same positions, decoded.
            want: `dense` of them.
        """
        self.positions += len(student)
        if not isinstance(target, TopK) or 1.0 in target.tails:
            guess = filled(student, target, 1.0).log_softmax(-1)
            gap = (teacher - guess).where(~guess.isneginf(), 0.0)
            self._kl.append((teacher.exp() * gap).sum(-1).cpu())
        for name, got in gradients(student, target, self.temperature, self.losses).items():
            norm = want[name].norm(dim=-1)
            at = norm.square() > LEAST_GRADIENT
            cosine = torch.cosine_similarity(want[name], got, dim=-1)
            error = (got - want[name]).norm(dim=-1) / norm
            self._cosine.setdefault(name, []).append(cosine[at].cpu())
            self._error.setdefault(name, []).append(error[at].cpu())

    def result(self) -> dict[str, Any]:
        """Means over positions; nats."""
        divergences = {}
        if self._kl:
            kl = np.concatenate([x.numpy() for x in self._kl]).astype(np.float64)
            divergences = {"kl_mean": float(kl.mean()), "kl_p99": float(np.quantile(kl, 0.99))}
        return {
            **divergences,
            "temperature": self.temperature,
            "gradient_cosine": {k: _mean(v) for k, v in self._cosine.items()},
            "gradient_relative_error": {k: _mean(v) for k, v in self._error.items()},
        }


def _mean(parts: list[Tensor]) -> float | None:
    values = torch.cat(parts).double()
    return float(values.mean()) if len(values) else None


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(n, i + size)) for i in range(0, n, size))
