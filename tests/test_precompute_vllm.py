"""Backend vllm against backend transformers: the same questions to the same folders, in two processes.

Needs an environment with vLLM, which `make test-vllm` makes; elsewhere these tests are skipped.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_vllm
from commands import Tide, refused
from small_precompute import conversation, write_corpus
from small_vllm import CASES, CODECS, Case, ask, asking_of, make_folder
from test_precompute_runner import rows_of
from transformers import PreTrainedTokenizerFast

from precompute.backends.vllm_requests import from_bytes
from precompute.backends.vllm_version import require_vllm
from precompute.rows import Answers
from precompute.teachers.base import TransformersTeacher
from precompute.teachers.load import load_teacher
from shards.errors import UsageError
from shards.manifest import Manifest
from shards.row import DenseTarget, ExactTarget, SparseTarget

try:
    require_vllm()
    missing = ""
except UsageError as e:
    missing = str(e)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"{missing} (make test-vllm)")]

WORST = 1e-4
"""Nats; measured: at most 4e-5, log-probs reaching down to -60."""
WRONG = {"bidirectional": "causal", "block-causal": "bidirectional", "causal": "bidirectional"}
"""Attention kind -> another one over the same tokens; of a staircase one that does not see the clean text."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by teacher; what vLLM says of them is put beside."""
    root = tmp_path_factory.mktemp("vllm")
    for case in CASES:
        make_folder(root, case.teacher)
    return root


@pytest.fixture(scope="module")
def said(folders: Path) -> Path:
    """What it says of each case and codec."""
    in_vllm(folders)
    return folders


def in_vllm(root: Path, devices: int = 1, **changes: str) -> None:
    command = [sys.executable, small_vllm.__file__, str(root), str(devices)]
    env = environment() | changes
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def environment() -> dict[str, str]:
    paths = [str(Path(small_vllm.__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_answers(case: Case, said: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(case, said, capsys)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_two_devices_say_the_same(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine in three processes, two of which share the model; they know its class by the entry point."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    in_vllm(folders, 2, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}")
    compare(small_vllm.SHARED_OUT, folders, capsys, devices=2)


def compare(case: Case, said: Path, capsys: pytest.CaptureFixture[str], devices: int = 1) -> None:
    """Every log-prob of every position, top-k ids (two of which may be closer than rounding), tails at each
    temperature, hidden states; and a teacher with a wrong mask says something else."""
    teacher = load_teacher(said / case.teacher, kind=case.kind, attention=case.attention)
    asking = asking_of(case, teacher.spec)
    ours: dict[str, Answers] = dict(ask(case, teacher, asking))
    theirs = {
        name: from_bytes((said / f"{case.name}, {devices}.{name}").read_bytes(), codec)
        for name, codec in CODECS.items()
    }
    worst = 0.0
    for name, (logp, target) in theirs.items():
        want = ours[name]
        worst = max(worst, gap(logp, want.gold_logp))
        if isinstance(target, DenseTarget):
            worst = max(worst, gap(target.logp, want.target.logp))
        elif isinstance(target, ExactTarget):
            np.testing.assert_allclose(target.hidden, want.target.hidden, atol=1e-3, rtol=1e-4)
        elif isinstance(target, SparseTarget):
            np.testing.assert_array_equal(target.counts, want.target.counts)
            place = np.repeat(np.arange(len(logp)), target.counts)
            swapped = np.flatnonzero(target.ids != want.target.ids)  # which only ties may be
            known = ours["dense"].target.logp[place[swapped]]
            at = np.arange(len(swapped))
            ties = known[at, target.ids[swapped]] - known[at, want.target.ids[swapped]]
            assert np.abs(ties).max(initial=0) < WORST
            worst = max(worst, gap(target.logp, want.target.logp), gap(target.tails, want.target.tails))
    wrong = replace(teacher.spec, attention=WRONG.get(teacher.spec.attention, "bidirectional"))
    control = dict(ask(case, TransformersTeacher(teacher.model, wrong), asking))["dense"]
    differs = gap(theirs["dense"][1].logp, control.target.logp)
    with capsys.disabled():
        found = f"worst {worst:.1e}, {len(swapped)} ties, wrong mask {differs:.1f}"
        print(f"\n  {case.name}, {devices} device(s): {len(want.gold_logp)} positions, {found}", end="")
    assert worst < WORST
    assert differs > 0.1


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; NaN (a true token outside the shared vocabulary) is in the same places."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    return float(np.nanmax(np.abs(a - b)))


RUN = "from tools.cli import main; main()"
ALONE = """
import sys, torch
from pathlib import Path
from vllm.v1.core.sched.scheduler import Scheduler
import small_vllm as small
from precompute.backends import vllm_scheduler, vllm_teacher
from precompute.teachers.load import describe_teacher
from shards.codec import SparseCodec
vllm_scheduler.BlockScheduler.get_request_counts = Scheduler.get_request_counts
case = small.Case(teacher="qwen3", attention="block-causal", alone=True)
teacher = vllm_teacher.load_vllm_teacher(
    describe_teacher(Path(sys.argv[1]) / case.teacher, attention=case.attention), dtype=torch.float32,
    device=torch.device("cpu"), codec=SparseCodec(), block_size=case.block, longest=small.LONGEST,
)
next(small.ask(case, teacher, small.asking_of(case, teacher.spec)))
"""


def run(*command: object, **changes: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment() | changes, timeout=900)


def test_a_step_that_is_no_block_is_refused(folders: Path) -> None:
    """vLLM's own scheduler drops the cut into blocks for a lone request, which would be silently wrong."""
    done = run(ALONE, folders)
    assert done.returncode == 1
    assert "are not blocks of 32 tokens" in done.stderr.splitlines()[-1]


def make_teacher(root: Path, structure: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model, of heads that vLLM has, for this tokenizer."""
    folder = make_folder(root, structure)
    file = folder / "config.json"
    published = json.loads(file.read_text()) | {"mask_token_id": tokenizer.mask_token_id}
    file.write_text(json.dumps(published))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("structure", "kind", "more"),
    [
        ("qwen3", "shared", ("--fidelity", 2)),
        ("llada2", "cross", ("--max-dropped", 1)),
        ("llama", "shared", ("--codec", "exact", "--teacher-kind", "ar")),
    ],
)
def test_same_dataset(
    structure: str,
    kind: str,
    more: tuple[object, ...],
    tmp_path: Path,
    tide: Tide,
    model: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """`tide precompute` with either backend: equal rows, each named in its manifest, and a dataset of the one
    is not gone on with by the other."""
    tokenizer = teacher_tokenizer if kind == "cross" else student_tokenizer
    teacher = make_teacher(tmp_path, structure, tokenizer)
    corpus = write_corpus(tmp_path / "corpus.jsonl", [conversation(i) for i in range(7)])
    given = ("precompute", "--teacher", teacher, "--student", model, "--corpus", corpus, "--kind", kind)
    given += ("--views", 2, "--block-size", 8, "--student-max-length", 96, "--samples-per-part", 3)
    given += ("--device", "cpu", *more)
    engine = (*given, "--out", tmp_path / "vllm", "--backend", "vllm", "--json")
    done = run(RUN, *engine)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == kind
    assert tide(*given, "--out", tmp_path / "library").code == 0
    ours, theirs = rows_of(tmp_path / "library"), rows_of(tmp_path / "vllm")
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        np.testing.assert_array_equal(row.masked, theirs[key].masked)
        for part in ("positions", "chunks"):
            same(getattr(row, part), getattr(theirs[key], part))
    records = [Manifest.load(tmp_path / name).config["compute"] for name in ("library", "vllm")]
    assert [r["backend"] for r in records] == ["transformers", "vllm"]
    assert records[1]["backend_version"] == "0.32"
    refused(tide(*given, "--out", tmp_path / "vllm"), 1, "compute.backend", "vllm", "transformers")


def same(ours: Any, theirs: Any) -> None:
    """Targets of a row: the same tokens, log-probs within `WORST`, which the codec's steps may widen."""
    if ours is None or theirs is None:
        assert ours is theirs
        return
    for name in ours.__slots__:
        a, b = getattr(ours, name), getattr(theirs, name)
        if name == "target":
            same(a, b)
        elif name == "ids":  # of two that are closer than rounding either may come first
            assert np.count_nonzero(a != b) <= 4
        elif isinstance(a, np.ndarray) and a.dtype == np.float32:
            step = {"logp": 0.125, "tails": 0.125}.get(name, 0.0) if isinstance(ours, SparseTarget) else 0.0
            atol = 1e-2 if name == "hidden" else WORST + step
            np.testing.assert_allclose(a, b, rtol=1e-3 if name == "hidden" else 0, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)
