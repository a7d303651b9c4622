"""Chat templates, rendered with the place of every message's content known exactly.

Searching the text for a content finds the wrong occurrence ("OK" four times, "a" in "assistant"). Here each
content is replaced by a marker, one message at a time: what the template puts before and after the marker
delimits the content in the real text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from precompute.sample import Message
from shards.errors import UsageError

RAW_ROLE = "text"
"""Role of a conversation that is one plain text: it is rendered as it is, without a template."""
MARKER = "TIDExCONTENTxMARKER"
"""Plain letters, so that trimming, escaping and JSON encoding in a template leave it alone."""


class TemplateRefusal(Exception):
    """The template raised on this conversation (roles must alternate, no system message, ...)."""


@dataclass(frozen=True, slots=True)
class ContentSpan:
    """text[start:end] == content[offset : offset + end - start], in characters."""

    start: int
    end: int
    offset: int
    """Characters of the content that the template left out before (a template that strips)."""


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    spans: tuple[ContentSpan | None, ...]
    """Per message; None where the template leaves the content out or rewrites it."""
    answers: tuple[tuple[int, int], ...]
    """[start, end) characters of every assistant turn, from the end of its generation prompt to the end of
    its turn."""
    exact: bool
    """Every generation prompt was a prefix of the text; where one is not, the turn starts where the two
    part."""


def chat_template(tokenizer: Any, template: str | None = None) -> str:
    """The template to use: the given one, else the tokenizer's own.

    Raises:
        UsageError: there is neither.
    """
    found = template if template is not None else getattr(tokenizer, "chat_template", None)
    if not isinstance(found, str) or not found:
        raise UsageError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '') or '(unnamed)'} has no single chat template: "
            "give one as a template, or add chat_template.jinja to its folder"
        )
    return found


def render(tokenizer: Any, messages: Sequence[Message], *, template: str | None = None) -> Rendered:
    """Render a conversation and locate its contents and assistant turns.

    Raises:
        UsageError: no template.
        TemplateRefusal: the template raised on this conversation.
    """
    if len(messages) == 1 and messages[0].role == RAW_ROLE:
        content = messages[0].content
        return Rendered(content, (ContentSpan(0, len(content), 0),), ((0, len(content)),), True)
    source = chat_template(tokenizer, template)

    def text_of(chat: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in chat],
                chat_template=source,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError) as error:
            raise TemplateRefusal(str(error)) from error

    text = text_of(messages)
    spans: list[ContentSpan | None] = []
    floor = 0  # contents come in order
    for i, message in enumerate(messages):
        marked = text_of([*messages[:i], Message(message.role, MARKER), *messages[i + 1 :]])
        span = _locate(text, message.content, marked, floor)
        spans.append(span)
        floor = span.end if span else floor
    answers, exact = [], True
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        span = spans[i]
        if i == 0:  # no prompt before it
            start = span.start if span else 0
        else:
            prompt = text_of(messages[:i], prompt=True)
            start = _common(text, prompt)
            exact &= start == len(prompt)
        end = len(text)
        if i + 1 < len(messages):
            # A template may render a turn differently once another follows: then the turn ends where the two
            # part, but not before its content does.
            end = max(_common(text, text_of(messages[: i + 1])), span.end if span else start)
        answers.append((start, end))
    return Rendered(text, tuple(spans), tuple(answers), exact)


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _locate(text: str, content: str, marked: str, floor: int) -> ContentSpan | None:
    """Where `content` stands in `text`, given the same chat rendered with the marker in its place."""
    if not content.strip():
        return ContentSpan(floor, floor, 0)
    at = marked.find(MARKER)
    if at < 0:
        return None
    head, tail = marked[:at], marked[at + len(MARKER) :]
    start, end = at, len(text) - len(tail)
    after, before = text.startswith(head), text.endswith(tail)
    if after and before and start <= end:
        shown = text[start:end]
        # Whole, stripped, or its last part (a template that removes reasoning from earlier turns).
        stripped = len(content) - len(content.lstrip())
        for offset in (0, stripped, len(content.rstrip()) - len(shown), len(content) - len(shown)):
            if offset >= 0 and content.startswith(shown, offset):
                return ContentSpan(start, end, offset)
    # The template treats this very content in a special way: one side may still anchor it, else the content
    # before.
    for shown in (content, content.strip()):
        offset = content.find(shown)
        if after and text.startswith(shown, start):
            return ContentSpan(start, start + len(shown), offset)
        if before and text.endswith(shown, 0, end):
            return ContentSpan(end - len(shown), end, offset)
    for shown in (content, content.strip()):
        start = text.find(shown, floor)
        if start >= 0:
            return ContentSpan(start, start + len(shown), content.find(shown))
    return None
