"""`tide plan precompute` and `tide plan all`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tools.console import Output, Progress
from tools.options import Config, Json, opt
from tools.planning import options as o


def precompute(
    ctx: typer.Context,
    teacher: o.Teacher,
    student: o.Student,
    corpus: o.Corpus = None,
    sample: o.Sample = 256,
    rows: o.Rows = None,
    lengths: o.LengthsOption = None,
    limit: o.Limit = None,
    holdout: o.Holdout = 0.0,
    loss_on: o.LossOn = "last",
    student_max_length: o.StudentLength = 512,
    teacher_max_length: o.TeacherLength = None,
    views: o.Views = 4,
    compdemo: o.CompDemo = None,
    timesteps: o.Timesteps = "stratified",
    block_size: o.BlockSize = 32,
    seed: o.Seed = 0,
    kind: o.KindOption = "auto",
    codec: o.CodecOption = "sparse",
    head_entries: o.HeadEntries = 64,
    tail_bound: o.TailBound = 1e-3,
    temperatures: o.Temperatures = "1,2",
    sketch: o.Sketch = 0,
    shared_vocab_size: o.SharedVocab = None,
    teacher_kind: o.TeacherKind = "auto",
    teacher_attention: o.TeacherAttention = None,
    dtype: o.Dtype = "bfloat16",
    row_tokens: o.RowTokens = None,
    like: o.Like = None,
    device_name: o.DeviceName = "H100-SXM",
    peak_tflops: o.Peak = None,
    memory_gib: o.MemoryGib = None,
    bandwidth_gbs: o.Bandwidth = None,
    gpus: o.Gpus = 1,
    link: o.Link = None,
    efficiency: o.Efficiency = 0.4,
    kept: o.Kept = None,
    padded_to: o.PaddedTo = None,
    length_spread: o.LengthSpread = "0.8,0.7",
    teacher_share: o.TeacherShare = 1.0,
    chunk_share: o.ChunkShare = 0.8,
    context_gb: o.ContextGb = 0.6,
    chunk_copies: o.ChunkCopies = 2.5,
    config: Config = None,
    json: Json = False,
) -> None:
    """What `tide precompute` would cost: FLOPs, GPU-hours, memory, bytes; runs no model.

    A sample of the corpus is tokenised, aligned, noised and packed by the engine's own code, and what it
    would run is counted. Nothing is read of the models but configurations and tokenizers.
    """
    from tools.planning.report import stage_one, to_json
    from tools.planning.teacher import TeacherPlan

    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        question = o.question_of(ctx.params, Path(folder))
        plan = TeacherPlan(question, progress.line("plan", "rows"))
        found = {"command": "plan precompute", "teacher_name": teacher, **to_json(plan, link)}
        tables = list(stage_one(plan, teacher, link))
    output = Output(as_json=json)
    for table in tables:
        output.report(table)
    output.result(found)


def project(
    ctx: typer.Context,
    teacher: o.Teacher,
    student: o.Student,
    corpus: o.Corpus = None,
    sample: o.Sample = 256,
    rows: o.Rows = None,
    lengths: o.LengthsOption = None,
    limit: o.Limit = None,
    holdout: o.Holdout = 0.0,
    loss_on: o.LossOn = "last",
    student_max_length: o.StudentLength = 512,
    teacher_max_length: o.TeacherLength = None,
    views: o.Views = 4,
    compdemo: o.CompDemo = None,
    timesteps: o.Timesteps = "stratified",
    block_size: o.BlockSize = 32,
    seed: o.Seed = 0,
    kind: o.KindOption = "auto",
    codec: o.CodecOption = "sparse",
    head_entries: o.HeadEntries = 64,
    tail_bound: o.TailBound = 1e-3,
    temperatures: o.Temperatures = "1,2",
    sketch: o.Sketch = 0,
    shared_vocab_size: o.SharedVocab = None,
    teacher_kind: o.TeacherKind = "auto",
    teacher_attention: o.TeacherAttention = None,
    dtype: o.Dtype = "bfloat16",
    row_tokens: o.RowTokens = None,
    like: o.Like = None,
    device_name: o.DeviceName = "H100-SXM",
    peak_tflops: o.Peak = None,
    memory_gib: o.MemoryGib = None,
    bandwidth_gbs: o.Bandwidth = None,
    gpus: o.Gpus = 1,
    link: o.Link = None,
    epochs: Annotated[float, opt("Times over the training samples (paper: 10).", "E", o.STUDENT)] = 10.0,
    batch_tokens: Annotated[
        int, opt("Packed student tokens per step, over all its GPUs.", "TOKENS", o.STUDENT)
    ] = 8192,
    optimizer: Annotated[str, opt("transformers' name.", "NAME", o.STUDENT)] = "adamw_torch",
    student_device: Annotated[
        str | None, opt("Device the student is trained on (default: the teacher's).", "NAME", o.STUDENT)
    ] = None,
    student_gpus: Annotated[int, opt("Of them, each with the whole student.", "N", o.STUDENT)] = 1,
    vram: Annotated[
        float | None,
        opt("Settings are picked to fit a card of this size (default: its own).", "GIB", o.STUDENT),
    ] = None,
    student_efficiency: Annotated[
        float | None, opt("Share of its peak (default: --efficiency).", "SHARE", o.ASSUMED)
    ] = None,
    efficiency: o.Efficiency = 0.4,
    kept: o.Kept = None,
    padded_to: o.PaddedTo = None,
    length_spread: o.LengthSpread = "0.8,0.7",
    teacher_share: o.TeacherShare = 1.0,
    chunk_share: o.ChunkShare = 0.8,
    context_gb: o.ContextGb = 0.6,
    chunk_copies: o.ChunkCopies = 2.5,
    config: Config = None,
    json: Json = False,
) -> None:
    """A whole project: `plan precompute`, then the student's steps, memory and hours, and what training
    online, the teacher beside the student, would cost instead. Runs no model."""
    from precompute.trial import without_targets
    from tools.planning.report import stage_one, to_json
    from tools.planning.student import StudentPlan
    from tools.planning.student_report import stage_two, student_json
    from tools.planning.teacher import TeacherPlan

    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        line = progress.line("plan", "rows")
        first, second = o.question_of(ctx.params, Path(folder)), o.student_question_of(ctx.params)
        plan = TeacherPlan(first, line)
        line(0, None, "packing the student's batches")
        trained = StudentPlan(second, plan, without_targets(plan.ready))
        found = {
            "command": "plan all",
            "teacher_name": teacher,
            "student_name": student,
            **to_json(plan, link),
        }
        found |= student_json(trained)
        tables = [*stage_one(plan, teacher, link), *stage_two(trained, student)]
    output = Output(as_json=json)
    for table in tables:
        output.report(table)
    output.result(found)
