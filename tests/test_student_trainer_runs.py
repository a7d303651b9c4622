"""What happens around the steps: evaluations, the best student, reports, pushes, and mismatches that stop a
run before its first step, through the command line."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from http_servers import serving
from hub_server import HubHandler
from safetensors.torch import load_file, save_file
from small_runs import BLOCK, CONFIG, MASK, SHARED, TIDAL, records, write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from shards.errors import TideError, UsageError
from shards.reader import LogitDataset
from student.checkpoint import checkpoints
from student.heldout import HeldOut
from student.loader import DatasetRows
from student.loop import TideTrainer
from student.model import load_student
from student.objective import parse_objective
from student.trainer import train
from tools import cli


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shared", student_tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), student_tokenizer)


def trainer(data: Path, student: Path, out: Path, **changes: Any) -> TideTrainer:
    model, tokenizer = load_student(student)
    out.mkdir(parents=True, exist_ok=True)
    return TideTrainer(
        model,
        tokenizer,
        TIDAL,
        replace(CONFIG, **changes),
        DatasetRows(LogitDataset(data), 0),
        out,
        block_size=BLOCK,
        mask_token_id=MASK,
        shared_vocab_size=SHARED,
        temperatures=(1.0, 2.0),
    )


def test_a_gradient_that_is_not_finite_stops_the_run(data: Path, student: Path, tmp_path: Path) -> None:
    """The loss is fine, one weight's gradient is not: no step, with clipping or without, all rows named."""
    for norm in (1.0, 0.0):
        t = trainer(data, student, tmp_path / str(norm), save_every=1, max_grad_norm=norm)
        before: dict[str, torch.Tensor] = {}

        def poison(gradient: torch.Tensor, t: TideTrainer = t, before: dict = before) -> torch.Tensor:
            if t.state.global_step != 2:
                return gradient
            before.update({k: v.clone() for k, v in t.model.state_dict().items()})
            return gradient * float("inf")

        t.model.model.norm.weight.register_hook(poison)
        with pytest.raises(
            TideError, match=r"^step 3: the gradient norm is (nan|inf) on rows s\d+/0, .*checkpoint-2"
        ):
            t.train()
        assert all(torch.equal(v, before[k]) for k, v in t.model.state_dict().items())
        assert checkpoints(t.out)[-1][0] == 2


def test_layers_run_twice_give_the_same_student(data: Path, student: Path, tmp_path: Path) -> None:
    """Gradient checkpointing changes memory, not a bit of the result; it does run layers twice (seen before
    the call: the second run stops as soon as it has what the backward pass needs)."""
    t = trainer(data, student, tmp_path / "once")
    calls: Counter[str] = Counter()
    t.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.update(["once"]))
    t.train()
    again = trainer(data, student, tmp_path / "twice", gradient_checkpointing=True)
    again.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.update(["twice"]))
    again.train()
    assert calls["twice"] == 2 * calls["once"]
    for name, value in t.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_evaluations_are_recorded_and_the_best_is_kept(data: Path, student: Path, tmp_path: Path) -> None:
    """Every second step and the last, on the same samples: values are those of the students themselves; a
    learning rate that wrecks the student makes an early one the best."""
    config = replace(
        CONFIG, steps=7, learning_rate=1.0, eval_every=2, eval_samples=5, keep_best=True, save_every=1,
        keep=9, schedule="constant", warmup=0.0, fresh_noise=0.0,
    )  # fmt: skip
    train(data, student, tmp_path, config, parse_objective("ce"))
    lines = {r["step"]: r["heldout_bits_per_byte"] for r in records(tmp_path) if "loss" not in r}
    assert list(lines) == [2, 4, 6, 7]
    judge = HeldOut(LogitDataset(data), 5)
    for step, value in lines.items():
        assert judge(load_student(tmp_path / f"checkpoint-{step}")[0]).bits_per_byte == value
    best = min(lines, key=lambda step: lines[step])
    assert best != 7
    kept, there = load_file(tmp_path / "best" / "model.safetensors"), tmp_path / f"checkpoint-{best}"
    for name, value in load_file(there / "model.safetensors").items():
        assert torch.equal(kept[name], value)
    assert judge(load_student(tmp_path / "best")[0]).bits_per_byte == lines[best]
    assert not (tmp_path / "best.part").exists()


def test_evaluations_change_nothing_else(data: Path, student: Path, tmp_path: Path) -> None:
    train(data, student, tmp_path / "without", CONFIG, TIDAL)
    train(data, student, tmp_path / "with", replace(CONFIG, eval_every=1, eval_samples=4), TIDAL)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("without", "with"))
    assert a == b
    assert records(tmp_path / "without") == [r for r in records(tmp_path / "with") if "loss" in r]


def test_reports_reach_tensorboard(data: Path, student: Path, tmp_path: Path) -> None:
    """Losses and evaluations under their names at their steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, report_to=("tensorboard",), eval_every=3, eval_samples=4)
    train(data, student, tmp_path, config, TIDAL)
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    logged = {r["step"]: r["loss"] for r in records(tmp_path) if "loss" in r}
    assert losses == pytest.approx(logged)
    assert [e.step for e in events.Scalars("eval/bits_per_byte")] == [3, 6]


# Through the command line


@pytest.fixture
def tide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return run


def changed(student: Path, out: Path, **settings: Any) -> Path:
    """A copy of a student folder with other settings in its config.json."""
    out.mkdir()
    for file in student.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((student / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | settings))
    return out


def test_mismatches_stop_before_the_first_step(
    tide: Any, data: Path, student: Path, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One line each, which names both sides and the remedy; no folder is begun."""
    made = {
        "hash": {"tokenizer_hash": "c" * 64},
        "ids": {"vocab_size": 400},
        "long": {"max_length": 65},
    }
    sets = {k: write_dataset(tmp_path / k, student_tokenizer, **v) for k, v in made.items()}  # type: ignore[arg-type]
    cross = write_dataset(tmp_path / "cross", student_tokenizer, "cross")
    other_blocks = changed(student, tmp_path / "blocks", block_size=32)
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (1, "is not the one the dataset was made with .cccccccccccc", ("--data", sets["hash"])),
        (1, "has 304 ids, the dataset stores ids below 400", ("--data", sets["ids"])),
        (1, "has 64 positions, the dataset's longest sample needs 72", ("--data", sets["long"])),
        (1, "trained with blocks of 32 .* the dataset has blocks of 8", ("--student", other_blocks)),
        (2, "objective kl needs teacher positions", ("--data", cross)),
        (2, "objective kl at temperature 3: the dataset stores tails for 1, 2", ("--temperature", 3)),
        (2, "trackio|wandb|tensorboard", ("--report-to", "nowhere")),
        (2, "keep_best needs evaluations", ("--keep-best",)),
        (2, "no teacher target to kl", ("--fresh-noise", 1)),
        (2, "fresh_noise is a share", ("--fresh-noise", 2)),
        (2, "--vram 0.1: the leanest settings need", ("--vram", 0.1)),
        (2, "OWNER/NAME, got 'mine'", ("--push-to", "mine")),
        (2, "--deepspeed .*nowhere.json: no such file", ("--deepspeed", "nowhere.json")),
        (2, "eval_every does not go with fsdp", ("--fsdp", "--eval-every", 2)),
    ]
    for code, words, flags in cases:
        given = {"--data": data, "--student": student, "--out": tmp_path / "run", "--objective": "kl"}
        given |= {"--steps": 2}
        rest = [x for name, value in given.items() if name not in flags for x in (name, value)]
        result = tide("train", *rest, *flags)
        assert result.code == code, (flags, result.err)
        lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.err
        assert "Traceback" not in result.err
        assert re.search(words, lines[0]), lines[0]
        assert not (tmp_path / "run").exists(), flags
    missing = tide("train", "--data", data, "--student", student, "--out", tmp_path / "run")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "Missing option '--steps'; or pass --epochs" in missing.err


def test_a_broken_student_stops_at_its_first_loss(
    tide: Any, data: Path, student: Path, tmp_path: Path
) -> None:
    """A weight that is not a number, a learning rate that makes one: the step, the rows, the checkpoint."""
    broken = changed(student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    common = ["--data", data, "--objective", "kl", "--batch-tokens", 200, "--save-steps", 1, "--warmup", 0]
    result = tide("train", *common, "--steps", 2, "--student", broken, "--out", tmp_path / "a")
    assert result.code == 1
    assert re.search(r"error: step 1: the loss is not finite .* on rows s\d+/0", result.err)
    assert "no checkpoint was saved yet" in result.err
    result = tide("train", *common, "--steps", 4, "--student", student, "--out", tmp_path / "b", "--lr", 1e20)
    assert result.code == 1
    assert re.search(r"step 2: the (loss is not finite|gradient norm is) .*checkpoint-1;", result.err)
    assert [step for step, _ in checkpoints(tmp_path / "b")] == [1]


def test_vram_picks_and_says(tide: Any, data: Path, student: Path, tmp_path: Path) -> None:
    """What it picks is printed and saved; what was given stays."""
    common = ["--data", data, "--student", student, "--objective", "kl", "--steps", 1, "--batch-tokens", 200]
    done = tide("train", *common, "--out", tmp_path / "run", "--vram", 8, "--accumulation", 2)
    assert done.code == 0, done.err
    assert "GB a GPU of 8.6 GB" in done.err
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())["config"]
    assert settings["accumulation"] == 2
    assert not settings["gradient_checkpointing"]


class ModelHub(HubHandler):
    """The stand-in hub serving model repositories, and saying who somebody is."""

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer_json({"name": "me", "type": "user", "orgs": [], "auth": {}})
            return
        self.path = self.path.replace("/api/models/", "/api/datasets/")
        super().do_GET()

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            body = json.dumps({"url": self._page(name), "error": "exists"}).encode()
            self.answer(409, body, Content_Type="application/json")
        else:
            super()._create(wanted)

    def do_POST(self) -> None:
        self.path = self.path.replace("/api/models/", "/api/datasets/")
        super().do_POST()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    from huggingface_hub import constants

    state: dict[str, Any] = {"repos": {}, "asked": Counter(), "large": {}}
    with serving(ModelHub, **state) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield state["repos"]


def test_a_finished_student_is_pushed(
    tide: Any, data: Path, student: Path, tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model folder arrives byte for byte, without checkpoints and pickles; the same command with --resume
    pushes again."""
    run = tmp_path / "run"
    common = ["train", "--data", data, "--student", student, "--out", run, "--objective", "kl", "--steps", 1]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    refused = tide(*common, "--push-to", "me/student")
    assert refused.code == 2
    assert "not logged in" in refused.err
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    done = tide(*common, "--push-to", "me/student", "--json")
    assert done.code == 0, done.err
    assert "me/student" in json.loads(done.out)["pushed"]
    repo = hub["me/student"]
    files = repo.commits[repo.branches["main"]]
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "train_config.json"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]
    again = tide(*common, "--push-to", "me/student", "--resume")
    assert again.code == 0, again.err


def test_where_sharded_weights_cannot_go(data: Path, student: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, eval_every=2, trainer_args={"deepspeed": "x.json"})
    with pytest.raises(UsageError, match="eval_every does not go with deepspeed"):
        train(data, student, tmp_path / "run", config, TIDAL)
