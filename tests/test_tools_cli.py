"""The command line as its users meet it: exit codes, one-line errors, options from files, the JSON line.

Commands run in this process through the entry point itself, except where only a fresh process can tell.
"""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import Tide, refused

from precompute.config import PrecomputeConfig
from shards.codec import SparseCodec
from student.config import TrainConfig
from student.evaluate import GRID
from student.objective import NAMES, Objective
from student.schedule import LambdaSchedule
from tools import cli, console
from tools.options import numbers


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and {i + 1} follow."} for i in range(8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# What people type


def test_help_is_fast(tmp_path: Path) -> None:
    """Asking for help, or mistyping, must not wait for torch: heavy libraries load inside the commands."""
    heavy = ["torch", "transformers", "pyarrow", "datasets", "plotly"]
    script = (
        "import sys; from tools import cli\n"
        f"def left(): print('loaded', [m for m in {heavy} if m in sys.modules])\n"
        "import atexit; atexit.register(left)\n"
        "cli.main()"
    )
    for arguments in (["--help"], ["train", "--help"], ["precompute", "--hlep"]):
        run = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.stdout.endswith("loaded []\n"), (arguments, run.stdout[-200:], run.stderr)


def test_without_arguments_it_explains_itself(tide: Tide) -> None:
    result = tide()
    assert result.code == 0
    for command in ("precompute", "train", "eval"):
        assert re.search(rf"\b{command}\b", result.out)


def test_version(tide: Tide) -> None:
    assert re.fullmatch(r"tide \d+\.\d+\.\d+\n", tide("--version").out)


def test_mistyped_command_and_option(tide: Tide) -> None:
    refused(tide("trian"), 2, "'trian'", "'train'")
    refused(tide("train", "--step", 3), 2, "--step", "--steps")


def test_bad_value_is_quoted(tide: Tide) -> None:
    refused(tide("train", "--steps", "many"), 2, "--steps", "'many'", "tide train --help")
    refused(tide("train", "--steps=1.5"), 2, "--steps", "'1.5'")


def test_missing_option(tide: Tide) -> None:
    refused(tide("train", "--data", "d", "--student", "s", "--out", "o"), 2, "Missing option '--steps'")


def test_defaults_are_those_of_the_packages() -> None:
    """The command line repeats defaults, so that help needs no torch; they must stay the packages' own."""
    precompute, train, evaluate = (
        {name: p.default for name, p in inspect.signature(command).parameters.items()}
        for command in (cli.precompute, cli.train, cli.evaluate)
    )
    renamed = {
        "student_max_length": "max_length",
        "teacher_max_length": "max_teacher_length",
        "head_entries": "cap",
        "lr": "learning_rate",
        "log_steps": "log_every",
        "save_steps": "save_every",
        "lambda_initial": "initial",
        "lambda_max": "maximum",
        "lambda_decay": "decay",
        "lambda_axes": "axes",
    }
    as_text = {"codec", "temperatures", "report_to", "steps"}  # steps may also be given as --epochs
    for options, owners in (
        (precompute, (PrecomputeConfig, SparseCodec)),
        (train, (TrainConfig, Objective, LambdaSchedule)),
    ):
        fields = {f.name: f.default for owner in owners for f in dataclasses.fields(owner)}
        repeated = {n: renamed.get(n, n) for n in options if renamed.get(n, n) in fields and n not in as_text}
        assert len(repeated) > 10
        for name, field in repeated.items():
            required = options[name] is inspect.Parameter.empty
            assert fields[field] is dataclasses.MISSING if required else options[name] == fields[field], name
    assert precompute["codec"] == SparseCodec.name
    assert numbers(precompute["temperatures"], "") == SparseCodec().temperatures
    assert numbers(evaluate["grid"], "") == GRID


# What goes wrong


def test_missing_corpus(tide: Tide, model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    result = tide(
        "precompute", "--teacher", model, "--student", model, "--corpus", missing, "--out", tmp_path / "d"
    )
    refused(result, 1, missing)
    assert not (tmp_path / "d").exists()


def test_missing_teacher(tide: Tide, model: Path, corpus: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    result = tide(
        "precompute", "--teacher", missing, "--student", model, "--corpus", corpus, "--out", tmp_path / "d"
    )
    refused(result, 1, missing)


@pytest.mark.parametrize("part", ["2", "4/4", "a/b"])
def test_bad_part(tide: Tide, part: str) -> None:
    result = tide(
        "precompute", "--teacher", "t", "--student", "s", "--corpus", "c", "--out", "o", "--part", part
    )
    refused(result, 2, repr(part), "0/4")


def test_unknown_objective_lists_the_valid_ones(tide: Tide) -> None:
    result = tide(
        "train", "--data", "d", "--student", "s", "--out", "o", "--steps", 1, "--objective", "tidle"
    )
    refused(result, 2, "'tidle'", *NAMES)


@pytest.mark.parametrize(
    ("flag", "valid"),
    [
        ("--ce-weighting", ("scheduler", "uniform")),
        ("--ce-schedule", ("linear", "cosine")),
        ("--ce-normalisation", ("token", "sequence", "batch")),
        ("--clamp", ("log", "reference")),
        ("--lambda-decay", ("cosine", "linear")),
        ("--lambda-axes", ("both", "training_only", "timestep_only")),
        ("--timestep-weighting", ("uniform", "mid-range")),
    ],
)
def test_choices_of_the_objective_list_the_valid_ones(
    tide: Tide, tmp_path: Path, flag: str, valid: tuple[str, ...]
) -> None:
    """Every valid choice gets as far as the missing dataset."""
    run = ("train", "--data", tmp_path / "no", "--student", "s", "--out", tmp_path / "o", "--steps", 1)
    refused(tide(*run, flag, "often"), 2, flag.removeprefix("--").replace("-", " "), "'often'", *valid)
    for name in valid:
        refused(tide(*run, flag, name), 1, tmp_path / "no")


def test_help_names_every_objective(tide: Tide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = set(re.findall(r"[\w-]+", tide("train", "--help").out))
    assert set(NAMES) <= words


def test_missing_dataset(tide: Tide, model: Path, tmp_path: Path) -> None:
    result = tide(
        "train", "--data", tmp_path / "none", "--student", model, "--out", tmp_path / "o", "--steps", 1
    )
    refused(result, 1, tmp_path / "none")


def test_bad_earlier_result(tide: Tide, tmp_path: Path) -> None:
    earlier = tmp_path / "e.json"
    earlier.write_text("[]")
    refused(tide("eval", "--model", "m", "--data", "d", "--against", earlier), 2, earlier)
    refused(tide("eval", "--model", "m", "--data", "d", "--against", tmp_path / "x"), 2, tmp_path / "x")
    refused(tide("eval", "--model", "m", "--data", "d", "--grid", "0.1;0.2"), 2, "0.1;0.2")
    refused(tide("eval", "--model", "m", "--data", "d", "--out", tmp_path), 2, "is a folder")


def test_what_a_failure_becomes(capsys: pytest.CaptureFixture[str]) -> None:
    """The system's refusals and Ctrl-C are one line; a bug keeps its traceback, after a line that says so."""

    def run(error: BaseException) -> tuple[int, str]:
        def fail() -> None:
            raise error

        return console.guard(fail), capsys.readouterr().err

    assert run(PermissionError(13, "Permission denied", "/x")) == (1, "error: Permission denied: /x\n")
    assert run(OSError(28, "No space left on device")) == (1, "error: No space left on device\n")
    assert run(OSError("a\nb")) == (1, "error: a b\n")
    assert run(KeyboardInterrupt()) == (130, "error: interrupted\n")
    code, err = run(ZeroDivisionError("oops"))
    assert code == 1
    assert err.startswith("error: this is a bug in tide")
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err


# Options from a file


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_unknown_key_names_the_nearest(tide: Tide, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", "batch-token: 5\n")
    refused(tide("train", "--config", config), 2, config, "'batch-token'", "'batch-tokens'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "list"),
        ("steps: [1, 2]\n", "steps"),
        ("a: b: c\n", "YAML"),
        ("data: d\nstudent: s\nout: o\nsteps: soon\n", "'soon'"),
    ],
)
def test_unusable_file(tide: Tide, tmp_path: Path, text: str, words: str) -> None:
    config = written(tmp_path / "c.yaml", text)
    refused(tide("train", "--config", config), 2, config, words)


def test_file_beats_default_and_flag_beats_file(tide: Tide, tmp_path: Path) -> None:
    """Seen through which value is refused: the objective is parsed before anything is read."""
    config = written(
        tmp_path / "c.yaml", "data: d\nstudent: s\nout: o\nsteps: 1\nobjective: fromfile\nseed: null\n"
    )
    refused(tide("train", "--config", config), 2, "'fromfile'")
    refused(tide("train", "--config", config, "--objective", "fromflag"), 2, "'fromflag'")
    refused(tide("train", "--objective", "fromflag", "--config", config), 2, "'fromflag'")


# The whole path


def test_two_stages_and_evaluation(tide: Tide, model: Path, corpus: Path, tmp_path: Path) -> None:
    """precompute, train, eval on a tiny network: files appear, the last line is JSON, and saved options serve
    as a configuration file that makes the same again."""
    data, run, result = tmp_path / "data", tmp_path / "run", tmp_path / "results" / "a.json"
    made = tide(
        "precompute", "--teacher", model, "--student", model, "--corpus", corpus, "--out", data, "--json",
        "--block-size", 8, "--student-max-length", 64, "--views", 2, "--holdout", 0.5, "--no-compdemo",
        "--kind", "shared",
    )  # fmt: skip
    assert made.code == 0, made.err
    summary = json.loads(made.out.splitlines()[-1])
    assert summary["kind"] == "shared"
    assert summary["totals"]["rows"] == 16
    options = yaml.safe_load((data / "tide-precompute.yaml").read_text())
    assert (options["block_size"], options["compdemo"], options["corpus"]) == (8, False, str(corpus))
    again = tide(
        "precompute", "--config", data / "tide-precompute.yaml", "--out", tmp_path / "data2", "--json"
    )
    assert json.loads(again.out)["identity"] == summary["identity"]

    arguments = ["train", "--data", data, "--student", model, "--out", run, "--objective", "kl", "--steps", 2]
    trained = tide(*arguments, "--batch-tokens", 64, "--log-steps", 1)
    assert trained.code == 0, trained.err
    assert "student of 2 steps" in trained.out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    saved = (run / "tide-train.yaml").read_text()
    assert yaml.safe_load(saved)["batch_tokens"] == 64
    refused(tide(*arguments, "--batch-tokens", 128), 2, run, "--resume")
    assert (run / "tide-train.yaml").read_text() == saved  # a refused call changes nothing

    exported = tide("export", "--model", run, "--out", tmp_path / "exported", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["bytes"] > 0
    assert (tmp_path / "exported" / "modeling_a2d_qwen3.py").exists()
    refused(
        tide("export", "--model", run, "--out", tmp_path / "exported"), 2, "exported", "not an empty folder"
    )

    evaluated = tide("eval", "--model", run, "--data", data, "--out", result, "--json")
    assert evaluated.code == 0, evaluated.err
    line = json.loads(evaluated.out)  # nothing but the line on standard output
    assert line["interval"][0] <= line["bits_per_byte"] <= line["interval"][1]
    assert "bits per byte" in evaluated.err
    compared = tide("eval", "--model", run, "--data", data, "--against", result, "--json")
    assert json.loads(compared.out)["difference"] == 0.0
    assert (tmp_path / "results" / "a.yaml").exists()
