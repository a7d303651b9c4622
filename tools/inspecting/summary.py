"""What a dataset holds, in a page of text: from its manifest, and from a sample of rows what it leaves open.

A manifest's hashes prove that it is whole, not that it is true: what it says beyond the checked settings may
be missing or of another type, and is shown as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.card import codec_words
from shards.manifest import Manifest
from shards.reader import LogitDataset
from tools.inspecting.sample import Sampled
from tools.inspecting.stats import BINS
from tools.inspecting.text import visible
from tools.tables import Column, Table, shown

BAR = 24
"""Characters of the longest bar of the histogram."""
WHAT_VALUE = (
    Column(label="what", align="left", wrap=True),
    Column(label="value", align="left", wrap=True),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """Tables for the terminal and the page, and the same for `--json`."""

    tables: tuple[Table, ...]
    timesteps: Table
    """Of the tables, the one that the page draws."""
    histogram: np.ndarray
    """[BINS] its counts."""
    json: dict[str, Any]


def summarise(dataset: LogitDataset, sampled: Sampled) -> Summary:
    """The summary of a dataset, with what its sampled rows say."""
    m = dataset.manifest
    t = np.array([row.t for row in sampled.rows])
    histogram = np.histogram(t, bins=BINS, range=(0, 1))[0]
    dropped, unaligned = (_counts(m.report.get(name)) for name in ("dropped", "unaligned_tokens"))
    gold = _gold(sampled)
    timesteps = _timesteps(histogram, sampled)
    tables = [
        _facts(dataset, sampled),
        timesteps,
        *([_halves(gold, m)] if gold else []),
        *([_dropped(dropped, unaligned, m)] if dropped or unaligned else []),
        *([_fidelity(m.fidelity)] if m.fidelity else []),
    ]
    return Summary(
        tuple(tables),
        timesteps,
        histogram,
        {
            "data": dataset.path,
            "revision": dataset.revision,
            "kind": m.kind,
            "identity": m.identity,
            "format_version": m.format_version,
            "teacher": m.teacher,
            "student": m.config["student"],
            "noise": m.config["noise"],
            "codec": m.config["codec"],
            "block_size": m.block_size,
            "shared_vocab_size": m.shared_vocab_size,
            "source": m.config.get("source"),
            "totals": m.totals,
            "bytes_per_masked_position": per_masked(m),
            "shards": len(m.shards),
            "dropped": dropped,
            "unaligned_tokens": unaligned,
            "fidelity": m.fidelity,
            "sampled_rows": len(sampled.rows),
            "sampled_bytes": sampled.bytes,
            "t_histogram": {"edges": np.linspace(0, 1, BINS + 1).round(3), "rows": histogram},
            "true_token": gold,
        },
    )


def per_masked(m: Manifest) -> float | None:
    """Compressed bytes of everything per masked position."""
    masked = _number(m.totals.get("masked"))
    return m.totals["bytes"] / masked if masked else None


def _facts(dataset: LogitDataset, sampled: Sampled) -> Table:
    m, student, teacher = dataset.manifest, dataset.manifest.student, dataset.manifest.teacher
    source = m.config.get("source")
    source = source if isinstance(source, dict) else {"spec": source}
    totals, noise = m.totals, m.noise
    samples = _counts(totals.get("samples"))
    masked, maskable = (_number(totals.get(n)) for n in ("masked", "maskable"))
    facts: list[tuple[str, Any]] = [
        ("teacher", _named(teacher, "name", "revision", "architecture", "kind")),
        ("teacher's attention", teacher.get("attention")),
        ("teacher's dtype", teacher.get("dtype")),
        ("teacher's weights", _hash(teacher.get("weights_hash"))),
        ("teacher's tokenizer", _tokenizer(teacher, _hash(teacher.get("tokenizer_hash")))),
        ("student's tokenizer", _tokenizer(m.config["student"], _hash(student.tokenizer_hash))),
        (
            "kind",
            f"{m.kind} tokenizer"
            + (f", shared vocabulary of {m.shared_vocab_size:,}" if m.shared_vocab_size else ""),
        ),
        ("samples", ", ".join(f"{n:,} {split}" for split, n in samples.items()) or None),
        (
            "views per sample",
            f"{noise.views}, {noise.timesteps} timesteps, {m.noise_source} noise, seed {noise.seed}",
        ),
        (
            "CompDemo",
            f"yes, by {noise.unit}, half A {noise.demo_ratio:.0%} of what is masked"
            if noise.compdemo
            else "no",
        ),
        ("rows", totals["rows"]),
        ("longest sample", f"{student.max_length} student tokens, blocks of {m.block_size}"),
        (
            "masked positions",
            None
            if masked is None
            else f"{masked:,}" + (f", {masked / maskable:.1%} of the maskable" if maskable else ""),
        ),
        ("distilled positions", totals.get("distilled")),
        ("chunks", _of(totals.get("active_chunks"), totals.get("chunks"), "active")),
        ("codec", "log-probs of chunks" if m.kind == "cross" else codec_words(m.codec)),
        ("size", f"{totals['bytes'] / 1e6:,.1f} MB, {len(m.shards):,} shard{'s' * (len(m.shards) != 1)}"),
        ("bytes per masked position", per_masked(m)),
        *(
            (f"file {f.file}", f"{f.what}, {f.bytes / 1e6:,.1f} MB, licence: {f.licence or 'not stated'}")
            for f in m.settings.files
        ),
        ("corpus", _named(source, "spec", "fingerprint")),
        ("licence of the corpus", source.get("licence") or "not stated"),
        ("identity", m.identity),
        ("revision", dataset.revision),
    ]
    rows = tuple((label, _text(value)) for label, value in facts if value not in (None, ""))
    return Table(title=dataset.path, columns=WHAT_VALUE, rows=rows, note=looked_at(sampled, m))


def looked_at(sampled: Sampled, m: Manifest) -> str:
    """How much of the dataset the numbers below come from."""
    if sampled.everything:
        return f"What follows is of all {m.totals['rows']:,} rows."
    return (
        f"What follows and is not in the manifest is of a sample: {len(sampled.rows):,} of "
        f"{m.totals['rows']:,} rows, spread over the shards ({sampled.bytes / 1e6:,.1f} MB read); --rows N "
        "takes more or fewer."
    )


def _timesteps(histogram: np.ndarray, sampled: Sampled) -> Table:
    most = max(1, int(histogram.max(initial=0)))
    rows = tuple(
        (f"{b / BINS:.1f} – {(b + 1) / BINS:.1f}", int(n), "█" * round(BAR * n / most))
        for b, n in enumerate(histogram.tolist())
    )
    columns = (Column(label="t", align="left"), Column(label="rows"), Column(label="", align="left"))
    return Table(title=f"Timesteps of {len(sampled.rows):,} rows", columns=columns, rows=rows)


def _gold(sampled: Sampled) -> dict[str, dict[str, float]]:
    """How probable the teacher finds what was masked, by half: means over positions or active chunks."""
    found: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for row in sampled.rows:
        if row.positions is not None:
            logp, half_a = row.positions.gold_logp, row.positions.half_a
        elif row.chunks is not None:
            logp, half_a = row.chunks.logp, row.chunks.half_a[row.chunks.active]
        else:
            continue
        known = np.isfinite(logp)
        found["a"].append(logp[known & half_a])
        found["b"].append(logp[known & ~half_a])
    out = {}
    for half, parts in found.items():
        logp = np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
        if len(logp):
            p = np.exp(logp)
            out[half] = {
                "n": len(p),
                "probability": p.mean(),
                "log_probability": logp.mean(),
                "above_half": (p > 0.5).mean(),
            }
    return out


def _halves(gold: dict[str, dict[str, float]], m: Manifest) -> Table:
    what = "active chunks" if m.kind == "cross" else "distilled positions"
    names = {"a": "half A", "b": "half B" if m.noise.compdemo else "no CompDemo"}
    return Table(
        title=f"The teacher's probability of the {'text of a chunk' if m.kind == 'cross' else 'true token'}",
        columns=(
            Column(label="", align="left"),
            Column(label=what),
            Column(label="mean probability", digits=3),
            Column(label="mean log-prob (nats)", digits=3),
            Column(label="share above ½", digits=3),
        ),
        rows=tuple(
            (
                names[half],
                int(g["n"]),
                float(g["probability"]),
                float(g["log_probability"]),
                float(g["above_half"]),
            )
            for half, g in gold.items()
        ),
    )


def _dropped(dropped: dict[str, int], unaligned: dict[str, int], m: Manifest) -> Table:
    rows: list[tuple[Any, ...]] = []
    for what, whole, counts in (
        ("corpus rows", _number(m.report.get("corpus_rows")), dropped),
        ("target tokens", _number(m.report.get("content_tokens")), unaligned),
    ):
        for reason, n in sorted(counts.items(), key=lambda item: -item[1]):
            rows.append((what, visible(reason), n, f"{n / whole:.2%}" if whole else None))
    return Table(
        title="Dropped",
        columns=(
            Column(label="what", align="left"),
            Column(label="reason", align="left"),
            Column(label="count"),
            Column(label="share"),
        ),
        rows=tuple(rows),
        note="Corpus rows gave no sample; target tokens have no counterpart on the teacher's side.",
    )


def _fidelity(measured: dict[str, Any]) -> Table:
    rows = tuple((visible(name.replace("_", " ")), _text(value)) for name, value in measured.items())
    return Table(
        title="Fidelity",
        columns=WHAT_VALUE,
        rows=rows,
        note="Measured against dense targets when the dataset was made (tide precompute --fidelity).",
    )


def _tokenizer(side: Any, hashed: str | None) -> str | None:
    """Its hash, and the special ids that are known of it."""
    ids = {n: _number(side.get(f"{n}_token_id")) for n in ("mask", "eos", "pad")}
    size = _number(side.get("vocab_size"))
    parts = [hashed or "hash not stated", f"{size:,} ids" if size else None]
    parts += [f"{name} {i}" for name, i in ids.items() if i is not None]
    return ", ".join(filter(None, parts))


def _of(part: Any, whole: Any, what: str) -> str | None:
    n, total = _number(part), _number(whole)
    return None if n is None or total is None else f"{total:,}, {n:,} {what}"


def _hash(value: Any) -> str | None:
    return value[:16] if isinstance(value, str) else None


def _named(values: dict[str, Any], *names: str) -> str:
    return ", ".join(str(values[n]) for n in names if values.get(n) is not None)


def _counts(values: Any) -> dict[str, int]:
    """Those entries of a mapping that are numbers."""
    given = values.items() if isinstance(values, dict) else ()
    return {str(k): int(n) for k, v in given if (n := _number(v)) is not None}


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{visible(str(name))} {_text(part)}" for name, part in value.items())
    return (
        shown(value, 4)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else visible(str(value))
    )
