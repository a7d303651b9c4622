"""What a teacher is: hidden states at the asked places of packed rows, and a head that turns them into
logits.

The loop never sees a model: it asks for hidden states at `read`, and for logits of a few rows at a time, so
that no [N, V] tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from precompute.budget import token_bytes
from precompute.teachers.stack import read_hidden
from shards.errors import ModelError
from shards.row import Target
from student.attention import Coordinates
from student.layout import Attention, Piece

if TYPE_CHECKING:
    from precompute.engine import Targets

TeacherKind = Literal["diffusion", "ar"]
"""`diffusion` predicts masked tokens from noised text, `ar` (autoregressive) each token from the clean text
to its left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """A teacher's identity and how it is asked; kept in the manifest."""

    name: str
    """Folder name or hub id."""
    revision: str | None
    """Commit on the hub; None for a local folder."""
    architecture: str
    """Model type as its config.json names it."""
    attention: Attention
    """How its streams see one another."""
    mask_token_id: int | None
    """None = an autoregressive teacher, which sees no mask."""
    vocab_size: int
    """Columns of its logits."""
    shifted: bool
    """The output at i - 1 predicts position i."""
    block_size: int | None = None
    """Tokens per block that it was trained with, in its own positions; None = the dataset's."""
    dtype: str
    """Number format it runs in: `float32` or `bfloat16`."""
    weights_hash: str
    """sha256 over its safetensors files and config.json."""
    kind: TeacherKind = "diffusion"
    bos_token_id: int | None = None
    """Put before an autoregressive teacher's text that does not begin with it; None = it has none."""

    def to_json(self) -> dict[str, Any]:
        """For the manifest. What autoregressive teachers alone have is absent from other datasets, whose
        identity does not depend on it."""
        own = () if self.kind == "ar" else ("kind", "bos_token_id")
        return {name: value for name, value in asdict(self).items() if name not in own}


class KnownTeacher(Protocol):
    """A frozen model that predicts tokens. Shapes: R rows, P tokens in a row, Q asked places, H, V."""

    @property
    def spec(self) -> TeacherSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def token_bytes(self) -> int:
        """Bytes of activations that a token adds to a forward at its peak."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """[q, V] float32 logits of [q, H] hidden states, a new tensor that the caller may overwrite."""
        ...

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """[V, H] and [V]: weight and bias of the head.

        Raises:
            ModelError: it is not a linear map.
        """
        ...


class PackedTeacher(KnownTeacher, Protocol):
    """One that runs packed rows, and is told who sees whom."""

    def hidden(self, ids: Tensor, position: Tensor, at: Coordinates, read: Tensor) -> Tensor:
        """[Q, H]: last hidden states at `read`, flat indices into the [R, P] rows `ids`, `position` and
        `at`."""
        ...


@runtime_checkable
class EngineTeacher(KnownTeacher, Protocol):
    """One in an engine that forms batches itself, and reduces what it finds where it finds it."""

    @property
    def backend(self) -> dict[str, Any]:
        """The engine and its settings that decide a dataset's bytes, for the manifest."""
        ...

    @property
    def tokens_at_once(self) -> int:
        """Tokens of pieces that are of use in one call of `answer`."""
        ...

    def answer(
        self, pieces: Sequence[Piece], gold: np.ndarray, targets: Targets
    ) -> tuple[np.ndarray, Target | None]:
        """What `precompute.engine.reduce` makes of the pieces' reads, piece after piece.

        Args:
            gold: [Q] true tokens.
        """
        ...


Teacher: TypeAlias = PackedTeacher | EngineTeacher


class TransformersTeacher:
    """Any decoder-only transformers model as a teacher: frozen, in eval mode, without gradients."""

    def __init__(self, model: Any, spec: TeacherSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self._spec = spec

    @property
    def spec(self) -> TeacherSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.model.config, self.model.dtype)

    @torch.no_grad()
    def hidden(self, ids: Tensor, position: Tensor, at: Coordinates, read: Tensor) -> Tensor:
        return read_hidden(self.model, ids, position, at, read, self._spec.attention)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise ModelError(
                f"{self._spec.name}: its head is a {type(head).__name__}, not a linear map, which the exact "
                "codec and sketches need: use --codec sparse without --sketch"
            )
        return head.weight, head.bias
