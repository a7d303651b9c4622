"""`tide bench precompute`: the packed engine against the layouts it replaces (`layouts`), in one run.

One teacher of random weights (cost does not depend on them), the same rows and noise, and the rows that the
sides make compared in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Json, numbers, opt
from tools.tables import Column, Table

if TYPE_CHECKING:
    import torch

    from precompute.teachers.base import TransformersTeacher
    from tools.benches.layouts import Sizes

CORPORA = ("sft", "stdlib")
WARM_UP = 4
"""Samples that warm up a side."""
HEAD_ROWS = 128
"""Rows of logits at once, as `tools.benches.layouts` has it."""


def bench_precompute(
    samples: Annotated[int, opt("Samples of the first corpus at the largest R.", "N")] = 64,
    samples_else: Annotated[int, opt("Samples of the other runs (0 = as --samples).", "N")] = 8,
    views: Annotated[str, opt("Views per sample; each number is a run of its own.", "R,R,...")] = "1,2,4",
    corpora: Annotated[
        str, opt("Lengths: sft (log-normal, as instruction data), stdlib (builtin:stdlib).", "NAME,...")
    ] = "sft,stdlib",
    layers: Annotated[int, opt("Decoder layers.", "N")] = 8,
    hidden: Annotated[int, opt("Hidden size.", "N")] = 512,
    intermediate: Annotated[int, opt("MLP width.", "N")] = 1536,
    heads: Annotated[int, opt("Attention heads.", "N")] = 8,
    kv_heads: Annotated[int, opt("Key and value heads.", "N")] = 4,
    head_dim: Annotated[int, opt("Size of a head.", "N")] = 64,
    vocab: Annotated[int, opt("Vocabulary.", "N")] = 32000,
    moe: Annotated[
        bool, opt("A LLaDA2 structure, asked bidirectionally; the others loop over its experts.")
    ] = False,
    experts: Annotated[int, opt("Experts (with --moe).", "N")] = 256,
    experts_active: Annotated[int, opt("Experts per token (with --moe).", "N")] = 8,
    expert_intermediate: Annotated[int, opt("Width of an expert (with --moe).", "N")] = 128,
    row_tokens: Annotated[int | None, opt("Packed row (default: as tide precompute).", "TOKENS")] = None,
    dtype: Annotated[str, opt("float32 or bfloat16.", "NAME")] = "float32",
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    repeats: Annotated[int, opt("Timed runs of each side.", "N")] = 1,
    workers: Annotated[
        int | None, opt("Processes beside the model, for its busy share (default: by device).", "N")
    ] = None,
    out: Annotated[Path | None, opt("Write the record here.", "FILE.json")] = None,
    json: Json = False,
) -> None:
    """Rows per second, tokens run, FLOPs and peak memory of the teacher's pass, against padded layouts."""
    import torch

    from precompute.config import DTYPES
    from tools.benches import common
    from tools.benches.layouts import Sizes, make_teacher

    names = [name for name in corpora.split(",") if name]
    for flag, values, known in (("corpora", names, CORPORA), ("dtype", [dtype], tuple(DTYPES))):
        for value in values:
            if value not in known:
                raise UsageError(f"--{flag} must be of {', '.join(known)}, got {value!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    runs = {}
    most = max(map(int, numbers(views, "views")))
    with Progress() as progress:
        for name in names:
            for r in map(int, numbers(views, "views")):
                headline = name == names[0] and r == most
                sizes = Sizes(
                    layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
                    head_dim=head_dim, vocab=vocab, experts=experts if moe else 0,
                    experts_active=experts_active, expert_intermediate=expert_intermediate,
                    samples=samples if headline else samples_else or samples, views=r,
                )  # fmt: skip
                title = f"{name}, R = {r}"
                line = progress.line(title, "runs")
                line(0, None, "making the teacher")
                teacher = make_teacher(sizes, device=where, dtype=DTYPES[dtype])
                runs[title] = measure(
                    sizes, name, teacher, dtype=DTYPES[dtype], row_tokens=row_tokens, repeats=repeats,
                    progress=line,
                )  # fmt: skip
                if headline:
                    main = runs[title]
                    first = sizes
        progress("busy share", 0, 1, unit="runs")
        busy = busy_share(first, teacher, workers)
    record = common.report(
        "precompute",
        sizes=asdict(first) | {"dtype": dtype, "corpora": names, "samples_else": samples_else or samples},
        sides=main["sides"],
        ratios={k: main[k] for k in main if k.startswith("ratio")},
        runs=runs,
        busy=busy,
    )
    if out is not None:
        common.save(record, out)
    output = Output(as_json=json)
    output.report(table(runs))
    output.say(f"tide precompute: the model was busy for {busy['share']:.1%} of {busy['loop_s']:.1f} s")
    output.result(record)


def measure(
    sizes: Sizes,
    corpus: str,
    teacher: TransformersTeacher,
    *,
    dtype: torch.dtype,
    row_tokens: int | None = None,
    repeats: int = 3,
    progress: Callable[..., None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """One corpus and number of views: the three sides' figures, ratios of the same rounds, and how far the
    rows they make are apart.

    `cpu_s` and the ratios of it count this process's own seconds, which others on the machine disturb less.
    `peak_bytes` are those of the first `WARM_UP` samples, which warm up each side too: what is held at once
    is a batch or a row, however many follow.
    """

    from tools.benches import common
    from tools.benches.layout_figures import cost, differences
    from tools.benches.layouts import CORPORA, make_work

    made = CORPORA[corpus](sizes)
    device = teacher.device
    work = make_work(sizes, made, teacher, row_tokens)
    few = make_work(sizes, made[:WARM_UP], teacher, row_tokens)
    calls = {
        "reference": lambda: work.padded(sizes.length),
        "fair": lambda: work.padded(None),
        "engine": work.engine,
    }
    costs = {
        "reference": cost(work, sizes.length),
        "fair": cost(work),
        "engine": cost(work, packed=True),
    }
    rows: dict[str, Any] = {}
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def run(name: str) -> None:
        start = time.process_time()
        rows[name] = calls[name]()
        cpu[name].append(time.process_time() - start)

    def measured(name: str) -> Callable[[], None]:
        return lambda: run(name)

    warm: dict[str, Callable[[], object]] = {
        "reference": lambda: few.padded(sizes.length),
        "fair": lambda: few.padded(None),
        "engine": few.engine,
    }
    progress(0, repeats * len(calls), "measuring memory")
    peaks = {name: common.peak_memory(call) for name, call in warm.items()}
    timings = common.compare({n: measured(n) for n in calls}, repeats=repeats, warmup=0, progress=progress)
    rate = matmul_rate(sizes.hidden, device=device, dtype=dtype)
    sides = {}
    for name, timing in timings.items():
        seconds = common.Timing(tuple(cpu[name])).median if device.type == "cpu" else timing.median
        sides[name] = {
            **timing.to_json(),
            "cpu_s": common.Timing(tuple(cpu[name])).median,
            "rows_per_s": len(rows[name]) / timing.median,
            "peak_bytes": peaks[name],
            **asdict(costs[name]),
            "matmul_share": costs[name].flops / seconds / rate,
        }
    in_cpu = {name: common.Timing(tuple(s)) for name, s in cpu.items()}
    lengths = [len(s.teacher_ids) for s in made]
    return {
        "samples": len(made),
        "mean_length": sum(lengths) / len(lengths),
        "row_tokens": work.asking.row_tokens,
        "matmul_flops_per_s": rate,
        "sides": sides,
        **{f"ratio_{n}": common.ratio(timings, n, "engine") for n in ("reference", "fair")},
        **{f"ratio_{n}_cpu": common.ratio(in_cpu, n, "engine") for n in ("reference", "fair")},
        **{f"ratio_{n}_tokens": costs[n].tokens / costs["engine"].tokens for n in ("reference", "fair")},
        "equal": {n: differences(rows["engine"], rows[n]) for n in ("reference", "fair")},
    }


def busy_share(sizes: Sizes, teacher: TransformersTeacher, workers: int | None = None) -> dict[str, Any]:
    """Share of its time that the model computes in `tide precompute`'s own loop, over `sizes.samples`
    functions of the standard library in four parts.

    Args:
        workers: processes beside the model; None = as `tide precompute` has it.
    """
    from precompute.busy import Busy
    from precompute.config import PrecomputeConfig
    from precompute.corpus import open_corpus
    from precompute.parts import cut
    from precompute.pipeline import WORKERS, Workers
    from precompute.runner import make_dataset
    from tools.benches.layouts import choose, stdlib_preparer

    choose(teacher, "engine")
    _, preparer = stdlib_preparer(sizes)
    count = WORKERS.get(teacher.device.type, WORKERS["cuda"]) if workers is None else workers
    busy, corpus = Busy(), open_corpus("builtin:stdlib", limit=sizes.samples)
    with TemporaryDirectory() as folder, Workers(count, preparer) as processes:
        config = PrecomputeConfig(
            teacher="random",
            student="random",
            corpus=corpus.spec,
            out=Path(folder) / "data",
            views=sizes.views,
            limit=sizes.samples,
            samples_per_part=max(1, sizes.samples // 4),
            device=teacher.device.type,
            head_rows=HEAD_ROWS,
            max_dropped=1.0,
        )
        processes.start(int)()
        ranges = cut(corpus, config.samples_per_part)
        make_dataset(config, corpus, ranges, preparer, teacher, processes, lambda *told: None, busy)
    return {
        "share": busy.share,
        "model_s": busy.model.seconds,
        "loop_s": busy.working_s,
        "workers": count,
        "samples": sizes.samples,
        "views": sizes.views,
    }


def matmul_rate(hidden: int, *, device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of plain products of [4096, hidden] and [hidden, 4 * hidden], the best of a few: what layers of
    this width could reach at most. On a CPU, of this process's own seconds."""
    import torch

    from tools.benches import common

    x = torch.randn(4096, hidden, device=device, dtype=dtype)
    w = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cpu":
            start = time.process_time()
            x @ w
            best = min(best, time.process_time() - start)
        else:
            best = min(best, common.timed(lambda: x @ w))
    return 2 * 4096 * hidden * 4 * hidden / best


def table(runs: dict[str, Any]) -> Table:
    """A line per corpus, number of views and side."""
    lines = []
    for title, run in runs.items():
        for name, side in run["sides"].items():
            against = {k: run.get(f"ratio_{name}{k}") for k in ("", "_cpu", "_tokens")}
            equal = run["equal"].get(name)
            lines.append(
                (
                    f"{title}: {name}",
                    side["rows_per_s"],
                    side["tokens"],
                    side["flops"] / 1e9,
                    side["peak_bytes"] / 2**20,
                    side["matmul_share"],
                    *against.values(),
                    equal and f"{max(v for k, v in equal.items() if k.startswith('max')):.1e}",
                )
            )
    columns = (
        Column(label="side", align="left"),
        Column(label="rows/s", digits=2),
        Column(label="tokens run"),
        Column(label="GFLOP", digits=0),
        Column(label="peak MiB", digits=0),
        Column(label="of matmul rate", digits=2),
        Column(label="time / engine", digits=2),
        Column(label="own CPU time", digits=2),
        Column(label="tokens", digits=2),
        Column(label="max error, nats"),
    )
    return Table(
        title="The teacher's pass, three layouts of the same rows", columns=columns, rows=tuple(lines)
    )
