"""Where contents stand in a rendered chat, for templates that leave them alone, strip them, or rewrite
them."""

import pytest
from transformers import PreTrainedTokenizerFast

from precompute.sample import Message
from precompute.templates import Rendered, TemplateRefusal, chat_template, render
from shards.errors import UsageError

STRIPPING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: the last answer gets a think block, empty or its own; earlier answers lose theirs.
THINKING = """{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant
{% set parts = m['content'].split('</think>') %}{% if loop.last %}<think>
{{ parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' }}
</think>

{% endif %}{{ parts[-1].lstrip('\\n') }}<|im_end|>
{% else %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)
DEAF = (
    "{% for m in messages if m['role'] != 'system' %}({{ m['content'] }}){% endfor %}"
    "{% if add_generation_prompt %}({% endif %}"
)
SHOUTING = "{% for m in messages %}:{{ m['content'] | upper }}{% endfor %}"


def chat(*contents: str, system: str | None = None) -> list[Message]:
    turns = [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]
    return ([Message("system", system)] if system is not None else []) + turns


def check(rendered: Rendered, messages: list[Message]) -> list[str]:
    """Spans hold what they promise, in order; returns the texts shown."""
    shown, at = [], 0
    for span, message in zip(rendered.spans, messages):
        assert span is not None
        assert at <= span.start <= span.end
        at = span.end
        shown.append(rendered.text[span.start : span.end])
        assert message.content[span.offset : span.offset + len(shown[-1])] == shown[-1]
    return shown


CONTENTS = [
    ("OK", "OK", "OK", "OK"),
    ("Say the letter a", "a"),
    ("assistant", "user", "user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("", "answer", "", ""),
    ("你好,请介绍一下北京。", "北京是中国的首都。🏯"),
    ("👩‍💻 🏳️‍🌈", "👍🏽 é e\u0301 Z\u0324\u0301"),
    ("  leading and trailing  ", "\n\nstarts with newlines, ends with space "),
    ("\ttab\t", "\t\tx\t"),
    ("\n" * 100, "\n" * 100 + "x" + "\n" * 100),
    ("<think>", "x"),
]


@pytest.mark.parametrize("contents", CONTENTS)
def test_contents_are_found_where_they_stand(
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    contents: tuple[str, ...],
) -> None:
    """Under both golden templates, by their own fixed literals: an independent computation of every span."""
    messages = chat(*contents)
    rendered = render(student_tokenizer, messages)
    assert check(rendered, messages) == [c if c.strip() else "" for c in contents]
    at = 0
    for m, span in zip(messages, rendered.spans):
        at += len(f"<|im_start|>{m.role}\n")
        assert span is not None
        assert not m.content.strip() or span.start == at
        at += len(f"{m.content}<|im_end|>\n")
    assert rendered.exact
    last = messages[-1].content
    start, end = rendered.answers[-1]
    assert rendered.text[start:end] == f"{last}<|im_end|>\n"
    assert end == len(rendered.text)
    check(render(teacher_tokenizer, messages), messages)


@pytest.mark.parametrize("contents", CONTENTS)
def test_template_that_strips(student_tokenizer: PreTrainedTokenizerFast, contents: tuple[str, ...]) -> None:
    messages = chat(*contents)
    assert check(render(student_tokenizer, messages, template=STRIPPING), messages) == [
        c.strip() for c in contents
    ]


def test_template_that_rewrites_reasoning(student_tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt stays a prefix, the last answer keeps its reasoning, earlier ones show their last part
    only."""
    messages = chat("q", "<think>\nhm q\n</think>\n\nfirst", "q", "second")
    rendered = render(student_tokenizer, messages, template=THINKING)
    assert check(rendered, messages) == ["q", "first", "q", "second"]
    assert rendered.exact
    start, end = rendered.answers[-1]
    assert rendered.text[start:end] == "<think>\n\n</think>\n\nsecond<|im_end|>\n"
    start, end = rendered.answers[0]
    assert rendered.text[start:end].startswith("first")
    own = chat("q", "<think>\nbecause\n</think>\n\nq")
    assert check(render(student_tokenizer, own, template=THINKING), own) == ["q", own[1].content]


def test_prompt_that_is_no_prefix_is_reported(student_tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
    )
    rendered = render(student_tokenizer, chat("q", "a"), template=template)
    assert not rendered.exact
    assert rendered.answers == ((2, 4),)


def test_content_left_out_or_changed_has_no_span(student_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat("q", "a", system="be nice")
    rendered = render(student_tokenizer, messages, template=DEAF)
    assert rendered.spans[0] is None
    assert rendered.text == "(q)(a)"
    assert [s.start for s in rendered.spans[1:] if s] == [1, 4]
    assert render(student_tokenizer, messages, template=SHOUTING).spans == (None, None, None)


def test_conversation_that_begins_with_its_answer(student_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(student_tokenizer, [Message("assistant", "hello")])
    start, end = rendered.answers[0]
    assert rendered.text[start:end] == "hello<|im_end|>\n"


def test_plain_text_needs_no_template(student_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(student_tokenizer, [Message("text", " once upon ")])
    assert rendered.text == " once upon "
    assert rendered.answers == ((0, 11),)


def test_refusal_and_missing_template(student_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateRefusal, match="no system role"):
        render(student_tokenizer, chat("q", "a", system="s"), template=NO_SYSTEM)
    bare = PreTrainedTokenizerFast(tokenizer_object=student_tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="no single chat template"):
        chat_template(bare)
