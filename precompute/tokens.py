"""Token edges in bytes of the original text, for any fast tokenizer; comparison of two vocabularies; the hash
that names a template.

Byte-level BPE (every current large model) is exact: its tokens are bytes of the normalised text, which are
mapped back through stretches that normalisation leaves alone. Other tokenizers give character offsets; edges
between tokens that share a character stay unknown (-1). See `shards.align` for what edges mean.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from shards.errors import UsageError

Normalize = Callable[[str], str]
Kind = Literal["shared", "cross"]
"""Whether student and teacher have one vocabulary."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text."""

    ids: np.ndarray
    """[n] int32."""
    edges: np.ndarray
    """[n + 1] int64: byte offsets into the UTF-8 text, -1 = unknown; the first is 0, the last its length."""


class EdgeTokenizer:
    """A tokenizer that also says where its tokens lie. No special tokens are added.

    Raises:
        UsageError: the tokenizer has no fast (Rust) backend, which knows offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                f"tokenizer {name_of(tokenizer)} has no fast backend, so its tokens cannot be located: "
                "use a folder with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._normalize: Normalize | None = backend.normalizer.normalize_str if backend.normalizer else None
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
        self._byte_level = any(d.get("type") == "ByteLevel" for d in [decoder, *decoder.get("decoders", ())])

    def encode(self, text: str) -> Tokens:
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        edges = self._byte_level_edges(text, encoding) if self._byte_level else None
        if (
            edges is None
        ):  # not byte-level, or bytes that do not add up (an invented prefix space, an unknown token)
            edges = edges_from_offsets(text, encoding.offsets)
        return Tokens(np.asarray(encoding.ids, dtype=np.int32), edges)

    def _byte_level_edges(self, text: str, encoding: Any) -> np.ndarray | None:
        """Edges from token bytes; None if they do not add up to the text.

        Added tokens are cut out before normalisation, so each stretch between two of them stands for itself.
        """
        ids, names, offsets = encoding.ids, encoding.tokens, encoding.offsets  # each access copies
        byte = byte_offsets(text)
        edges = np.full(len(ids) + 1, byte[-1])
        i = at = 0  # first token and first character of the stretch
        for j in [*(k for k, token in enumerate(ids) if token in self._added), len(ids)]:
            stop = offsets[j][0] if j < len(ids) else len(text)
            pieces = [token_bytes(t) for t in names[i:j]]
            stretch = edges_from_pieces(pieces, text[at:stop], self._normalize)
            if stretch is None:
                return None
            edges[i:j] = np.where(stretch < 0, -1, stretch + byte[at])[:-1]
            if j < len(ids):
                edges[j], at, i = byte[stop], offsets[j][1], j + 1
        return edges


@cache
def _byte_alphabet() -> dict[str, int]:
    """Printable stand-ins of the 256 bytes in byte-level vocabularies (GPT-2): printable bytes stand for
    themselves, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


@cache
def token_bytes(token: str) -> bytes | None:
    """Bytes of a byte-level token; None if it is not written in the byte alphabet."""
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[c] for c in token)
    except KeyError:
        return None


def edges_from_pieces(
    pieces: Sequence[bytes | None], text: str, normalize: Normalize | None
) -> np.ndarray | None:
    """[n + 1] edges of byte-level tokens in the original `text`, or None if their bytes are not the
    normalised text.

    Args:
        pieces: bytes of each token.
        normalize: the tokenizer's normalisation; None = none.
    """
    if any(p is None for p in pieces):
        return None
    seen, origin = _origins(text, normalize)
    if b"".join(p for p in pieces if p is not None) != seen:
        return None
    return origin[np.cumsum([0, *(len(p) for p in pieces if p is not None)])]


def _origins(text: str, normalize: Normalize | None) -> tuple[bytes, np.ndarray]:
    """The normalised text in bytes, and for each of its offsets the offset in the original, -1 = none."""
    normal = normalize(text) if normalize else text
    if normal == text:
        raw = text.encode()
        return raw, np.arange(len(raw) + 1)
    clusters = _clusters(text)
    images = [normalize(c) for c in clusters] if normalize else clusters
    if "".join(images) != normal:  # normalisation reaches across the cut: only the ends are known
        clusters, images = [text], [normal]
    origin = np.full(len(normal.encode()) + 1, -1, dtype=np.int64)
    a = b = 0
    origin[0] = 0
    for cluster, image in zip(clusters, images):
        n, m = len(cluster.encode()), len(image.encode())
        if image == cluster:
            origin[b : b + m] = np.arange(a, a + m)
        a, b = a + n, b + m
        origin[b] = a
    return normal.encode(), origin


def _clusters(text: str) -> list[str]:
    """Cut before every character that normalisation never joins to what precedes it."""
    starts = [i for i, c in enumerate(text) if i == 0 or c < "\x7f" or _stands_alone(c)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


@cache
def _stands_alone(char: str) -> bool:
    first = {unicodedata.normalize(form, char)[0] for form in ("NFD", "NFKD")}
    return not any(unicodedata.combining(c) or c in _second_halves() for c in first)


@cache
def _second_halves() -> frozenset[str]:
    """Characters that can compose with the one before: second halves of canonical pairs, Hangul vowels and
    finals."""
    pairs = (unicodedata.decomposition(chr(i)).split() for i in range(0x110000))
    seconds = {chr(int(p[1], 16)) for p in pairs if len(p) == 2 and not p[0].startswith("<")}
    return frozenset(seconds | {chr(i) for i in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))})


def byte_offsets(text: str) -> np.ndarray:
    """[len(text) + 1] int64: byte offset of every character, and of the end."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(width)]).astype(np.int64)


def edges_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n + 1] edges from character offsets, for tokenizers whose tokens are not bytes.

    Tokens that share a character have no known edge between them. Characters in no token (trimmed spaces)
    belong to the token after them, the last ones to the last token.
    """
    at = byte_offsets(text)
    edges = np.zeros(len(offsets) + 1, dtype=np.int64)
    reach = 0
    for i, (start, end) in enumerate(offsets):
        shared = i > 0 and start < reach
        edges[i] = -1 if shared else at[reach]
        reach = max(reach, end)
    edges[-1] = at[-1]
    edges[0] = 0
    return edges


def name_of(tokenizer: Any) -> str:
    """The folder or id a tokenizer came from, for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or "(unnamed)")


def template_hash(template: str) -> str:
    """sha256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def infer_kind(student_tokenizer: Any, teacher_tokenizer: Any) -> Kind:
    """`shared` iff the ordinary vocabularies agree: equal tokens under every id that both have, added ones
    apart."""
    return "shared" if _disagreement(student_tokenizer, teacher_tokenizer) is None else "cross"


def check_shared(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise UsageError unless the two tokenizers share their ordinary vocabulary."""
    at = (
        None
        if student_tokenizer is teacher_tokenizer
        else _disagreement(student_tokenizer, teacher_tokenizer)
    )
    if at is not None:
        raise UsageError(
            f"kind shared needs one vocabulary, but token {at} is another in the student's tokenizer "
            f"{name_of(student_tokenizer)} than in the teacher's {name_of(teacher_tokenizer)}: use kind cross"
        )


def shared_vocab_size(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """Leading ids that mean the same in both tokenizers: up to the first that differs, is missing, or is a
    mask token of either side (never a true token).

    The paper's scripts set 151646 for Qwen by hand; whoever wants that number gives it instead of this one.
    """
    student, teacher = _by_id(student_tokenizer), _by_id(teacher_tokenizer)
    masks = {getattr(t, "mask_token_id", None) for t in (student_tokenizer, teacher_tokenizer)}
    size = 0
    while size in student and size not in masks and student[size] == teacher.get(size):
        size += 1
    return size


def _by_id(tokenizer: Any, *, added: bool = True) -> dict[int, str]:
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=added)
    return {i: token for token, i in vocabulary.items()}


def _disagreement(student_tokenizer: Any, teacher_tokenizer: Any) -> int | None:
    """First ordinary id under which the two have different tokens; None = they agree on all they both
    have."""
    student, teacher = (_by_id(t, added=False) for t in (student_tokenizer, teacher_tokenizer))
    return next((i for i in sorted(student.keys() & teacher.keys()) if student[i] != teacher[i]), None)
