"""What stage two would cost: a student's step, its memory, an epoch; and the same with the teacher beside the
student, as training online has it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from functools import cached_property

from shards.errors import UsageError
from shards.row import Row
from student.batch import collate, packed_tokens
from student.flops import StepFlops, Work, step_flops
from student.loader import deal, global_batches
from student.memory import Assumptions, Estimate, Plan, fit, optimiser_bytes
from student.pairs import TILE
from student.tensors import Batch
from tools.planning.devices import Device
from tools.planning.teacher import TeacherPlan

STEPS = 8
"""Batches that are packed to see what a step runs."""
CUDA_ROW = 4096
"""Longest packed row of a student on CUDA (`student.config.TrainConfig`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentQuestion:
    """What is planned of stage two."""

    device: Device
    efficiency: float
    epochs: float
    plan: Plan
    """`batch_tokens`, `world` and `optimizer` count; the others are picked to fit."""
    vram: float | None = None
    """Of a card, GiB; None = the device's."""
    memory: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        if not 0.0 < self.efficiency <= 1.0:
            raise UsageError(
                f"--student-efficiency is a share of the peak, above 0 and at most 1, got {self.efficiency:g}"
            )
        if not self.epochs > 0:
            raise UsageError(f"--epochs must be positive, got {self.epochs:g}")
        for flag, value in (("batch-tokens", self.plan.batch_tokens), ("student-gpus", self.plan.world)):
            if value < 1:
                raise UsageError(f"--{flag} must be at least 1, got {value}")


class StudentPlan:
    """The answer, piece by piece.

    Raises (all of it): UsageError where the student does not fit its card.
    """

    def __init__(self, question: StudentQuestion, teacher: TeacherPlan, rows: list[Row]) -> None:
        """
        Args:
            rows: of the sample, without targets.
        """
        self.question, self.teacher = question, teacher
        self.shape, self.block = teacher.student, teacher.settings.block_size
        self.rows = [row for row in rows if row.split == "train"] or rows
        self.batches = self._batches()
        self.chosen, self.needs = self._fitted()
        self.work = self._work()

    def _batches(self) -> list[list[Row]]:
        """Whole global batches, of the sample's rows in any order, over again where they are few."""
        budget, order = self.question.plan.batch_tokens, random.Random(0)
        tokens = sum(max(1, packed_tokens(row, self.block)) for row in self.rows)
        stream: list[Row] = []
        for _ in range(math.ceil((STEPS + 1) * budget / tokens)):
            stream += order.sample(self.rows, len(self.rows))
        cut = global_batches(((row, None) for row in stream), batch_tokens=budget, block_size=self.block)
        return [batch for batch, _ in cut][:STEPS]

    def _fitted(self) -> tuple[Plan, Estimate]:
        longest = max(packed_tokens(row, self.block) for batch in self.batches for row in batch)
        masked = sum(int(row.masked.sum()) for batch in self.batches for row in batch)
        tokens = sum(packed_tokens(row, self.block) for batch in self.batches for row in batch)
        seen = replace(self.question.memory, row_tokens=max(1, longest), masked_share=masked / max(1, tokens))
        return fit(self.shape, self.question.vram or self.question.device.gib, self.question.plan, seen)

    def packed(self, rows: list[Row]) -> list[Batch]:
        """A global batch as its micro-batches, on all GPUs."""
        cuda = self.question.device.kind == "cuda"
        costs = [packed_tokens(row, self.block) for row in rows]
        return [
            collate(
                [rows[i] for i in hand],
                block_size=self.block,
                mask_token_id=0,
                row_tokens=min(CUDA_ROW, self.needs.micro_tokens)
                if cuda
                else self.question.plan.batch_tokens,
                width_multiple=TILE if cuda else 1,
            )
            for hand in deal(costs, self.chosen.world * self.chosen.accumulation)
        ]

    def _work(self) -> Work:
        """Of a step, on average."""
        how = self.question.device.counting
        works = [Work.of(part, how) for batch in self.batches for part in self.packed(batch)]
        n = len(self.batches)
        return Work(*(sum(getattr(w, x) for w in works) / n for x in ("tokens", "masked", "pairs")))

    @cached_property
    def flops(self) -> StepFlops:
        """Of a step."""
        return step_flops(self.shape, self.work, gradient_checkpointing=self.chosen.gradient_checkpointing)

    @property
    def update_s(self) -> float:
        """Of the optimiser's step: weights, gradients and state read, weights and state written."""
        traffic = 12.0 * self.shape.parameters + 2 * optimiser_bytes(self.shape, self.chosen)
        return traffic / (self.question.device.gb_per_s * 1e9)

    @property
    def step_s(self) -> float:
        q = self.question
        return self.flops.total / (q.plan.world * q.device.tflops * 1e12 * q.efficiency) + self.update_s

    @cached_property
    def samples(self) -> int:
        """Training samples of the whole corpus."""
        return max(1, round(self.teacher.samples * (1 - self.teacher.settings.holdout)))

    @cached_property
    def rows_per_step(self) -> float:
        return sum(map(len, self.batches)) / len(self.batches)

    @property
    def epoch_steps(self) -> int:
        return max(1, math.ceil(self.samples / self.rows_per_step))

    @property
    def epoch_tokens(self) -> float:
        """Packed, without the padding of rows."""
        tokens = sum(packed_tokens(row, self.block) for row in self.rows) / len(self.rows)
        return self.samples * tokens

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.question.epochs * self.samples / self.rows_per_step))

    @property
    def gpu_hours(self) -> float:
        """Of all steps, without the teacher."""
        return self.steps * self.step_s * self.question.plan.world / 3600

    def online_hours(self, *, packed: bool) -> float:
        """GPU-hours of the teacher's passes where every row of every epoch is asked for anew, on the
        student's device: packed as the engine does (one view at a time), or in padded sequences."""
        t = self.teacher
        views = self.question.epochs * self.samples
        cost = t.one_view if packed else t.naive
        per_view = cost.flops / len(t.ready.samples) / (1 if packed or t.ar else t.settings.views)
        return t.hours(views * per_view, self.steps if packed else 0.0, device=self.question.device)

    @property
    def online_bytes(self) -> float:
        """Of a GPU that holds the student as above, the teacher's weights, and its activations for one
        micro-batch's rows, packed."""
        t = self.teacher
        sample_tokens = t.one_view.tokens / len(t.ready.samples)
        rows = self.rows_per_step / (self.chosen.world * self.chosen.accumulation)
        return self.needs.peak + t.weight_bytes + rows * sample_tokens * t.row_activations / t.row_tokens
