"""What `tide plan all` says of stage two: the object of `--json`, and the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tools.planning.student import StudentPlan
from tools.tables import Column, Table


def student_json(plan: StudentPlan) -> dict[str, Any]:
    q, teacher = plan.question, plan.teacher
    return {
        "student": {
            "parameters": plan.shape.parameters,
            "step": {
                **asdict(plan.work),
                **asdict(plan.flops),
                "flops": plan.flops.total,
                "seconds": plan.step_s,
            },
            "rows_per_step": plan.rows_per_step,
            "epoch_steps": plan.epoch_steps,
            "epoch_tokens": plan.epoch_tokens,
            "epochs": q.epochs,
            "epochs_before_noise_repeats": teacher.settings.views,
            "steps": plan.steps,
            "gpu_hours": plan.gpu_hours,
            "settings": asdict(plan.chosen),
            "memory": {
                "peak_bytes": plan.needs.peak,
                "bytes": plan.needs.parts,
                "moments": plan.needs.moments,
            },
            "assumptions": {
                "device": q.device.name,
                "peak_tflops": q.device.tflops,
                "efficiency": q.efficiency,
                **asdict(plan.needs.assumptions),
            },
        },
        "offline": {
            "teacher_gpu_hours": teacher.engine_hours,
            "student_gpu_hours": plan.gpu_hours,
            "student_gpu_bytes": plan.needs.peak,
        },
        "online": {
            "teacher_gpu_hours_packed": plan.online_hours(packed=True),
            "teacher_gpu_hours_padded": plan.online_hours(packed=False),
            "student_gpu_hours": plan.gpu_hours,
            "student_gpu_bytes": plan.online_bytes,
        },
    }


def stage_two(plan: StudentPlan, name: str) -> Iterator[Table]:
    """The student's steps, and offline beside online."""
    yield step_table(plan, name)
    yield online_table(plan)


def step_table(plan: StudentPlan, name: str) -> Table:
    q, work, flops, chosen = plan.question, plan.work, plan.flops, plan.chosen
    views = plan.teacher.settings.views
    rows = [
        ("a step: tokens, padding of rows included", f"{work.tokens:,.0f}"),
        ("masked positions, through the head", f"{work.masked:,.0f}"),
        ("rows of the dataset", f"{plan.rows_per_step:,.1f}"),
        (
            "TFLOP: forward, backward, head",
            " + ".join(f"{x / 1e12:,.1f}" for x in (flops.forward, flops.backward, flops.head)),
        ),
        ("seconds, the optimiser's share", f"{plan.step_s:,.3f}, {plan.update_s:,.3f}"),
        ("peak memory", f"{plan.needs.peak / 1e9:,.1f} GB"),
        ("an epoch: steps", f"{plan.epoch_steps:,}"),
        ("packed tokens", f"{plan.epoch_tokens / 1e6:,.1f} M"),
        ("epochs before noise repeats", f"{views}"),
        (f"{q.epochs:g} epochs: steps", f"{plan.steps:,}"),
        (f"GPU-hours, {q.device.name}", f"{plan.gpu_hours:,.2f}"),
    ]
    picked = (
        f"gradient checkpointing {'on' if chosen.gradient_checkpointing else 'off'}, {chosen.optimizer}, "
    )
    picked += f"{chosen.accumulation} micro-batch{'' if chosen.accumulation == 1 else 'es'}"
    seen = plan.needs.assumptions
    return Table(
        title=f"{name}: {plan.shape.parameters / 1e6:,.1f} M parameters, {q.plan.batch_tokens:,} tokens a "
        f"step, {q.plan.world} x {q.device.name}",
        columns=(Column(label="", align="left"), Column(label="")),
        rows=tuple(rows),
        note=f"to fit {q.vram or q.device.gib:g} GiB: {picked}\nassumed: {q.device.tflops:g} TFLOP/s at "
        f"peak, --student-efficiency {q.efficiency:g} of it, --epochs {q.epochs:g}; counted on the sample: "
        f"{seen.masked_share:.2f} masked positions a token, longest row {seen.row_tokens:,}",
    )


def online_table(plan: StudentPlan) -> Table:
    q, t = plan.question, plan.teacher
    packed, padded = (plan.online_hours(packed=p) for p in (True, False))

    def row(label: str, teacher: float, memory: float) -> tuple[str | float, ...]:
        return label, teacher, plan.gpu_hours, teacher + plan.gpu_hours, memory / 1e9

    views = q.epochs * plan.samples
    return Table(
        title="Offline, and the teacher asked anew at every step instead",
        columns=(
            Column(label="", align="left"),
            Column(label="teacher GPU-hours", digits=2),
            Column(label="student GPU-hours", digits=2),
            Column(label="in all", digits=2),
            Column(label="GB on a student GPU", digits=1),
        ),
        rows=(
            row(f"offline: {t.views:,} views once", t.engine_hours, plan.needs.peak),
            row(f"online, packed: {views:,.0f} views, one at a time", packed, plan.online_bytes),
            row("online, padded as the reference", padded, plan.online_bytes),
        ),
        note=f"online: on {q.device.name}, at the same efficiency as stage one; memory: the student's, the "
        "teacher's weights, its activations for a micro-batch (packed; padded it is more)",
    )
