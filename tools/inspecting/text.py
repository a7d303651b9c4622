"""Texts of a dataset's token ids, by its models' tokenizers, and how text from elsewhere is shown.

A dataset names its tokenizers by hash alone. Where they lie is said by an option, or by the options
that `tide precompute` left beside a local dataset; one with another hash is not used, it would show other
words.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shards.errors import ModelError, UsageError
from shards.manifest import Manifest
from shards.verify import OPTIONS

NEWLINE = "⏎"


def visible(text: str) -> str:
    """Text without what a terminal would act on: line ends as a mark, other control and format characters
    as escapes."""
    shown = []
    for c in text:
        if c == "\n":
            shown.append(NEWLINE)
        elif unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(c.encode("unicode_escape", "surrogatepass").decode())
        else:
            shown.append(c)
    return "".join(shown)


@dataclass(slots=True)
class TokenTexts:
    """Id -> text; without a tokenizer the ids themselves."""

    tokenizer: Any = None
    why_not: str = ""
    """Where there is no tokenizer: one line for the user."""
    _known: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, token: int) -> str:
        if self.tokenizer is None:
            return f"#{token}"
        if token not in self._known:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            if "�" in text or not text:  # a part of a character, or nothing: as the vocabulary writes it
                text = self.tokenizer.convert_ids_to_tokens(token) or f"#{token}"
            self._known[token] = text
        return self._known[token]

    def joined(self, ids: list[int]) -> str:
        """The text of successive tokens."""
        if self.tokenizer is None:
            return " ".join(f"#{i}" for i in ids)
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def texts_of(manifest: Manifest, data: str, given: str | None) -> TokenTexts:
    """The texts of a dataset's ids, as far as its student's tokenizer can be found.

    Args:
        data: where the dataset is. given: folder or hub id of the tokenizer.

    Raises:
        UsageError: the tokenizer `given` is another one. ModelError: it cannot be read.
    """
    return _texts("student", "tokenizer", manifest.student.tokenizer_hash, data, given)


def teacher_texts_of(manifest: Manifest, data: str, given: str | None) -> TokenTexts:
    """The same of its teacher's ids. Arguments and errors as for `texts_of`."""
    return _texts("teacher", "teacher-tokenizer", manifest.teacher.get("tokenizer_hash"), data, given)


def _texts(side: str, flag: str, wanted: Any, data: str, given: str | None) -> TokenTexts:
    wanted = wanted if isinstance(wanted, str) else "not stated"
    missing = f"{'token ids are' if side == 'student' else 'the number of teacher tokens is'} shown"
    hint = f"--{flag} DIR|ID names the {side}'s tokenizer (hash {wanted[:12]})"
    named = given or saved_options_of(data).get(side)
    if named is None:
        return TokenTexts(None, f"{missing}: nothing beside the dataset names the tokenizer; {hint}")
    from student.tokenizer import load_tokenizer, tokenizer_hash

    try:
        if side == "teacher":
            from precompute.teachers.load import load_teacher_tokenizer

            tokenizer = load_teacher_tokenizer(named)
        else:
            tokenizer = load_tokenizer(named)
    except ModelError as e:
        if given:
            raise
        return TokenTexts(None, f"{missing}: {e}; {hint}")
    if (found := tokenizer_hash(tokenizer)) != wanted:
        differs = f"{named} has the hash {found[:12]}, the dataset's {side} has {wanted[:12]}"
        if given:
            raise UsageError(f"--{flag} {differs}: give that {side}'s, or leave it out")
        return TokenTexts(None, f"{missing}: tokenizer {differs}; {hint}")
    return TokenTexts(tokenizer)


def saved_options_of(data: str) -> dict[str, str]:
    """The options that `tide precompute` was called with, those that are text, where they lie beside a local
    dataset."""
    file = Path(data).expanduser() / OPTIONS
    if not file.is_file() or file.is_symlink():
        return {}
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {k: v for k, v in options.items() if isinstance(v, str)} if isinstance(options, dict) else {}
