"""`tide eval`: held-out likelihood of a student, with intervals, and against another result."""

from __future__ import annotations

import itertools
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.atomic import write_atomic
from shards.errors import UsageError
from tools.console import Output, Progress
from tools.options import Config, Json, numbers, opt, saved_options
from tools.tables import Column, Table, interval


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, opt("Student: model folder or hub id.", "DIR|ID")],
    data: Annotated[str, opt("Logit dataset made with --holdout above 0.", "DIR|URL")],
    out: Annotated[Path | None, opt("Write the result here, options beside it (.yaml).", "FILE.json")] = None,
    against: Annotated[
        Path | None, opt("An earlier result: print the paired difference.", "FILE.json")
    ] = None,
    grid: Annotated[str, opt("Timesteps (shares of masked tokens).", "T,T,...")] = "0.1,0.3,0.5,0.7,0.9",
    limit: Annotated[int | None, opt("At most N held-out samples (default: all).", "N")] = None,
    seed: Annotated[int, opt("Decides the masks and the bootstrap.", "S")] = 0,
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Held-out NLL by timestep, and its mean: a bound on the likelihood in bits per byte (lower is better).

    Masks are drawn afresh from --seed, equal for every student: results over the same data compare in pairs.
    """
    times = numbers(grid, "grid")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    if out is not None:
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder; name a file, such as {out / 'eval.json'}")
        out.parent.mkdir(parents=True, exist_ok=True)
    other = None if against is None else _read(against)

    import torch

    from shards.reader import LogitDataset
    from student import evaluate as likelihood
    from student.model import load_student
    from student.trainer import check_student

    before = None if other is None else likelihood.EvalResult.from_json(other)
    dataset = LogitDataset(data)
    student, tokenizer = load_student(model)
    check_student(dataset.manifest, student, tokenizer, model)
    total = min(dataset.count("heldout"), limit or dataset.count("heldout"))
    with Progress() as progress:
        report = progress.line("evaluating", "samples")
        result = likelihood.evaluate(
            student.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            itertools.islice(dataset.samples("heldout"), total),
            mask_token_id=dataset.manifest.student.mask_token_id,
            block_size=dataset.manifest.block_size,
            grid=times,
            seed=seed,
            progress=lambda done: report(done, total),
        )
    value, low, high = likelihood.bootstrap(result, seed=seed)
    summary: dict[str, Any] = {
        "command": "eval",
        "model": model,
        "data": data,
        "samples": len(result.sample_ids),
        "bits_per_byte": value,
        "interval": [low, high],
        "by_t": {f"{t:g}": bits for t, bits in result.by_t.items()},
    }
    output = Output(as_json=json)
    columns = (Column(label="t", digits=2), Column(label="bits per byte"))
    output.report(Table(title="Held-out NLL", columns=columns, rows=tuple(result.by_t.items())))
    output.say(f"bits per byte {interval(value, low, high)} over {len(result.sample_ids)} samples (95 %)")
    if before is not None:
        difference = likelihood.paired_bootstrap(result, before, seed=seed)
        summary |= {"against": against, "difference": difference[0], "difference_interval": difference[1:]}
        output.say(f"difference to {against}: {interval(*difference)} (95 %, paired; negative is better)")
    if out is not None:
        with saved_options(ctx, out.with_suffix(".yaml")):
            write_atomic(out, jsonlib.dumps({**summary, **result.to_json()}).encode())
    output.result(summary)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = jsonlib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UsageError(f"--against {path}: {reason}; pass a file that tide eval --out wrote") from e
    if not isinstance(value, dict):
        raise UsageError(f"--against {path}: not a result; pass a file that tide eval --out wrote")
    return value
