"""Autoregressive teachers, from checkpoints to trained students: clean left context, one causal pass for all
views.

The other side is naive: the library model that was saved, run by its own causal `forward` over one sample's
text at a time, tokenised anew. It shares no layout, packing, alignment or bookkeeping with ours.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Tide, refused
from test_precompute_runner import conversation, digests, rows_of, write_corpus
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from precompute import runner
from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.engine import Targets, make_part, plans_of
from precompute.inputs import NO_LEFT_NEIGHBOUR, Asking, as_read
from precompute.runner import make_preparer, precompute
from precompute.sample import ChunkSpans, PositionPairs, Sample
from precompute.teachers.load import load_teacher, teacher_kind
from shards.card import card
from shards.codec import DenseCodec, ExactCodec, SparseCodec
from shards.errors import ConfigMismatch, ModelError, UsageError
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import DenseTarget, ExactTarget, Row, SparseTarget
from shards.settings import identity_of

BLOCK = 4
CLASSES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)),
    "qwen2": lambda sizes: Qwen2ForCausalLM(Qwen2Config(**sizes)),
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.15,  # large enough that a wrong context shows
}  # fmt: skip


def bare(tokenizer: PreTrainedTokenizerFast, bos: bool) -> PreTrainedTokenizerFast:
    """The tokenizer as autoregressive checkpoints have it: without a mask token to its name, with or without
    BOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
        **({"bos_token": "<|endoftext|>"} if bos else {}),
    )


@dataclass
class Teachers:
    """Folders by structure, side (whose tokenizer) and BOS, made when first asked for, with their models."""

    root: Path
    tokenizers: dict[str, PreTrainedTokenizerFast]
    student: Path
    made: dict[Path, Any]

    def get(self, structure: str, side: str, *, bos: bool = False) -> tuple[Path, Any]:
        folder = self.root / f"{structure}-{side}{'-bos' if bos else ''}"
        if folder not in self.made:
            torch.manual_seed(0)
            model = CLASSES[structure](SIZES | {"vocab_size": len(self.tokenizers[side])})
            for p in model.parameters():
                if p.ndim == 1:  # norms and biases too: at their initial values a forgotten one is not seen
                    p.data.add_(torch.randn_like(p) * 0.2)
            model.save_pretrained(folder)
            bare(self.tokenizers[side], bos).save_pretrained(folder)
            self.made[folder] = model.eval()
        return folder, self.made[folder]


@pytest.fixture(scope="module")
def teachers(
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Teachers:
    root = tmp_path_factory.mktemp("autoregressive")
    write_corpus(root / "corpus.jsonl", [conversation(i) for i in range(9)])
    return Teachers(root, {"shared": student_tokenizer, "cross": teacher_tokenizer}, model, {})


Make = Callable[..., PrecomputeConfig]


@pytest.fixture
def make(teachers: Teachers, tmp_path: Path) -> Make:
    def settings(folder: Path, **changes: Any) -> PrecomputeConfig:
        given = {
            "teacher": str(folder),
            "student": str(teachers.student),
            "corpus": str(teachers.root / "corpus.jsonl"),
            "out": tmp_path / "out",
            "views": 3,
            "block_size": BLOCK,
            "max_length": 96,
            "samples_per_part": 4,
            "device": "cpu",
            "codec": DenseCodec(),
        }
        return PrecomputeConfig(**{**given, **changes})

    return settings


def naive(model: Any, text: np.ndarray, bos: int | None = None) -> np.ndarray:
    """[len(text), V] float64 log-probs of what follows each prefix: row i predicts text[i]; the first row is
    NaN without BOS."""
    ids = text if bos is None else np.append(bos, text)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
    logp = torch.log_softmax(logits, -1).numpy()[:-1]
    return logp if bos is not None else np.concatenate([np.full_like(logp[:1], np.nan), logp])


def renormalised(logp: np.ndarray, size: int) -> np.ndarray:
    """Over the first `size` ids alone."""
    kept = torch.from_numpy(logp[:, :size])
    return torch.log_softmax(kept, -1).numpy()


def text_of(row: Row) -> np.ndarray:
    """The student's tokens without the EOS that fill the last block."""
    return row.input_ids[: row.real_length]


@pytest.mark.parametrize(("structure", "bos"), [("qwen3", False), ("llama", True), ("qwen2", True)])
def test_shared_rows_equal_a_plain_causal_forward(
    teachers: Teachers, make: Make, structure: str, bos: bool
) -> None:
    """Whole stored distributions and gold log-probs at every masked token of the text, the first one with BOS
    alone; noised and bidirectional contexts give others."""
    folder, model = teachers.get(structure, "shared", bos=bos)
    config = make(folder, loss_on="all", max_dropped=0.1)
    manifest = precompute(config)
    assert manifest.kind == "shared"
    assert manifest.teacher["kind"] == "ar"
    assert (manifest.teacher["attention"], manifest.teacher["mask_token_id"]) == ("causal", None)
    assert manifest.teacher["bos_token_id"] == (290 if bos else None)
    assert not manifest.noise.compdemo
    assert "ar, float32, causal" in card(manifest)
    assert manifest.shared_vocab_size == 294  # ids before the mask token
    worst, noised, both_ways, firsts = 0.0, 0.0, 0.0, 0
    for row in rows_of(config.out).values():
        text, at = text_of(row), row.positions
        assert at is not None
        assert isinstance(at.target, DenseTarget)
        masked = np.flatnonzero(row.masked)
        firsts += bool(row.masked[0])
        np.testing.assert_array_equal(at.positions, masked[(masked < len(text)) & (masked >= (not bos))])
        expected = renormalised(naive(model, text, 290 if bos else None), manifest.shared_vocab_size)
        worst = max(worst, np.abs(at.target.logp - expected[at.positions]).max(initial=0))
        gold = expected[at.positions, text[at.positions]]
        known = text[at.positions] < manifest.shared_vocab_size
        worst = max(worst, np.abs(at.gold_logp - gold)[known].max(initial=0))
        wrong = renormalised(naive(model, np.where(row.masked[: len(text)], 294, text), 290 if bos else None),
                             manifest.shared_vocab_size)  # fmt: skip
        noised = max(noised, np.abs(wrong - expected)[at.positions].max(initial=0))
        with torch.no_grad():
            ids = torch.from_numpy(text.astype(np.int64))[None]
            seen = torch.ones(1, 1, len(text), len(text), dtype=torch.bool)
            logits = model(ids, attention_mask=seen).logits[0, :, : expected.shape[1]]
        wrong = torch.log_softmax(logits.double(), -1).numpy()[:-1]
        both_ways = max(both_ways, np.abs(wrong - expected[1:]).max())
    assert worst < 1e-5
    assert firsts
    assert noised > 0.5
    assert both_ways > 0.5
    lost = manifest.report["unaligned_tokens"]
    assert lost == ({} if bos else {NO_LEFT_NEIGHBOUR: 9})


@pytest.mark.parametrize("structure", ["qwen3", "llama"])
def test_sparse_targets_equal_a_plain_causal_forward(teachers: Teachers, make: Make, structure: str) -> None:
    """Before encoding: ids of the top k, their log-probs, both tails, gold log-probs."""
    folder, model = teachers.get(structure, "shared")
    config = make(folder)
    preparer, teacher = make_preparer(config), load_teacher(folder, kind="ar")
    asking = Asking(
        mask_id=None, attention="causal", block_size=BLOCK, shifted=True, row_tokens=500, compdemo=False
    )
    made = [preparer.prepare(c) for c in open_corpus(config.corpus)]
    samples = [as_read(s, asking) for s in made if isinstance(s, Sample)]
    noise = NoiseConfig(views=3, compdemo=False)
    codec = SparseCodec(cap=7, tail_bound=1e-9)
    rows, _ = make_part(
        teacher, samples, [plans_of(s, noise) for s in samples], asking=asking,
        targets=Targets(codec=codec, vocab_size=294, head_rows=5),
    )  # fmt: skip
    assert len(rows) == 27
    for row in rows:
        at = row.positions
        assert at is not None
        assert isinstance(at.target, SparseTarget)
        expected = renormalised(naive(model, text_of(row)), 294)[at.positions]
        order = np.argsort(-expected, axis=1)
        assert (at.target.counts == 7).all()
        np.testing.assert_array_equal(at.target.ids.reshape(-1, 7), order[:, :7])
        top = np.take_along_axis(expected, order, 1)
        np.testing.assert_allclose(at.target.logp.reshape(-1, 7), top[:, :7], atol=1e-5)
        tails = [np.log(np.exp(top[:, 7:] / t).sum(1)) for t in codec.temperatures]
        np.testing.assert_allclose(at.target.tails, np.stack(tails, 1), atol=1e-5)
        gold = text_of(row)[at.positions]
        np.testing.assert_allclose(at.gold_logp, expected[np.arange(len(gold)), gold], atol=1e-5)


@pytest.mark.parametrize(("structure", "bos"), [("qwen3", True), ("llama", False)])
def test_cross_rows_equal_sums_over_the_teachers_tokens(
    teachers: Teachers, make: Make, structure: str, bos: bool
) -> None:
    """Each active chunk: the sum, over the teacher tokens that cover its characters, of their log-probs given
    the clean text before them, found anew from both tokenizers' offsets in the two renderings."""
    folder, model = teachers.get(structure, "cross", bos=bos)
    config = make(folder)
    manifest = precompute(config)
    assert (manifest.kind, manifest.teacher["kind"]) == ("cross", "ar")
    sides = []
    for side in ("shared", "cross"):
        tokenizer = bare(teachers.tokenizers[side], False)
        found = {}
        for i in range(9):
            messages = conversation(i)["messages"]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            begin = text.rindex(messages[-1]["content"])
            edges = np.array(encoded["offset_mapping"]) - begin  # in characters of the answer; all is ASCII
            found[messages[-1]["content"]] = (np.array(encoded["input_ids"]), edges)
        sides.append(found)
    answer_of = {tuple(ids): answer for answer, (ids, _) in sides[0].items()}
    longest, chunks = 0, 0
    for row in rows_of(config.out).values():
        answer = answer_of[tuple(text_of(row))]
        edges, (teacher_ids, teacher_edges) = sides[0][answer][1], sides[1][answer]
        logp = naive(model, teacher_ids, 298 if bos else None)
        assert row.chunks is not None
        active = np.flatnonzero(row.chunks.active)
        for c, stored in zip(active, row.chunks.logp, strict=True):
            first = row.chunks.start[c]
            low, high = edges[first, 0], edges[first + row.chunks.length[c] - 1, 1]
            tokens = np.flatnonzero((teacher_edges[:, 0] >= low) & (teacher_edges[:, 1] <= high))
            assert len(tokens) == row.chunks.teacher_length[c]
            assert abs(logp[tokens, teacher_ids[tokens]].sum() - stored) < 1e-5 * len(tokens)
            longest, chunks = max(longest, len(tokens)), chunks + 1
    assert chunks == manifest.totals["active_chunks"] > 50
    assert longest > 1, "no chunk has several teacher tokens"


@pytest.mark.parametrize("side", ["shared", "cross"])
def test_one_pass_serves_all_views(
    teachers: Teachers, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, side: str
) -> None:
    """Tokens that went through the network: those before the last one that any view asks for, once; with 8
    views no more than a whole text per sample. Views that mask the same token hold the same bits."""
    folder, _ = teachers.get("qwen3", side)
    ran: list[int] = []
    load = runner.load_teacher

    def counting(*args: Any, **kwargs: Any) -> Any:
        teacher = load(*args, **kwargs)
        hidden = teacher.hidden

        def counted(ids: torch.Tensor, *rest: Any) -> Any:
            ran.append(ids.numel())
            return hidden(ids, *rest)

        teacher.hidden = counted
        return teacher

    monkeypatch.setattr(runner, "load_teacher", counting)
    tokens = {}
    for views in (1, 8):
        ran.clear()
        config = make(folder, views=views, out=tmp_path / str(views))
        manifest = precompute(config)
        assert manifest.report["teacher_tokens"] == sum(ran)
        tokens[views] = sum(ran)
        rows: dict[str, list[Row]] = defaultdict(list)
        for row in rows_of(config.out).values():
            rows[row.sample_id].append(row)
        last = 0
        for same in rows.values():
            if side == "shared":
                last += max(int(r.positions.positions.max(initial=0)) for r in same if r.positions)
            for a, b in combinations(same, 2):
                assert_agree(a, b)
        if side == "shared":
            assert sum(ran) == last
        whole = sum(len(s.teacher_ids) for s in samples_of(config))
        assert sum(ran) < whole
    assert tokens[8] < 1.5 * tokens[1]


def samples_of(config: PrecomputeConfig) -> list[Sample]:
    preparer = make_preparer(config)
    made = (preparer.prepare(c) for c in open_corpus(config.corpus))
    return [s for s in made if isinstance(s, Sample)]


def assert_agree(a: Row, b: Row) -> None:
    """Two views of a sample hold equal answers about what both mask."""
    if a.positions is not None and b.positions is not None:
        _, i, j = np.intersect1d(a.positions.positions, b.positions.positions, return_indices=True)
        np.testing.assert_array_equal(a.positions.gold_logp[i], b.positions.gold_logp[j])
        assert isinstance(a.positions.target, DenseTarget)
        assert isinstance(b.positions.target, DenseTarget)
        np.testing.assert_array_equal(a.positions.target.logp[i], b.positions.target.logp[j])
        return
    assert a.chunks is not None
    assert b.chunks is not None
    found = [dict(zip(np.flatnonzero(c.active), c.logp)) for c in (a.chunks, b.chunks)]
    for c in found[0].keys() & found[1].keys():
        assert found[0][c] == found[1][c]


def test_a_text_begins_with_bos_once() -> None:
    """BOS in front moves what is aligned by one and makes the first token answerable; a template that renders
    it itself gets no second one. Without BOS what is aligned with the first token goes, and is counted."""
    ids, at = np.arange(8, dtype=np.int32), np.arange(4, dtype=np.int32)
    everything = np.ones(8, dtype=bool)
    positions = Sample("s", "train", ids, everything, 8, 8, ids, PositionPairs(at * 2, at * 2))
    chunks = Sample("s", "train", ids, everything, 8, 8, ids, ChunkSpans(at * 2, at * 0 + 2, at, at * 0 + 1))

    def asking(bos: int | None) -> Asking:
        return Asking(
            mask_id=None, attention="causal", block_size=4, shifted=True, row_tokens=99, compdemo=False,
            bos_id=bos,
        )  # fmt: skip

    with_bos = as_read(positions, asking(7))
    np.testing.assert_array_equal(with_bos.teacher_ids, [7, *range(8)])
    assert isinstance(with_bos.alignment, PositionPairs)
    np.testing.assert_array_equal(with_bos.alignment.teacher, at * 2 + 1)
    np.testing.assert_array_equal(with_bos.alignment.student, at * 2)
    with_bos = as_read(chunks, asking(7))
    assert isinstance(with_bos.alignment, ChunkSpans)
    np.testing.assert_array_equal(with_bos.alignment.teacher_start, at + 1)
    assert not with_bos.dropped
    for bos in (None, 0):  # token 0 begins the text already
        for sample, lost in ((positions, 1), (chunks, 2)):
            without = as_read(sample, asking(bos))
            assert without.teacher_ids is sample.teacher_ids
            assert without.dropped == {NO_LEFT_NEIGHBOUR: lost}
    with pytest.raises(ValueError, match="causal and shifted"):
        Asking(mask_id=None, attention="staircase", block_size=4, shifted=False, row_tokens=9, compdemo=False)


def test_the_first_chunk_of_a_plain_text(teachers: Teachers, make: Make, tmp_path: Path) -> None:
    """A text without a template: its first chunk is active with BOS alone."""
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"the river runs past {i}"}) + "\n" for i in range(6)))
    first = {}
    for bos in (False, True):
        folder, _ = teachers.get("qwen3", "cross", bos=bos)
        config = make(folder, corpus=str(corpus), out=tmp_path / str(bos), max_dropped=0.5, loss_on="all")
        manifest = precompute(config)
        first[bos] = min(int(r.chunks.start[0]) for r in rows_of(config.out).values() if r.chunks)
        assert (NO_LEFT_NEIGHBOUR in manifest.report["unaligned_tokens"]) != bos
    assert first[True] == 0 < first[False]


def test_what_kind_of_teacher_a_checkpoint_is(
    teachers: Teachers, make: Make, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast, caplog: Any
) -> None:
    """By itself, and as told: `ar` wins over a mask token, `diffusion` needs one."""
    plain, _ = teachers.get("qwen3", "shared")
    assert teacher_kind(plain) == "ar"
    assert teacher_kind(teachers.get("llama", "cross", bos=True)[0]) == "ar"
    assert teacher_kind(teachers.student) == "diffusion"  # a2d-qwen3
    named = {
        "config.json": {"mask_token_id": 294},
        "tide_teacher": {"tide_teacher": {"mask_token_id": 294}},
        "tokenizer": {},
        "wedlm": {"model_type": "wedlm"},
    }
    for name, fields in named.items():
        folder = tmp_path / name
        folder.mkdir()
        published = json.loads((plain / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(published))
        (student_tokenizer if name == "tokenizer" else bare(student_tokenizer, False)).save_pretrained(folder)
        assert teacher_kind(folder) == "diffusion", name
    with caplog.at_level("INFO"):
        assert precompute(make(plain, limit=1)).teacher["kind"] == "ar"
    assert [r.message.count("is an autoregressive teacher") for r in caplog.records] == [1]
    told = precompute(make(teachers.student, limit=1, out=tmp_path / "told", teacher_kind="ar"))
    assert (told.teacher["kind"], told.teacher["architecture"]) == ("ar", "a2d-qwen3")
    with pytest.raises(ModelError, match=r"no mask token.*teacher-kind ar"):
        precompute(make(plain, limit=1, out=tmp_path / "not", teacher_kind="diffusion"))
    diffusion = precompute(make(teachers.student, limit=1, out=tmp_path / "diffusion"))
    assert diffusion.noise.compdemo
    assert not {"kind", "bos_token_id"} & diffusion.teacher.keys()  # identities of old datasets stay


def test_refusals(teachers: Teachers, tide: Tide, tmp_path: Path) -> None:
    folder, _ = teachers.get("qwen3", "shared")
    given = [
        "precompute", "--teacher", folder, "--student", teachers.student, "--out", tmp_path / "out",
        "--corpus", teachers.root / "corpus.jsonl",
    ]  # fmt: skip
    for kind in ([], ["--teacher-kind", "ar"]):
        refused(tide(*given, *kind, "--compdemo"), 2, "--compdemo", "teacher-kind ar")
        refused(
            tide(*given, *kind, "--teacher-attention", "staircase"),
            2,
            "teacher-attention staircase",
            "causal",
        )
    refused(
        tide(*given, "--teacher-kind", "gpt"), 2, "teacher-kind must be one of auto, diffusion, ar", "gpt"
    )
    refused(tide(*given, "--row-tokens", 5), 2, "teacher tokens", "--row-tokens allows 5")
    with pytest.raises(UsageError, match="compdemo"):
        PrecomputeConfig(teacher="t", student="s", corpus="c", out=tmp_path, teacher_kind="ar", compdemo=True)
    with pytest.raises(ValueError, match="causal"):
        load_teacher(folder, kind="ar", attention="staircase")


@pytest.mark.parametrize("side", ["shared", "cross"])
def test_a_dataset_grows_and_keeps_its_kind(
    teachers: Teachers, make: Make, tmp_path: Path, side: str
) -> None:
    """Made in two goes or at once: the same bytes. As another kind it is not gone on with."""
    folder, _ = teachers.get("llama", side)
    changes: dict[str, Any] = {"codec": SparseCodec(cap=9)}
    precompute(make(folder, limit=5, **changes))
    grown = precompute(make(folder, **changes))
    whole = precompute(make(folder, out=tmp_path / "whole", **changes))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert grown.identity == whole.identity == identity_of(grown.config)
    named = tmp_path / "named"
    bare(teachers.tokenizers[side], False).save_pretrained(named)
    for file in folder.iterdir():
        (named / file.name).write_bytes(file.read_bytes())
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(config | {"mask_token_id": 294}))
    with pytest.raises(ConfigMismatch, match=r"was made with other settings.*kind"):
        precompute(make(named, compdemo=False, **changes))


def test_exact_and_sketched_targets_and_their_fidelity(
    teachers: Teachers, make: Make, tmp_path: Path
) -> None:
    """The exact codec's hidden states give the dense codec's distributions; a sketch is fitted; both are
    measured."""
    folder, model = teachers.get("qwen3", "shared", bos=True)
    precompute(make(folder))
    exact = precompute(make(folder, out=tmp_path / "exact", codec=ExactCodec(), fidelity=3))
    sketch = precompute(
        make(folder, out=tmp_path / "sketch", codec=SparseCodec(cap=9, sketch=6, sketch_wide=6), fidelity=3)
    )
    dense, rows = rows_of(tmp_path / "out"), rows_of(tmp_path / "exact")
    for key, row in rows.items():
        assert row.positions is not None
        assert isinstance(row.positions.target, ExactTarget)
        theirs = dense[key].positions
        assert theirs is not None
        assert isinstance(theirs.target, DenseTarget)
        with torch.no_grad():
            logits = model.lm_head(torch.tensor(row.positions.target.hidden))[:, :294]
        np.testing.assert_allclose(torch.log_softmax(logits, -1).numpy(), theirs.target.logp, atol=0.05)
    for manifest in (exact, sketch):
        assert manifest.fidelity is not None
        assert manifest.fidelity["positions"] > 10
        assert manifest.fidelity["gradient_cosine"]["tidal 0.9"] > 0.8


@pytest.mark.parametrize(("side", "objective"), [("shared", "kl+calm"), ("cross", "reverse-calm+calm")])
def test_from_precompute_to_a_trained_student(
    teachers: Teachers, tide: Tide, tmp_path: Path, side: str, objective: str
) -> None:
    """The three commands, as a user types them."""
    folder, _ = teachers.get("llama", side)
    data, run = tmp_path / "data", tmp_path / "run"
    made = tide(
        "precompute", "--teacher", folder, "--student", teachers.student, "--out", data,
        "--corpus", teachers.root / "corpus.jsonl", "--teacher-kind", "ar", "--block-size", BLOCK,
        "--student-max-length", 96,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert f"kind {side}, autoregressive teacher" in made.out
    assert tide("verify", data, "--full").code == 0
    trained = tide(
        "train", "--data", data, "--student", teachers.student, "--out", run, "--objective", objective,
        "--steps", 3, "--batch-tokens", 200, "--json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert (run / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = {name for line in lines for name in line}
    assert set(objective.split("+")) <= terms
    assert Manifest.load(data).teacher["kind"] == "ar"
    assert len(list(LogitDataset(data).samples("train"))) == 9
