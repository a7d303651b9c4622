"""Every command that README, CONTRIBUTING and docs show: its options exist, and it runs.

A page's commands run in order, as they stand, in a folder that holds small models, corpora, datasets and
runs under the names the page uses; sizes alone are overridden (`SMALL`). What needs a GPU, a store or a hub
that is not here is parsed, and the test that runs it elsewhere is named (`ELSEWHERE`).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import zstandard
from commands import Tide, refused
from safetensors.torch import save_file
from small_precompute import conversation, write_corpus, write_folders
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from tools import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    if p.name not in ("benchmarks.md", "LOG.md")  # records of what was run, with the commands of their day
)
STUDENT = "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"

SMALL = {
    "precompute": shlex.split(
        "--limit 12 --dtype float32 --max-dropped 1 --student-max-length 64 --holdout 0.3"
    ),
    "train": ["--steps", "2", "--batch-tokens", "256"],
    "generate": ["--max-new-tokens", "4"],
}
"""Given after what a page says, so that it wins."""

NAMES = {
    "TEACHER": "tencent/WeDLM-8B-Instruct",
    "STUDENT": "student",
    "SPEC": "sft.jsonl",
    "151646": "280",
}
"""What stands for a reader's own models and corpus, and a number that follows from real tokenizers."""

ELSEWHERE = {
    r"^make |^\.ci/run": "this very run is one of them",
    r"^pip install": "extras are checked against pyproject.toml",
    r"^tide (push|pull|verify|merge)": "tests/test_tools_share.py runs the page's commands against stand-ins",
    r"^tide demo|^tide bench": "tests/test_tools_demo.py and test_tools_bench_*.py, at small size",
    r"^python -m studies": "tests/test_studies.py, at smoke size",
    r"--suite|--tasks": "tests/test_tools_harness.py, on local tasks: data sets are on the hub",
    r"--vram|--fsdp|--deepspeed|--gpus|--qlora": "needs a GPU",
    r"--chat": "needs a terminal: tests/test_tools_generate.py",
    r"\.\.\.": "a part of a command",
    r"--engine ray|^ray ": "tests/test_precompute_ray.py",
    r"--backend vllm": "tests/test_precompute_vllm.py, in an environment of its own",
    r"^python -m tools\.relay": "tests/test_tools_relay.py, on tiny models: it fetches real weights",
}


def commands(page: str) -> list[str]:
    """What a page shows in indented or fenced blocks, comments and line continuations resolved."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^    .*\n)+", plain, re.M)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    found = (re.sub(r"\s+#.*", "", " ".join(line.split())) for line in lines)
    words = r"(tide|make|python|pip|torchrun|ray|\.ci/run)\b"
    return [c for c in found if re.match(words, c)]


def elsewhere(command: str) -> str | None:
    return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, command)), None)


def parsed(command: str) -> None:
    """The options of a `tide` command exist and take what they are given. Raises what the parser raises."""
    arguments = shlex.split(command)[1:]
    if "..." in arguments:
        return
    found: Any = typer.main.get_command(cli.app)
    ctx = found.make_context("tide", [], resilient_parsing=True)
    while hasattr(found, "commands") and arguments and arguments[0] in found.commands:
        found, arguments = found.commands[arguments[0]], arguments[1:]
    config = [i for i, a in enumerate(arguments) if a == "--config"]
    for i in reversed(config):  # the file is the running test's matter
        arguments = arguments[:i] + arguments[i + 2 :]
    found.make_context(found.name, arguments, parent=ctx, resilient_parsing=bool(config))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    extras = (ROOT / "pyproject.toml").read_text()
    for command in commands(page):
        if command.startswith("tide "):
            parsed(command)
        if command.startswith("make "):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), command
        for names in re.findall(r"tide\[([^\]]+)\]", command):
            for name in names.split(","):
                assert f"\n{name} = [" in extras, command


def test_links_lead_somewhere() -> None:
    """Relative links of all pages, anchors left out."""
    for page in [*PAGES, "docs/benchmarks.md", "docs/LOG.md"]:
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_every_exception_is_needed() -> None:
    everything = [c for page in PAGES for c in commands(page)]
    assert len(everything) > 50
    unused = [p for p in ELSEWHERE if not any(re.search(p, c) for c in everything)]
    assert not unused, unused


@pytest.fixture(scope="module")
def stock(
    tmp_path_factory: pytest.TempPathFactory,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Models and corpora under the names that the pages use."""
    made = write_folders(tmp_path_factory.mktemp("made"), golden, student_tokenizer, teacher_tokenizer)
    root = tmp_path_factory.mktemp("stock")
    shutil.copytree(made / "teacher_dense", root / "tencent/WeDLM-8B-Instruct")
    shutil.copytree(made / "teacher_moe", root / "inclusionAI/LLaDA2.0-mini")
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=len(student_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    for name in (STUDENT, "student"):
        A2DQwen3LMHeadModel(config).save_pretrained(root / name)
        student_tokenizer.save_pretrained(root / name)
    shutil.copytree(made / "teacher_dense", root / "Qwen/Qwen3-8B")
    rows = [conversation(i) for i in range(12)]
    write_corpus(root / "sft.jsonl", rows)
    (root / "allenai/tulu-3-sft-mixture").mkdir(parents=True)
    write_corpus(root / "allenai/tulu-3-sft-mixture/rows.jsonl", rows)
    (root / "sft.jsonl.zst").write_bytes(zstandard.compress((root / "sft.jsonl").read_bytes()))
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "the river runs"}) + "\n")
    return root


@pytest.fixture
def folder(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(stock, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def scored(tide: Tide, out: str, *more: str) -> None:
    options = [
        "--student",
        STUDENT,
        "--corpus",
        "sft.jsonl",
        "--holdout",
        "0.3",
        "--views",
        "2",
        "--out",
        out,
    ]
    teacher = ["--teacher", "tencent/WeDLM-8B-Instruct", *SMALL["precompute"]]
    result = tide("precompute", *options, *teacher, *more)
    assert result.code == 0, result.err


def trained(tide: Tide, out: str, data: str, objective: str) -> None:
    options = ["--data", data, "--student", STUDENT, "--objective", objective, "--out", out, *SMALL["train"]]
    result = tide("train", *options)
    assert result.code == 0, result.err


def prepare(tide: Tide, page: str) -> None:
    """What a page takes for granted."""
    if page == "docs/evaluation.md":
        scored(tide, "data/logits")
        for name, objective in (("kl", "kl"), ("ce", "ce"), ("tidal", "tidal")):
            trained(tide, f"runs/{name}", "data/logits", objective)
        Path("results").mkdir()
    elif page == "README.md":
        scored(tide, "given")
        trained(tide, "runs/ce", "given", "ce")
        trained(tide, "runs/tidal", "given", "tidal")
        shutil.rmtree("student")  # the page makes it
    elif page == "docs/extending.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        code = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
        assert code is not None
        Path("my_objective.py").write_text(code[1])
        scored(tide, "data")
        trained(tide, "runs/ce", "data", "ce")
        renamed_teacher(Path("my-dllm"), sections(text)[-1])
    elif page == "docs/reproducing.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        settings = re.search(r"^```yaml\n(.*?)^```", text, re.M | re.S)
        assert settings is not None
        # A mixture of local folders under the names of the hub's data sets; configurations and filters are
        # the hub's own, and tested in tests/test_precompute_mixture.py.
        local = re.sub(r"corpus: .*", "corpus: sft.jsonl", settings[1]).replace("0.005", "0.3")
        Path("paper.yaml").write_text(local)
    elif page in ("docs/training.md", "docs/method.md"):
        scored(tide, "data")


def sections(text: str) -> list[dict[str, Any]]:
    """The `tide_teacher` objects of the worked example, first and last attempt."""
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)]


def renamed_teacher(folder: Path, section: dict[str, Any]) -> None:
    """A Qwen2 dLLM that calls two things by other names, described by `section`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = Qwen2ForCausalLM(config)
    shutil.copytree("student", folder, dirs_exist_ok=True)  # its tokenizer
    renamed = {
        name.replace("lm_head", "head").replace("self_attn.o_proj", "self_attn.out"): x
        for name, x in model.state_dict().items()
    }
    save_file({name: x.contiguous() for name, x in renamed.items()}, folder / "model.safetensors")
    published = config.to_dict() | {"model_type": "my-dllm", "depth": 2, "tide_teacher": section}
    del published["num_hidden_layers"], published["layer_types"]
    (folder / "config.json").write_text(json.dumps(published))


def test_first_attempt_is_refused(tide: Tide, folder: Path) -> None:
    """As the worked example says: what is in the way has a name."""
    first, last = sections((ROOT / "docs/extending.md").read_text(encoding="utf-8"))
    command = ["--teacher", "my-dllm", "--student", "student", "--corpus", "sft.jsonl", "--out", "try"]
    renamed_teacher(Path("my-dllm"), first)
    refused(tide("precompute", *command), 1, "lacks lm_head.weight, model.layers.0.self_attn.o_proj.weight")
    renamed_teacher(Path("my-dllm"), first | {"fields": last["fields"]})
    refused(tide("precompute", *command), 1, "lm_head.weight")


RUN = [page for page in PAGES if any(elsewhere(c) is None for c in commands(page))]


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, tide: Tide, folder: Path) -> None:
    prepare(tide, page)
    for command in commands(page):
        if elsewhere(command):
            continue
        words = shlex.split(command)
        small = SMALL.get(words[1], []) if words[0] == "tide" else SMALL["train"]
        given = [NAMES.get(word, word) for word in words]
        if words[0] in ("python", "torchrun"):
            bin = Path(sys.executable).parent
            done = subprocess.run(
                [bin / words[0], *given[1:], *small],
                capture_output=True,
                text=True,
                cwd=folder,
                env=os.environ | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"},
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        else:
            result = tide(*given[1:], *small)
            assert result.code == 0, f"{command}\n{result.err}"
