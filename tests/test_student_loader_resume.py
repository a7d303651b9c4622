"""Training from a faulty server, stopped and resumed with other numbers of ranks and worker processes."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from http_servers import FaultProxy, Faults, FolderHandler, serving
from safetensors.torch import load_file
from small_runs import CONFIG, TIDAL, records, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from student.checkpoint import checkpoints
from student.config import TrainConfig
from student.trainer import train

SGD = replace(CONFIG, steps=6, save_every=1, learning_rate=3e-2, optimizer="sgd")
"""Plain gradient descent: Adam would make a step of a rounding error near zero."""


def part(data: str, cache: str, student: Path, out: Path, config: TrainConfig, until: int) -> None:
    """Train up to a step, as a run does that was asked to stop in it."""
    os.environ["TIDE_CACHE"] = cache

    def stop(done: int, steps: int, what: str) -> None:
        if done == until - 1 < steps - 1:
            os.kill(os.getpid(), signal.SIGINT)

    train(data, student, out, config, TIDAL, resume=True, progress=stop)


@pytest.mark.slow
def test_a_remote_run_goes_on_with_other_ranks_and_workers(
    tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Three steps by one rank with two workers, the rest by two ranks with one worker each, all from a server
    that fails at times: curve and weights are those of one local run."""
    data = write_dataset(tmp_path / "data", student_tokenizer)
    (tmp_path / "student").mkdir()
    student = write_student(tmp_path / "student", student_tokenizer)
    train(data, student, tmp_path / "whole", SGD, TIDAL)
    faults = Faults(4, ("500", "cut"), share=0.3)
    with (
        serving(FolderHandler, root=data) as there,
        serving(FaultProxy, upstream=there, faults=faults) as url,
    ):
        for world, workers, until in ((1, 2, 3), (2, 1, 6)):
            config = replace(SGD, workers=workers)
            cache = str(tmp_path / f"cache{until}")
            run_ranks(part, url, cache, student, tmp_path / "cut", config, until, world=world)
            assert checkpoints(tmp_path / "cut")[-1][0] == until
    assert faults.injected.total() > 0
    for left, right in zip(records(tmp_path / "whole"), records(tmp_path / "cut"), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))
