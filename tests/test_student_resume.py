"""Exact resume and exact sharing of work: runs in processes of their own, killed by SIGKILL or talking over
gloo, against one process left alone."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks, run_until_killed
from safetensors.torch import load_file
from small_runs import CONFIG, TIDAL, records, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from student.checkpoint import checkpoints, load_state
from student.config import TrainConfig
from student.loop import TideTrainer
from student.trainer import train

STEPS = 8
EXACT = replace(
    CONFIG, steps=STEPS, log_every=3, save_every=2, eval_every=3, eval_samples=4, keep_best=True, warmup=0.3
)
SETTINGS = {
    "plain": replace(EXACT, fresh_noise=0.0, eval_every=None, keep_best=False),
    "fresh noise, evaluations": replace(EXACT, fresh_noise=0.4),
    "accumulation, checkpointed layers": replace(EXACT, accumulation=3, gradient_checkpointing=True),
    "worker process": replace(EXACT, workers=1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shared", student_tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


def run(data: Path, student: Path, out: Path, config: TrainConfig) -> None:
    """What every process here does."""
    train(data, student, out, config, TIDAL, resume=True)


def run_and_die(data: Path, student: Path, out: Path, config: TrainConfig, at: int, where: str) -> None:
    """SIGKILL at a step: before it (`step`), in the middle of writing its checkpoint (`save`), or between the
    held-out evaluation and the checkpoint (`evaluation`)."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_step(name: str, after: bool) -> None:
        method: Callable[..., Any] = getattr(TideTrainer, name)

        def killed(self: TideTrainer, *args: Any, **kwargs: Any) -> Any:
            now = self.state.global_step >= at
            if now and not after:
                die()
            result = method(self, *args, **kwargs)
            if now:
                die()
            return result

        setattr(TideTrainer, name, killed)

    # `_save_optimizer_and_scheduler` is one of the library's many files, the weights lie there already.
    name, after = {
        "step": ("get_batch_samples", False),
        "save": ("_save_optimizer_and_scheduler", True),
        "evaluation": ("evaluate", True),
    }[where]
    at_step(name, after)
    run(data, student, out, config)


def same(a: Path, b: Path) -> None:
    """Bit for bit: the student, every line of the records, the best student, the last checkpoint's state."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert records(a) == records(b)
    best = [(out / "best" / "model.safetensors") for out in (a, b)]
    assert best[0].exists() == best[1].exists()
    if best[0].exists():
        assert best[0].read_bytes() == best[1].read_bytes()
    last = [checkpoints(out)[-1] for out in (a, b)]
    assert last[0][0] == last[1][0] == STEPS
    assert load_state(last[0][1]) == load_state(last[1][1])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "worker" in n else n for n in SETTINGS]
)
def test_killed_anywhere_and_resumed(data: Path, student: Path, tmp_path: Path, name: str) -> None:
    """Three kills, at random steps and places, one after another; the end is that of a run left alone."""
    config = SETTINGS[name]
    run(data, student, tmp_path / "whole", config)
    dice = random.Random(name)
    places = ["step", "save", *(["evaluation"] if config.eval_every else ["step"])]
    dice.shuffle(places)
    for at, where in zip(sorted(dice.sample(range(1, STEPS), 3)), places):
        code = run_until_killed(run_and_die, data, student, tmp_path / "cut", config, at, where)
        assert code == -signal.SIGKILL
        assert not (tmp_path / "cut" / "model.safetensors").exists()
    run(data, student, tmp_path / "cut", config)
    same(tmp_path / "whole", tmp_path / "cut")


def close(a: Path, b: Path) -> None:
    """Records and weights agree to 1e-6 of each tensor's largest entry; only sums are ordered differently."""
    for left, right in zip(records(a), records(b), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    weights, others = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


SHARED_WORK = replace(
    CONFIG, steps=6, fresh_noise=0.3, eval_every=3, eval_samples=4, learning_rate=3e-2, optimizer="sgd"
)
"""Plain gradient descent: Adam divides by a gradient's size and makes a rounding error near zero a step."""


def test_ranks_and_micro_batches_give_one_result(data: Path, student: Path, tmp_path: Path) -> None:
    """One batch, four micro-batches, two gloo ranks of two: the same global batches, loss curve, weights."""
    run(data, student, tmp_path / "one", SHARED_WORK)
    run(data, student, tmp_path / "four", replace(SHARED_WORK, accumulation=4))
    run_ranks(run, data, student, tmp_path / "ranks", replace(SHARED_WORK, accumulation=2))
    close(tmp_path / "one", tmp_path / "four")
    close(tmp_path / "one", tmp_path / "ranks")


def test_a_run_goes_on_with_another_world_size(data: Path, student: Path, tmp_path: Path) -> None:
    """Three steps by one process, killed, the rest by two: one process's batches, curve, weights."""
    run(data, student, tmp_path / "whole", SHARED_WORK)
    code = run_until_killed(run_and_die, data, student, tmp_path / "cut", SHARED_WORK, 4, "step")
    assert code == -signal.SIGKILL
    assert checkpoints(tmp_path / "cut")[-1][0] == 3
    run_ranks(run, data, student, tmp_path / "cut", SHARED_WORK)
    close(tmp_path / "whole", tmp_path / "cut")
    assert records(tmp_path / "cut")[-1]["step"] == 6
