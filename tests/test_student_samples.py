"""Texts written while training: what they are, and that training does not notice them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks, run_until_killed
from small_runs import BLOCK, CONFIG, TIDAL, records, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from shards.errors import UsageError
from shards.reader import LogitDataset
from student.config import SAMPLES, AdapterConfig, TrainConfig
from student.generate import load_sampler, make_sampler
from student.loop import TideTrainer
from student.model import load_student
from student.sampler_config import SamplerConfig
from student.samples import as_sampled, held_out_prompts
from student.trainer import train

TOKENS = 12
WITHOUT = replace(CONFIG, keep=9, save_every=1)
WITH = replace(WITHOUT, sample_every=2, samples=2, sample_tokens=TOKENS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shared", student_tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


def texts(out: Path) -> list[dict[str, Any]]:
    lines = (out / SAMPLES).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def test_samples_are_those_of_the_checkpoints(data: Path, student: Path, tmp_path: Path) -> None:
    """Before the first step, every second and the last: each text is what the sampler of `tide generate`
    writes with the student of that moment, for prompts cut from held-out samples."""
    out = tmp_path / "run"
    train(data, student, out, replace(WITH, steps=5), TIDAL)
    assert [t["step"] for t in texts(out)] == [0, 0, 2, 2, 4, 4, 5, 5]
    tokenizer = load_student(student)[1]
    prompts = held_out_prompts(LogitDataset(data), tokenizer, count=2, tokens=TOKENS, positions=64)
    rows = {row.sample_id: row for row in LogitDataset(data).samples("heldout")}
    for prompt in prompts:
        row = rows[prompt.sample_id]
        assert row.input_ids[: len(prompt.ids)].tolist() == prompt.ids
        assert not row.maskable[: len(prompt.ids)].any()
        assert row.maskable[len(prompt.ids)]
    how = SamplerConfig(max_new_tokens=TOKENS, block_size=BLOCK)
    for step in (0, 2, 4, 5):
        sampler, _ = load_sampler(out / f"checkpoint-{step}" if step else student)
        wanted = sampler.generate([p.ids for p in prompts], how)
        found = [t for t in texts(out) if t["step"] == step]
        assert [t["text"] for t in found] == [w.text for w in wanted]
        assert [t["sample_id"] for t in found] == [p.sample_id for p in prompts]
        assert [t["prompt"] for t in found] == [p.text for p in prompts]


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4, dropout=0.3)])
def test_samples_change_nothing(
    data: Path, student: Path, tmp_path: Path, adapter: AdapterConfig | None
) -> None:
    """Bit for bit: weights and records of a run with samples and evaluations at every step are those of a run
    without. The adapter's dropout draws from torch's generator all along."""
    if adapter is not None:
        pytest.importorskip("peft")
    config = replace(WITHOUT, adapter=adapter)
    train(data, student, tmp_path / "without", config, TIDAL)
    often = replace(config, sample_every=1, sample_tokens=TOKENS, eval_every=1, eval_samples=3)
    train(data, student, tmp_path / "with", often, TIDAL)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("without", "with"))
    assert a == b
    assert records(tmp_path / "without") == [r for r in records(tmp_path / "with") if "loss" in r]
    assert not (tmp_path / "without" / SAMPLES).exists()


def test_the_network_is_left_as_it_was(data: Path, student: Path) -> None:
    """Mode, attention, and generator, also where sampling fails."""
    model, tokenizer = load_student(student)
    model.train()
    attention, state = model.config._attn_implementation, torch.get_rng_state()
    held_out = held_out_prompts(LogitDataset(data), tokenizer, count=1, tokens=TOKENS, positions=64)
    how = SamplerConfig(max_new_tokens=999, block_size=BLOCK)
    with pytest.raises(UsageError, match="64 positions"), as_sampled(model):
        make_sampler(model, tokenizer, static=False).generate([held_out[0].ids], how)
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)


def run(data: Path, student: Path, out: Path, config: TrainConfig) -> None:
    train(data, student, out, config, TIDAL, resume=True)


def run_and_die(data: Path, student: Path, out: Path, config: TrainConfig, at: int) -> None:
    """SIGKILL between a step's samples and its checkpoint."""
    save = TideTrainer._save_checkpoint

    def killed(self: TideTrainer, *args: Any) -> None:
        if self.state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, *args)

    TideTrainer._save_checkpoint = killed  # type: ignore[method-assign]
    run(data, student, out, config)


def test_a_resumed_run_has_the_same_samples(data: Path, student: Path, tmp_path: Path) -> None:
    """Killed between a step's samples and its checkpoint, and resumed: no line twice, none missing."""
    config = replace(WITH, save_every=2)
    run(data, student, tmp_path / "whole", config)
    code = run_until_killed(run_and_die, data, student, tmp_path / "cut", config, 4)
    assert code == -signal.SIGKILL
    assert texts(tmp_path / "cut")[-1]["step"] == 4
    run(data, student, tmp_path / "cut", config)
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")


def test_one_of_several_ranks_writes(data: Path, student: Path, tmp_path: Path) -> None:
    config = replace(WITH, optimizer="sgd", learning_rate=3e-2, steps=2)
    run(data, student, tmp_path / "one", config)
    run_ranks(run, data, student, tmp_path / "two", config)
    places = [[(t["step"], t["sample_id"]) for t in texts(tmp_path / n)] for n in ("one", "two")]
    assert places[0] == places[1]


def test_what_cannot_be_sampled(data: Path, student: Path, tmp_path: Path) -> None:
    """Refused before anything is written; the words name the setting."""
    for changes, words in (
        ({"sample_tokens": 999}, "leaves room for sample_tokens 999"),
        ({"trainer_args": {"deepspeed": "x.json"}}, "sample_every does not go with deepspeed"),
        ({"trainer_args": {"fsdp": True}}, "sample_every does not go with fsdp"),
    ):
        with pytest.raises(UsageError, match=words):
            train(data, student, tmp_path / "run", replace(WITH, **changes), TIDAL)
        assert not (tmp_path / "run").exists()
    for name in ("sample_every", "samples", "sample_tokens"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
            TrainConfig(steps=1, **{name: 0})
