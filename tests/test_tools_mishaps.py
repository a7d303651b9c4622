"""Mishaps a user meets between the two stages, by the real command in a real process: Ctrl-C in either
command, a shard cut short, a student with another tokenizer, a corpus that cannot be used. One line each, and
the work goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from shards.manifest import Manifest
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel


def tide(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tools.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and the lines of standard error."""
    _, err = process.communicate(timeout=300)
    return process.returncode, err.splitlines()


def refused(process: subprocess.Popen[str], *words: object) -> None:
    code, lines = outcome(process)
    assert code == 1, lines
    errors = [line for line in lines if not line.startswith("step ")]  # steps before the bad shard are fine
    assert len(errors) == 1, lines
    assert errors[0].startswith("error: ")
    for word in words:
        assert str(word) in errors[0]


def interrupt_once(process: subprocess.Popen[str], there: Path, pattern: str) -> None:
    """Ctrl-C as soon as a first file shows that work is under way."""
    while not list(there.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": f"{i} and {i + 1} and {i + 2} follow."} for i in range(240)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def data(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose making was interrupted and went on: no shard was made twice."""
    out = tmp_path_factory.mktemp("data") / "data"
    arguments = [
        "precompute", "--teacher", model, "--student", model, "--corpus", corpus, "--out", out,
        "--kind", "shared", "--block-size", 8, "--student-max-length", 64, "--samples-per-part", 8,
    ]  # fmt: skip
    first = tide(*arguments)
    interrupt_once(first, out, "parts/*.json")
    code, lines = outcome(first)
    assert code == 130, lines
    assert "Traceback" not in "\n".join(lines)
    assert "the same command goes on from there" in lines[-1]
    assert not (out / "manifest.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.arrow")}
    assert 0 < len(kept) < 30
    code, lines = outcome(tide(*arguments))
    assert code == 0, lines
    assert Manifest.load(out).totals["rows"] == 240 * 4
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    return out


def test_ctrl_c_in_training_keeps_a_checkpoint(data: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--data", data, "--student", model, "--out", run, "--steps", 400, "--save-steps", 5]
    arguments += ["--batch-tokens", 256]
    first = tide(*arguments)
    interrupt_once(first, run, "checkpoint-*/tide_state.json")
    code, lines = outcome(first)
    assert code == 130, lines
    assert "Traceback" not in "\n".join(lines)
    assert "--resume" in lines[-1]
    steps = max(int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*"))
    assert f"checkpoint-{steps}" in lines[-1]
    second = tide(*arguments, "--resume")
    time.sleep(0.1)
    interrupt_once(second, run, f"checkpoint-{(steps // 5 + 2) * 5}/tide_state.json")
    assert outcome(second)[0] == 130


def test_truncated_shard(data: Path, model: Path, tmp_path: Path) -> None:
    shard = sorted(data.glob("*.arrow"))[3]
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[: len(whole) // 2])
        refused(
            tide("train", "--data", data, "--student", model, "--out", tmp_path / "r", "--steps", 400),
            shard.name,
            "truncated",
            "tide precompute",
        )
    finally:
        shard.write_bytes(whole)


def test_student_with_another_tokenizer(
    data: Path, model: Path, teacher_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    config = A2DQwen3Config.from_pretrained(model)
    config.vocab_size = len(teacher_tokenizer)
    A2DQwen3LMHeadModel(config).save_pretrained(other)
    teacher_tokenizer.save_pretrained(other)
    arguments = ["train", "--data", data, "--student", other, "--out", tmp_path / "r", "--steps", 4]
    refused(tide(*arguments), other, "tokenizer")
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["corpus.jsonl"]),
        ('{"question": "Why?"}\n', ["corpus.jsonl", "question", "messages"]),
        ('{"messages": [\n', ["corpus.jsonl"]),
    ],
    ids=["empty", "wrong field", "not JSON"],
)
def test_unusable_corpus(text: str, words: list[str], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    arguments = ["precompute", "--teacher", model, "--student", model, "--corpus", path, "--out"]
    refused(tide(*arguments, tmp_path / "out"), *words)
    assert not (tmp_path / "out" / "manifest.json").exists()
