"""The demo: workers that fail well, models that are reproducible, a report that says what the numbers say,
and the whole of it at `--quick`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from precompute.sample import Conversation, Message
from shards.errors import UsageError
from student.evaluate import EvalResult
from student.pretrain import PretrainConfig, TrainingText
from student.trainer import StopOnSignal
from tools.demo.models import Recipe, make_model, make_tokenizer
from tools.demo.report import findings, verdicts, write_page
from tools.demo.run import AR_ARMS, AR_DATASETS, ARMS, DATASETS
from tools.workers import Event, Job, Report, run_jobs


def square(*, x: int, report: Report) -> tuple[int, int]:
    report(1, 1, "squaring")
    return x * x, torch.get_num_threads()


def refuse(*, after: str, report: Report) -> None:
    while not Path(after).exists():
        time.sleep(0.05)
    raise UsageError("no")


def endure(*, pid_file: str, report: Report) -> None:
    """A training run: it minds SIGTERM, writes down who it is, and takes its time."""
    with StopOnSignal():
        Path(f"{pid_file}.new").write_text(str(os.getpid()))
        Path(f"{pid_file}.new").rename(pid_file)
        time.sleep(300)


def test_jobs_run_on_one_thread_each_and_report() -> None:
    events: list[Event] = []
    jobs = [Job(str(x), square, {"x": x}) for x in (3, 4)]
    assert run_jobs(jobs, on_event=events.append, workers=2) == {"3": (9, 1), "4": (16, 1)}
    assert sorted(e.job for e in events) == ["3", "4"]


def test_a_failing_job_ends_the_others_at_once(tmp_path: Path) -> None:
    """The error arrives as it is, and no worker is left behind, not even one that minds SIGTERM."""
    pid_file = str(tmp_path / "pid")
    jobs = [Job("long", endure, {"pid_file": pid_file}), Job("bad", refuse, {"after": pid_file})]
    start = time.monotonic()
    with pytest.raises(UsageError, match="no"):
        run_jobs(jobs, on_event=lambda e: None, workers=2)
    assert time.monotonic() - start < 200
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(pid_file).read_text()), 0)


CONVERSATIONS = [
    Conversation((Message("user", f"def f{i}(x):"), Message("assistant", f"return x + {i}")), "here", i)
    for i in range(40)
]


@pytest.mark.parametrize("chatml", [True, False])
def test_tokenizers_have_the_promised_size_and_specials_last(chatml: bool) -> None:
    tokenizer = make_tokenizer(CONVERSATIONS, vocab_size=280, chatml=chatml)
    assert len(tokenizer) == 280
    assert tokenizer.mask_token_id == 279
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATIONS[7].messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "return x + 7" in text
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_models_are_reproducible_and_kept(tmp_path: Path) -> None:
    """Two trainings give the same bytes; a folder with the same key is kept, with another it is replaced."""
    tokenizer = make_tokenizer(CONVERSATIONS, vocab_size=280, chatml=False)
    texts = [TrainingText(np.arange(i, i + 12, dtype=np.int32), np.arange(12) > 3) for i in range(20)]
    training = PretrainConfig(
        attention="bidirectional", block_size=1, ar_steps=2, diffusion_steps=2, batch_size=4
    )
    recipe = Recipe(role="teacher-moe", vocab_size=280, training=training, max_length=12)

    def make(folder: Path, key: str) -> bool:
        return make_model(recipe, tokenizer, texts, folder, key=key, report=lambda *x: None)

    assert make(tmp_path / "a", "k")
    assert make(tmp_path / "b", "k")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "llada2_moe"
    assert not make(tmp_path / "a", "k")
    assert make(tmp_path / "a", "another")


def invented(bits: dict[str, float]) -> dict[str, Any]:
    """Demo results in which every arm has the given bits per byte, with a little noise over samples."""
    noise = np.random.default_rng(0).normal(0, 0.01, (50, 2))

    def result(value: float) -> dict[str, Any]:
        nll = (value + noise) * 100 * np.log(2)
        ids = tuple(map(str, range(50)))
        return EvalResult((0.3, 0.7), 0, ids, nll, np.full(50, 100)).to_json()

    arms = {}
    for i, arm in enumerate(ARMS):
        shift = np.random.default_rng(i).normal(0, 0.01)
        arms[arm.name] = {
            "pipeline": arm.pipeline,
            "objective": arm.objective,
            "dataset": arm.dataset,
            "seconds": 2.0,
            "tokens": 1000,
            "curve": [{"step": 4, "ce": 5.0 + shift}, {"step": 8, "ce": 4.0}, {"step": 8, "train_loss": 1.0}],
            "eval": result(bits.get(arm.name, 3.0)),
        }
    totals = {"rows": 8, "masked": 100, "bytes": 4000}
    return {
        "seed": 0,
        "size": {"steps": 8},
        "models": {"teacher-dense": {"parameters": 10, "samples": 5, "trained": False, "seconds": 1.0}},
        "datasets": {
            d.name: {
                "kind": d.name.split("-")[0],
                "compdemo": d.compdemo,
                "totals": totals,
                "report": {"active_chunks": 10, "chunks_above_half": 3},
                "seconds": 2.0,
            }
            for d in DATASETS
        },
        "reference": {"student start": result(3.3), "dense teacher": result(2.5)},
        "arms": arms,
        "seconds": 12.0,
    }


def test_findings_say_better_worse_or_nothing() -> None:
    """Differences far beyond, at and within the noise of the samples."""
    judged = verdicts(invented({"shared-kl": 2.9, "cross-reverse-calm": 3.2}))
    said = [line.split(" (")[0] for line in findings(judged)]
    assert len(said) == 3 + 2 + 2  # shared: three against CE, two against the control; cross: two against CE
    assert "shared-kl is better than CE by 0.100 bits per byte" in said
    assert "shared-kl is better than the re-weighted control by 0.100 bits per byte" in said
    assert "cross-reverse-calm is worse than CE by 0.200 bits per byte" in said
    assert "shared-tidal cannot be told from CE" in said


def test_autoregressive_arms_stand_beside_the_others() -> None:
    """Each has a name of its own and is compared with the CE arm and control of its pipeline, whose samples
    and masks it shares."""
    assert len({arm.name for arm in ARMS + AR_ARMS}) == len(ARMS + AR_ARMS)
    assert {arm.dataset for arm in AR_ARMS} == {d.name for d in AR_DATASETS}
    result = invented({"shared-kl": 2.9})
    arm, value = AR_ARMS[0], result["arms"]["shared-kl"]
    result["arms"][arm.name] = value | {"dataset": arm.dataset}
    (judged,) = (v for v in verdicts(result) if v.name == "shared-kl-ar")
    assert judged.against_ce is not None
    assert judged.against_ce[0] == pytest.approx(-0.1)
    assert judged.against_control is not None


def test_report_shows_the_numbers_and_a_quick_run_claims_nothing(tmp_path: Path) -> None:
    result = invented({"shared-kl": 2.9})
    page = write_page(tmp_path / "full.html", result, quick=False).read_text()
    assert "−0.100" in page
    assert "better than CE" in page
    assert ">0.30<" in page  # three of ten active chunks above one half
    quick = write_page(tmp_path / "quick.html", result, quick=True).read_text()
    assert "better than CE" not in quick
    assert "numbers mean nothing" in quick


@pytest.mark.parametrize("ar", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quick_demo_from_end_to_end(tmp_path: Path, ar: bool) -> None:
    """The command a newcomer runs, with few steps: every stage, the table, the page, the JSON line."""
    arms = ARMS + AR_ARMS if ar else ARMS
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tools.cli", "demo", "--quick", "--json", "--out", str(tmp_path / "out")),
            *(["--ar"] if ar else []),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert set(summary["bits_per_byte"]) == {arm.name for arm in arms}
    assert all(1.0 < value < 8.0 for value, _, _ in summary["bits_per_byte"].values())
    assert summary["datasets"]["shared-plain"]["masked"] == summary["datasets"]["shared-compdemo"]["masked"]
    for name in ("manifest.json", "README.md"):
        assert (tmp_path / "out" / "data" / "cross-compdemo" / name).is_file()
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "shared-tidal" in report
    assert summary["runs"].keys() == {arm.name for arm in arms if arm.name not in ("shared-ce", "cross-ce")}
    for name, place in summary["runs"].items():
        assert f'href="students/{name}/report.html"' in report
        training = Path(place).read_text(encoding="utf-8")
        for words in ("finished, 12 steps", f"step 0, {name}", f"step 12, {name}", "by timestep"):
            assert words in training, (name, words)
    assert "without CompDemo" in (tmp_path / "out" / "dataset.html").read_text(encoding="utf-8")
