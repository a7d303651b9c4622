"""Corpora: where conversations come from. Rows are streamed; an unusable row is skipped and counted, never
silent.

A row is one of: `messages` (list of role and content), `instruction` (with optional `input`) and `output`,
`prompt` and `completion`, or `text` (one plain text, rendered without a chat template). A string field
`group` keeps rows of one origin on one side of the held-out split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from precompute.builtin import LICENCE, STDLIB, stdlib_fingerprint, stdlib_functions
from precompute.sample import Conversation, Message
from precompute.templates import RAW_ROLE
from shards.errors import CorpusError

FIELDS = ("messages", "instruction", "input", "output", "prompt", "completion", "text", "group")
SHAPES = "messages | instruction + output | prompt + completion | text"
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")


class Corpus(Protocol):
    spec: str
    licence: str | None
    skipped: Counter[str]
    """Rows skipped by the latest iteration, by reason."""
    first_skipped: dict[str, str]
    """Where each reason was met first."""

    @property
    def fingerprint(self) -> str:
        """Names the content, whatever the limit."""

    def __iter__(self) -> Iterator[Conversation]: ...


class RawRow(NamedTuple):
    """A row as its file has it."""

    source: str
    number: int
    """Counts from 0 in its source."""
    where: str
    """File and line, for messages."""
    value: Any
    """A dict of fields, or the `BadRow` that reading it gave."""


class BadRow(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


class RowCorpus:
    """Conversations from rows.

    Iterating raises CorpusError when a file breaks in the middle, or when not one row was usable.
    """

    def __init__(
        self,
        spec: str,
        rows: Callable[[], Iterable[RawRow]],
        fingerprint: Callable[[], str],
        *,
        licence: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.spec = spec
        self.licence = licence
        self.limit = limit
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str] = {}
        self._rows = rows
        self._fingerprint = fingerprint

    @cached_property
    def fingerprint(self) -> str:
        return self._fingerprint()

    def __iter__(self) -> Iterator[Conversation]:
        self.skipped.clear()
        self.first_skipped.clear()
        taken = 0
        for row in self._rows():
            if self.limit is not None and taken >= self.limit:
                return
            try:
                if isinstance(row.value, BadRow):
                    raise row.value
                messages = messages_of(row.value)
            except BadRow as bad:
                reason = str(bad)
                self.skipped[reason] += 1
                self.first_skipped.setdefault(reason, row.where)
                continue
            taken += 1
            group = row.value.get("group")
            yield Conversation(messages, row.source, row.number, group if isinstance(group, str) else None)
        if not taken and self.limit != 0:
            if not self.skipped:
                raise CorpusError(f"{self.spec}: no rows in it; expected rows with {SHAPES}")
            reason, where = next(iter(self.first_skipped.items()))
            raise CorpusError(
                f"{where}: {reason}; none of {self.skipped.total()} rows is usable: expected fields {SHAPES}"
            )


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
    fields = " ".join(", ".join(sorted(map(str, row))).split())[:200]
    raise BadRow(f"found fields {fields or '(none)'}")


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
        spec: `builtin:stdlib`, a file (.jsonl, .jsonl.zst, .parquet), a folder of such files, or a `datasets`
            id.
        limit: conversations at most; not part of the fingerprint.

    Raises:
        CorpusError: no such file, folder, built-in corpus or data set.
    """
    if spec == STDLIB:
        return RowCorpus(spec, _stdlib_rows, stdlib_fingerprint, licence=LICENCE, limit=limit)
    if spec.startswith("builtin:"):
        raise CorpusError(f"{spec}: no such built-in corpus; there is {STDLIB}")
    path = Path(spec).expanduser()
    if path.is_file():
        if not spec.endswith(SUFFIXES):
            raise CorpusError(f"{spec}: unknown kind of file, expected {', '.join(SUFFIXES)}")
        return _local(spec, [path], path.parent, limit)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if files:
            return _local(spec, files, path, limit)
        if not any(p.is_file() for p in path.rglob("*")):
            raise CorpusError(f"{spec}: no files in this folder, expected {', '.join(SUFFIXES)}")
    elif spec.endswith(SUFFIXES) or spec.startswith(("/", ".", "~")) or not spec:
        raise CorpusError(f"{spec or '(empty name)'}: no such file or folder")
    return _from_datasets(spec, limit)


def _stdlib_rows() -> Iterator[RawRow]:
    for i, f in enumerate(stdlib_functions()):
        yield RawRow(STDLIB, i, f.where, {"prompt": f.stub, "completion": f.body, "group": f.group})


def _local(spec: str, files: list[Path], root: Path, limit: int | None) -> Corpus:
    names = [p.relative_to(root).as_posix() for p in files]

    def rows() -> Iterator[RawRow]:
        for path, name in zip(files, names):
            read = _parquet_rows if name.endswith(".parquet") else _jsonl_rows
            for index, line, value in read(path):
                yield RawRow(name, index, f"{path}:{line}", value)

    def fingerprint() -> str:
        total = hashlib.sha256()
        for path, name in zip(files, names):
            with path.open("rb") as f:
                total.update(f"{name}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    return RowCorpus(spec, rows, fingerprint, limit=limit)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(index, line, row); both count every line, so that editing one row does not rename the others."""
    try:
        with path.open("rb") as raw:
            lines = _unzipped_lines(raw) if path.name.endswith(".zst") else raw
            for index, line in enumerate(lines):
                if not line.strip():
                    continue
                value: Any
                try:
                    value = json.loads(line)
                except UnicodeDecodeError:
                    value = BadRow("not UTF-8")
                except (ValueError, RecursionError):
                    value = BadRow("not JSON")
                yield index, f"{index + 1}", value
    except (OSError, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{path}: cannot be read ({_one_line(error)}); the file is damaged or cut off"
        ) from error


def _unzipped_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd file of one or more frames. The library's own stream reader ends quietly in a cut-off
    file."""
    rest, frame = b"", None
    for block in iter(lambda: raw.read(1 << 16), b""):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(block)).split(b"\n")
            yield from lines
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise zstandard.ZstdError("it ends inside a frame")
    yield rest


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [n for n in names if n in FIELDS] or names
            index = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for value in batch.to_pylist():
                    yield index, f"row {index + 1}", value
                    index += 1
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{path}: cannot be read ({_one_line(error)}); the file is damaged or cut off"
        ) from error


def _from_datasets(spec: str, limit: int | None) -> Corpus:
    """A data set that the `datasets` library loads by name, or from a folder in any of its formats; split
    `train`."""
    import datasets  # seconds to import, and local files do without

    try:
        builder = datasets.load_dataset_builder(spec)
        stream = datasets.load_dataset(spec, split="train", streaming=True)
    except Exception as error:  # the library raises a dozen kinds, network ones included
        raise CorpusError(
            f"{spec}: neither a file or folder here nor a data set that can be loaded ({_one_line(error)})"
        ) from error

    def rows() -> Iterator[RawRow]:
        numbered = enumerate(stream)
        while True:
            try:
                index, value = next(numbered)
            except StopIteration:
                return
            except Exception as error:
                raise CorpusError(f"{spec}: cannot be read further ({_one_line(error)})") from error
            yield RawRow(spec, index, f"{spec}: row {index + 1}", dict(value))

    def fingerprint() -> str:
        named = f"{spec}\0{builder.config.name}\0{builder.hash}"
        return hashlib.sha256(named.encode()).hexdigest()

    return RowCorpus(spec, rows, fingerprint, licence=builder.info.license or None, limit=limit)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
