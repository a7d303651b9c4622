"""Alignment with tokenizers of real models over the standard library: how much of a response is aligned, and
how fine the chunks are. `pytest -s` prints the figures.

Where a template puts special tokens around contents, nothing can merge with them, and every byte must be in a
chunk: both sides cut at byte offsets, and the ends of a content are edges on both.
"""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from precompute.corpus import open_corpus
from precompute.prepare import PrepareConfig, Preparer
from precompute.sample import ChunkSpans, Sample
from precompute.tokens import token_bytes

pytestmark = pytest.mark.slow  # fetches and loads four real tokenizers

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLE = (
    "{% for m in messages %}"
    "{{ '<role>' + m['role'] + '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>assistant</role>' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "roles": (ROLE, ("<role>", "</role>", "<|role_end|>")),
    "roles as plain text": (ROLE, ()),
}
FUNCTIONS = 300


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["llama3", "gpt4o", "deepseek_v3"])
def test_coverage(real_tokenizer: Callable[..., PreTrainedTokenizerFast], name: str, template: str) -> None:
    source, specials = TEMPLATES[template]
    student, teacher = real_tokenizer("qwen3", CHATML), real_tokenizer(name, source, *specials)
    config = PrepareConfig(kind="cross", student_max_length=1 << 20, teacher_max_length=1 << 20)
    preparer = Preparer(student, teacher, config)
    count, dropped = Counter[str](), Counter[str]()
    for talk in islice(open_corpus("builtin:stdlib"), FUNCTIONS):
        sample = preparer.prepare(talk)
        assert isinstance(sample, Sample), sample
        dropped += sample.dropped
        aligned = chunk_bytes(sample, student, teacher)
        response = talk.messages[-1].content
        if specials:
            assert b"".join(aligned) == response.encode(), talk.source
        assert sum(map(len, aligned)) <= len(response.encode())
        spans = sample.alignment
        assert isinstance(spans, ChunkSpans)
        learned = sample.maskable[spans.student_start]
        count.update(
            chunks=len(aligned),
            aligned=sum(map(len, aligned)),
            bytes=len(response.encode()),
            student=int(spans.student_length[learned].sum()),
            teacher=int(spans.teacher_length[learned].sum()),
        )
    share = count["aligned"] / count["bytes"]
    finest = {side: count["chunks"] / count[side] for side in ("student", "teacher")}
    print(
        f"\n{name}, {template}: {share:.4%} of {count['bytes']:,} bytes; chunks per token "
        f"{finest['student']:.3f} (student), {finest['teacher']:.3f} (teacher)"
    )
    assert set(dropped) <= {"not content"} | (set() if specials else {"merged with template"})
    assert (share == 1.0) if specials else (0.99 < share < 1.0)
    assert finest["student"] > 0.97, "nearly every token is a chunk of its own"


def chunk_bytes(sample: Sample, student: Any, teacher: Any) -> list[bytes]:
    """Bytes of every chunk of the response, which must be the same on both sides."""
    spans, found = sample.alignment, []
    assert isinstance(spans, ChunkSpans)
    columns = (spans.student_start, spans.student_length, spans.teacher_start, spans.teacher_length)
    for s, n, t, m in zip(*columns):
        if sample.maskable[s]:
            ours = text_of(student, sample.student_ids[s : s + n])
            assert ours == text_of(teacher, sample.teacher_ids[t : t + m])
            found.append(ours)
    return found


def text_of(tokenizer: Any, ids: Any) -> bytes:
    pieces = [token_bytes(x) for x in tokenizer.convert_ids_to_tokens(ids.tolist())]
    assert None not in pieces
    return b"".join(p for p in pieces if p is not None)
