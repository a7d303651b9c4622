"""Corpora: conversations from one source or a mixture of several (`precompute.mixture` has the language).
Rows are streamed; an unusable row is skipped and counted, never silent.

A row is one of: `messages` (list of role and content), `instruction` (with optional `input`) and `output`,
`prompt` and `completion`, or `text` (one plain text, rendered without a chat template). A string field
`group` keeps rows of one origin on one side of the held-out split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from typing import Any

from precompute.mixture import Term, interleave, parse_mixture
from precompute.sample import Conversation, Message
from precompute.sources import BadRow, RawRow, Source, open_source
from precompute.templates import RAW_ROLE
from shards.errors import CorpusError, UsageError

FIELDS = ("messages", "instruction", "input", "output", "prompt", "completion", "text", "group")
SHAPES = "messages | instruction + output | prompt + completion | text"
PLACES = 20
"""Places of skipped rows that are remembered for each reason; all are counted."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a corpus, and which of its rows are taken how often."""

    source: Source
    term: Term

    @property
    def name(self) -> str:
        return self.term.written(self.source.name)

    def fingerprint(self) -> str:
        content = self.source.fingerprint()
        if not self.term.filters:
            return content
        filters = "\0".join(map(str, self.term.filters))
        return hashlib.sha256(f"{content}\0{filters}".encode()).hexdigest()


class Corpus:
    """Conversations of one or more parts; see `open_corpus`.

    Iterating raises CorpusError when a file breaks in the middle, when not one row of a file was usable, or
    when none of a part passed its filters.
    """

    def __init__(self, spec: str, parts: Sequence[Part], *, limit: int | None = None) -> None:
        self.spec = spec
        self.parts = tuple(parts)
        self.limit = limit
        self.skipped: Counter[str] = Counter()
        """Rows skipped by the latest iteration, by reason."""
        self.skipped_at: dict[str, list[str]] = {}
        """The first `PLACES` of them by reason: file (without its folder) and line."""

    @property
    def name(self) -> str:
        """The specification without folders, which may differ between machines."""
        return "+".join(part.name for part in self.parts)

    @property
    def licence(self) -> str | None:
        known = [p.source.licence for p in self.parts]
        if len(known) == 1 or not any(known):
            return known[0]
        return "; ".join(f"{p.source.name}: {x or 'unknown'}" for p, x in zip(self.parts, known))

    @cached_property
    def fingerprint(self) -> str:
        """Names the content and, in a mixture, its order; whatever the limit."""
        prints = self._fingerprints
        if len(prints) == 1:
            return prints[0]
        mixed = "\n".join(f"{p.term.weight!r} {f}" for p, f in zip(self.parts, prints))
        return hashlib.sha256(mixed.encode()).hexdigest()

    @cached_property
    def _fingerprints(self) -> list[str]:
        return [part.fingerprint() for part in self.parts]

    def __iter__(self) -> Iterator[Conversation]:
        self.skipped.clear()
        self.skipped_at.clear()
        streams = [self._conversations(part) for part in self.parts]
        if len(streams) > 1:
            prints = self._fingerprints
            if len(set(prints)) < len(prints):
                twice = next(p.name for i, p in enumerate(self.parts) if prints[i] in prints[:i])
                raise UsageError(
                    f"corpus {self.spec}: {twice} has the same rows as another term; use a weight"
                )
            # Two files of one name are two sources: ids of samples follow from the source's name.
            streams = [_marked(s, f[:8]) for s, f in zip(streams, prints)]
        return islice(interleave(streams, [p.term.weight for p in self.parts]), self.limit)

    def _conversations(self, part: Part) -> Iterator[Conversation]:
        """The usable rows of a part that pass its filters."""
        taken, filtered = 0, None
        for source, rows in groupby(part.source.rows(), key=lambda row: row.source):
            usable, first, bad = 0, "", 0
            for row in rows:
                try:
                    if isinstance(row.value, BadRow):
                        raise row.value
                    messages = messages_of(row.value)
                except BadRow as error:
                    first, bad = first or f"{row.place}: {error}", bad + 1
                    self._skip(row, str(error))
                    continue
                usable += 1
                if not all(f.passes(row.value, messages) for f in part.term.filters):
                    filtered = filtered or row
                    continue
                taken += 1
                group = row.value.get("group")
                yield Conversation(messages, source, row.number, group if isinstance(group, str) else None)
            if not usable:
                raise CorpusError(
                    f"{part.source.prefix}{source}:{first}; none of {bad} rows is usable: expected fields "
                    f"{SHAPES}"
                )
        if filtered is not None and not taken:
            raise CorpusError(
                f"{part.name}: no row passes the filter; the first has fields {_fields(filtered.value)}"
            )
        if not taken:
            raise CorpusError(f"{part.term.name}: no rows in it; expected rows with {SHAPES}")

    def _skip(self, row: RawRow, reason: str) -> None:
        self.skipped[reason] += 1
        places = self.skipped_at.setdefault(reason, [])
        if len(places) < PLACES:
            places.append(f"{row.source}:{row.place}")


def _marked(conversations: Iterator[Conversation], mark: str) -> Iterator[Conversation]:
    return (replace(c, source=f"{mark}/{c.source}") for c in conversations)


def messages_of(row: Any) -> tuple[Message, ...]:
    """The messages of a row, whichever shape it has.

    Raises:
        BadRow: not a row of these shapes (says what was found).
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object with fields, found {type(row).__name__}")
    if row.get("messages") is not None:
        return _chat(row["messages"])
    if row.get("instruction") is not None:
        extra = row.get("input")
        user = _string(row, "instruction") + (f"\n\n{_string(row, 'input')}" if extra else "")
        return Message("user", user), Message("assistant", _string(row, "output"))
    if row.get("prompt") is not None:
        return Message("user", _string(row, "prompt")), Message("assistant", _string(row, "completion"))
    if row.get("text") is not None:
        return (Message(RAW_ROLE, _string(row, "text")),)
    raise BadRow(f"found fields {_fields(row)}")


def _fields(row: dict[str, Any]) -> str:
    return " ".join(", ".join(sorted(map(str, row))).split())[:200] or "(none)"


def _chat(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow("field messages must be a list of messages, not empty")
    messages = []
    for m in value:
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow("a message must have a role and a content, both text")
        messages.append(Message(role, content))
    return tuple(messages)


def _string(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(
            f"field {name} must be text, found {'nothing' if value is None else type(value).__name__}"
        )
    return value


def open_corpus(spec: str, *, limit: int | None = None) -> Corpus:
    """Open a corpus; rows are read only when it is iterated.

    Args:
        spec: what `tide precompute --corpus` takes: a path (.jsonl, .jsonl.zst, .parquet, a folder of such
            files), a `datasets` id, `builtin:stdlib`, or a mixture with weights and filters
            (`precompute.mixture`).
        limit: conversations at most; not part of the fingerprint, and without influence on the order.

    Raises:
        CorpusError: no such file, folder, built-in corpus, data set, configuration or split.
        UsageError: `spec` cannot be read.
    """
    parts = []
    for term in parse_mixture(spec):
        fields = (*FIELDS, *(f.field for f in term.filters))
        parts.append(Part(open_source(term.name, config=term.config, split=term.split, fields=fields), term))
    return Corpus(spec, parts, limit=limit)
