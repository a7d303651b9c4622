"""The tasks before training: corpus files, tokenizers, models, logit datasets. Each does what the demo or a
`tide` command does, in its task's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.cost import Network, packed_cost
from precompute.identity import source_of
from precompute.inputs import Asking
from precompute.parts import begun
from precompute.prepare import PrepareConfig, Preparer, split_of
from precompute.ready import prepare
from precompute.recipe import decide
from precompute.runner import make_preparer, open_teacher, precompute
from precompute.sample import Conversation, Sample
from precompute.teachers.families import SECTION
from precompute.trial import without_targets
from shards.noise import NoiseConfig
from shards.row import Row
from student.pairs import Counting
from student.pretrain import PretrainConfig, TrainingText, pretrain
from student.tokenizer import load_tokenizer
from studies.tasks import Task
from tools.benches.codec import parse_codec
from tools.demo.models import Recipe, build, make_tokenizer, model_key, training_samples
from tools.demo.models import make_model as train_model
from tools.workers import Report

SPLITS = ("train", "validation", "test")
COUNTED = 64
"""Conversations whose teacher tokens are counted pair by pair; the rest costs as much per token."""
BLOCKWISE = ("teacher-dense", "student-start", "smollm2")
"""Roles that read blocks of tokens; the others see no block filling."""
MASK = "<|mask|>"


def make_corpus(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """`train.jsonl`, `validation.jsonl`, `test.jsonl`: whole groups each, by a fixed hash of their name.

    Of the groups held out (`precompute.prepare.split_of`), those that a smaller share would hold out too are
    for validation, the others for tests.
    """
    spec, folder = task.spec, task.folder(out)
    held = spec["validation"] + spec["test"]
    rows: dict[str, list[str]] = {name: [] for name in SPLITS}
    groups: dict[str, set[str]] = {name: set() for name in SPLITS}
    report(0, 1, "reading the corpus")
    corpus = open_corpus(spec["source"])
    for c in corpus:
        into = "train"
        if split_of(c, holdout=held, seed=spec["seed"]) == "heldout":
            first = split_of(c, holdout=spec["validation"], seed=spec["seed"]) == "heldout"
            into = "validation" if first else "test"
        groups[into].add(c.group or "")
        if len(rows[into]) < spec["at_most"][into]:
            messages = [{"role": m.role, "content": m.content} for m in c.messages]
            rows[into].append(json.dumps({"messages": messages, "group": c.group}) + "\n")
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "fingerprint": corpus.fingerprint,
        "rows": {name: len(lines) for name, lines in rows.items()},
        "groups": {name: len(found) for name, found in groups.items()},
    }


def conversations(corpus: Path, split: str, limit: int) -> list[Conversation]:
    """The first of a split's."""
    return list(islice(open_corpus(str(corpus / f"{split}.jsonl")), limit))


def make_tokenizers(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """Folders `chatml` (the student's) and `roles`, from training text alone; or SmolLM2's own with a mask
    token, as `chatml`."""
    folder = task.folder(out)
    report(0, 1, "reading the corpus")
    text = conversations(task.needs["corpus"].folder(out), "train", task.spec["conversations"])
    for name, size in task.spec["sizes"].items():
        if name == "chatml" and task.spec["smollm2"]:
            from tools.smollm2 import load_smollm2

            _, tokenizer = load_smollm2()
            tokenizer.add_special_tokens({"mask_token": MASK})
        else:
            tokenizer = make_tokenizer(text, vocab_size=size, chatml=name == "chatml")
        tokenizer.save_pretrained(folder / name)
    return {"sizes": {name: len(load_tokenizer(folder / name)) for name in task.spec["sizes"]}}


def make_model(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """The folder `model`: trained from nothing by the demo's recipe, or from SmolLM2's weights."""
    from transformers import AutoTokenizer

    spec = task.spec
    role: Any = "teacher-dense" if spec["role"] == "smollm2" else spec["role"]
    training = PretrainConfig(
        attention="bidirectional" if role == "teacher-moe" else "staircase",
        block_size=spec["block_size"],
        ar_steps=spec["ar_steps"],
        diffusion_steps=spec["diffusion_steps"],
        batch_size=spec["batch_size"],
        learning_rate=spec["learning_rate"],
        diffusion_learning_rate=spec["diffusion_learning_rate"],
        seed=spec["seed"],
    )
    recipe = Recipe(
        role=role,
        vocab_size=0,
        training=training,
        max_length=spec["max_length"],
        seed=spec["seed"],
        sizes=dict(spec["sizes"]),
    )
    folder = task.needs["tokenizer"].folder(out) / ("chatml" if recipe.chatml else "roles")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recipe = replace(recipe, vocab_size=len(tokenizer))
    corpus = task.needs["corpus"].folder(out)
    report(0, 1, "preparing samples")
    samples = training_samples(
        tokenizer,
        conversations(corpus, "train", spec["conversations"]),
        block_size=spec["block_size"] if spec["role"] in BLOCKWISE else 1,
        max_length=spec["max_length"],
        holdout=0.0,
        seed=0,
    )
    if spec["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
    texts = [TrainingText(s.student_ids, s.maskable) for s in samples]
    folder = task.folder(out) / "model"
    if spec["role"] == "smollm2":
        return {"parameters": _train_smollm2(folder, tokenizer, texts, training, spec["device"], report)}
    key = model_key(recipe, task.key, 0, 0.0)
    train_model(recipe, tokenizer, texts, folder, key=key, report=report, device=spec["device"])
    return {"parameters": sum(p.numel() for p in build(recipe).parameters()), "samples": len(texts)}


def _train_smollm2(
    folder: Path, tokenizer: Any, texts: Any, training: Any, device: str, report: Report
) -> int:
    """SmolLM2's weights, trained further as a block-diffusion model; a folder that is read as a teacher."""
    from tools.smollm2 import load_smollm2

    loaded, _ = load_smollm2()
    del loaded.config.quantization_config  # how the weights came: a model that has it is not written
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.to(device)
    pretrain(model, texts, training, mask_token_id=tokenizer.mask_token_id, progress=report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    section = {
        "structure": "llama",
        "attention": "staircase",
        "mask_token_id": tokenizer.mask_token_id,
        "block_size": training.block_size,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {SECTION: section}, indent=2))
    return sum(p.numel() for p in model.parameters())


def data_config(task: Task, out: Path) -> PrecomputeConfig:
    """What `tide precompute` is asked for a `data` task."""
    spec = task.spec
    return PrecomputeConfig(
        teacher=str(task.needs["teacher"].folder(out) / "model"),
        student=str(task.needs["tokenizer"].folder(out) / "chatml"),
        corpus=str(task.needs["corpus"].folder(out) / "train.jsonl"),
        out=task.folder(out) / "data",
        views=spec["views"],
        seed=spec["seed"],
        codec=parse_codec(spec["codec"]),
        limit=spec["conversations"],
        compdemo=spec["compdemo"],
        timesteps=spec["timesteps"],
        teacher_kind=spec["teacher_kind"],
        block_size=spec["block_size"],
        max_length=spec["max_length"],
        max_teacher_length=2 * spec["max_length"],
        device=spec["device"],
        dtype=spec["dtype"],
    )


def make_data(task: Task, out: Path, report: Report) -> dict[str, Any]:
    """`tide precompute` into the folder `data`, and what it cost the teacher."""
    config = data_config(task, out)
    total = config.limit or 0
    manifest = precompute(config, lambda done, of, what: report(done, of or total, what))
    asked = Asked(task, out)
    return {
        "kind": manifest.kind,
        "totals": manifest.totals,
        "report": manifest.report,
        "teacher_flops": asked.flops_per_token * manifest.report["teacher_tokens"],
    }


class Asked:
    """A dataset's teacher, at hand to be asked as the dataset's was, and its samples."""

    def __init__(self, task: Task, out: Path) -> None:
        self.config = data_config(task, out)
        self.preparer = make_preparer(self.config)
        self.teacher: Any = open_teacher(
            self.config, self.preparer, torch.device(self.config.device or "cpu")
        )
        corpus = open_corpus(self.config.corpus, limit=self.config.limit)
        first = next(begun(corpus, self.config.samples_per_part))
        self.conversations = list(corpus)
        self.recipe = decide(
            self.config,
            source_of(corpus),
            first,
            self.preparer,
            self.teacher,
            lambda *told: None,
        )

    @property
    def flops_per_token(self) -> float:
        """Of the packed engine, counted on the first conversations."""
        asking = self.recipe.asking
        some = prepare(self.conversations[:COUNTED], self.preparer, self.recipe.noise, asking)
        how: Counting = "tiles" if self.teacher.device.type == "cuda" else "runs"
        cost = packed_cost(
            Network.of(self.teacher.model.config), [[j.piece for j in some.jobs]], asking.attention, how
        )
        return cost.flops / max(1, some.teacher_tokens)

    def samples(self) -> dict[str, Sample]:
        """Every sample by its id."""
        ready = prepare(self.conversations, self.preparer, self.recipe.noise, self.recipe.asking)
        return {s.sample_id: s for s in ready.samples}


def held_out(
    corpus: Path, tokenizers: Path, split: str, limit: int, *, block_size: int, max_length: int
) -> list[Row]:
    """Rows of a split under the student's tokenizer, without targets: what `student.evaluate` reads."""
    tokenizer = load_tokenizer(tokenizers / "chatml")
    preparer = Preparer(
        tokenizer,
        None,
        PrepareConfig(
            kind="shared",
            block_size=block_size,
            student_max_length=max_length,
            teacher_max_length=max_length,
        ),
    )
    asking = Asking(
        mask_id=tokenizer.mask_token_id,
        attention="staircase",
        block_size=block_size,
        shifted=False,
        row_tokens=1 << 30,
        compdemo=False,
    )
    noise = NoiseConfig(views=1, compdemo=False)
    return without_targets(prepare(conversations(corpus, split, limit), preparer, noise, asking))
