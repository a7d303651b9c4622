"""`tide precompute`: corpus + teacher -> logit dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shards.errors import UsageError
from tools.console import Output, Progress, doing
from tools.options import Config, Json, numbers, opt, saved_options

if TYPE_CHECKING:
    from shards.codec import Codec

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
    out: Annotated[Path, opt("Folder of the logit dataset; an unfinished one is resumed or joined.", "DIR")],
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
        bool | None,
        opt("Ask for each half of the masked tokens, the other shown (default: yes; ar: no).", None, NOISE),
    ] = None,
    demo_ratio: Annotated[float, opt("Expected share of the first half.", "SHARE", NOISE)] = 0.5,
    kind: Annotated[
        str, opt("Tokenizer pipeline; auto compares the two.", "auto|shared|cross", TARGETS)
    ] = "auto",
    codec: Annotated[
        str, opt("How distributions are stored (below; kind shared).", "sparse|exact|dense", TARGETS)
    ] = "sparse",
    head_entries: Annotated[int, opt("Sparse: most tokens kept per position.", "K", TARGETS)] = 64,
    tail_bound: Annotated[
        float, opt("Sparse: keep fewer once only this mass is left.", "MASS", TARGETS)
    ] = 1e-3,
    temperatures: Annotated[str, opt("Sparse: temperatures training may use.", "T,T", TARGETS)] = "1,2",
    sketch: Annotated[
        int, opt("Sparse: coefficients of the tail's shape per position (0: none).", "R", TARGETS)
    ] = 0,
    sketch_step: Annotated[float, opt("Sparse: their step.", "D", TARGETS)] = 0.4,
    sketch_mix: Annotated[
        float, opt("Sparse: weight of the student's shape where the sketch is silent.", "B", TARGETS)
    ] = 0.6,
    sketch_from: Annotated[
        str | None, opt("Sparse: take the basis of this file or dataset.", "FILE|DATASET", TARGETS)
    ] = None,
    fidelity: Annotated[
        int | None,
        opt("Score N samples densely too; measures go into the manifest (default: none).", "N", TARGETS),
    ] = None,
    shared_vocab_size: Annotated[
        int | None, opt("First N ids are compared (default: those that agree).", "N", TARGETS)
    ] = None,
    teacher_kind: Annotated[
        str, opt("How it is asked; ar: autoregressive, clean left context.", "auto|diffusion|ar", TARGETS)
    ] = "auto",
    teacher_attention: Attention = None,
    part: Annotated[
        str, opt("Only parts I, I + N, ... (runs on one --out share the parts without).", "I/N", WORK)
    ] = "0/1",
    processes: Annotated[
        int | None,
        opt("Processes that run the model; on cuda each takes the next GPU (default: 1).", "N", WORK),
    ] = None,
    gpus: Annotated[str | None, opt("The same, one per GPU.", "N|all", WORK)] = None,
    engine: Annotated[
        str, opt("Where they run: here, or as actors of a Ray cluster.", "local|ray", WORK)
    ] = "local",
    ray_address: Annotated[
        str | None, opt("The cluster's head (default: RAY_ADDRESS, else this machine's).", "HOST:PORT", WORK)
    ] = None,
    verify_parts: Annotated[
        bool, opt("Hash the parts on disk, make damaged ones again (default: sizes).", None, WORK)
    ] = False,
    workers: Annotated[
        int | None,
        opt("Processes beside the model (default: 0 on cpu, else 2).", "N", WORK),
    ] = None,
    samples_per_part: Annotated[int, opt("Corpus rows per part; a stop loses one part.", "N", WORK)] = 256,
    row_tokens: Annotated[
        int | None, opt("Packed teacher row (default: by device and length).", "TOKENS", WORK)
    ] = None,
    dtype: Annotated[str, opt("The teacher's number format.", "float32|bfloat16", WORK)] = "float32",
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME", WORK)] = None,
    backend: Annotated[
        str, opt("What runs the teacher; vllm needs the extra tide[vllm].", "transformers|vllm", WORK)
    ] = "transformers",
    tensor_parallel: Annotated[int, opt("vllm: devices that share the teacher.", "N", WORK)] = 1,
    cache_gb: Annotated[
        float | None, opt("vllm: for keys and values on each device (default: enough).", "GB", WORK)
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    r"""Run a teacher over masked samples and write what it says as a logit dataset.

    Codec sparse keeps each position's most probable tokens and the mass of the rest; a sketch adds its shape.
    exact keeps the last hidden state and, once, the LM head: teacher weights, under the teacher's licence.

    An autoregressive teacher (a qwen2, qwen3 or llama checkpoint without a mask token, or --teacher-kind ar)
    reads the clean text once per sample and answers for all views.

    Stopped at any moment, the same command goes on where it was. Run by several processes or machines on one
    --out, it shares the parts among them; each ends when all parts are done. With --gpus, --processes or
    --engine ray this one command hands the parts to workers and writes what they make; workers may die, on
    Ray also come later, and the dataset is the same.

    A SPEC may join several corpora with +, each \[WEIGHT*]NAME\[:CONFIG]\[#SPLIT]\[\[FIELD:VALUE,...]], as in
    2*allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk:all+OpenCoder-LLM/opc-sft-stage1\[lang:python].
    Weights are rates: shares of the first N rows, whatever N. A row passes a filter if its FIELD has the
    VALUE, or one of several (lang:python|c); lang of rows without such a field looks for VALUE in the answer.
    """
    with doing("loading libraries"):
        from precompute.busy import Busy
        from precompute.config import PrecomputeConfig
        from precompute.corpus_size import told_total
        from precompute.crew import Spread
        from precompute.launch import launch
        from shards.verify import OPTIONS

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
        codec=codec_of(
            codec,
            head_entries=head_entries,
            tail_bound=tail_bound,
            temperatures=temperatures,
            sketch=sketch,
            sketch_step=sketch_step,
            sketch_mix=sketch_mix,
        ),
        sketch_from=sketch_from,
        fidelity=fidelity,
        shared_vocab_size=shared_vocab_size,
        teacher_kind=teacher_kind,  # type: ignore[arg-type]
        teacher_attention=teacher_attention,  # type: ignore[arg-type]
        part=part,
        verify_parts=verify_parts,
        workers=workers,
        samples_per_part=samples_per_part,
        row_tokens=row_tokens,
        dtype=dtype,
        device=device,
        backend=backend,  # type: ignore[arg-type]
        tensor_parallel=tensor_parallel,
        cache_gb=cache_gb,
    )
    how = Spread(
        engine=engine,  # type: ignore[arg-type]
        processes=processes,
        gpus=gpu_count(gpus),
        ray_address=ray_address,
    )
    busy = Busy()
    with saved_options(ctx, out / OPTIONS) as saved, Progress() as progress:
        report = told_total(progress.line("precompute", "corpus rows"), corpus)
        manifest = launch(settings, how, saved(report), busy=busy)
    output, totals = Output(as_json=json), manifest.totals
    samples = ", ".join(f"{n:,} {split}" for split, n in totals["samples"].items())
    size = f"{totals['rows']:,} rows of {samples} samples, {totals['bytes'] / 1e6:,.1f} MB"
    teacher_is = "autoregressive" if manifest.teacher.get("kind") == "ar" else "diffusion"
    output.say(f"{out}: {size}, kind {manifest.kind}, {teacher_is} teacher")
    for f in manifest.settings.files:
        licence = f.licence or "not stated by the teacher's folder"
        output.say(f"{out / f.file}: {f.what}, {f.bytes:,} bytes, licence: {licence}")
    if manifest.fidelity is not None:
        output.say(fidelity_line(manifest.fidelity))
    for line in losses(manifest.report):
        output.say(line)
    if (share := above_half(manifest.report)) is not None:
        output.say(
            f"{share:.0%} of the active chunks have a tempered teacher probability (T = 2) above one half; "
            "reverse-calm pushes the student away from the text of the others"
        )
    if busy.share is not None:
        output.say(f"the model was busy for {busy.share:.1%} of {busy.working_s:,.1f} s")
    output.result(
        {
            "command": "precompute",
            "out": out,
            "kind": manifest.kind,
            "identity": manifest.identity,
            "totals": totals,
            "report": manifest.report,
            "fidelity": manifest.fidelity,
            "busy": busy.share,
        }
    )


def codec_of(
    name: str,
    *,
    head_entries: int,
    tail_bound: float,
    temperatures: str,
    sketch: int,
    sketch_step: float = 0.4,
    sketch_mix: float = 0.6,
) -> Codec:
    """The codec that the options describe.

    Raises:
        UsageError: no such codec, or settings that it cannot have.
    """
    from shards.codec import DenseCodec, ExactCodec, SparseCodec

    codecs: dict[str, Codec] = {
        "sparse": SparseCodec(
            cap=head_entries,
            tail_bound=tail_bound,
            temperatures=numbers(temperatures, "temperatures"),
            sketch=sketch,
            sketch_wide=sketch,
            sketch_step=sketch_step,
            sketch_mix=sketch_mix,
        ),
        "exact": ExactCodec(),
        "dense": DenseCodec(),
    }
    if name not in codecs:
        raise UsageError(f"codec must be one of {', '.join(codecs)}, got {name!r}")
    return codecs[name]


def fidelity_line(measured: dict[str, Any]) -> str:
    """The record of `--fidelity` in a line."""
    cosines = ", ".join(f"{name} {value:.3f}" for name, value in measured["gradient_cosine"].items() if value)
    size = measured["bytes_per_masked_position"]["all"]
    kl = f", KL from the dense teacher {measured['kl_mean']:.4f} nats" if "kl_mean" in measured else ""
    return (
        f"fidelity at {measured['positions']:,} positions: {size:.1f} bytes each{kl}; cosine of gradients at "
        f"T {measured['temperature']:g}: {cosines}"
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


def gpu_count(text: str | None) -> int | Literal["all"] | None:
    """`--gpus`.

    Raises:
        UsageError: neither a number nor `all`.
    """
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise UsageError(f"--gpus must be a number or all, got {text!r}")
    return int(text)
