"""`tide plan precompute` and `tide plan all` against runs: a plan that sees a part of a corpus, and the
dataset really made of all of it, its FLOPs counted while it was made."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Tide, refused
from flops import flops_of
from transformers import PreTrainedTokenizerFast

from precompute.config import PrecomputeConfig
from precompute.runner import precompute
from shards.codec import DenseCodec, ExactCodec, SparseCodec
from shards.manifest import Manifest
from shards.reader import LogitDataset
from student.trainer import steps_of
from tools.planning.devices import CPU, DEVICES, device_named
from tools.planning.models import KNOWN

ROWS, SAMPLE = 90, 64
CODECS: dict[str, Any] = {"sparse": SparseCodec(cap=16), "exact": ExactCodec(), "dense": DenseCodec()}
COMMON = {"views": 2, "block_size": 8, "max_length": 192, "device": "cpu"}
FLAGS = (
    *("--views", 2, "--block-size", 8, "--student-max-length", 192, "--head-entries", 16),
    *("--dtype", "float32", "--device-name", "cpu", "--peak-tflops", 0.05, "--json"),
)


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Model folders `student`, `teacher_dense` (its tokenizer) and `teacher_moe` (one of its own)."""
    root = tmp_path_factory.mktemp("plan")
    for name, tokenizer in (
        ("student", student_tokenizer),
        ("teacher_dense", student_tokenizer),
        ("teacher_moe", teacher_tokenizer),
    ):
        shutil.copytree(golden / "D_trace" / "models" / name, root / name)
        tokenizer.save_pretrained(root / name)
    return root


Made = Callable[..., tuple[Manifest, int]]


@pytest.fixture(scope="module")
def make(work: Path) -> Made:
    """Makes a dataset, once for the same settings: its manifest, and the FLOPs that ran."""
    made: dict[str, tuple[Manifest, int]] = {}

    def run(teacher: str, codec: str = "sparse", limit: int = ROWS, **changes: Any) -> tuple[Manifest, int]:
        name = f"{teacher}-{codec}-{limit}-{changes}"
        if name not in made:
            config = PrecomputeConfig(
                teacher=str(work / teacher),
                student=str(work / "student"),
                corpus="builtin:stdlib",
                out=work / name,
                codec=CODECS[codec],
                limit=limit,
                **COMMON,
                **changes,
            )
            flops = flops_of(lambda: precompute(config))
            made[name] = Manifest.load(config.out), flops
        return made[name]

    return run


def planned(
    tide: Tide, work: Path, teacher: str, *more: object, command: str = "precompute"
) -> dict[str, Any]:
    """The object of a plan that looks at `SAMPLE` of `ROWS` rows."""
    corpus = ("--corpus", "builtin:stdlib", "--rows", ROWS, "--sample", SAMPLE)
    models = ("--teacher", work / teacher, "--student", work / "student")
    said = tide("plan", command, *models, *corpus, *FLAGS, *more)
    assert said.code == 0, said.err
    result: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    return result


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("teacher", "compdemo"), [
    ("teacher_dense", True), ("teacher_moe", False),
    pytest.param("teacher_dense", False, marks=SLOW), pytest.param("teacher_moe", True, marks=SLOW),
])  # fmt: skip
def test_flops_and_tokens_of_a_run(tide: Tide, work: Path, make: Made, teacher: str, compdemo: bool) -> None:
    """Shared tokenizer with a dense teacher, two tokenizers with experts: within a tenth of what ran."""
    manifest, flops = make(teacher, compdemo=compdemo)
    found = planned(tide, work, teacher, "--compdemo" if compdemo else "--no-compdemo")
    assert found["kind"] == manifest.kind
    engine, naive = found["teacher"]["engine"], found["teacher"]["naive"]
    assert engine["flops"] == pytest.approx(flops, rel=0.1)
    assert engine["tokens"] == pytest.approx(manifest.report["teacher_tokens"], rel=0.1)
    assert found["views"] == pytest.approx(manifest.totals["rows"], rel=0.1)
    assert naive["flops"] > 3 * engine["flops"]
    assert engine["gpu_hours"] >= engine["flops"] / (0.05e12 * 0.4) / 3600


@pytest.mark.parametrize(("teacher", "codec"), [
    ("teacher_dense", "sparse"), ("teacher_dense", "exact"), ("teacher_moe", "sparse"),
    pytest.param("teacher_dense", "dense", marks=SLOW),
])  # fmt: skip
def test_bytes_of_a_run(tide: Tide, work: Path, make: Made, teacher: str, codec: str) -> None:
    """Within a fifth of what was written, files beside the shards included. How many entries a sparse
    position keeps is the teacher's: it is taken from a few rows, as the command says."""
    manifest, _ = make(teacher, codec)
    few, _ = make(teacher, limit=8)
    kept = []
    if "distilled" in few.totals:
        kept = ["--kept", few.totals["target_entries"] / few.totals["distilled"]]
    found = planned(tide, work, teacher, "--codec", codec, *kept)["shards"]
    written = manifest.totals["bytes"] + sum(f.bytes for f in manifest.settings.files)
    assert found["bytes"] == pytest.approx(written, rel=0.2)
    assert found["beside_bytes"] == pytest.approx(sum(f.bytes for f in manifest.settings.files), rel=0.1)
    assert found["bytes_per_view"] == pytest.approx(
        manifest.totals["bytes"] / manifest.totals["rows"], rel=0.2
    )


def test_bytes_like_a_dataset_made_before(tide: Tide, work: Path, make: Made) -> None:
    manifest, _ = make("teacher_dense")
    few = make("teacher_dense", limit=24, fidelity=8)[0]
    like = work / "teacher_dense-sparse-24-{'fidelity': 8}"
    shards = planned(tide, work, "teacher_dense", "--like", like)["shards"]
    assert shards["bytes"] == pytest.approx(manifest.totals["bytes"], rel=0.2)
    assert shards["fidelity"]["gradient_cosine"] == few.fidelity["gradient_cosine"]  # type: ignore[index]
    models = ("--teacher", work / "teacher_moe", "--student", work / "student", "--corpus", "builtin:stdlib")
    refused(
        tide("plan", "precompute", *models, "--rows", 9, "--sample", 9, *FLAGS, "--like", like),
        2, "kind shared", "the plan is of kind cross",
    )  # fmt: skip


def test_an_autoregressive_teacher_runs_once_for_all_views(tide: Tide, work: Path) -> None:
    ar = ("--teacher-kind", "ar")
    one, four = (planned(tide, work, "teacher_dense", *ar, "--views", n)["teacher"]["engine"] for n in (1, 4))
    assert four["tokens"] < 1.2 * one["tokens"]
    assert planned(tide, work, "teacher_dense", *ar)["teacher"]["attention"] == "causal"


def test_a_whole_project(tide: Tide, work: Path, make: Made) -> None:
    """Steps of an epoch as `tide train` would count them on the dataset; what is added up adds up."""
    manifest, _ = make("teacher_dense")
    train = ("--batch-tokens", 1500, "--epochs", 3, "--student-device", "L4", "--student-gpus", 2)
    found = planned(tide, work, "teacher_dense", *train, command="all")
    student, offline, online = (found[name] for name in ("student", "offline", "online"))
    dataset = LogitDataset(work / f"teacher_dense-sparse-{ROWS}-{{}}")
    assert student["epoch_steps"] == pytest.approx(steps_of(dataset, 1, 1500), rel=0.1)
    assert student["steps"] == pytest.approx(3 * student["epoch_steps"], abs=3)
    assert student["epochs_before_noise_repeats"] == manifest.noise.views
    step = student["step"]
    assert step["flops"] == step["forward"] + step["backward"] + step["head"]
    assert offline["student_gpu_hours"] == pytest.approx(student["steps"] * step["seconds"] * 2 / 3600)
    assert offline["teacher_gpu_hours"] == found["teacher"]["engine"]["gpu_hours"]
    assert online["teacher_gpu_hours_padded"] > online["teacher_gpu_hours_packed"]
    weights = found["teacher"]["parameters"] * 4
    assert online["student_gpu_bytes"] > student["memory"]["peak_bytes"] + weights
    assert student["assumptions"]["device"] == "L4"


def test_known_models_need_no_folder_and_invented_lengths_no_corpus(tide: Tide) -> None:
    """The sizes that the published models have, and tables that name every assumption."""
    flags = ("--lengths", "74,200", "--rows", 1000, "--sample", 12, "--json")
    for name, kind, parameters in (("LLaDA2.0-mini", "cross", 16.256e9), ("WeDLM-8B", "shared", 8.191e9)):
        said = tide(
            "plan", "precompute", "--teacher", name, "--student", "Qwen3-0.6B", "--kind", kind, *flags
        )
        assert said.code == 0, said.err
        found = json.loads(said.out)
        assert found["teacher"]["parameters"] == pytest.approx(parameters, rel=1e-3)
        assert found["teacher"]["memory"]["fits"]
        assert found["teacher"]["memory"]["peak_bytes"] > 2 * parameters
        for word in ("--efficiency 0.4", "989.4 TFLOP/s", "--padded-to", "--context-gb", "naive / engine"):
            assert word in said.err
    assert found["assumptions"]["kept"] == pytest.approx(9.6, abs=1)
    assert "--kept" in said.err


def test_what_changes_the_answer(tide: Tide) -> None:
    """Hours go with peak and efficiency, bytes with entries kept; a small card does not fit the teacher."""

    def ask(*more: object) -> dict[str, Any]:
        models = ("--teacher", "WeDLM-8B", "--student", "Qwen3-0.6B", "--kind", "shared")
        said = tide("plan", "precompute", *models, "--lengths", "74,200", "--sample", 3, *more, "--json")
        assert said.code == 0, said.err
        result: dict[str, Any] = json.loads(said.out)
        return result

    base = ask()
    hours = base["teacher"]["engine"]["gpu_hours"]
    assert ask("--efficiency", 0.2)["teacher"]["engine"]["gpu_hours"] == pytest.approx(2 * hours)
    slower = ask("--device-name", "A100-SXM-80")["teacher"]["engine"]["gpu_hours"]
    assert slower == pytest.approx(hours * 989.4 / 312)
    more = ask("--kept", 40, "--link", 100)
    assert more["shards"]["bytes"] > 2 * base["shards"]["bytes"]
    assert more["shards"]["link_hours"] == pytest.approx(more["shards"]["bytes"] * 8 / 1e8 / 3600)
    assert not ask("--device-name", "RTX-3090", "--memory-gib", 12)["teacher"]["memory"]["fits"]
    few, many = (ask("--rows", n)["shards"]["bytes"] for n in (2560, 25600))
    assert many == pytest.approx(10 * few)  # whole parts


@pytest.mark.parametrize(("more", "words"), [
    (["--device-name", "H300"], ["unknown device 'H300'", "H100-SXM", "cpu"]),
    (["--device-name", "cpu"], ["--peak-tflops"]),
    (["--dtype", "float32"], ["bfloat16", "--peak-tflops"]),
    (["--peak-tflops", 0], ["--peak-tflops must be positive"]),
    (["--efficiency", 0], ["--efficiency", "above 0 and at most 1"]),
    (["--efficiency", 1.01], ["--efficiency", "1.01"]),
    (["--lengths", "74"], ["--lengths must be two numbers"]),
    (["--length-spread", "-1,1"], ["--length-spread must be two numbers"]),
    (["--kind", "auto"], ["--kind shared or --kind cross"]),
    (["--corpus", "builtin:stdlib"], ["--corpus and --lengths exclude each other"]),
    (["--gpus", 0], ["--gpus must be at least 1"]),
    (["--kept", 0], ["--kept must be at least 1"]),
    (["--link", 0], ["--link must be positive"]),
    (["--codec", "gzip"], ["codec must be one of sparse, exact, dense"]),
    (["--student-gpus", 0], ["--student-gpus must be at least 1"]),
    (["--epochs", 0], ["--epochs must be positive"]),
    (["--student-efficiency", 2], ["--student-efficiency", "above 0 and at most 1"]),
    (["--student-device", "H300"], ["unknown device 'H300'"]),
    (["--vram", 3], ["--vram 3", "the leanest settings need"]),
])  # fmt: skip
def test_refused_in_one_line(tide: Tide, more: list[object], words: list[str]) -> None:
    models = ("--teacher", "WeDLM-8B", "--student", "Qwen3-0.6B", "--sample", 4)
    given = ["--kind", "shared", "--lengths", "74,200", *more]
    refused(tide("plan", "all", *models, *given), 2, *words)


def test_models_and_corpora_that_cannot_be_planned_with(tide: Tide, work: Path, tmp_path: Path) -> None:
    """An unknown architecture, no folder, a corpus without a usable row, or with none that gives a sample."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "mute.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    lengths = ("--student", "Qwen3-0.6B", "--kind", "shared", "--lengths", "74,200")
    for teacher, word in (("odd", "model_type 'mamba' is not one of"), ("nowhere", "no such model folder")):
        refused(tide("plan", "precompute", "--teacher", tmp_path / teacher, *lengths), 1, word)
    models = ("--teacher", work / "teacher_dense", "--student", work / "student", "--corpus")
    refused(tide("plan", "precompute", *models, tmp_path / "bad.jsonl"), 1, "none of 1 rows is usable")
    refused(
        tide("plan", "precompute", *models, tmp_path / "mute.jsonl"),
        1,
        "gives a sample",
        "no assistant message",
    )
    no_text = ("--teacher", "WeDLM-8B", "--student", "Qwen3-0.6B", "--kind", "shared")
    refused(tide("plan", "precompute", *no_text), 2, "--corpus SPEC", "--lengths")
    refused(tide("plan", "precompute", *no_text, "--corpus", "builtin:stdlib"), 1, "no tokenizer found")


def test_rows_are_counted_where_nobody_says_how_many(tide: Tide, work: Path, tmp_path: Path) -> None:
    """The whole corpus is read, and the sample drawn from all of it."""
    rows = [{"prompt": f"Count to {i}.", "completion": " ".join(map(str, range(i)))} for i in range(1, 31)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    models = ("--teacher", work / "teacher_dense", "--student", work / "student")
    said = tide("plan", "precompute", *models, "--corpus", tmp_path / "c.jsonl", "--sample", 10, *FLAGS)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["corpus_rows"] == 30
    assert found["sample"]["samples"] == 10


def test_devices() -> None:
    """Figures by name; those given win."""
    assert device_named("H100-SXM").kind == "cuda"
    assert device_named("H100-SXM", tflops=500.0).tflops == 500
    assert device_named(CPU, tflops=0.1).kind == "cpu"
    assert all(d.tflops > 0 and d.gib > 0 and d.gb_per_s > 0 for d in DEVICES.values())
    assert set(KNOWN) == {"LLaDA2.0-mini", "WeDLM-8B", "Qwen3-0.6B"}


DOCS = Path(__file__).parent.parent / "docs" / "planning.md"


@pytest.mark.parametrize("column", [pytest.param(1, marks=SLOW), 2])
def test_the_figures_of_the_docs_are_the_commands(tide: Tide, column: int) -> None:
    """The documented command prints every figure of its column."""
    text = DOCS.read_text().split("## Two teachers")[1].split("Plans, not measurements")[0]
    commands = [line.split() for line in text.splitlines() if line.startswith("    tide plan")]
    said = tide(*commands[column - 1][1:])
    assert said.code == 0, said.err
    rows = [line.split("|")[column + 1] for line in text.splitlines() if line.startswith("|")][2:]
    figures = [figure for row in rows for figure in re.findall(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", row)]
    assert len(figures) == 17
    for figure in figures:
        assert figure in said.out, figure
