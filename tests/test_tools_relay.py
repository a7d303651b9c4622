"""The relay's steps on tiny models: what one team scores and pushes, another pulls and trains on, where
`precompute` cannot be imported.

Machine two is a real virtual environment, which finds the libraries of this one and stage two's copy of the
checkout; its commands run in one process, not one each, to save their starts. The whole relay, with real
weights and an environment made by pip, is `python -m tools.relay OUT`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Tide
from small_precompute import conversation, write_corpus
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shards.codec import SparseCodec
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from tools.relay.machines import Machine, RelayError, Unreachable, pip, stage_two_source, store
from tools.relay.models import make_student
from tools.relay.report import tables
from tools.relay.run import Leg, RelayConfig, run_relay

SESSION = """
import contextlib, io, json, sys
from tools import cli

for line in sys.stdin:
    sys.argv, out = ["tide", *json.loads(line)], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as ended:
        print(json.dumps([ended.code, out.getvalue()]), flush=True)
"""


class Here(Machine):
    """Machine one: commands run in this process."""

    run: Tide

    def tide(self, *arguments: object) -> dict[str, Any]:
        result = type(self).run(*arguments, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out.splitlines()[-1]) | {"took_s": 1.0, "cpu_s": 1.0}


class InOneProcess(Machine):
    """Machine two: one process runs all commands."""

    process: subprocess.Popen[str]

    def tide(self, *arguments: object) -> dict[str, Any]:
        process = type(self).process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(a) for a in (*arguments, "--json")]) + "\n")
        process.stdin.flush()
        code, out = json.loads(process.stdout.readline())
        assert code == 0, self.log.read_text()
        return json.loads(out.splitlines()[-1]) | {"took_s": 1.0, "cpu_s": 1.0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with this one's libraries and stage two alone: folders named in a .pth file
    join the path, but what *they* install by such files, as an editable tide, does not."""
    root = tmp_path_factory.mktemp("two")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    libraries = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join([str(stage_two_source(root / "source")), *libraries]))
    return root / "venv" / "bin" / "python"


@pytest.fixture
def teacher(tmp_path: Path, teacher_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama with random weights whose tokenizer names no mask token."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(teacher_tokenizer))).save_pretrained(
        tmp_path / "teacher"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=teacher_tokenizer.backend_tokenizer,
        eos_token=teacher_tokenizer.eos_token,
        chat_template=teacher_tokenizer.chat_template,
    ).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def config(tmp_path: Path) -> RelayConfig:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [conversation(i) for i in range(24)])
    return RelayConfig(
        corpus=str(corpus), rows=24, holdout=0.3, max_length=160, vocab_size=300, steps=2, batch_tokens=400
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, str]]]:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with store(None) as (url, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield url, variables
    s3fs.S3FileSystem.clear_instance_cache()


def test_from_one_machine_to_the_other(
    config: RelayConfig,
    teacher: Path,
    alone: Path,
    s3: tuple[str, dict[str, str]],
    tide: Tide,
    tmp_path: Path,
) -> None:
    """Both tokenizer pipelines: the same dataset on both sides, students trained by their objectives and
    compared with their controls, on a machine that names `precompute` an unknown module."""
    url, variables = s3
    log = tmp_path / "log"
    machines = []
    for kind, name, python in ((Here, "one", Path(sys.executable)), (InOneProcess, "two", alone)):
        (tmp_path / name).mkdir()
        machines.append(
            kind(name=name, python=python, folder=tmp_path / name, log=log, environment=variables)
        )
    one, two = machines
    Here.run = staticmethod(tide)
    students = tmp_path / "students"
    legs = (Leg("cross", ("ce", "calm")), Leg("shared", ("ce", "kl")))
    for leg in legs:
        make_student(
            students / leg.name,
            tokenizer_of=teacher if leg.name == "shared" else None,
            corpus=config.corpus,
            vocab_size=config.vocab_size,
            steps=(2, 1),
            block_size=config.block_size,
            max_length=config.max_length,
            holdout=config.holdout,
            seed=0,
            report=lambda *_: None,
        )
    said: list[str] = []
    with log.open("w") as errors:
        environment = os.environ | variables | {"HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        InOneProcess.process = subprocess.Popen(
            [alone, "-P", "-c", SESSION], text=True, cwd=two.folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        with InOneProcess.process as process:
            result = run_relay(
                config, one, two, teacher=teacher, students=students, url=url, legs=legs,
                absent=("precompute",), say=said.append,
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.close()
    assert said[0] == "machine two cannot import precompute"
    for leg in legs:
        there, here = (Manifest.load(tmp_path / name / "data" / leg.name) for name in ("one", "two"))
        assert there == here
        assert (here.kind, here.teacher["kind"]) == (leg.name, "ar")
        origin = json.loads((tmp_path / "two" / "data" / leg.name / "origin.json").read_text())
        assert origin["url"] == f"s3://relay/{leg.name}"
        found = result["legs"][leg.name]
        assert found["push"]["moved"] == found["pull"]["moved"] == found["pull"]["files"] > 0
        assert found["precompute"]["totals"]["samples"].keys() == {"train", "heldout"}
        control, judged = leg.objectives
        assert {o: s["train"]["finished"] for o, s in found["students"].items()} == {
            control: True,
            judged: True,
        }
        assert judged in found["students"][judged]["train"]["last"]
        low, high = found["students"][judged]["eval"]["difference_interval"]
        assert low <= found["students"][judged]["eval"]["difference"] <= high
    moved, trained = tables(result)
    assert [row[0] for row in moved.texts()] == ["cross", "shared"]
    assert [row[1] for row in trained.texts()] == ["its start", "ce", "calm", "its start", "ce", "kl"]


def test_a_machine_with_too_much_proves_nothing(config: RelayConfig, tmp_path: Path) -> None:
    machine = Machine(name="two", python=Path(sys.executable), folder=tmp_path, log=tmp_path / "log")
    assert machine.importable(["precompute", "json", "no_such_package"]) == ["precompute", "json"]
    with pytest.raises(RelayError, match="machine two can import precompute"):
        run_relay(
            config, machine, machine, teacher=tmp_path, students=tmp_path, url="x",
            absent=("precompute",), say=lambda _: None,
        )  # fmt: skip


def test_commands_are_processes_with_a_log(tmp_path: Path) -> None:
    """What a failing command said last is the error; the log has all, results are the JSON line."""
    machine = Machine(name="two", python=Path(sys.executable), folder=tmp_path, log=tmp_path / "log")
    with pytest.raises(RelayError, match=r"\[two\] \$ tide verify nothing: error: .*nothing") as failed:
        machine.tide("verify", "nothing")
    assert "\n" not in str(failed.value)
    assert "[two] exit code 1" in (tmp_path / "log").read_text()
    (tmp_path / "out").mkdir()
    with pytest.raises(RelayError, match="no manifest"):
        machine.tide("pull", tmp_path / "out", "copy")
    noise, codec = NoiseConfig(views=1), SparseCodec(cap=8)
    with DatasetWriter(tmp_path / "data", "shared", synthetic_config(noise, codec)) as writer:
        writer.write_part(0, 0, 4, list(synthetic_rows(0, 4, kind="shared", noise=noise, codec=codec)), {})
        writer.finish()
    verified = machine.tide("verify", "data")
    assert (verified["command"], verified["ok"]) == ("verify", True)
    assert verified["took_s"] > 0
    assert verified["cpu_s"] > 0


def test_without_an_index_it_is_skipped_in_one_line(tmp_path: Path) -> None:
    """The script itself, where pip may ask nobody."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tools.relay", tmp_path / "out"],
        env=os.environ | offline, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("skipped: this needs a package index")
    with pytest.raises(Unreachable, match=r"ERROR.*no-such-package"):
        pip(Path(sys.executable), "--no-index", "no-such-package")


def test_a_store_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder means the same on both machines, which work in folders of their own."""
    monkeypatch.chdir(tmp_path)
    for given, meant in (("s3://bucket/relay/", "s3://bucket/relay"), ("share", str(tmp_path / "share"))):
        with store(given) as (url, variables):
            assert (url, variables) == (meant, {})
