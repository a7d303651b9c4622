"""What a dataset was made with: the configuration in its manifest, checked and typed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from shards.codec import Codec, codec_from_json, table_limit, table_of
from shards.errors import ManifestError
from shards.invariants import ID_LIMIT
from shards.noise import NoiseConfig
from shards.untrusted import build

NoiseSource = Literal["philox", "explicit"]


def identity_of(config: dict[str, Any]) -> str:
    """sha256 (hex) of the configuration as canonical JSON: equal for datasets that may grow together."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentInfo:
    """What a student must agree with to train on the dataset."""

    tokenizer_hash: str
    vocab_size: int
    """Ids of the tokenizer, added tokens included; every input id is below it."""
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    template_hash: str
    """Of the chat template the samples were rendered with."""
    max_length: int
    """Longest sample in tokens, before the last block is filled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file beside the shards, without which their targets cannot be used."""

    file: str
    """Name inside the dataset's folder."""
    bytes: int
    sha256: str
    what: str
    """In words, for the card."""
    licence: str | None = None
    """Of what it was derived from; None = not stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The typed part of a configuration; the rest (source, backend, ...) is provenance."""

    student: StudentInfo
    noise: NoiseConfig
    noise_source: NoiseSource
    codec: Codec
    block_size: int
    shared_vocab_size: int | None
    teacher: dict[str, Any]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plain:
    block_size: int
    teacher: dict[str, Any]
    shared_vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    source: NoiseSource


def settings_of(config: Any, where: str) -> Settings:
    """Raises: ManifestError for a missing or impossible setting, VersionError for an unknown codec."""
    plain = build(_Plain, config, f"{where}: config", ignore_unknown=True)
    student = build(StudentInfo, config.get("student"), f"{where}: config.student", ignore_unknown=True)
    source = build(_Source, config.get("noise"), f"{where}: config.noise", ignore_unknown=True)
    noise = {k: v for k, v in config["noise"].items() if k != "source"}
    limits = {
        "block_size": (plain.block_size, 1, 1 << 16),
        "student.vocab_size": (student.vocab_size, 1, ID_LIMIT),
        "student.max_length": (student.max_length, 1, 1 << 20),
        "student.mask_token_id": (student.mask_token_id, 0, student.vocab_size - 1),
        "shared_vocab_size": (plain.shared_vocab_size or student.vocab_size, 1, student.vocab_size),
        "noise.views": (noise.get("views", 1), 1, 1 << 16),
    }
    for name, (value, low, high) in limits.items():
        if isinstance(value, int) and not low <= value <= high:
            raise ManifestError(f"{where}: config.{name} must lie in {low}..{high}, got {value}")
    codec = codec_from_json(config.get("codec"))
    return Settings(
        student=student,
        noise=build(NoiseConfig, noise, f"{where}: config.noise"),
        noise_source=source.source,
        codec=codec,
        block_size=plain.block_size,
        shared_vocab_size=plain.shared_vocab_size,
        teacher=plain.teacher,
        files=_files(config, codec, plain.shared_vocab_size or student.vocab_size, where),
    )


def _files(config: dict[str, Any], codec: Codec, vocab_size: int, where: str) -> tuple[FileRecord, ...]:
    """The files beside the shards: what the codec needs, and nothing else."""
    given = config.get("files", [])
    if not isinstance(given, list):
        raise ManifestError(f"{where}: config.files must be a list; fetch the dataset again")
    files = tuple(build(FileRecord, f, f"{where}: config.files") for f in given)
    table = table_of(codec)
    if [(f.file, f.sha256) for f in files] != ([table] if table else []):
        needed = f"{table[0]} of sha256 {table[1][:12]}" if table else "none"
        raise ManifestError(
            f"{where}: config.files must name what codec {codec.name} needs ({needed}); fetch the dataset "
            "again"
        )
    for f in files:
        if not 0 < f.bytes <= (most := table_limit(codec, vocab_size)):
            raise ManifestError(
                f"{where}: config.files: {f.file} of {f.bytes} bytes, 1..{most} are possible; fetch the "
                "dataset again"
            )
    return files
