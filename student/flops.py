"""FLOPs of a student's training step, from a configuration and the packed tokens that run. A multiply and an
add are two.

Matrix products and attention alone, which are all but a percent of the arithmetic. The head's gradients are
formed with its logits (`student.fused`), so it costs three products; attention's backward pass makes the
scores again and four more products of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass

from student.memory import Shape
from student.pairs import Counting, computed_pairs
from student.tensors import Batch

BACKWARD_ATTENTION = 2.5
"""Of attention's forward pass: five products against two."""


@dataclass(frozen=True, slots=True)
class Work:
    """What goes through the network."""

    tokens: float
    """Through the layers, padding of packed rows included."""
    masked: float
    """Through the LM head."""
    pairs: float
    """Query-key pairs that attention computes in one layer and head."""

    @classmethod
    def of(cls, batch: Batch, how: Counting) -> Work:
        """Of a packed batch."""
        pairs = computed_pairs(how, "staircase", batch.at)
        return cls(batch.input_ids.numel(), len(batch.read), pairs)


@dataclass(frozen=True, slots=True)
class StepFlops:
    forward: float
    """Layers and attention."""
    backward: float
    """The same, run again first where gradients are checkpointed."""
    head: float
    """Logits and both gradients."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.head


def step_flops(shape: Shape, work: Work, *, gradient_checkpointing: bool = False) -> StepFlops:
    """Of a training step that trains all weights."""
    linear = 2.0 * work.tokens * shape.in_layers
    attention = 4.0 * work.pairs * shape.heads * shape.head_dim * shape.layers
    again = 0.0
    if gradient_checkpointing:  # but for a layer's last product, whose result nobody needs
        last = 2.0 * work.tokens * shape.intermediate * shape.hidden * shape.layers
        again = linear + attention - last
    return StepFlops(
        forward=linear + attention,
        backward=2 * linear + BACKWARD_ATTENTION * attention + again,
        head=3 * 2.0 * shape.embedding * work.masked,
    )
