"""Teachers against the recorded ones: the golden models, loaded into the library's classes, give the
golden logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from precompute.teachers import llada2
from precompute.teachers.base import TransformersTeacher
from precompute.teachers.checkpoint import weights_hash
from precompute.teachers.load import load_teacher, read_config
from shards.errors import ModelError, UsageError
from student.attention import Coordinates
from student.forward import hidden_at

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> MakeFolder:
    """A writable copy of a golden model, its config.json changed; None removes a field."""

    def make(name: str, **changes: Any) -> Path:
        copy = tmp_path / name
        shutil.copytree(golden / "D_trace" / "models" / name, copy)
        config = json.loads((copy / "config.json").read_text()) | changes
        config = {k: v for k, v in config.items() if v is not None}
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


@pytest.fixture
def change_weights(golden: Path) -> Callable[[Path, Callable[[dict[str, torch.Tensor]], Any]], None]:
    def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def trace(golden: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(golden / "D_trace" / f"{case}.safetensors")


def test_llada2_gives_the_recorded_logits(golden: Path, folder: MakeFolder) -> None:
    """Forward on the recorded inputs of both CompDemo passes; padded keys are hidden, as they were."""
    teacher = load_teacher(folder("teacher_moe", mask_token_id=302))
    assert isinstance(teacher.model, Glm4MoeForCausalLM)
    assert teacher.spec.attention == "bidirectional"
    t = trace(golden, "A_cd_s1")
    real = t["batch.teacher_attention_mask"].bool()
    half_a = t["teacher_M_A"].bool()
    for i, where in ((1, real & ~half_a), (2, real & half_a)):
        ids = t[f"teacher_in.{i}.input_ids"]
        position = torch.arange(ids.shape[1]).expand_as(ids)
        row = torch.arange(len(ids))[:, None].expand_as(ids)
        at = Coordinates(torch.where(real, row, -1), torch.ones_like(ids), position, position)
        hidden = teacher.hidden(ids, position, at, where.flatten().nonzero()[:, 0])
        torch.testing.assert_close(teacher.head(hidden), t["teacher_logits"][where], atol=1e-5, rtol=0)


def test_wedlm_gives_the_recorded_logits(golden: Path, folder: MakeFolder) -> None:
    teacher = load_teacher(folder("teacher_dense"))
    assert teacher.spec.attention == "staircase"
    assert teacher.spec.mask_token_id == 293  # of config.json: the folder has no tokenizer
    t = trace(golden, "B_plain_cd_x0_xt_s1")
    block_size = json.loads((golden / "D_trace" / "B_plain_cd_x0_xt_s1.json").read_text())["block_size"]
    for i, where in ((1, ~t["M_A"].bool()), (2, t["M_A"].bool())):
        ids, position = t[f"teacher_in.{i}.input_ids"], t[f"teacher_in.{i}.position_ids"]
        length = where.shape[1]
        stream = (torch.arange(2 * length) >= length).long().expand_as(ids)
        row = torch.arange(len(ids))[:, None].expand_as(ids)
        at = Coordinates(row, stream, position // block_size, position)
        read = torch.cat([torch.zeros_like(where), where], dim=1)
        hidden = teacher.hidden(ids, position, at, read.flatten().nonzero()[:, 0])
        torch.testing.assert_close(teacher.head(hidden), t["teacher_logits"][where], atol=1e-5, rtol=0)


def test_llada2_map_covers_every_parameter_once_and_back(golden: Path) -> None:
    source = golden / "D_trace" / "models" / "teacher_moe"
    config = llada2.glm_config(read_config(source))
    model = llada2.load_llada2(source, config, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    ours = [name for e in llada2.weight_map(config) for name in e.ours]
    assert sorted(ours) == sorted(model.state_dict())
    back, published_config = llada2.to_llada2(model)
    again = llada2.glm_config(published_config)
    assert again.to_dict() == config.to_dict() | {"dtype": again.dtype}
    published = load_file(source / "model.safetensors")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[k], published[k]) for k in published)


def test_llada2_saved_in_the_published_layout_loads_again(golden: Path, tmp_path: Path) -> None:
    """What the project trains itself: save, load, equal outputs; with tied embeddings and qkv bias too."""
    published = read_config(golden / "D_trace" / "models" / "teacher_moe")
    config = llada2.glm_config(published | {"use_qkv_bias": True, "tie_word_embeddings": True})
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config).eval()
    llada2.save_llada2(model, tmp_path / "moe")
    loaded_config = llada2.glm_config(read_config(tmp_path / "moe"))
    loaded = llada2.load_llada2(
        tmp_path / "moe", loaded_config, dtype=torch.float32, device="cpu", attn_implementation="sdpa"
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_llada2_reads_sharded_checkpoints_and_keeps_the_router_bias_in_float32(
    golden: Path, folder: MakeFolder
) -> None:
    moe = folder("teacher_moe", mask_token_id=302)
    state = load_file(moe / "model.safetensors")
    names = sorted(state)
    (moe / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):  # experts of one layer over both files
        save_file({k: state[k] for k in part}, moe / f"model-0000{i + 1}-of-00002.safetensors")
    model = load_teacher(moe, dtype=torch.bfloat16).model
    gate = model.model.layers[1].mlp.gate
    torch.testing.assert_close(
        gate.e_score_correction_bias, state["model.layers.1.mlp.gate.expert_bias"], atol=0, rtol=0
    )
    assert gate.weight.dtype == model.model.layers[2].mlp.experts.down_proj.dtype == torch.bfloat16
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("model.layers.2.mlp.experts.7.up_proj.weight"), r"lacks .*\.experts\.7\.up_proj"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), r"no parameter takes.* model\.extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"the shape \[3\].*\[64\]"),
    ],
)  # fmt: skip
def test_llada2_names_tensors_that_do_not_fit(
    folder: MakeFolder, change_weights: Any, edit: Any, message: str
) -> None:
    moe = folder("teacher_moe", mask_token_id=302)
    change_weights(moe, edit)
    with pytest.raises(ModelError, match=message):
        load_teacher(moe)


@pytest.mark.parametrize(
    ("field", "value"), [("use_bias", True), ("score_function", "softmax"), ("num_nextn_predict_layers", 1)]
)
def test_llada2_refuses_what_the_structure_cannot_do(folder: MakeFolder, field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=field):
        load_teacher(folder("teacher_moe", mask_token_id=302, **{field: value}))


def test_dense_names_tensors_that_do_not_fit(folder: MakeFolder, change_weights: Any) -> None:
    dense = folder("teacher_dense")
    change_weights(dense, lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_teacher(dense)


def test_qk_norm_decides_the_structure_of_wedlm(folder: MakeFolder) -> None:
    """Without QK norm it is Qwen2, which has no such weights and wants biases: the folder no longer fits."""
    with pytest.raises(ModelError, match="Qwen2ForCausalLM"):
        load_teacher(folder("teacher_dense", qk_norm=False))


def test_student_and_llama_folders_are_teachers_too(folder: MakeFolder, tmp_path: Path) -> None:
    bd3lm = load_teacher(folder("student", mask_token_id=294))
    assert (bd3lm.spec.architecture, bd3lm.spec.attention) == ("a2d-qwen3", "staircase")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    config.mask_token_id = 63
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    llama = load_teacher(tmp_path / "llama", attention="bidirectional")
    assert (llama.spec.attention, llama.spec.mask_token_id) == ("bidirectional", 63)


def test_mask_id_comes_from_the_tokenizer(
    folder: MakeFolder, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    dense = folder("teacher_dense")
    student_tokenizer.save_pretrained(dense)
    assert load_teacher(dense).spec.mask_token_id == 294


def test_frozen(folder: MakeFolder) -> None:
    teacher = load_teacher(folder("teacher_dense"))
    assert isinstance(teacher, TransformersTeacher)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_weights_hash_sees_contents(folder: MakeFolder, change_weights: Any) -> None:
    dense = folder("teacher_dense")
    before = weights_hash(dense)
    change_weights(dense, lambda s: s["model.norm.weight"].add_(1e-3))
    changed = weights_hash(dense)
    assert changed != before
    config = dense / "config.json"
    config.write_text(config.read_text().replace("1000000.0", "10000.0"))
    assert weights_hash(dense) not in (before, changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f, tmp: tmp / "nowhere", "no such model folder"),
        (lambda f, tmp: f("teacher_dense", model_type="gpt5"), "'gpt5' is not one of llada2_moe, wedlm"),
        (lambda f, tmp: f("teacher_moe"), "no mask token"),
        (lambda f, tmp: f("teacher_dense", mask_token_id=304), "mask id 304 lies outside"),
        (lambda f, tmp: f("teacher_moe", num_experts=None, mask_token_id=302), "needs num_experts"),
    ],
)
def test_one_line_for_a_folder_that_cannot_be_used(
    folder: MakeFolder, tmp_path: Path, make: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as e:
        load_teacher(make(folder, tmp_path))
    assert "\n" not in str(e.value)


def test_experts_in_one_grouped_product_equal_those_in_a_loop(folder: MakeFolder) -> None:
    """The library's grouped GEMM is what a LLaDA2 teacher runs; its outputs are those of the loop over
    experts."""
    moe = folder("teacher_moe", mask_token_id=302)
    grouped, looped = (load_teacher(moe, experts=e).model for e in llada2.EXPERTS)
    assert grouped.config._experts_implementation == "grouped_mm"
    assert looped.config._experts_implementation == "eager"
    ids = torch.arange(24)[None]
    at = Coordinates(ids * 0, ids * 0, ids // 4, ids)
    with torch.inference_mode():
        a, b = (hidden_at(m, ids, ids, at, ids[0], "bidirectional") for m in (grouped, looped))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="experts must be one of grouped_mm, eager, got 'sonic'"):
        load_teacher(moe, experts="sonic")
