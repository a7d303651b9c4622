"""The dataset card (README.md) that lies beside a manifest: made from it, for people and for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shards.codec import Codec, ExactCodec, SparseCodec
from shards.manifest import Manifest


def card(manifest: Manifest, name: str = "logit dataset") -> str:
    """Markdown with a YAML header. `name`: title, usually the folder's name."""
    m, source = manifest, manifest.config.get("source") or {}
    student, teacher = m.student, m.teacher
    licence = source.get("licence") if isinstance(source, dict) else None
    header = [
        "---",
        *([f"license: {json.dumps(licence)}"] if licence else []),
        "tags: [tide, knowledge-distillation, diffusion-language-model, logits]",
        "configs:",
        "- config_name: default",
        '  data_files: "part-*.arrow"',
        "---",
    ]
    samples = m.totals.get("samples", {})
    facts = {
        "kind": f"{m.kind} tokenizer",
        "samples": ", ".join(f"{n} {split}" for split, n in samples.items()) or "0",
        "views per sample": m.noise.views,
        "rows": m.totals["rows"],
        "shards": f"{len(m.shards)} ({m.totals['bytes'] / 1e6:.1f} MB)",
        "teacher": _named(teacher, "name", "revision", "architecture", "kind", "dtype", "attention"),
        "teacher weights": teacher.get("weights_hash"),
        "teacher tokenizer": teacher.get("tokenizer_hash"),
        "student tokenizer": student.tokenizer_hash,
        "student vocabulary": f"{student.vocab_size} ids, of which mask is {student.mask_token_id}",
        "shared vocabulary": m.shared_vocab_size,
        "longest sample": f"{student.max_length} student tokens, blocks of {m.block_size}",
        "corpus": _named(source, "spec", "fingerprint") if isinstance(source, dict) else source,
        "licence of the corpus": licence or "not stated",
        "noise": f"{m.noise_source}, seed {m.noise.seed}, {m.noise.timesteps} timesteps, by {m.noise.unit}",
        "CompDemo": f"halves of {m.noise.demo_ratio:g}" if m.noise.compdemo else "no",
        "targets": "log-probs of chunks" if m.kind == "cross" else codec_words(m.codec),
        **{
            f"file {f.file}": f"{f.what}, {f.bytes:,} bytes, licence: {f.licence or 'not stated'}"
            for f in m.settings.files
        },
        "format version": m.format_version,
        "identity": m.identity,
    }
    parts = [
        "\n".join(header),
        f"# {name}",
        "What a frozen teacher said about masked samples, kept so that a student can be distilled from it "
        "without the teacher: a tide logit dataset.",
        _table(facts, "what", "value"),
    ]
    for title, content in (("Counts", m.totals), ("Report", m.report), ("Fidelity", m.fidelity or {})):
        if rows := dict(_flat(content)):
            parts += [f"## {title}", _table(rows, "what", "value")]
    parts += ["## Use", _USE]
    return "\n\n".join(parts) + "\n"


_USE = """Train a student on it (no teacher needed):

    tide train --data THIS_FOLDER --student STUDENT --objective ce --out RUN

Read it without tide: every shard is an Arrow IPC file with plain list columns, one row per view of a sample.

    import datasets
    rows = datasets.load_dataset("arrow", data_files="THIS_FOLDER/part-*.arrow", split="train")
    row = rows[0]
    bytes_of_ids = zip(row["input_0"], row["input_1"], row["input_2"])
    input_ids = [a + 256 * b + 65536 * c for a, b, c in bytes_of_ids]

The column `split` says `train` or `heldout`. `manifest.json` holds the whole configuration and the sha256 of
every shard and record batch; tide checks a batch before it uses one of its rows."""


def codec_words(codec: Codec) -> str:
    """What a codec keeps, in words."""
    if isinstance(codec, ExactCodec):
        return (
            f"exact: the teacher's final hidden states, {codec.width} numbers of {codec.dtype} per position, "
            "and its head once, in a file of its own"
        )
    if not isinstance(codec, SparseCodec):
        return "dense: float32 log-probs of the whole shared vocabulary"
    temperatures = " and ".join(f"{t:g}" for t in codec.temperatures)
    sketch = f"; sketch = {codec.sketch} coefficients of the tail's shape" if codec.sketch else ""
    return (
        f"sparse: the head up to a dropped mass of {codec.tail_bound:g}, at most {codec.cap} entries, "
        f"log-prob = -code * {codec.step:g} nat, codes as differences; tail_i = log of the rest's mass at "
        f"temperature {temperatures}, code * {codec.tail_step:g} nat, -128 = nothing left{sketch}"
    )


def _named(values: dict[str, Any], *names: str) -> str:
    return ", ".join(str(values[n]) for n in names if values.get(n) is not None)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: dict[str, Any], *head: str) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, value in rows.items():
        text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
        lines.append(f"| {key} | {text} |".replace("\n", " "))
    return "\n".join(lines)
