"""Where rows come from: local files, the `datasets` library, the standard library. A source streams raw rows
and names its content; what a row means is `precompute.corpus`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from precompute.builtin import BUILTIN, LICENCE, stdlib_fingerprint, stdlib_functions
from shards.errors import CorpusError

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")


class BadRow(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


class RawRow(NamedTuple):
    """A row as its file has it."""

    source: str
    """File or data set, without the folder it lies in: the same wherever it is kept."""
    number: int
    """Counts from 0 in its source."""
    place: str
    """Its line, or `row N`, in the source; for messages."""
    value: Any
    """A dict of fields, or the `BadRow` that reading it gave."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that can be read again and again.

    Iterating `rows()` raises CorpusError where a file breaks in the middle.
    """

    name: str
    """Without the folders above it, which may differ between machines."""
    prefix: str
    """What stands before a row's source in a message: the folder."""
    rows: Callable[[], Iterable[RawRow]]
    fingerprint: Callable[[], str]
    """Names the content."""
    licence: str | None = None


def open_source(name: str, *, config: str | None, split: str | None, fields: Sequence[str]) -> Source:
    """Open a source; nothing is read yet but what names it.

    Args:
        name: one of `precompute.builtin`, a file (`SUFFIXES`), a folder of such files, or a `datasets` id or
            folder.
        config, split: of a data set; with either, a folder is read by `datasets` whatever is in it.
        fields: Parquet columns to read; where a file has none of them, all.

    Raises:
        CorpusError: no such file, folder, built-in corpus, data set, configuration or split.
    """
    path = Path(name).expanduser()
    chosen = config is not None or split is not None
    if chosen and (name.startswith("builtin:") or path.is_file()):
        raise CorpusError(f"{name}: has no configurations or splits; leave out :{config} or #{split}")
    if name in BUILTIN:
        return Source(name, "", partial(_stdlib_rows, name), partial(stdlib_fingerprint, name), LICENCE)
    if name.startswith("builtin:"):
        raise CorpusError(f"{name}: no such built-in corpus; there is {', '.join(BUILTIN)}")
    if path.is_file():
        if not name.endswith(SUFFIXES):
            raise CorpusError(f"{name}: unknown kind of file, expected {', '.join(SUFFIXES)}")
        return _local(path.name, [path], path.parent, fields)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if files and not chosen:
            return _local(path.name, files, path, fields)
        if not any(p.is_file() for p in path.rglob("*")):
            raise CorpusError(f"{name}: no files in this folder, expected {', '.join(SUFFIXES)}")
        return _from_datasets(str(path), path.name, config, split)
    if name.endswith(SUFFIXES) or name.startswith(("/", ".", "~")) or not name:
        raise CorpusError(f"{name or '(empty name)'}: no such file or folder")
    return _from_datasets(name, name, config, split)


def _stdlib_rows(name: str) -> Iterator[RawRow]:
    for i, f in enumerate(stdlib_functions(name)):
        yield RawRow(name, i, f.where, {"prompt": f.stub, "completion": f.body, "group": f.group})


def _local(name: str, files: list[Path], root: Path, fields: Sequence[str]) -> Source:
    names = [p.relative_to(root).as_posix() for p in files]

    def rows() -> Iterator[RawRow]:
        for path, source in zip(files, names):
            read = _parquet_rows(path, fields) if source.endswith(".parquet") else _jsonl_rows(path)
            for index, place, value in read:
                yield RawRow(source, index, place, value)

    def fingerprint() -> str:
        total = hashlib.sha256()
        for path, source in zip(files, names):
            with path.open("rb") as f:
                total.update(f"{source}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    return Source(name, "" if root == Path() else f"{root}/", rows, fingerprint)


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
        raise _damaged(path, error) from error


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


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [n for n in names if n in fields] or names
            index = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for value in batch.to_pylist():
                    yield index, f"row {index + 1}", value
                    index += 1
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path}: cannot be read ({_one_line(error)}); the file is damaged or cut off")


def _from_datasets(where: str, name: str, config: str | None, split: str | None) -> Source:
    """A data set that the `datasets` library loads by id, or from a folder in any of its formats.

    Without a `config`: the data set's default one, else one named `all`, else all of them, one after another.
    """
    import datasets  # seconds to import, and local files do without

    wanted = split or "train"
    try:
        configs = [config] if config is not None else _configs(datasets, where)
        builders = [datasets.load_dataset_builder(where, c) for c in configs]
        splits = [datasets.load_dataset(where, c, streaming=True) for c in configs]
    except Exception as error:  # the library raises a dozen kinds, network ones included
        raise CorpusError(
            f"{where}{f':{config}' if config else ''}: neither a file or folder here nor a data set that can "
            f"be loaded ({_one_line(error)})"
        ) from error
    for found in splits:
        if wanted not in found:
            raise CorpusError(f"{where}: no split {wanted!r}; choose one, as in {name}#{next(iter(found))}")
    suffix = "" if wanted == "train" else f"#{wanted}"
    sources = [f"{name}{'' if c == 'default' else f':{c}'}{suffix}" for c in configs]

    def rows() -> Iterator[RawRow]:
        for source, found in zip(sources, splits):
            numbered = enumerate(found[wanted])
            while True:
                try:
                    index, value = next(numbered)
                except StopIteration:
                    break
                except Exception as error:
                    raise CorpusError(f"{where}: cannot be read further ({_one_line(error)})") from error
                yield RawRow(source, index, f"row {index + 1}", dict(value))

    def fingerprint() -> str:
        named = "\0".join(f"{b.config.name}\0{b.hash}" for b in builders)
        return hashlib.sha256(f"{name}\0{wanted}\0{named}".encode()).hexdigest()

    licences = {b.info.license for b in builders if b.info.license}
    return Source(name, where.removesuffix(name), rows, fingerprint, ", ".join(sorted(licences)) or None)


def _configs(datasets: Any, where: str) -> list[str]:
    """Configurations to read where none is named."""
    names = datasets.get_dataset_config_names(where)
    default = datasets.get_dataset_default_config_name(where)
    if default is not None:
        return [default]
    return ["all"] if "all" in names else names


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
