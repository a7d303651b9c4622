"""From done tasks to one small JSON file per question, which every table and plot is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precompute.prepare import sample_id_of
from shards.atomic import write_atomic
from studies.config import Arm
from studies.making import conversations, held_out
from studies.plan import Choice, Plan
from studies.tasks import RESULT, Task

RESULTS = "results"
"""Folder of the files, in a run's folder."""


def write_results(plan: Plan, question: str) -> Path:
    """`results/QUESTION.json`: every arm that is done for every seed, and the names of those that are not."""
    q, out = plan.study.questions[question], plan.out
    done, open_arms = [], []
    for arm in q.arms:
        choice, tasks = plan.arm(question, arm)
        results = [r for t in tasks if (r := t.result(out)) is not None]
        if not tasks or len(results) < len(tasks):
            open_arms.append(arm.name)
        else:
            done.append(_arm(plan, arm, choice, tasks, results))
    references = {
        name: {"validation": r["validation"], "test": r["test"]["bits_per_byte"], "by_t": r["test"]["by_t"]}
        for name, task in plan.references(question).items()
        if (r := task.result(out)) is not None
    }
    explained = []
    for why in q.why:
        task = plan.why(question, why)
        found = task.result(out) if task is not None else None
        if found is not None:
            explained.append({"data": why.data, "trained": why.after} | found)
    codecs = plan.codecs(question)
    corpus = plan.corpus().result(out)
    file = {
        "question": question,
        "title": q.title,
        "asks": q.asks,
        "baseline": q.baseline,
        "control": q.control,
        "contrasts": q.contrasts,
        "seeds": plan.study.seeds,
        "tuning_seeds": plan.study.tuning_seeds,
        "train": asdict(plan.study.train),
        "samples": asdict(plan.study.samples) | {"tokenizers": dict(plan.study.samples.tokenizers)},
        "corpus": asdict(plan.study.corpus) | (corpus or {}),
        "groups": test_groups(plan),
        "arms": done,
        "open": open_arms,
        "references": references,
        "why": explained,
        "codecs": codecs.result(out) if codecs is not None else None,
    }
    path = out / RESULTS / f"{question}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(file, separators=(",", ":")) + "\n").encode())
    return path


def test_groups(plan: Plan) -> list[int]:
    """[test samples] the number of each one's group; empty while there are no tokenizers."""
    if not plan.tokenizer().done(plan.out):
        return []
    s, corpus = plan.study.samples, plan.corpus().folder(plan.out)
    group_of = {sample_id_of(c): c.group or "" for c in conversations(corpus, "test", s.test)}
    rows = held_out(
        corpus,
        plan.tokenizer().folder(plan.out),
        "test",
        s.test,
        block_size=s.block_size,
        max_length=s.max_length,
    )
    found = [group_of[row.sample_id] for row in rows]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(found))}
    return [numbers[name] for name in found]


def _arm(
    plan: Plan, arm: Arm, choice: Choice, tasks: list[Task], results: list[dict[str, Any]]
) -> dict[str, Any]:
    data = [plan.data(arm.data, seed).result(plan.out) or {} for seed in range(plan.study.seeds)]
    teacher = [r["teacher_flops"] or d.get("teacher_flops", 0.0) for r, d in zip(results, data)]
    if arm.objective in ("ce", "ce-uniform"):
        teacher = [0.0]  # its masks alone are used
    n = len(results)
    return {
        "name": arm.name,
        "objective": arm.objective,
        "data": arm.data,
        "codec": plan.study.data[arm.data].codec,
        "bytes_per_position": data[0]["totals"]["bytes"] / data[0]["totals"]["masked"],
        "against": arm.against,
        "settings": choice.settings,
        "tried": choice.tried,
        "steps": tasks[0].spec["steps"],
        "validation": [r["validation"] for r in results],
        "centinats": [r["test"]["centinats"] for r in results],
        "bytes": results[0]["test"]["bytes"],
        "by_t": {t: sum(r["test"]["by_t"][t] for r in results) / n for t in results[0]["test"]["by_t"]},
        "student_flops": sum(r["student_flops"] for r in results) / n,
        "teacher_flops": sum(teacher) / len(teacher),
        "tokens": sum(r["tokens"] for r in results) / n,
        "cpu_seconds": sum(r["cpu_seconds"] for r in results) / n,
        "above_half": _mean([r["above_half"] for r in results]),
        "data_report": {k: v for k, v in data[0].get("report", {}).items() if isinstance(v, int | float)},
        "curve": _mean_curve([r["curve"] for r in results]),
        "lambda": results[0]["lambda"],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """[step, mean over seeds] at every step that they have."""
    return [[points[0][0], sum(p[1] for p in points) / len(points)] for points in zip(*curves)]


def progress_of(plan: Plan, question: str) -> tuple[int, int, int]:
    """Arms done, arms, open tasks that are known of."""
    arms = plan.study.questions[question].arms
    trained = [plan.arm(question, arm)[1] for arm in arms]
    done = sum(bool(tasks) and all(t.done(plan.out) for t in tasks) for tasks in trained)
    return done, len(arms), len(plan.open(question))


def spent(out: Path) -> tuple[int, float]:
    """Tasks done in a folder, whatever study they are of, and their CPU-hours."""
    results = [json.loads(f.read_text()) for f in (out / "tasks").glob(f"*/{RESULT}")]
    return len(results), sum(r["cpu_seconds"] for r in results) / 3600
