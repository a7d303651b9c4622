"""What `tide plan` says of stage one: the object of `--json`, and the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from precompute.cost import Cost
from shards.codec import SparseCodec
from shards.manifest import Manifest
from tools.planning.teacher import TeacherPlan
from tools.tables import Column, Table

COUNTED = {
    "tiles": "whole FlexAttention tiles of 128 x 128 that hold an allowed pair",
    "runs": "runs of tokens, as SDPA computes them on a CPU",
}
MEASURES = ("kl_mean", "temperature", "gradient_cosine")
"""Of a dataset's fidelity record, those that are shown."""


def link_hours(size: float, link: float | None) -> float | None:
    """Hours to send bytes over a network of `link` Mbit/s."""
    return None if link is None else size * 8 / (link * 1e6) / 3600


def to_json(plan: TeacherPlan, link: float | None) -> dict[str, Any]:
    """Counts of the whole corpus; `sample` says what they were counted on."""
    ready, size, memory = plan.ready, plan.size, plan.memory

    def side(cost: Cost, hours: float) -> dict[str, float]:
        whole = {name: plan.scaled(count) for name, count in asdict(cost).items()}
        per_view = {f"{name}_per_view": count / plan.views for name, count in whole.items()}
        return {**whole, **per_view, "gpu_hours": hours}

    n = len(ready.samples)
    return {
        "kind": plan.kind,
        "corpus_rows": plan.rows,
        "samples": plan.samples,
        "views": plan.views,
        "sample": {
            "samples": n,
            "per_corpus_row": plan.share,
            "dropped": dict(ready.dropped),
            "student_tokens": sum(len(s.student_ids) for s in ready.samples) / n,
            "teacher_tokens": sum(len(s.teacher_ids) for s in ready.samples) / n,
            "masked_per_view": size.masked / plan.views,
        },
        "teacher": {
            "parameters": plan.parameters,
            "active_parameters": plan.network.active,
            "attention": plan.opened.attention,
            "engine": side(plan.engine, plan.engine_hours),
            "naive": side(plan.naive, plan.naive_hours),
            "wall_hours": plan.engine_hours / plan.question.gpus,
            "row_tokens": plan.row_tokens,
            "rows_at_once": plan.at_once,
            "row_activation_bytes": plan.row_activations,
            "memory": {"peak_bytes": memory.peak, "fits": plan.fits, **asdict(memory)},
        },
        "shards": {
            "codec": plan.codec_name,
            "bytes": size.all,
            "shard_bytes": size.shards,
            "beside_bytes": size.beside,
            "bytes_per_view": size.per_view,
            "bytes_per_masked_position": size.per_masked,
            "link_hours": link_hours(size.all, link),
            "fidelity": fidelity(plan),
        },
        "assumptions": assumptions(plan),
    }


def fidelity(plan: TeacherPlan) -> dict[str, Any] | None:
    """How much of the teacher the dataset of `--like` keeps, as far as that was measured."""
    record = Manifest.load(plan.question.like).fidelity if plan.question.like else None
    return None if record is None else {name: record[name] for name in MEASURES if name in record}


def assumptions(plan: TeacherPlan) -> dict[str, Any]:
    """Everything that was not counted, by the option that changes it."""
    q = plan.question
    return {
        "device": q.device.name,
        "peak_tflops": q.device.tflops,
        "memory_gib": q.device.gib,
        "bandwidth_gbs": q.device.gb_per_s,
        "efficiency": q.efficiency,
        "dtype": plan.settings.dtype,
        "padded_to": plan.padded_to,
        "attention_pairs": plan.question.device.counting,
        **asdict(q.memory),
        **({} if plan.kept is None else {"kept": plan.kept}),
        **({} if q.like is None else {"like": q.like}),
        **({} if q.lengths is None else asdict(q.lengths)),
    }


def stage_one(plan: TeacherPlan, name: str, link: float | None) -> Iterator[Table]:
    """The teacher's pass, its memory, the shards; each says what it rests on."""
    yield work_table(plan, name)
    yield teacher_memory_table(plan)
    yield shard_table(plan, link)


def work_table(plan: TeacherPlan, name: str) -> Table:
    q, n = plan.question, len(plan.ready.samples)

    def row(label: str, cost: Cost, hours: float) -> tuple[str | float, ...]:
        tokens, read, flops = (
            plan.scaled(x) / plan.views for x in (cost.tokens, cost.head_positions, cost.flops)
        )
        return label, tokens, read, flops / 1e12, plan.scaled(cost.flops) / 1e18, hours

    ratio = [
        a / b for a, b in ((getattr(plan.naive, x), getattr(plan.engine, x)) for x in ("tokens", "flops"))
    ]
    active = plan.network.active / 1e9
    source = "invented lengths" if q.lengths else f"{n:,} samples of the corpus"
    return Table(
        title=f"{name}: {plan.parameters / 1e9:.2f} B parameters, {active:.2f} B that a token meets; "
        f"{plan.views:,} views of {plan.samples:,} samples, {plan.kind} tokenizer"
        f"{'' if plan.kind == 'shared' else 's'}",
        columns=(
            Column(label="layout", align="left"),
            Column(label="tokens a view", digits=0),
            Column(label="through the head", digits=0),
            Column(label="TFLOP a view", digits=3),
            Column(label="EFLOP in all", digits=3),
            Column(label=f"GPU-hours, {q.device.name}", digits=2),
        ),
        rows=(
            row("naive: padded, one pass a half, full head", plan.naive, plan.naive_hours),
            row("engine: packed", plan.engine, plan.engine_hours),
            ("naive / engine", f"{ratio[0]:.2f}", None, f"{ratio[1]:.2f}", None, None),
        ),
        note=f"counted on {source}, {plan.opened.attention} attention; pairs: {COUNTED[q.device.counting]} "
        f"(naive: all)\nassumed: {q.device.tflops:g} TFLOP/s at peak, --efficiency {q.efficiency:g} of it, "
        f"--padded-to {plan.padded_to}, --dtype {plan.settings.dtype}; on --gpus {q.gpus}: "
        f"{plan.engine_hours / q.gpus:.2f} h",
    )


def teacher_memory_table(plan: TeacherPlan) -> Table:
    memory, q = plan.memory, plan.question
    rows = [(label, size / 1e9) for label, size in memory.parts.items()]
    rows += [(f"in use in the {moment}", size / 1e9) for moment, size in memory.moments.items()]
    given = "" if plan.fits else "; it does not fit"
    return Table(
        title=f"Teacher's memory: {memory.peak / 1e9:.1f} GB of {q.device.gib * 2**30 / 1e9:.1f}{given}",
        columns=(Column(label="", align="left"), Column(label="GB", digits=2)),
        rows=tuple(rows),
        note=f"{plan.at_once} packed rows of {plan.row_tokens:,} tokens at once; weights and the activations "
        f"of one row: {(plan.weight_bytes + plan.row_activations) / 1e9:.2f} GB\n"
        f"assumed: --context-gb {q.memory.context_gb:g}, --chunk-copies {q.memory.chunk_copies:g}",
    )


def shard_table(plan: TeacherPlan, link: float | None) -> Table:
    size, codec = plan.size, plan.settings.codec
    rows = [
        ("a masked position", f"{size.per_masked:,.1f} B"),
        (f"a view ({size.masked / plan.views:,.0f} masked positions)", f"{size.per_view / 1e3:,.2f} kB"),
        ("beside the shards", f"{size.beside / 1e6:,.1f} MB"),
        ("in all", f"{size.all / 1e9:,.3f} GB"),
    ]
    if (hours := link_hours(size.all, link)) is not None:
        rows.append((f"to push or pull, at {link:g} Mbit/s", f"{hours:,.2f} h"))
    said = (
        f"as {plan.question.like} has" if plan.question.like else "invented targets, encoded and compressed"
    )
    if plan.kept is not None:
        said += f"\nassumed: --kept {plan.kept:.1f} entries a position"
        said += f" of {codec.cap}" if isinstance(codec, SparseCodec) else ""
        said += "; measure: tide precompute --limit 64, then --like"
    if (record := fidelity(plan)) and (cosines := record.get("gradient_cosine")):
        said += "\ncosine of gradients: " + ", ".join(f"{k} {v:.3f}" for k, v in cosines.items() if v)
    return Table(
        title=f"Shards, {'chunk log-probs' if plan.codec_name is None else f'codec {plan.codec_name}'}",
        columns=(Column(label="", align="left"), Column(label="size")),
        rows=tuple(rows),
        note=said,
    )
