"""From a conversation to a sample: tokens for both models, what may be masked, and how the two sides
align."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from precompute.first_search import Reading, first_regions, next_regions
from precompute.sample import ChunkSpans, Conversation, Message, PositionPairs, Sample
from precompute.templates import RAW_ROLE, ContentSpan, Rendered, TemplateRefusal, chat_template, render
from precompute.tokens import EdgeTokenizer, Kind, Tokens, byte_offsets, check_shared, name_of
from shards.align import Alignment, Fate, Region, align_chunks, align_positions, outer_spans
from shards.errors import UsageError
from shards.noise import uniform01

LossOn = Literal["last", "assistant", "all"]
ContentSearch = Literal["exact", "first"]
Targets = tuple[np.ndarray, PositionPairs | ChunkSpans, Counter[str]]
"""Teacher ids, alignment, and maskable student tokens without a counterpart, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Everything about tokenising and aligning that decides the samples of a dataset."""

    kind: Kind
    """`shared`: one tokenizer, targets per position; `cross`: two tokenizers, targets per chunk."""
    block_size: int = 32
    student_max_length: int = 512
    """Student tokens at most, rounded down to whole blocks; longer samples are cut."""
    teacher_max_length: int | None = None
    """Teacher tokens at most; default 768 (shared) or 1024 (cross), as the paper has it."""
    loss_on: LossOn = "last"
    """What may be masked: `last` everything after the last generation prompt, block-filling EOS included;
    `assistant` every assistant turn with its end-of-turn; `all` every token."""
    holdout: float = 0.0
    """Share of groups (or samples without one) held out."""
    seed: int = 0
    """Decides the held-out split."""
    student_template: str | None = None
    """Chat template instead of the student tokenizer's own."""
    teacher_template: str | None = None
    """Chat template instead of the teacher tokenizer's own."""
    content_search: ContentSearch = "exact"
    """How contents are found in the two texts: `exact` where the template put them; `first` where a search
    first finds their text, the reference's mistake, for parity with it alone (`precompute.first_search`)."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("loss_on", self.loss_on, get_args(LossOn)),
            ("content_search", self.content_search, get_args(ContentSearch)),
        ):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.block_size < 1:
            raise UsageError(f"block_size must be at least 1, got {self.block_size}")
        for name, length in (
            ("student_max_length", self.student_max_length),
            ("teacher_max_length", self.teacher_length),
        ):
            if length < self.block_size:
                raise UsageError(f"{name} must be at least one block ({self.block_size}), got {length}")
        if not 0.0 <= self.holdout < 1.0:
            raise UsageError(f"holdout must lie in [0, 1), got {self.holdout}")

    @property
    def student_length(self) -> int:
        """Student tokens at most, in whole blocks."""
        return self.student_max_length // self.block_size * self.block_size

    @property
    def teacher_length(self) -> int:
        """Teacher tokens at most."""
        return self.teacher_max_length or (768 if self.kind == "shared" else 1024)


@dataclass(frozen=True, slots=True)
class Drop:
    """A conversation that gives no sample."""

    reason: str
    """One of a few fixed sentences, fit for counting."""
    detail: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    """As in `Sample`: what its maskable tokens would have needed, where alignment was tried."""


class Preparer:
    """Tokenise and align conversations, one at a time; the same conversation always gives the same sample.

    Args:
        teacher_tokenizer: None = the student's own (kind `shared` alone).

    Raises:
        UsageError: no fast tokenizer, no chat template, no EOS token, or tokenizers that do not fit the kind.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any | None, config: PrepareConfig) -> None:
        self.config = config
        self.student = EdgeTokenizer(student_tokenizer)
        self.teacher = (
            self.student
            if teacher_tokenizer is None or teacher_tokenizer is student_tokenizer
            else EdgeTokenizer(teacher_tokenizer)
        )
        if config.kind == "shared":
            check_shared(student_tokenizer, self.teacher.tokenizer)
        elif teacher_tokenizer is None:
            raise UsageError("kind cross needs the teacher's tokenizer: give a teacher, or use kind shared")
        self.student_template = chat_template(student_tokenizer, config.student_template)
        self.teacher_template = chat_template(self.teacher.tokenizer, config.teacher_template)
        self.eos = _eos(student_tokenizer)
        self.teacher_eos = _eos(self.teacher.tokenizer)
        self._same_text = self.teacher is self.student and self.teacher_template == self.student_template
        self.notes: Counter[str] = Counter()
        """Samples that deserve a remark in the run's report, by remark."""

    def prepare(self, conversation: Conversation) -> Sample | Drop:
        messages = conversation.messages
        plain = len(messages) == 1 and messages[0].role == RAW_ROLE
        if not plain and not any(m.role == "assistant" for m in messages):
            return Drop("no assistant message")
        if self.config.loss_on == "last" and not plain and messages[-1].role != "assistant":
            return Drop("last message is not the assistant's")
        try:
            "".join(m.role + m.content for m in messages).encode()
        except UnicodeEncodeError as error:
            return Drop("not valid Unicode", str(error))
        try:
            shown = render(self.student.tokenizer, messages, template=self.student_template)
            asked = (
                shown
                if self._same_text
                else render(self.teacher.tokenizer, messages, template=self.teacher_template)
            )
        except TemplateRefusal as refusal:
            return Drop("refused by the chat template", str(refusal))
        learned = self._learned(messages)
        if not any(messages[i].content.strip() for i in learned):
            return Drop("empty content")
        if any(shown.spans[i] is None for i in learned):
            return Drop("content changed by the student's chat template")

        if not shown.exact:
            self.notes["generation prompt is not a prefix of the text"] += 1
        tokens = self.student.encode(shown.text)
        real = min(len(tokens.ids), self.config.student_length)
        length = -(-real // self.config.block_size) * self.config.block_size
        ids = np.append(tokens.ids[:real], np.full(length - real, self.eos, dtype=np.int32))
        wanted = self._wanted(shown, tokens)
        maskable = np.append(wanted[:real], np.full(length - real, self.config.loss_on != "assistant"))
        if not wanted.any():
            return Drop("nothing to learn")
        if not wanted[:real].any():
            return Drop("prompt too long")
        seen = tokens if self._same_text else self.teacher.encode(asked.text)
        for side, read in ((self.student, tokens), (self.teacher, seen)):
            mask = getattr(side.tokenizer, "mask_token_id", None)
            if mask is not None and mask in read.ids:
                return Drop("mask token in the text")

        if self.config.kind == "shared" and np.array_equal(tokens.ids, seen.ids):
            teacher_ids, alignment, dropped = self._identity(ids, maskable)
        else:
            found = self._align(messages, shown, asked, tokens, seen, real)
            if (found.spans[1:, 0::2] < found.spans[:-1, 1::2]).any():  # `content_search` "first" alone
                return Drop("overlapping chunks")
            teacher_ids, alignment, dropped = self._aligned(found, seen, maskable, real)
        if not len(teacher_ids):
            return Drop("nothing aligned", dropped=dropped)
        return Sample(
            sample_id=sample_id_of(conversation),
            split=split_of(conversation, holdout=self.config.holdout, seed=self.config.seed),
            student_ids=ids,
            maskable=maskable,
            real_length=real,
            content_bytes=_content_bytes(shown, tokens, wanted[:real]),
            teacher_ids=teacher_ids,
            alignment=alignment,
            text=shown.text,
            dropped=dropped,
        )

    def _teacher_limit(self) -> int:
        """Whole blocks where the teacher reads block by block, as the student does."""
        unit = self.config.block_size if self.config.kind == "shared" else 1
        return self.config.teacher_length // unit * unit

    def _identity(self, ids: np.ndarray, maskable: np.ndarray) -> Targets:
        """One tokenizer, one template: the teacher reads the student's tokens, filling included."""
        ids, kept = ids[: self._teacher_limit()], maskable[: self._teacher_limit()]
        at = np.flatnonzero(kept).astype(np.int32)
        dropped = Counter({Fate.TEACHER_TRUNCATED.label: int(maskable.sum() - kept.sum())})
        return ids if len(at) else ids[:0], PositionPairs(at, at), +dropped

    def _aligned(self, found: Alignment, seen: Tokens, maskable: np.ndarray, real: int) -> Targets:
        """Teacher ids up to the last aligned token: nothing after it tells where the answer ends (as the
        reference has it). With a shared tokenizer EOS fills the last block. No ids at all where nothing is
        aligned."""
        spans = found.spans
        alignment: PositionPairs | ChunkSpans
        if self.config.kind == "shared":
            spans = spans[maskable[spans[:, 0]]]
            alignment = PositionPairs(spans[:, 0].copy(), spans[:, 2].copy())
        else:
            start, length = spans[:, 0::2], spans[:, 1::2] - spans[:, 0::2]
            alignment = ChunkSpans(
                *(x.copy() for x in (start[:, 0], length[:, 0], start[:, 1], length[:, 1]))
            )
        end = int(spans[-1, 3]) if len(spans) else 0
        fill = -end % self.config.block_size if self.config.kind == "shared" else 0
        ids = np.append(seen.ids[:end], np.full(fill, self.teacher_eos, dtype=np.int32))
        fates = Counter(int(f) for f in found.fate[:real][maskable[:real]])
        fates[Fate.NOT_CONTENT] += int(maskable[real:].sum())
        return (
            ids,
            alignment,
            Counter({Fate(f).label: n for f, n in fates.items() if n and f != Fate.ALIGNED}),
        )

    def _learned(self, messages: tuple[Message, ...]) -> list[int]:
        """Messages whose content may be masked."""
        if self.config.loss_on == "last":
            return [len(messages) - 1]
        if self.config.loss_on == "all" or messages[0].role == RAW_ROLE:
            return list(range(len(messages)))
        return [i for i, m in enumerate(messages) if m.role == "assistant"]

    def _wanted(self, shown: Rendered, tokens: Tokens) -> np.ndarray:
        """[tokens] bool: carries loss. A token belongs to the turn it begins in."""
        start, _ = outer_spans(tokens.edges)
        if self.config.loss_on == "all":
            return np.ones(len(start), dtype=bool)
        byte = byte_offsets(shown.text)
        if self.config.loss_on == "last":
            return start >= byte[shown.answers[-1][0]]
        wanted = np.zeros(len(start), dtype=bool)
        for first, end in shown.answers:
            wanted |= (start >= byte[first]) & (start < byte[end])
        return wanted

    def _align(
        self,
        messages: tuple[Message, ...],
        shown: Rendered,
        asked: Rendered,
        tokens: Tokens,
        seen: Tokens,
        real: int,
    ) -> Alignment:
        s_byte, t_byte = byte_offsets(shown.text), byte_offsets(asked.text)
        regions, contents = [], []
        for message, s, t in zip(messages, shown.spans, asked.spans):
            if s is not None:
                contents.append((int(s_byte[s.start]), int(s_byte[s.end])))
            if s is not None and t is not None:
                regions.append(_region(message, s, t, s_byte, t_byte))
        if self.config.content_search == "first":
            read = (Reading(self.student, shown.text, tokens), Reading(self.teacher, asked.text, seen))
            if self.config.kind == "cross":
                regions = first_regions([m.content for m in messages], *read)
            else:
                searched = [m for m in messages if m.role == "assistant" or self.config.loss_on == "all"]
                regions = next_regions([m.content for m in searched], *read)
        where: dict[str, Any] = {
            "student_tokens": real,
            "teacher_tokens": self._teacher_limit(),
            "contents": contents,
        }
        if self.config.kind == "shared":
            return align_positions(tokens.edges, seen.edges, regions, tokens.ids, seen.ids, **where)
        return align_chunks(tokens.edges, seen.edges, regions, **where)


def _region(
    message: Message, s: ContentSpan, t: ContentSpan, s_byte: np.ndarray, t_byte: np.ndarray
) -> Region:
    """The part of a content that both texts show (one template may strip it, the other not)."""
    low = max(s.offset, t.offset)
    high = max(low, min(s.offset + s.end - s.start, t.offset + t.end - t.start))
    return Region(
        int(s_byte[min(s.start + low - s.offset, s.end)]),
        int(t_byte[min(t.start + low - t.offset, t.end)]),
        len(message.content[low:high].encode()),
    )


def _content_bytes(shown: Rendered, tokens: Tokens, wanted: np.ndarray) -> int:
    """UTF-8 bytes of message content under the kept maskable tokens, each byte counted once."""
    known = np.where(tokens.edges < 0, np.iinfo(np.int64).max, tokens.edges)
    edges = np.minimum.accumulate(known[::-1])[
        ::-1
    ]  # bytes without an edge of their own: with the first token
    start, end = edges[:-1][: len(wanted)][wanted], edges[1:][: len(wanted)][wanted]
    byte = byte_offsets(shown.text)
    spans = [(byte[s.start], byte[s.end]) for s in shown.spans if s is not None]
    return int(
        sum(np.clip(np.minimum(end, high) - np.maximum(start, low), 0, None).sum() for low, high in spans)
    )


def sample_id_of(conversation: Conversation) -> str:
    """32 hex digits that name (source, row, content); tokenizers and options have no part in it."""
    content = [[m.role, m.content] for m in conversation.messages]
    key = json.dumps([conversation.source, conversation.index, content])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def split_of(conversation: Conversation, *, holdout: float, seed: int) -> str:
    """`heldout` for a share `holdout` of the groups (of the conversations without one), else `train`."""
    key = conversation.group or sample_id_of(conversation)
    return "heldout" if uniform01(seed, key, "holdout", 1)[0] < holdout else "train"


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"tokenizer {name_of(tokenizer)} has no EOS token: set eos_token in its configuration"
        )
    return int(tokenizer.eos_token_id)
