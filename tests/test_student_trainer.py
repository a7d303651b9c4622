"""The trainer: exact under accumulation and resume, honest when something is wrong. Everything real, on CPU.

Rows are made here, targets drawn at random: what is compared is one way of training with another.
"""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    BLOCK,
    CONFIG,
    MASK,
    SHARED,
    TIDAL,
    records,
    synthetic,
    write_dataset,
    write_student,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shards.errors import ConfigMismatch, ModelError, TideError, UsageError
from shards.reader import LogitDataset
from shards.row import PositionTargets, Row, SparseTarget
from shards.synthetic import endless
from student.checkpoint import STATE_FILE, check_same_run, checkpoints, load_state, run_identity
from student.config import TrainConfig, training_arguments
from student.fused import FusedLoss
from student.loop import METRICS, TideTrainer
from student.model import A2DQwen3LMHeadModel, load_student
from student.objective import Objective, parse_objective
from student.trainer import CONFIG_FILE, train


def make_rows(n: int = 24) -> list[Row]:
    return synthetic("shared", n)[::2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny student with its tokenizer."""
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


def trainer(
    folder: Path,
    out: Path,
    config: TrainConfig = CONFIG,
    objective: Objective = TIDAL,
    rows: list[Row] | None = None,
    **kwargs: Any,
) -> TideTrainer:
    model, tokenizer = load_student(folder, attention="sdpa")
    out.mkdir(parents=True, exist_ok=True)
    return TideTrainer(
        model,
        tokenizer,
        objective,
        config,
        endless(make_rows() if rows is None else rows),
        out,
        block_size=BLOCK,
        mask_token_id=MASK,
        shared_vocab_size=SHARED,
        temperatures=(1.0, 2.0),
        **kwargs,
    )


def weights(t: TideTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in t.model.state_dict().items()}


def test_micro_batches_do_not_change_the_gradient(folder: Path, tmp_path: Path) -> None:
    """One batch or four micro-batches: the same rows, the same global counts, gradients equal to rounding."""

    def gradient(accumulation: int) -> dict[str, torch.Tensor]:
        t = trainer(folder, tmp_path / str(accumulation), replace(CONFIG, accumulation=accumulation))
        t.current_gradient_accumulation_steps = accumulation
        parts, count = t.get_batch_samples(iter(t.get_train_dataloader()), accumulation, torch.device("cpu"))
        assert len(parts) == accumulation
        for part in parts:
            t.training_step(t.model, part, count)
        return {name: p.grad for name, p in t.model.named_parameters() if p.grad is not None}

    whole, cut = gradient(1), gradient(4)
    assert whole.keys() == cut.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(cut[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, optimiser-driven records and data order, stopped between two logged steps."""
    whole = trainer(folder, tmp_path / "whole")
    whole.train()
    asked = iter([False, False, True])
    first = trainer(folder, tmp_path / "cut", should_stop=lambda: next(asked))
    first.train()
    assert first.state.global_step == 3
    [(step, checkpoint)] = checkpoints(tmp_path / "cut")
    start = load_state(checkpoint)
    assert start.step == step == 3
    assert start.window["steps"] == 1
    second = trainer(folder, tmp_path / "cut", start=start)
    second.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    assert [r["step"] for r in records(tmp_path / "whole")] == [1, 2, 4, 6]


def test_records_hold_every_term(folder: Path, tmp_path: Path) -> None:
    """The logged loss is the weighted sum of the logged terms; counts are of global batches; all lines are
    JSON."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("student.loop")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    seen: list[tuple[int, int, str]] = []
    rows = make_rows()
    nothing = np.zeros(0, np.int32)
    sparse = SparseTarget(nothing, nothing, nothing.astype(np.float32), np.zeros((0, 2), np.float32))
    none = PositionTargets(nothing, nothing.astype(bool), sparse.logp, sparse)
    rows[0] = replace(rows[0], masked=np.zeros_like(rows[0].masked), positions=none)
    rows[1:6] = [r for r in rows[1:] if r.masked.any()][:5]
    config = replace(CONFIG, batch_tokens=1, log_every=1)  # a view per step, the first with nothing masked
    t = trainer(folder, tmp_path, config, rows=rows, progress=lambda *a: seen.append(a))
    t.train()
    log.removeHandler(handler)
    got = records(tmp_path)
    assert [r["empty_batches"] for r in got] == [1, 0, 0, 0, 0, 0]
    assert got[0]["loss"] == 0.0
    for r in got:
        assert r["loss"] == pytest.approx(r["ce"] + r["tidal"] + 0.5 * r["reverse-calm"], rel=1e-6)
        assert r["views"] == 1
    assert got[0]["lambda"] == pytest.approx(0.1)
    assert got[3]["lambda"] == pytest.approx(0.5)
    assert [s[:2] for s in seen] == [(i, 6) for i in range(1, 7)]
    assert len(lines) == 6
    assert "step 6/6" in lines[-1]
    assert "tok/s" in lines[-1]


def test_training_lowers_the_loss(folder: Path, tmp_path: Path) -> None:
    """A few rows, seen again and again, are learnt: the loop does move the weights the right way."""
    config = replace(CONFIG, steps=60, batch_tokens=400, learning_rate=1e-2, save_every=60, log_every=10)
    t = trainer(folder, tmp_path, config, parse_objective("ce"), rows=make_rows(6))
    t.train()
    got = records(tmp_path)
    assert got[-1]["loss"] < 0.5 * got[0]["loss"]


def test_a_loss_that_is_not_finite_stops_before_the_step(folder: Path, tmp_path: Path) -> None:
    """The message names step and rows; weights are those of the step before; the checkpoint is kept."""
    rows = make_rows()
    t = trainer(folder, tmp_path, replace(CONFIG, save_every=1), rows=rows)
    before: dict[str, torch.Tensor] = {}

    class Poisoned(FusedLoss):
        def __call__(self, hidden: torch.Tensor, head: torch.nn.Module) -> Any:
            if t.state.global_step == 2:
                before.update(weights(t))
                hidden = hidden * float("nan")
            return super().__call__(hidden, head)

    t.loss_head = Poisoned(t.objective)
    with pytest.raises(
        TideError, match=r"^step 3: the loss is not finite .* on rows s\d+/0, .*checkpoint-2"
    ) as e:
        t.train()
    assert "\n" not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in weights(t).items())
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]


def test_half_written_checkpoints_are_not_resumed(folder: Path, tmp_path: Path) -> None:
    t = trainer(folder, tmp_path, replace(CONFIG, save_every=1, keep=3))
    t.train()
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 5, 6]
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()
    assert checkpoints(tmp_path)[-1][0] == 5
    (tmp_path / "checkpoint-5" / STATE_FILE).write_text("{")
    with pytest.raises(ModelError, match="unreadable"):
        load_state(tmp_path / "checkpoint-5")


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    saved = run_identity("data1", TIDAL, CONFIG)

    def refusal(*now: Any) -> str:
        with pytest.raises(ConfigMismatch) as caught:
            check_same_run(saved, run_identity(*now), tmp_path)
        return str(caught.value)

    check_same_run(
        saved, run_identity("data1", TIDAL, replace(CONFIG, log_every=1, accumulation=4)), tmp_path
    )
    assert "steps 6, now it is 7" in refusal("data1", TIDAL, replace(CONFIG, steps=7))
    assert "dataset 'data1', now it is 'data2'" in refusal("data2", TIDAL, CONFIG)
    assert "objective.temperature 2.0, now it is 1.0" in refusal(
        "data1", replace(TIDAL, temperature=1.0), CONFIG
    )
    assert "objective.terms" in refusal("data1", parse_objective("kl"), CONFIG)


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        TrainConfig(steps=0)
    with pytest.raises(UsageError, match="schedule must be one of cosine, linear, constant, got 'cos'"):
        TrainConfig(steps=1, schedule="cos")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="warmup"):
        TrainConfig(steps=1, warmup=1.5)
    with pytest.raises(UsageError, match="max_steps is decided"):
        training_arguments(replace(CONFIG, trainer_args={"max_steps": 3}), Path("x"))
    with pytest.raises(UsageError, match="no_such_thing"):
        training_arguments(replace(CONFIG, trainer_args={"no_such_thing": 3}), Path("x"))


# tide train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shared", student_tokenizer)


def test_a_whole_run(data: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The folder holds a student that plain transformers loads, its settings and records, and no pickle;
    nothing of the libraries reaches the console."""
    capfd.readouterr()
    summary = train(data, folder, tmp_path / "run", CONFIG, TIDAL)
    assert capfd.readouterr() == ("", "")
    assert summary.finished
    assert (summary.step, summary.checkpoint) == (6, tmp_path / "run" / "checkpoint-6")
    assert summary.last["loss"] == records(tmp_path / "run")[-1]["loss"]
    assert summary.tokens > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(trained) is A2DQwen3LMHeadModel
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert trained.config.use_cache == start.config.use_cache
    settings = json.loads((tmp_path / "run" / CONFIG_FILE).read_text())
    assert settings["config"]["steps"] == 6
    assert settings["dataset"].startswith(LogitDataset(data).manifest.identity[:12])
    assert not list((tmp_path / "run").glob("*.bin"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_resume_goes_on(
    data: Path, folder: Path, tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    """No traceback, a checkpoint, a way to go on; the end is bit for bit that of a run left alone."""

    def interrupt(step: int, steps: int, what: str) -> None:
        if step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    train(data, folder, tmp_path / "whole", CONFIG, TIDAL)
    summary = train(data, folder, tmp_path / "cut", CONFIG, TIDAL, progress=interrupt)
    assert not summary.finished
    assert summary.step == 2
    assert signal.getsignal(number) == before
    assert f"{tmp_path / 'cut' / 'checkpoint-2'}; go on with the same command and --resume" in caplog.text
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with pytest.raises(UsageError, match="holds a run at step 2: pass --resume"):
        train(data, folder, tmp_path / "cut", CONFIG, TIDAL)
    with pytest.raises(ConfigMismatch, match="started with steps 6, now it is 9"):
        train(data, folder, tmp_path / "cut", replace(CONFIG, steps=9), TIDAL, resume=True)
    with (tmp_path / "cut" / METRICS).open("a") as f:
        f.write('{"step": 5, "loss": 1}\n{"st')  # what a kill after the checkpoint would leave
    assert train(data, folder, tmp_path / "cut", CONFIG, TIDAL, resume=True).finished
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    cut.write_bytes(b"")  # killed while the finished student was written
    again = train(data, folder, tmp_path / "cut", CONFIG, TIDAL, resume=True)
    assert again.finished
    assert (again.tokens, again.last["loss"]) == (0, records(tmp_path / "cut")[-1]["loss"])
    assert whole.read_bytes() == cut.read_bytes()


def test_cross_tokenizer_datasets_train(
    folder: Path, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Resuming where nothing was begun is a start."""
    path = write_dataset(tmp_path / "cross", student_tokenizer, "cross")
    summary = train(path, folder, tmp_path / "run", CONFIG, parse_objective("bernoulli-kl"), resume=True)
    assert summary.finished
    assert 0 < summary.last["active_above_half"] < 1
    with pytest.raises(UsageError, match="tidal needs teacher positions"):
        train(path, folder, tmp_path / "other", CONFIG, parse_objective("tidal"))


def test_students_that_do_not_fit_are_refused(
    data: Path, folder: Path, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    def refusal(name: str, **student: Any) -> str:
        path = write_dataset(tmp_path / name, student_tokenizer, **student)
        with pytest.raises(ConfigMismatch) as caught:
            train(path, folder, tmp_path / "run", CONFIG, TIDAL)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "is not the one the dataset was made with (cccccccccccc)" in refusal(
        "hash", tokenizer_hash="c" * 64
    )
    assert "has 304 ids, the dataset stores ids below 400" in refusal("ids", vocab_size=400)
    assert "has 64 positions, the dataset's longest sample needs 72" in refusal("long", max_length=65)
    with pytest.raises(ModelError, match="no such model folder"):
        train(data, tmp_path / "nowhere", tmp_path / "run", CONFIG, TIDAL)
    with pytest.raises(UsageError, match="temperature 3"):
        train(data, folder, tmp_path / "run", CONFIG, parse_objective("kl", temperature=3.0))
