"""LoRA, QLoRA and 8-bit optimisers, for real: what is trained, saved, merged, resumed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CONFIG, TIDAL, VOCAB, records, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from shards.errors import UsageError
from student import config as configuration
from student.config import AdapterConfig, TrainConfig, check_libraries
from student.export import export_student
from student.model import load_student
from student.trainer import train

LORA = replace(CONFIG, adapter=AdapterConfig(rank=4, dropout=0.1), learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shared", student_tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


def test_lora_trains_an_adapter_and_leaves_a_plain_student(data: Path, student: Path, tmp_path: Path) -> None:
    """The student folder is the start plus alpha / rank times B A in the layers named, and nothing else; it
    loads, exports and starts another run like any other. The best evaluation's is one too."""
    pytest.importorskip("peft")
    config = replace(LORA, eval_every=3, eval_samples=4, keep_best=True)
    out = tmp_path / "run"
    train(data, student, out, config, TIDAL)
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    low_rank = load_file(out / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj.weight" in name}
    name = "model.layers.0.self_attn.q_proj"
    a, b = (low_rank[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2.0 * b @ a)
    assert b.abs().max() > 1e-3
    assert json.loads((out / "config.json").read_text())["block_size"] == 8
    assert all("checkpoint" in str(pickle) for pickle in out.rglob("training_args.bin"))
    load_student(out / "best")
    export_student(out, tmp_path / "exported")
    again = train(data, out, tmp_path / "again", replace(CONFIG, steps=1), TIDAL)
    assert again.finished


def test_lora_resumes_exactly(data: Path, student: Path, tmp_path: Path) -> None:
    """Adapter, optimiser, dropout's generator and records, as with all weights trained; a run killed while
    its finished student was written only writes it again."""
    pytest.importorskip("peft")
    train(data, student, tmp_path / "whole", LORA, TIDAL)

    def stop(step: int, steps: int, what: str) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="stopped at once; checkpoint of step 3"):
        train(data, student, tmp_path / "cut", LORA, TIDAL, progress=stop)
    train(data, student, tmp_path / "cut", LORA, TIDAL, resume=True)
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    cut.unlink()
    assert train(data, student, tmp_path / "cut", LORA, TIDAL, resume=True).tokens == 0
    assert whole.read_bytes() == cut.read_bytes()


def test_the_seed_decides_the_adapters_start(data: Path, student: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    once = replace(LORA, steps=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed * 17)
        train(data, student, tmp_path / name, replace(once, seed=seed), TIDAL)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_qlora_keeps_the_weights_in_four_bits(data: Path, student: Path, tmp_path: Path) -> None:
    """Training sees quantised weights; the merged student has the start's own, plus the update."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    config = replace(LORA, adapter=AdapterConfig(rank=4, four_bit=True))
    out = tmp_path / "run"
    summary = train(data, student, out, config, TIDAL)
    plain = train(data, student, tmp_path / "plain", replace(LORA, adapter=AdapterConfig(rank=4)), TIDAL)
    assert summary.last["loss"] != plain.last["loss"]
    assert summary.last["loss"] == pytest.approx(plain.last["loss"], rel=0.2)
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    low_rank = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (low_rank[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2.0 * b @ a)


def test_eight_bit_optimisers(data: Path, student: Path, tmp_path: Path) -> None:
    """They train to about what 32 bits give; the embedding's state has 8 bits only where that is asked."""
    pytest.importorskip("bitsandbytes")
    wide = train(data, student, tmp_path / "wide", CONFIG, TIDAL)
    for eight_bit in (False, True):
        config = replace(CONFIG, optimizer="adamw_bnb_8bit", eight_bit_embedding=eight_bit)
        out = tmp_path / str(eight_bit)
        narrow = train(data, student, out, config, TIDAL)
        assert narrow.last["loss"] == pytest.approx(wide.last["loss"], rel=0.05)
        state = torch.load(out / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
        [embedding] = {m.dtype for m in moments(state) if m.shape == (VOCAB, 32)}
        assert embedding == (torch.uint8 if eight_bit else torch.float32)


def moments(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an optimiser's saved state, which bitsandbytes nests deeper than torch does."""
    for value in state.values():
        if isinstance(value, dict):
            yield from moments(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_missing_libraries_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "find_spec", lambda name: None)

    def refusal(config: TrainConfig) -> str:
        with pytest.raises(UsageError) as caught:
            check_libraries(config)
        return str(caught.value)

    assert refusal(LORA) == "LoRA needs peft: pip install peft, or train all weights"
    eight = refusal(replace(CONFIG, optimizer="adamw_bnb_8bit"))
    assert eight == (
        "optimizer adamw_bnb_8bit needs bitsandbytes: pip install bitsandbytes, or use adamw_torch"
    )
    assert "trackio needs trackio: pip install trackio" in refusal(replace(CONFIG, report_to=("trackio",)))
    check_libraries(CONFIG)


def test_adapters_are_checked() -> None:
    with pytest.raises(UsageError, match="rank of LoRA must be at least 1, got 0"):
        AdapterConfig(rank=0)
    with pytest.raises(UsageError, match="dropout"):
        AdapterConfig(dropout=1.0)
    with pytest.raises(UsageError, match="not the head"):
        AdapterConfig(targets=("q_proj", "lm_head"))
