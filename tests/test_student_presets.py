"""The paper's presets: real options, below everything a user says, and honest about what differs."""

import inspect
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_runs import write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from shards.errors import UsageError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from student.loader import DatasetRows, global_batches
from student.presets import PRESETS, preset_named
from student.trainer import steps_of
from tools import cli
from tools.commands import train as run_train


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "shared", student_tokenizer, noise=NoiseConfig(views=3)
    )


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "cross", student_tokenizer, "cross")


def tide(capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    before, sys.argv = sys.argv, ["tide", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return SimpleNamespace(code=ended.value.code, out=out, err=err)


def test_presets_name_real_options() -> None:
    """And the help, which must not import torch, repeats their names."""
    options = set(inspect.signature(run_train.train).parameters)
    for preset in PRESETS.values():
        assert preset.options.keys() <= options
        assert "paper" in preset.differs
    assert ", ".join(PRESETS) == run_train.PRESET_NAMES
    with pytest.raises(UsageError, match="unknown preset 'paper'; the presets are paper-shared, paper"):
        preset_named("paper")


def test_the_papers_numbers() -> None:
    """The paper: the settings of the two main runs and of Table 2's ablations."""
    shared, cross = PRESETS["paper-shared"], PRESETS["paper-cross"]
    assert shared.options["objective"] == "tidal"
    assert shared.compdemo
    assert (shared.options["lambda_initial"], shared.options["lambda_max"]) == (0.1, 0.9)
    assert shared.options["timestep_weighting"] == "mid-range"
    assert (shared.options["temperature"], shared.options["lr"], shared.options["epochs"]) == (2.0, 5e-5, 10)
    assert (cross.options["objective"], cross.options["chunk_temperature"]) == ("reverse-calm", 5.0)
    axis, demo = (PRESETS[f"paper-ablation-shared-no-{name}"] for name in ("timestep-axis", "compdemo"))
    assert {k for k in shared.options if axis.options[k] != shared.options[k]} == {"lambda_axes"}
    assert demo.options == shared.options
    assert not demo.compdemo


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(
    name: str, data: Path, cross: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """On a dataset of its kind; flags win over it; what it resolved to is saved; differences are said."""
    caplog.set_level(logging.INFO, logger="tools")
    arguments = ["train", "--data", cross if "cross" in name and "shared-tide" not in name else data]
    out = tmp_path / "run"
    done = tide(
        capsys, *arguments, "--student", student, "--out", out, "--preset", name, "--steps", 1, "--lr", 1e-4,
        "--batch-tokens", 200, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["step"] == 1
    saved = yaml.safe_load((out / "tide-train.yaml").read_text())
    preset = PRESETS[name]
    for key, value in preset.options.items():
        if key not in ("lr", "batch_tokens"):
            assert saved[key] == value
    assert (saved["lr"], saved["batch_tokens"], saved["preset"]) == (1e-4, 200, name)
    assert preset.differs in caplog.text
    assert "blocks of 8 (paper: 32)" in caplog.text
    settings = json.loads((out / "train_config.json").read_text())
    assert settings["config"]["fresh_noise"] == 0.0


def test_a_file_wins_over_a_preset_and_may_name_one(
    data: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"preset: paper-shared\nobjective: kl\nsteps: 1\nbatch-tokens: 200\ndata: {data}\n")
    for flags in (["--config", file], ["--preset", "paper-ablation-shared-ce", "--config", file]):
        out = tmp_path / f"run{len(flags)}"
        done = tide(capsys, "train", *flags, "--student", student, "--out", out)
        assert done.code == 0, done.err
        saved = yaml.safe_load((out / "tide-train.yaml").read_text())
        assert (saved["objective"], saved["timestep_weighting"]) == ("kl", "mid-range")


def test_epochs_become_steps(data: Path) -> None:
    """24 samples, 3 views: the batches of three real epochs, against what one epoch's rows predict."""
    dataset = LogitDataset(data)
    state = None
    batches = 0
    for _, after in global_batches(DatasetRows(dataset, 0)(None), batch_tokens=200, block_size=8):
        batches += 1
        state = after
        if after.epoch == 3:
            break
    assert state is not None
    assert steps_of(dataset, 3, 200) == pytest.approx(batches, rel=0.2)
    assert steps_of(dataset, 0.01, 200) == 1
    with pytest.raises(UsageError, match="epochs must be positive, got 0"):
        steps_of(dataset, 0, 200)
