"""`tide eval`: held-out likelihood of a student, or its scores on tasks of lm-evaluation-harness."""

from __future__ import annotations

import itertools
import json as jsonlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.atomic import write_atomic
from shards.errors import UsageError
from tools.console import Output, Progress, Report, doing
from tools.options import Config, Json, numbers, opt, saved_options
from tools.tables import Column, Table, interval

LIKELIHOOD, TASKS = "Held-out likelihood (--data)", "Tasks (--suite, --tasks)"


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, opt("Student: model folder or hub id.", "DIR|ID")],
    data: Annotated[str | None, opt("Logit dataset made with --holdout above 0.", "DIR|URL")] = None,
    out: Annotated[Path | None, opt("Write the result here, options beside it (.yaml).", "FILE.json")] = None,
    against: Annotated[
        Path | None, opt("An earlier result: print the paired difference.", "FILE.json", LIKELIHOOD)
    ] = None,
    grid: Annotated[
        str, opt("Timesteps (shares of masked tokens).", "T,T,...", LIKELIHOOD)
    ] = "0.1,0.3,0.5,0.7,0.9",
    suite: Annotated[
        str | None, opt("tide: the paper's eight tasks; humaneval: that alone.", "NAME", TASKS)
    ] = None,
    tasks: Annotated[
        str | None, opt("Tasks of the suite, or of lm-evaluation-harness.", "NAME,...", TASKS)
    ] = None,
    include_path: Annotated[Path | None, opt("Folder with task files of your own.", "DIR", TASKS)] = None,
    run_code: Annotated[
        bool, opt("Run the programs a student writes, in a sandbox, to score them.", panel=TASKS)
    ] = False,
    raw: Annotated[bool, opt("Plain prompts, without the chat template.", panel=TASKS)] = False,
    max_new_tokens: Annotated[
        int | None, opt("Tokens per answer, at most (default: the suite's, the task's).", "N", TASKS)
    ] = None,
    steps: Annotated[
        int | None, opt("Denoising passes for that many tokens (default: one each).", "N", TASKS)
    ] = None,
    threshold: Annotated[
        float | None, opt("Fill all tokens at least this probable (default: as --steps says).", "P", TASKS)
    ] = None,
    shots: Annotated[
        int | None, opt("Examples in the prompt (default: as the task has it).", "N", TASKS)
    ] = None,
    draws: Annotated[int, opt("Masks per likelihood (a bound, by their mean).", "N", TASKS)] = 32,
    block_size: Annotated[int | None, opt("Tokens per block (default: as trained).", "N", TASKS)] = None,
    batch: Annotated[int, opt("Prompts that run together.", "N", TASKS)] = 8,
    limit: Annotated[
        int | None, opt("At most N held-out samples, or documents of each task (default: all).", "N")
    ] = None,
    seed: Annotated[int, opt("Decides the masks and the bootstrap.", "S")] = 0,
    device: Annotated[str | None, opt("Torch device (default: cuda, else cpu).", "NAME")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Judge a student: on held-out text with --data, or on tasks with --suite or --tasks.

    Held-out: NLL by timestep, and its mean, a bound on the likelihood in bits per byte (lower is better).
    Masks are drawn afresh from --seed, equal for every student: results over the same data compare in pairs.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    if (data is None) == (suite is None and tasks is None):
        raise UsageError("give one of --data DIR|URL (held-out likelihood), and --suite or --tasks")
    if out is not None:
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder; name a file, such as {out / 'eval.json'}")
        out.parent.mkdir(parents=True, exist_ok=True)
    output = Output(as_json=json)
    if data is not None:
        summary: dict[str, Any] = {"command": "eval", "model": model, "data": data}
        summary |= held_out(output, model, data, numbers(grid, "grid"), limit, seed, device, against)
    else:
        sampling = {"steps": steps, "threshold": threshold, "block_size": block_size, "batch_size": batch}
        summary = {"command": "eval", "model": model, "suite": suite}
        summary |= on_tasks(
            output,
            {"pretrained": model, "device": device, "seed": seed, "draws": draws, **sampling},
            suite=suite,
            tasks=tasks,
            include_path=include_path,
            run=run_code,
            chat=not raw,
            changes={"new_tokens": max_new_tokens, "shots": shots},
            limit=limit,
        )
    samples = summary.pop("samples_jsonl", None)
    full = summary | summary.pop("result", {})
    if out is not None:
        with saved_options(ctx, out.with_suffix(".yaml")):
            write_atomic(out, jsonlib.dumps(full).encode())
            if samples is not None:
                write_atomic(out.with_suffix(".jsonl"), samples.encode())
    output.result(summary)


def held_out(
    output: Output,
    model: str,
    data: str,
    grid: tuple[float, ...],
    limit: int | None,
    seed: int,
    device: str | None,
    against: Path | None,
) -> dict[str, Any]:
    """Evaluate, print, and return the summary; `result` holds all of it."""
    other = None if against is None else read_result(against, "--against")
    with Progress() as progress:
        report = progress.line("evaluating", "samples")
        report(0, None, "loading")

        from student.evaluate import EvalResult, bootstrap, paired_bootstrap

        before = None if other is None else EvalResult.from_json(other)
        result = measure(model, data, grid=grid, limit=limit, seed=seed, device=device, report=report)
    value, low, high = bootstrap(result, seed=seed)
    summary: dict[str, Any] = {
        "samples": len(result.sample_ids),
        "bits_per_byte": value,
        "interval": [low, high],
        "by_t": {f"{t:g}": bits for t, bits in result.by_t.items()},
        "result": result.to_json(),
    }
    columns = (Column(label="t", digits=2), Column(label="bits per byte"))
    output.report(Table(title="Held-out NLL", columns=columns, rows=tuple(result.by_t.items())))
    output.say(f"bits per byte {interval(value, low, high)} over {len(result.sample_ids)} samples (95 %)")
    if before is not None:
        difference = paired_bootstrap(result, before, seed=seed)
        summary |= {"against": against, "difference": difference[0], "difference_interval": difference[1:]}
        output.say(f"difference to {against}: {interval(*difference)} (95 %, paired; negative is better)")
    return summary


def measure(
    model: str,
    data: str,
    *,
    grid: tuple[float, ...],
    limit: int | None,
    seed: int,
    device: str | None,
    report: Report,
) -> Any:
    """The `EvalResult` of a student on a dataset's held-out samples."""
    report(0, None, "loading the student")
    from shards.reader import LogitDataset
    from student import evaluate as likelihood
    from student.device import pick_device
    from student.model import load_student
    from student.trainer import check_student

    where = pick_device(device)
    dataset = LogitDataset(data)
    student, tokenizer = load_student(model)
    check_student(dataset.manifest, student, tokenizer, model)
    total = min(dataset.count("heldout"), limit or dataset.count("heldout"))
    return likelihood.evaluate(
        student.to(where),
        itertools.islice(dataset.samples("heldout"), total),
        mask_token_id=dataset.manifest.student.mask_token_id,
        block_size=dataset.manifest.block_size,
        grid=grid,
        seed=seed,
        progress=lambda done: report(done, total),
    )


def on_tasks(
    output: Output,
    student: dict[str, Any],
    *,
    suite: str | None,
    tasks: str | None,
    include_path: Path | None,
    run: bool,
    chat: bool,
    changes: dict[str, Any],
    limit: int | None,
) -> dict[str, Any]:
    """Run the tasks, print their table, and return the summary."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-evaluation-harness draws bars of its own
    from tools.evaluation import suite as suites
    from tools.evaluation.sandbox import Limits, isolation

    chosen = suites.choose(suite, tasks)
    for name, value in changes.items():
        if value is not None:
            if value < (name == "new_tokens"):
                raise UsageError(f"--{'max-new-tokens' if name == 'new_tokens' else name}: got {value}")
            chosen = tuple(replace(t, **{name: value}) for t in chosen)
    if not chat:
        chosen = tuple(replace(t, task=suites.PLAIN.get(t.task, t.task)) for t in chosen)
    with doing("looking for the tasks"):
        manager = suites.find_tasks(chosen, include_path)

        from tools.evaluation.code_tasks import running
        from tools.harness import TideLM

    limits = Limits() if run else None
    with Progress() as progress, running(limits):
        with progress.doing("loading the student"):
            lm = TideLM(
                **student, report=lambda title, done, total: progress(title, done, total, unit="requests")
            )
        results = []
        for result in suites.run_tasks(lm, chosen, manager, chat=chat, limit=limit):
            results.append(result)
            if len(chosen) > 1:  # hours may lie between two tasks
                score = "not scored" if result.value is None else f"{100 * result.value:.2f} %"
                output.say(f"{result.task.name}: {score} over {result.documents} documents")
    output.report(suites.results_table(results, Path(student["pretrained"]).name))
    notes = []
    if any(t.task in suites.CODE for t in chosen):
        notes.append(
            f"generated code ran in {isolation(limits)}"
            if limits
            else "generated code was not run, and not scored: --run-code allows it, in a sandbox"
        )
    if lm.cut:
        notes.append(f"{lm.cut} prompts were longer than the student's positions and lost their beginning")
    for note in notes:
        output.say(note)
    return {
        "tasks": [r.to_json() for r in results],
        "notes": notes,
        "samples_jsonl": "".join(
            jsonlib.dumps(a, default=str, ensure_ascii=False) + "\n" for r in results for a in r.answers
        ),
    }


def read_result(path: Path, what: str) -> dict[str, Any]:
    """A file that `tide eval --out` wrote.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        value = jsonlib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UsageError(f"{what} {path}: {reason}; pass a file that tide eval --out wrote") from e
    if not isinstance(value, dict):
        raise UsageError(f"{what} {path}: not a result; pass a file that tide eval --out wrote")
    return value
