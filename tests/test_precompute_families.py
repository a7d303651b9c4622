"""Teachers of every family, from checkpoints in their published layout to the rows of a dataset.

The other side is naive: the library model that was saved, run padded over one noised sequence at a time, with
a dense mask written from its definition. It shares no layout, predicate or bookkeeping with ours.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.inputs import NO_LEFT_NEIGHBOUR, without_first
from precompute.runner import make_preparer, precompute
from precompute.sample import ChunkSpans, PositionPairs, Sample
from precompute.teachers import dense
from precompute.teachers.checkpoint import empty_model
from precompute.teachers.families import FAMILIES, family_of
from precompute.teachers.load import load_teacher, load_teacher_tokenizer, teacher_folder
from shards.codec import DenseCodec
from shards.errors import ModelError, UsageError
from shards.reader import LogitDataset
from shards.row import DenseTarget, Row
from student.tokenizer import load_tokenizer

BLOCK, PADDED = 4, 96
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "tie_word_embeddings": False, "initializer_range": 0.4,  # large enough that a wrong mask shows
}  # fmt: skip


def llada_name(name: str) -> str:
    """Where LLaDA's checkpoints keep a Llama parameter."""
    for ours, theirs in {
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "model.layers": "model.transformer.blocks",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.down_proj": "ff_out",
        "mlp.": "",
    }.items():
        name = name.replace(ours, theirs)
    return name


def llada_config(vocab_size: int) -> dict[str, Any]:
    """As GSAI-ML/LLaDA-8B-Instruct publishes it, small."""
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False,
        "attention_layer_norm": False, "block_type": "llama", "d_model": 32, "embedding_size": vocab_size,
        "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
        "max_sequence_length": 128, "mlp_hidden_size": 48, "mlp_ratio": 4, "multi_query_attention": None,
        "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True,
        "rope_theta": 5000.0, "scale_logits": False, "vocab_size": vocab_size,
        "weight_tying": False, "use_cache": False,
    }  # fmt: skip


def checkpoint(folder: Path, family: str, vocab_size: int, files: int = 1) -> Any:
    """A random model of a family, saved in its published layout; returns the library model.

    `family` is a model type; `wedlm-qwen2` and `wedlm-qwen3` are its two structures.
    """
    torch.manual_seed(len(family))
    sizes = SIZES | {"vocab_size": vocab_size}
    extra: dict[str, Any] = {
        "Dream": {"model_type": "Dream"},
        "Fast_dLLM_Qwen": {"model_type": "Fast_dLLM_Qwen", "bd_size": 8},
        "sdar": {"model_type": "sdar", "block_size": 2, "fuse_cross_entropy": True, "head_dim": 8},
        "wedlm-qwen2": {"model_type": "wedlm", "qk_norm": False},
        "wedlm-qwen3": {"model_type": "wedlm", "qk_norm": True, "attention_bias": False, "head_dim": 8},
        "llada": {},
    }[family]
    if family == "llada":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    elif family in ("sdar", "wedlm-qwen3"):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, p in model.named_parameters():
        if p.ndim == 1:  # norms and biases start out as ones and zeros
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    published = llada_config(vocab_size) if family == "llada" else sizes | extra | {"rope_scaling": None}
    state = {(llada_name(k) if family == "llada" else k): v.detach() for k, v in model.state_dict().items()}
    write(folder, published, state, files)
    return model.eval()


def write(folder: Path, published: dict[str, Any], state: dict[str, torch.Tensor], files: int) -> None:
    """config.json and weights, over several files with an index as large checkpoints have them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    if files == 1:
        save_file(state, folder / "model.safetensors")
        return
    where = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        save_file({k: v for k, v in state.items() if where[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@dataclass
class Models:
    """Teacher folders by family and tokenizer, made when first asked for, with the model each was saved
    from."""

    root: Path
    golden: Path
    tokenizers: dict[str, PreTrainedTokenizerFast]
    models: dict[Path, Any]

    def get(self, family: str, side: str) -> tuple[Path, Any]:
        folder = self.root / f"{family}-{side}"
        if folder not in self.models:
            golden = {"llada2_moe": "teacher_moe", "a2d-qwen3": "student"}.get(family)
            if golden:
                shutil.copytree(self.golden / "D_trace" / "models" / golden, folder)
            else:
                model = checkpoint(folder, family, len(self.tokenizers[side]), files=2)
            self.tokenizers[side].save_pretrained(folder)
            self.models[folder] = load_teacher(folder).model if golden else model
        return folder, self.models[folder]


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Models:
    root = tmp_path_factory.mktemp("families")
    tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    shutil.copytree(golden / "D_trace" / "models" / "student", root / "student")
    student_tokenizer.save_pretrained(root / "student")
    words = [
        "the",
        "river",
        "runs",
        "past",
        "an",
        "old",
        "mill",
        "and",
        "nobody",
        "asks",
        "it",
        "where",
        "to",
    ]
    rows = [[" ".join(np.roll(words, -3 * i - k)[: 3 + 2 * i + k]) for k in (0, 1)] for i in range(3)]
    (root / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), row)]})
            + "\n"
            for row in rows
        )
    )
    return Models(root, golden, tokenizers, {})


def naive_logits(
    model: Any,
    clean: np.ndarray,
    noisy: np.ndarray,
    asked: np.ndarray,
    *,
    attention: str,
    block: int,
    shifted: bool,
) -> torch.Tensor:
    """[asked, V]: one noised sequence (with its clean one where the teacher sees it), right-padded."""
    n = len(clean)
    i = torch.arange(n)
    b = i // block
    where = torch.from_numpy(asked) - int(shifted)
    ids, position = torch.from_numpy(noisy), i
    mask = {"bidirectional": b[:, None] >= 0, "block-causal": b[:, None] >= b}.get(attention)
    if mask is not None:
        mask = mask.expand(n, n)
    else:  # the noisy sequence, then the clean one
        turn = i
        inside = torch.ones(n, n, dtype=torch.bool)
        if attention == "staircase-causal":  # visible tokens to the front of their block, masked ones behind
            hidden = torch.from_numpy(noisy != clean)
            turn = torch.cat([torch.cat([k[~hidden[k]], k[hidden[k]]]) for k in i.split(block)])
            inside = i[:, None] >= i
        ids = torch.cat([ids[turn], torch.from_numpy(clean)])
        position = torch.cat([turn, i])
        same, earlier = (b[:, None] == b) & inside, b[:, None] > b
        none = torch.zeros(n, n, dtype=torch.bool)
        mask = torch.cat([torch.cat([same, earlier], 1), torch.cat([none, same | earlier], 1)])
        first = torch.from_numpy(asked % block == 0) & shifted  # its left neighbour is in a finished block
        where = torch.where(first, n + where, turn.argsort()[where])
    size, most = len(ids), 2 * PADDED
    whole = torch.eye(most, dtype=torch.bool)
    whole[:size, :size] = mask
    pad = (0, most - size)
    with torch.no_grad():
        out = model(
            input_ids=torch.nn.functional.pad(ids.long(), pad)[None],
            position_ids=torch.nn.functional.pad(position, pad)[None],
            attention_mask=whole[None, None],
        )
    return out.logits[0, where]


def made(
    models: Models, tmp_path: Path, family: str, side: str, **settings: Any
) -> tuple[LogitDataset, list[tuple[Sample, Row]], Any]:
    """A dataset of the family's teacher, its rows beside their samples, and the library model."""
    folder, model = models.get(family, side)
    config = PrecomputeConfig(
        **{
            "teacher": str(folder),
            "student": str(models.root / "student"),
            "corpus": str(models.root / "corpus.jsonl"),
            "out": tmp_path / "out",
            "views": 2,
            "block_size": BLOCK,
            "max_length": 64,
            "device": "cpu",
            "codec": DenseCodec(),
            "kind": "shared" if side == "student" else "cross",
            "seed": 5,
            "max_dropped": 0.1,  # the first token of a shifted teacher is much of samples this short
            **settings,
        }
    )
    precompute(config)
    preparer = make_preparer(config)
    samples = [preparer.prepare(c) for c in open_corpus(config.corpus)]
    by_id = {s.sample_id: s for s in samples if isinstance(s, Sample)}
    assert len(by_id) == 3
    data = LogitDataset(config.out)
    data.check_shard(0)
    return data, [(by_id[r.sample_id], r) for r in data.read(0, 0)], model


OTHER = {
    "staircase": "staircase-causal",
    "staircase-causal": "staircase",
    "bidirectional": "block-causal",
    "block-causal": "bidirectional",
}
"""Control: this kind must give other numbers, or the comparison says nothing."""
SHARED = [
    ("a2d-qwen3", None, "staircase", BLOCK),
    ("wedlm-qwen3", None, "staircase", BLOCK),
    ("wedlm-qwen3", "staircase-causal", "staircase-causal", BLOCK),
    ("wedlm-qwen2", "staircase-causal", "staircase-causal", BLOCK),
    ("wedlm-qwen2", None, "staircase", BLOCK),
    ("llada", None, "bidirectional", BLOCK),
    ("Dream", None, "bidirectional", BLOCK),
    ("Dream", "block-causal", "block-causal", BLOCK),
    ("sdar", None, "staircase", 2),
    ("sdar", "block-causal", "block-causal", 2),
    ("Fast_dLLM_Qwen", None, "staircase", 8),
]


@pytest.mark.parametrize(("family", "flag", "attention", "block"), SHARED)
def test_shared_rows_equal_naive_passes(
    models: Models, tmp_path: Path, family: str, flag: str | None, attention: str, block: int
) -> None:
    """Whole distributions of every masked position, both CompDemo halves; blocks are the teacher's own. With
    every token maskable, the first one too, which a shifted teacher is not asked."""
    data, rows, model = made(models, tmp_path, family, "student", teacher_attention=flag, loss_on="all")
    shifted = family in ("Dream", "Fast_dLLM_Qwen")
    recorded = data.manifest.teacher
    assert (recorded["attention"], recorded["shifted"]) == (attention, shifted)
    worst, control, first_masked = 0.0, 0.0, 0
    for sample, row in rows:
        assert row.positions is not None
        assert isinstance(row.positions.target, DenseTarget)
        expected = np.flatnonzero(row.masked)
        if shifted:
            first_masked += int(row.masked[0])
            expected = expected[expected > 0]
        np.testing.assert_array_equal(row.positions.positions, expected)
        for half in (False, True):
            mine = row.positions.half_a == half
            asked = row.positions.positions[mine].astype(np.int64)
            noisy = sample.teacher_ids.copy()
            noisy[asked] = recorded["mask_token_id"]
            logits = naive_logits(
                model, sample.teacher_ids, noisy, asked, attention=attention, block=block, shifted=shifted
            )
            logp = torch.log_softmax(logits[:, : data.manifest.config["shared_vocab_size"]], dim=1).numpy()
            worst = max(worst, np.abs(row.positions.target.logp[mine] - logp).max(initial=0))
            logits = naive_logits(
                model,
                sample.teacher_ids,
                noisy,
                asked,
                attention=OTHER[attention],
                block=block,
                shifted=shifted,
            )
            wrong = torch.log_softmax(logits[:, : logp.shape[1]], dim=1).numpy()
            control = max(control, np.abs(wrong - logp).max(initial=0))
    print(f"{family} {attention}: worst log-prob error {worst:.1e}")
    assert worst < 1e-4
    assert control > 1.0
    assert bool(first_masked) == shifted


CROSS = [
    ("llada2_moe", None, "bidirectional", BLOCK, True),
    *(
        ("llada2_moe", kind, kind, BLOCK, compdemo)
        for kind in ("bidirectional", "staircase", "block-causal")
        for compdemo in (True, False)
    ),
    ("wedlm-qwen3", "staircase-causal", "staircase-causal", BLOCK, True),
    ("Dream", None, "bidirectional", BLOCK, True),
    ("Fast_dLLM_Qwen", None, "staircase", 8, True),
]


@pytest.mark.parametrize(("family", "flag", "attention", "block", "compdemo"), CROSS)
def test_cross_rows_equal_naive_passes(
    models: Models,
    tmp_path: Path,
    family: str,
    flag: str | None,
    attention: str,
    block: int,
    compdemo: bool,
) -> None:
    """Log-probs of every active chunk: the sum over its teacher tokens, also where it straddles blocks of the
    teacher's positions."""
    data, rows, model = made(models, tmp_path, family, "teacher", teacher_attention=flag, compdemo=compdemo)
    shifted = family in ("Dream", "Fast_dLLM_Qwen")
    worst, straddling = 0.0, 0
    for sample, row in rows:
        chunks, spans = row.chunks, sample.alignment
        assert chunks is not None
        assert isinstance(spans, ChunkSpans)
        tokens = [np.arange(s, s + n) for s, n in zip(spans.teacher_start, spans.teacher_length)]
        stored = iter(chunks.logp)
        expected = {c: next(stored) for c in np.flatnonzero(chunks.active)}
        for half in (False, True) if compdemo else (None,):
            of_half = chunks.masked & (half is None or chunks.half_a == half)
            noisy = sample.teacher_ids.copy()
            for c in np.flatnonzero(of_half):
                noisy[tokens[c]] = data.manifest.teacher["mask_token_id"]
            for c in np.flatnonzero(of_half & chunks.active):
                straddling += len(set(tokens[c] // block)) > 1
                logits = naive_logits(
                    model, sample.teacher_ids, noisy, tokens[c],
                    attention=attention, block=block, shifted=shifted,
                )  # fmt: skip
                logp = torch.log_softmax(logits, dim=1).numpy()
                total = logp[np.arange(len(tokens[c])), sample.teacher_ids[tokens[c]]].sum()
                worst = max(worst, abs(total - expected.pop(c)))
        assert not expected
    print(f"{family} {attention}: worst chunk log-prob error {worst:.1e}, {straddling} chunks straddle")
    assert worst < 1e-4
    assert straddling


@pytest.mark.parametrize("family", ["llada", "Dream", "sdar", "Fast_dLLM_Qwen", "wedlm-qwen2", "wedlm-qwen3"])
@pytest.mark.parametrize("files", [1, 3])
def test_published_layouts_load_exactly(tmp_path: Path, family: str, files: int) -> None:
    """Equal logits, to the bit, from one file or several with an index; facts of the family's row."""
    model = checkpoint(tmp_path, family, 64, files)
    published = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"mask_token_id": 63}))
    teacher = load_teacher(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits, atol=0, rtol=0)
    spec = teacher.spec
    row = FAMILIES[published["model_type"]]
    assert (spec.attention, spec.shifted, spec.mask_token_id) == (row.attention, row.shifted, 63)
    assert spec.block_size == {"sdar": 2, "Fast_dLLM_Qwen": 8}.get(family)
    half = load_teacher(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.spec.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("family", "vocab_size", "mask"),
    [("llada", 126464, 126336), ("Dream", 152064, 151666), ("sdar", 151936, 151669),
     ("Fast_dLLM_Qwen", 152064, 151665), ("wedlm", 151936, 151665), ("llada2_moe", 157184, 156895)],
)  # fmt: skip
def test_known_mask_ids(family: str, vocab_size: int, mask: int) -> None:
    """Used where neither the tokenizer nor config.json names one, and inside the vocabulary alone."""
    from precompute.teachers.load import mask_token_id

    row = FAMILIES[family]
    assert mask_token_id(Path("nowhere"), {}, row, vocab_size) == mask
    assert mask_token_id(Path("nowhere"), {"mask_token_id": 7}, row, vocab_size) == 7
    with pytest.raises(ModelError, match="no mask token"):
        mask_token_id(Path("nowhere"), {}, row, 500)


def test_block_sizes_of_published_checkpoints() -> None:
    """SDAR is trained with 4 unless config.json says otherwise, Fast-dLLM v2 with 32."""
    assert family_of({"model_type": "sdar"}).block_size == 4
    assert family_of({"model_type": "sdar", "block_size": 32}).block_size == 32
    assert family_of({"model_type": "Fast_dLLM_Qwen"}).block_size == 32
    assert family_of({"model_type": "llada2_moe"}).block_size is None


def test_a_tied_head_may_be_stored_if_it_is_the_embeddings(tmp_path: Path) -> None:
    checkpoint(tmp_path, "Dream", 64)
    state = load_file(tmp_path / "model.safetensors")
    published = json.loads((tmp_path / "config.json").read_text())
    published |= {"tie_word_embeddings": True, "mask_token_id": 63}
    write(tmp_path, published, state, 1)
    with pytest.raises(ModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        load_teacher(tmp_path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older checkpoints keep these
    write(tmp_path, published, state, 1)
    model = load_teacher(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Described by configuration alone


def describe(folder: Path, model_type: str, **section: Any) -> None:
    published = json.loads((folder / "config.json").read_text())
    changed = published | {"model_type": model_type, "tide_teacher": section}
    (folder / "config.json").write_text(json.dumps(changed))


def test_an_unknown_family_is_described_in_its_config(tmp_path: Path) -> None:
    """LLaDA's weights under a model type nobody knows, with everything said in the section."""
    model = checkpoint(tmp_path, "llada", 64)
    llada = FAMILIES["llada"]
    describe(
        tmp_path, "mine", structure="llama", attention="block-causal", shifted=True, block_size=16,
        mask_token_id=61, fields=dict(llada.fields), tensors=dict(llada.tensors),
    )  # fmt: skip
    teacher = load_teacher(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits, atol=0, rtol=0)
    spec = teacher.spec
    assert (spec.architecture, spec.attention, spec.shifted) == ("mine", "block-causal", True)
    assert (spec.block_size, spec.mask_token_id) == (16, 61)


def test_a_section_changes_a_known_family(tmp_path: Path, student_tokenizer: Any) -> None:
    checkpoint(tmp_path, "sdar", 304)
    describe(tmp_path, "sdar", block_size=32, attention="block-causal", mask_token_id=60)
    spec = load_teacher(tmp_path).spec
    assert (spec.block_size, spec.attention, spec.mask_token_id) == (32, "block-causal", 60)
    student_tokenizer.save_pretrained(tmp_path)
    assert load_teacher(tmp_path).spec.mask_token_id == 60  # said of the teacher, so above its tokenizer's


def test_the_page_on_teachers_says_what_the_program_does() -> None:
    """Every family has its row there, and the example is one that loads as it says."""
    page = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
    example = json.loads(page.partition("```json")[2].partition("```")[0])
    family = family_of(example)
    assert (family.structure, family.block_size, family.shifted) == ("qwen2", 16, False)
    names = {dense.published_name(f"model.layers.7.self_attn.{x}_proj.weight", family.tensors) for x in "qo"}
    assert names == {"model.layers.7.self_attn.q_proj.weight", "model.layers.7.self_attn.out.weight"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"shifted": True}, "needs structure, one of qwen2, qwen3, llama, llada2"),
        ({"structure": "gpt"}, "structure must be one of qwen2, .*, got 'gpt'"),
        ({"structure": "llama", "attention": "all"}, "attention must be one of staircase, .*, got 'all'"),
        ({"structure": "llama", "shift": True}, "no field 'shift'; its fields are structure, "),
        ({"structure": "llama", "shifted": "yes"}, "shifted must be true or false, got 'yes'"),
        ({"structure": "llama", "block_size": True}, "block_size must be a whole number, got True"),
        ({"structure": "llama", "tensors": ["a"]}, r"tensors must be an object, got \['a'\]"),
        ({"structure": "llada2", "tensors": {"a": "b"}}, "fields and tensors are for dense structures"),
        ("llama", "tide_teacher must be an object, got 'llama'"),
    ],
)
def test_a_section_that_cannot_be(section: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as e:
        family_of({"model_type": "mine", "tide_teacher": section})
    assert "\n" not in str(e.value)


# Checkpoints that do not fit


def test_a_llada_variant_of_another_structure_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llada", 64)
    published = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"attention_layer_norm": True}))
    with pytest.raises(ModelError, match="attention_layer_norm = True, but tide reads llada only with False"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("where", ["index", "file", "surplus", "damaged"])
def test_files_that_do_not_fit_the_index(tmp_path: Path, where: str) -> None:
    checkpoint(tmp_path, "Dream", 64, files=3)
    describe(tmp_path, "Dream", mask_token_id=63)
    second = tmp_path / "model-00002-of-00003.safetensors"
    message = f"names {second.name}, which is not there"
    if where == "index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        message = "not a safetensors index"
    elif where == "file":
        second.unlink()
    elif where == "surplus":
        save_file(load_file(second) | {"model.extra": torch.ones(1)}, second)
        message = r"no parameter takes: model\.extra, read as Qwen2ForCausalLM"
    else:
        second.write_bytes(second.read_bytes()[:40])
        message = f"{second.name}: not a whole safetensors file"
    with pytest.raises(ModelError, match=message) as e:
        load_teacher(tmp_path)
    assert "\n" not in str(e.value)


def test_files_outside_the_index_are_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, "Dream", 64, files=2)
    describe(tmp_path, "Dream", mask_token_id=63)
    before = load_teacher(tmp_path).spec.weights_hash
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert load_teacher(tmp_path).spec.weights_hash == before


def test_reordered_blocks_and_shifted_outputs_do_not_go_together(tmp_path: Path) -> None:
    checkpoint(tmp_path, "Dream", 64)
    with pytest.raises(
        UsageError, match="Dream reads each position at its left neighbour: use bidirectional"
    ):
        load_teacher(tmp_path, attention="staircase-causal")


def test_what_a_shifted_teacher_cannot_be_asked_is_counted() -> None:
    ids = np.arange(6, dtype=np.int32)
    at = np.arange(0, 6, dtype=np.int32)

    def sample(alignment: PositionPairs | ChunkSpans) -> Sample:
        return Sample("s", "train", ids, np.arange(6) > 0, 6, 6, ids, alignment)

    pairs = without_first(sample(PositionPairs(at, at)))
    assert isinstance(pairs.alignment, PositionPairs)
    assert pairs.alignment.teacher.tolist() == pairs.alignment.student.tolist() == [1, 2, 3, 4, 5]
    assert pairs.dropped == {NO_LEFT_NEIGHBOUR: 1}
    spans = without_first(sample(ChunkSpans(at[:2] * 3, at[:2] + 2, at[:2] * 2, at[:2] + 2)))
    assert isinstance(spans.alignment, ChunkSpans)
    assert spans.alignment.student_start.tolist() == [3]
    assert spans.alignment.teacher_start.tolist() == [2]
    assert spans.dropped == {NO_LEFT_NEIGHBOUR: 1}  # its chunk had tokens 0 and 1, and 0 is not maskable
    assert without_first(pairs) is pairs


# At full size, by its configuration


LLADA_8B = llada_config(126464) | {
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "max_sequence_length": 4096, "rope_theta": 500000.0,
}  # fmt: skip


def test_full_size_llada_8b() -> None:
    """GSAI-ML/LLaDA-8B by its configuration: 8.0 billion parameters under the names its code gives them."""
    family = family_of(LLADA_8B)
    config = dense.dense_config(LLADA_8B, family)
    entries = dense.weight_map(config, family)
    state = empty_model(LlamaForCausalLM, config).state_dict()
    assert {e.ours[0]: e.theirs[0] for e in entries} == {n: llada_name(n) for n in state}
    assert len({e.theirs for e in entries}) == len(entries) == 32 * 9 + 3
    assert sum(p.numel() for p in state.values()) == pytest.approx(8.02e9, rel=1e-3)


# The hub, from its cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student_tokenizer: Any) -> Iterator[Path]:
    """A hub cache as `HF_HOME/hub` holds it, with one model: `main` and a tag `v1` of other weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--sdar-tiny"
    (repo / "refs").mkdir(parents=True)
    for ref, family in (("main", "sdar"), ("v1", "wedlm-qwen3")):
        commit = {"main": "a", "v1": "b"}[ref] * 40
        (repo / "refs" / ref).write_text(commit)
        checkpoint(repo / "snapshots" / commit, family, 304, files=2)
        student_tokenizer.save_pretrained(repo / "snapshots" / commit)
    return repo


def test_hub_ids_and_revisions(hub: Path) -> None:
    latest = load_teacher("org/sdar-tiny").spec
    assert (latest.name, latest.revision, latest.architecture) == ("org/sdar-tiny", "a" * 40, "sdar")
    for revision in ("v1", "b" * 40):
        tagged = load_teacher(f"org/sdar-tiny@{revision}").spec
        assert (tagged.name, tagged.revision, tagged.architecture) == ("org/sdar-tiny", "b" * 40, "wedlm")
    assert teacher_folder("org/sdar-tiny")[0] == hub / "snapshots" / ("a" * 40)
    assert load_teacher_tokenizer("org/sdar-tiny").mask_token_id == 294


@pytest.mark.parametrize("name", ["org/sdar-tiny@v2", "org/nothing"])
def test_hub_ids_out_of_reach(hub: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: neither a folder nor reachable on the hub") as e:
        load_teacher(name)
    assert "\n" not in str(e.value)


# Tokenizers


def test_published_configurations_say_nothing_to_the_user(
    models: Models, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A config.json with null rope_scaling and a model type that the library does not know, beside a
    tokenizer: no warning reaches whoever loads either."""
    folder, _ = models.get("sdar", "student")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(folder).mask_token_id == 294
        assert load_teacher(folder).spec.mask_token_id == 294
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_is_code_is_read_by_the_librarys(
    tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Dream publishes vocab.json, merges.txt and a tokenizer class as code, which is Qwen2's."""
    spec = json.loads(student_tokenizer.backend_tokenizer.to_str())
    checkpoint(tmp_path, "Dream", 304)
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = (m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
    names = {i: added[str(i)]["content"] for i in (292, 294)}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": added,
                "mask_token": names[294],
                "eos_token": names[292],
                "pad_token": names[292],
            }
        )
    )
    (tmp_path / "tokenization_dream.py").write_text("raise RuntimeError('never run')")
    read: Callable[[str], list[int]] = lambda text: load_teacher_tokenizer(tmp_path)(text)["input_ids"]  # noqa: E731
    text = f"the river runs past an old mill{names[294]}"
    assert read(text) == student_tokenizer(text)["input_ids"]
    assert load_teacher(tmp_path).spec.mask_token_id == 294
