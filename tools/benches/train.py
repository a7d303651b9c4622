"""`tide bench train`: a student's step from a logit dataset against the steps it replaces, in one run.

`train_sides` has the sides. Rows, student, optimiser and noise are the same; weights are random, since
cost does not depend on them. Our CE must equal the padded form's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Json, opt
from tools.tables import Column, Table

if TYPE_CHECKING:
    from tools.benches.train_rows import Setting, Shape

FIELDS = ("vocab", "hidden", "mlp", "layers", "heads", "kv_heads", "head_dim", "tied")
PAIRS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "tiny": ((32000, 256, 512, 8, 4, 2, 64, True), (32000, 1024, 3072, 11, 16, 8, 64, True)),
    "0.6b": ((151936, 1024, 3072, 28, 16, 8, 128, True), (151936, 4096, 12288, 36, 32, 8, 128, False)),
}
"""Student and teacher, Qwen3's structure. The teacher has 13 times the student's parameters, embeddings
included (the padded step runs tied ones at every position, as its head). `0.6b`: Qwen3-0.6B and Qwen3-8B."""
SIDES = ("online", "sft", "fair", "ours")
RATIOS = {"ratio_online": "online", "ratio_sft": "sft", "ratio_sft_fair": "fair"}


def bench_train(
    size: Annotated[str, opt(f"Student and its teacher: {', '.join(PAIRS)}.", "NAME")] = "tiny",
    rows: Annotated[int, opt("Rows of the dataset; `online` takes a step of them per run.", "N")] = 32,
    batch: Annotated[int, opt("Rows per optimiser step.", "N")] = 8,
    online: Annotated[
        bool, opt("Run the step with a teacher too (0.6b: 16 GB for its weights on CUDA, 33 elsewhere).")
    ] = True,
    loss_memory: Annotated[
        bool,
        opt("Measure the loss's memory too, fused and plain: some 10 GB, a few minutes on a CPU."),
    ] = False,
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    repeats: Annotated[int, opt("Timed runs of each side.", "N")] = 3,
    out: Annotated[Path | None, opt("Write the record here.", "FILE.json")] = None,
    json: Json = False,
) -> None:
    """Step time, tokens run, peak memory and data wait of a student's step, against the reference's."""
    from student.device import pick_device
    from tools.benches import common
    from tools.benches.loss_memory import compare_losses
    from tools.benches.train_rows import Setting, Shape

    if size not in PAIRS:
        raise UsageError(f"--size must be one of {', '.join(PAIRS)}, got {size!r}")
    if rows < 1 or batch < 1 or repeats < 1:
        raise UsageError(f"--rows, --batch and --repeats must be at least 1, got {rows}, {batch}, {repeats}")
    setting = Setting(rows=rows, batch=batch, device=pick_device(device).type)
    student, teacher = (Shape(**dict(zip(FIELDS, values, strict=True))) for values in PAIRS[size])
    with Progress() as progress:
        measured = measure(
            setting, student, teacher if online else None, repeats=repeats,
            progress=progress.line("training steps", "runs"),
        )  # fmt: skip
        if loss_memory:
            line = progress.line("memory of the loss", "runs")
            measured |= compare_losses(setting.device, progress=line)
    record = common.report(
        "train",
        sizes={"size": size, **asdict(setting), **measured.pop("sizes")},
        sides=measured.pop("sides"),
        ratios={k: measured.pop(k) for k in list(measured) if k.startswith("ratio")},
        **measured,
    )
    if out is not None:
        common.save(record, out)
    output = Output(as_json=json)
    output.report(table(record))
    output.say(f"CE, packed against padded: relative difference {record['equal']['relative']:.1e}")
    output.result(record)


def measure(
    setting: Setting,
    student: Shape,
    teacher: Shape | None,
    *,
    repeats: int = 3,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """The sides' figures, ratios per row of the same rounds, and CE both ways.

    `cpu_s` and the ratios of it count this process's own seconds, which others on the machine disturb less.
    A side's first run, for its memory, is its warm-up too.
    """
    import torch

    from tools.benches import common
    from tools.benches.train_rows import make_model, make_rows, write_rows
    from tools.benches.train_sides import Sides

    rounds = repeats * (len(SIDES) - (teacher is None))
    progress(0, rounds, "making models and rows")
    model = make_model(student, setting.device)
    narrow = torch.bfloat16 if setting.device == "cuda" else torch.float32
    large = None if teacher is None else make_model(teacher, setting.device, dtype=narrow).eval()
    made = make_rows(setting, student.vocab)
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_rows(made, setting, student.vocab, Path(folder))
        sides = Sides(model, large, made, dataset, setting)
        progress(0, rounds, "comparing losses, measuring memory")
        equal = sides.equality()
        names = [name for name in SIDES if name != "online" or large is not None]
        peaks = {name: common.peak_memory(partial(sides.largest, name)) for name in reversed(names)}

        def run(name: str) -> Callable[[], None]:
            def call() -> None:
                start = time.process_time()
                getattr(sides, name)()
                cpu.setdefault(name, []).append(time.process_time() - start)

            return call

        timings = common.compare({n: run(n) for n in names}, repeats=repeats, warmup=0, progress=progress)
    in_cpu = {name: common.Timing(tuple(seconds)) for name, seconds in cpu.items()}
    steps, per_pass = -(-setting.rows // setting.batch), sides.tokens()
    runs = {name: 1 if name == "online" else steps for name in names}  # optimiser steps of a run
    waited = [w / s for w, s in zip(sides.wait_s, timings["ours"].seconds, strict=True)]
    figures = {
        name: {
            **timing.to_json(),
            "cpu_s": in_cpu[name].median,
            "steps": runs[name],
            "step_s": timing.median / runs[name],
            "tokens_per_step": per_pass[name] / steps,
            "peak_bytes": peaks[name],
            "data_wait": median(waited) if name == "ours" else None,
        }
        for name, timing in timings.items()
    }

    def against(clock: dict[str, common.Timing], name: str) -> float:
        return common.ratio(clock, name, "ours") * steps / runs[name]

    present = {key: name for key, name in RATIOS.items() if name in names}
    lengths = [len(row.input_ids) for row in made]
    return {
        "sizes": {
            "student_parameters": sum(p.numel() for p in model.parameters()),
            "teacher_parameters": large and sum(p.numel() for p in large.parameters()),
            "mean_length": sum(lengths) / len(lengths),
            "masked": sum(int(row.masked.sum()) for row in made),
        },
        "sides": figures,
        **{key: against(timings, name) for key, name in present.items()},
        **{f"{key}_cpu": against(in_cpu, name) for key, name in present.items()},
        "equal": equal,
    }


def table(record: dict[str, Any]) -> Table:
    """A line per side."""
    by_side = {name: key for key, name in RATIOS.items()}
    lines = [
        (
            name,
            side["step_s"],
            side["cpu_s"] / side["steps"],
            side["tokens_per_step"],
            side["peak_bytes"] / 2**20,
            side["data_wait"],
            record.get(by_side.get(name, "")),
            record.get(f"{by_side.get(name, '')}_cpu"),
        )
        for name, side in record["sides"].items()
    ]
    columns = (
        Column(label="side", align="left"),
        Column(label="s/step", digits=2),
        Column(label="CPU s/step", digits=2),
        Column(label="tokens/step", digits=0),
        Column(label="peak MiB", digits=0),
        Column(label="data wait", digits=4),
        Column(label="time / ours", digits=2),
        Column(label="own CPU time", digits=2),
    )
    title = f"A step of {record['sizes']['batch']} rows, {record['sizes']['size']} student"
    note = ""
    if "loss_memory_ratio" in record:
        note = f"The plain loss peaks at {record['loss_memory_ratio']:.1f} times the fused one's memory."
    return Table(title=title, columns=columns, rows=tuple(lines), note=note)
