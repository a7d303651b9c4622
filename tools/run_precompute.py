"""`tide precompute`: corpus + teacher -> logit dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Config, Json, numbers, opt, saved_options

TEXT, NOISE, TARGETS, WORK = "Text", "Noise", "Teacher and targets", "Work"
Attention = Annotated[
    str | None,
    opt(
        "How the teacher attends (default: its family's way).",
        "staircase|staircase-causal|bidirectional|block-causal|causal",
        TARGETS,
    ),
]


def precompute(
    ctx: typer.Context,
    teacher: Annotated[str, opt("Teacher: model folder or hub id.", "DIR|ID")],
    student: Annotated[str, opt("Student: its tokenizer and chat template make the samples.", "DIR|ID")],
    corpus: Annotated[
        str, opt("JSONL or Parquet path, `datasets` id, builtin:stdlib, or a mixture (below).", "SPEC")
    ],
    out: Annotated[Path, opt("Folder of the logit dataset; an unfinished one is resumed.", "DIR")],
    limit: Annotated[int | None, opt("Read only the first N corpus rows (default: all).", "N", TEXT)] = None,
    holdout: Annotated[
        float, opt("Share of samples kept out of training, for tide eval.", "SHARE", TEXT)
    ] = 0.0,
    max_dropped: Annotated[
        float, opt("Stop above this share of unaligned target tokens.", "SHARE", TEXT)
    ] = 0.02,
    loss_on: Annotated[
        str, opt("Tokens that are masked and carry loss.", "last|assistant|all", TEXT)
    ] = "last",
    content_search: Annotated[
        str, opt("How contents are found; first: the reference's mistake, for parity.", "exact|first", TEXT)
    ] = "exact",
    student_max_length: Annotated[int, opt("Longest student sample.", "TOKENS", TEXT)] = 512,
    teacher_max_length: Annotated[
        int | None, opt("Longest teacher sample (default: 768 shared, 1024 cross).", "TOKENS", TEXT)
    ] = None,
    views: Annotated[int, opt("Noisings per sample.", "R", NOISE)] = 4,
    seed: Annotated[int, opt("Decides timesteps, masks, halves and hold-out.", "S", NOISE)] = 0,
    timesteps: Annotated[str, opt("Timesteps of a sample's views.", "stratified|iid", NOISE)] = "stratified",
    block_size: Annotated[int, opt("Tokens per block.", "TOKENS", NOISE)] = 32,
    compdemo: Annotated[
        bool, opt("Ask for each half of the masked tokens, the other shown.", None, NOISE)
    ] = True,
    demo_ratio: Annotated[float, opt("Expected share of the first half.", "SHARE", NOISE)] = 0.5,
    kind: Annotated[
        str, opt("Tokenizer pipeline; auto compares the two.", "auto|shared|cross", TARGETS)
    ] = "auto",
    codec: Annotated[
        str, opt("How distributions are stored (kind shared).", "sparse|dense", TARGETS)
    ] = "sparse",
    head_entries: Annotated[int, opt("Sparse: most tokens kept per position.", "K", TARGETS)] = 64,
    tail_bound: Annotated[
        float, opt("Sparse: keep fewer once only this mass is left.", "MASS", TARGETS)
    ] = 1e-3,
    temperatures: Annotated[str, opt("Sparse: temperatures training may use.", "T,T", TARGETS)] = "1,2",
    shared_vocab_size: Annotated[
        int | None, opt("First N ids are compared (default: those that agree).", "N", TARGETS)
    ] = None,
    teacher_attention: Attention = None,
    part: Annotated[
        str, opt("Only parts I, I + N, ...; runs into one --out take turns.", "I/N", WORK)
    ] = "0/1",
    samples_per_part: Annotated[int, opt("Corpus rows per part; a stop loses one part.", "N", WORK)] = 256,
    row_tokens: Annotated[
        int | None, opt("Packed teacher row (default: by device and length).", "TOKENS", WORK)
    ] = None,
    dtype: Annotated[str, opt("The teacher's number format.", "float32|bfloat16", WORK)] = "float32",
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME", WORK)] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    r"""Run a teacher over masked samples and write what it says as a logit dataset.

    Stopped at any moment, the same command goes on where it was.

    A SPEC may join several corpora with +, each \[WEIGHT*]NAME\[:CONFIG]\[#SPLIT]\[\[FIELD:VALUE,...]], as in
    2*allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk:all+OpenCoder-LLM/opc-sft-stage1\[lang:python].
    Weights are rates: shares of the first N rows, whatever N. A row passes a filter if its FIELD has the
    VALUE, or one of several (lang:python|c); lang of rows without such a field looks for VALUE in the answer.
    """
    from precompute.config import PrecomputeConfig
    from precompute.runner import precompute as run
    from shards.codec import DenseCodec, SparseCodec

    if codec not in ("sparse", "dense"):
        raise UsageError(f"codec must be one of sparse, dense, got {codec!r}")
    sparse = SparseCodec(
        cap=head_entries, tail_bound=tail_bound, temperatures=numbers(temperatures, "temperatures")
    )
    settings = PrecomputeConfig(
        teacher=teacher,
        student=student,
        corpus=corpus,
        out=out,
        limit=limit,
        holdout=holdout,
        max_dropped=max_dropped,
        loss_on=loss_on,  # type: ignore[arg-type]
        content_search=content_search,  # type: ignore[arg-type]
        max_length=student_max_length,
        max_teacher_length=teacher_max_length,
        views=views,
        seed=seed,
        timesteps=timesteps,  # type: ignore[arg-type]
        block_size=block_size,
        compdemo=compdemo,
        demo_ratio=demo_ratio,
        kind=kind,  # type: ignore[arg-type]
        codec=sparse if codec == "sparse" else DenseCodec(),
        shared_vocab_size=shared_vocab_size,
        teacher_attention=teacher_attention,  # type: ignore[arg-type]
        part=part,
        samples_per_part=samples_per_part,
        row_tokens=row_tokens,
        dtype=dtype,
        device=device,
    )
    with saved_options(ctx, out / "tide-precompute.yaml") as saved, Progress() as progress:
        manifest = run(settings, saved(progress.line("precompute", "corpus rows")))
    output, totals = Output(as_json=json), manifest.totals
    samples = ", ".join(f"{n:,} {split}" for split, n in totals["samples"].items())
    size = f"{totals['rows']:,} rows of {samples} samples, {totals['bytes'] / 1e6:,.1f} MB"
    output.say(f"{out}: {size}, kind {manifest.kind}")
    for line in losses(manifest.report):
        output.say(line)
    if (share := above_half(manifest.report)) is not None:
        output.say(
            f"{share:.0%} of the active chunks have a tempered teacher probability (T = 2) above one half; "
            "reverse-calm pushes the student away from the text of the others"
        )
    output.result(
        {
            "command": "precompute",
            "out": out,
            "kind": manifest.kind,
            "identity": manifest.identity,
            "totals": totals,
            "report": manifest.report,
        }
    )


def losses(report: dict[str, Any]) -> list[str]:
    """What was lost on the way from corpus to targets, a line for rows and one for tokens, by reason."""

    def reasons(counts: dict[str, int], places: dict[str, list[str]]) -> str:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        return "; ".join(
            f"{n:,} {reason}" + (f" (first at {places[reason][0]})" if places.get(reason) else "")
            for reason, n in ordered
        )

    lines = []
    if dropped := report["dropped"]:
        rows = f"{sum(dropped.values()):,} of {report['corpus_rows']:,} corpus rows give no sample"
        lines.append(f"{rows}: {reasons(dropped, report.get('skipped_at', {}))}")
    if unaligned := report["unaligned_tokens"]:
        lost, tokens = sum(unaligned.values()), report["content_tokens"]
        share = f"{lost:,} of {tokens:,} target tokens ({lost / tokens:.2%}) have no teacher counterpart"
        lines.append(f"{share}: {reasons(unaligned, {})}")
    if notes := report.get("notes"):
        lines.append(f"remarks on samples: {reasons(notes, {})}")
    return lines


def above_half(report: dict[str, Any]) -> float | None:
    """Share of active chunks whose tempered (T = 2) teacher probability exceeds 1/2; None without chunks."""
    chunks = report.get("active_chunks", 0)
    return report["chunks_above_half"] / chunks if chunks else None
