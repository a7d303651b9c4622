"""The reference's first-occurrence search (`content_search="first"`) against what it recorded on the golden
tokenizers, mistakes included, and our exact one beside it. Real tokenizers: `test_golden_chats.py`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from precompute.config import PrecomputeConfig
from precompute.first_search import Reading, first_ranges, first_regions
from precompute.inputs import Asking
from precompute.prepare import Drop, PrepareConfig, Preparer
from precompute.ready import prepare
from precompute.sample import ChunkSpans, Conversation, Message, Sample
from precompute.templates import render
from precompute.tokens import byte_offsets
from shards.align import align_chunks
from shards.errors import UsageError
from shards.noise import NoiseConfig

CROSS = [
    "A_cd_s1",
    "A_cd_s2",
    "A_edge_max_teacher_length",
    "A_edge_nothing_masked",
    "A_edge_truncated_fixedpad",
    "A_nocd_s1",
    "A_nocd_s2",
]
WRONG = {"A_cd_s2", "A_nocd_s2"}
"""Traces with a content that the first-occurrence search misplaces or cuts: messages 1 ("yes", which the
prompt holds) and 3 (ends in an emoji of several tokens) of row 0."""


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    return Conversation(tuple(Message(*m) for m in zip(roles, contents)), "chats", 0)


def preparer(student: Any, teacher: Any, search: Any = "first") -> Preparer:
    """Without truncation, which the reference does after its search."""
    return Preparer(student, teacher, PrepareConfig(kind="cross", block_size=4, content_search=search))


def readings(made: Preparer, talk: Conversation) -> tuple[list[str], Reading, Reading]:
    """The contents, and the chat as student and teacher read it."""
    texts = [(side, render(side.tokenizer, talk.messages).text) for side in (made.student, made.teacher)]
    student, teacher = (Reading(side, text, side.encode(text)) for side, text in texts)
    return [m.content for m in talk.messages], student, teacher


def spans_of(sample: Sample | Drop) -> list[list[int]]:
    """[student start, student end, teacher start, teacher end] of every chunk."""
    assert isinstance(sample, Sample), sample
    c = sample.alignment
    assert isinstance(c, ChunkSpans)
    ends = (c.student_start + c.student_length, c.teacher_start + c.teacher_length)
    return np.stack([c.student_start, ends[0], c.teacher_start, ends[1]], axis=1).tolist()


def exact_ranges(made: Preparer, talk: Conversation) -> list[tuple[int, ...]]:
    """From the first to the last chunk of each content, as `first_ranges` has it."""
    shown = render(made.student.tokenizer, talk.messages)
    edges, byte = made.student.encode(shown.text).edges, byte_offsets(shown.text)
    chunks, found = np.array(spans_of(made.prepare(talk))), []
    for span in shown.spans:
        assert span is not None
        start = edges[chunks[:, 0]]
        at = np.flatnonzero((start >= byte[span.start]) & (start < byte[span.end]))
        found.append((*chunks[at[0], [0]], *chunks[at[-1], [1]], *chunks[at[0], [2]], *chunks[at[-1], [3]]))
    return found


def as_recorded(ranges: Sequence[Any]) -> list[list[int]]:
    """In the order of the golden files: teacher before student, contents not found left out."""
    return [[int(x) for x in (*r[2:], *r[:2])] for r in ranges if r is not None]


@pytest.mark.parametrize("trace", CROSS, indirect=True)
def test_recorded_ranges_and_chunks(trace: Any) -> None:
    """`first` gives every row's token ranges and, aligned by bytes, the chunk columns, overlapping ones
    included. `exact` gives other ranges for the two contents that are wrong, and for no other."""
    searches = {s: preparer(trace.student_tokenizer, trace.teacher_tokenizer, s) for s in ("first", "exact")}
    wrong = set()
    for i, row in enumerate(trace.meta["rows"]):
        talk = Conversation(tuple(Message(**m) for m in row), trace.name, i)
        contents, student, teacher = readings(searches["first"], talk)
        theirs = trace.meta["features"][i]["ranges"]
        assert as_recorded(first_ranges(contents, student, teacher)) == theirs

        found = align_chunks(
            student.tokens.edges, teacher.tokens.edges, first_regions(contents, student, teacher)
        )
        batch = trace.recorded[i].alignment
        seen = trace.tensors["batch.teacher_attention_mask"][i].sum()  # teacher tokens that the batch kept
        size = np.diff(np.minimum(found.spans[:, 2:], seen))[:, 0]
        assert found.spans[:, 0].tolist() == batch.student_start.tolist()
        assert np.diff(found.spans[:, :2])[:, 0].tolist() == batch.student_length.tolist()
        assert size.tolist() == batch.teacher_length.tolist()
        assert found.spans[size > 0, 2].tolist() == batch.teacher_start[size > 0].tolist()

        ours = as_recorded(exact_ranges(searches["exact"], talk))
        assert len(ours) == len(theirs)
        wrong |= {(i, m) for m, (a, b) in enumerate(zip(ours, theirs)) if a != b}
        made = searches["first"].prepare(talk)
        if trace.name in WRONG and i == 0:
            assert made == Drop("overlapping chunks")
        else:
            assert spans_of(made) == spans_of(searches["exact"].prepare(talk))
    assert wrong == ({(0, 1), (0, 3)} if trace.name in WRONG else set())


def test_last_character_of_several_tokens(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    """`first` loses all but its first token, and counts what it loses; `exact` has it whole."""
    talk = chat("hi", "hello 😀")
    first, exact = (
        preparer(student_tokenizer, teacher_tokenizer, s).prepare(talk) for s in ("first", "exact")
    )
    assert spans_of(first) == spans_of(exact)[:-3]  # F0 | 9F 98 80: one token a byte on both sides
    assert isinstance(first, Sample)
    assert isinstance(exact, Sample)
    assert first.dropped - exact.dropped == Counter({"absent from the teacher's text": 3})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a", "stands in a role's name, on both sides over tokens of other text"),
        (" \n", "blank"),
        ("", "blank"),
    ],
)
def test_contents_without_a_range(
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    content: str,
    why: str,
) -> None:
    made = preparer(student_tokenizer, teacher_tokenizer)
    assert first_ranges(*readings(made, chat("hello", content))) == [(3, 6, 3, 4), None], why


def test_overlaps_are_counted(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A row whose chunks overlap gives no sample, for this reason, in the counts that a run reports."""
    asking = Asking(
        mask_id=302, attention="bidirectional", block_size=4, shifted=False, row_tokens=512, compdemo=True
    )
    talks = [chat("say yes", "yes"), chat("hi", "hello")]
    ready = prepare(talks, preparer(student_tokenizer, teacher_tokenizer), NoiseConfig(unit="chunk"), asking)
    assert (len(ready.samples), ready.dropped) == (1, Counter({"overlapping chunks": 1}))


def test_unknown_search(tmp_path: Any) -> None:
    """Of a run, and of a preparer."""
    with pytest.raises(UsageError, match="content-search must be one of exact, first, got 'last'"):
        PrecomputeConfig(
            teacher="t", student="s", corpus="c", out=tmp_path, content_search="last"  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(UsageError, match="content_search must be one of exact, first, got 'last'"):
        PrepareConfig(kind="cross", content_search="last")  # type: ignore[arg-type]
