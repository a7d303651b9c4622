"""What passes from corpus to teacher: conversations, and samples tokenised and aligned for both models."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One corpus row."""

    messages: tuple[Message, ...]
    source: str
    """Name of the source it came from."""
    index: int
    """Row in that source."""
    group: str | None = None
    """Rows of one group stay on one side of the held-out split (a module, a repository); None = on its
    own."""


@dataclass(frozen=True, slots=True)
class ChunkSpans:
    """Alignment across tokenizers: chunks over the same bytes, in order. All [C] int32, half-open spans by
    length."""

    student_start: np.ndarray
    student_length: np.ndarray
    teacher_start: np.ndarray
    teacher_length: np.ndarray


@dataclass(frozen=True, slots=True)
class PositionPairs:
    """Alignment with one tokenizer and two templates: pairs of equal tokens. Both [n] int32, ascending."""

    student: np.ndarray
    teacher: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, tokenised for both models. L student tokens, L' teacher tokens."""

    sample_id: str
    split: str
    """`train` or `heldout`."""
    student_ids: np.ndarray
    """[L] int32, the last block filled with EOS."""
    maskable: np.ndarray
    """[L] bool."""
    real_length: int
    content_bytes: int
    teacher_ids: np.ndarray
    """[L'] int32; equal to `student_ids` when tokenizer and template are shared."""
    alignment: PositionPairs | ChunkSpans
    text: str = ""
    """The student's rendered text, for people."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Maskable student tokens without a teacher counterpart, by reason."""
