"""The student network: reads the reference's files, writes what transformers reads, refuses the rest."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shards.errors import ModelError
from student.model import A2DQwen3LMHeadModel, load_student
from student.tokenizer import MASK_TOKEN, load_tokenizer, tokenizer_hash


@pytest.fixture(scope="module")
def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def qwen3_folder(tmp_path: Path, qwen3: Qwen3ForCausalLM, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    qwen3.save_pretrained(tmp_path / "ar")
    student_tokenizer.save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


@pytest.mark.parametrize("case", ["A_cd_s1", "B_plain_cd_x0_xt_s1"])
def test_recorded_logits(golden: Path, case: str) -> None:
    """The reference's checkpoint, loaded as it is, gives the reference's logits (xt half of [xt, x0])."""
    model = AutoModelForMaskedLM.from_pretrained(
        golden / "D_trace" / "models" / "student", dtype=torch.float32
    )
    assert type(model) is A2DQwen3LMHeadModel
    trace = load_file(golden / "D_trace" / f"{case}.safetensors")
    ids = trace["student_in.input_ids"]
    mask = trace["student_in.attention_allowed"].bool().expand(len(ids), 1, -1, -1)
    with torch.no_grad():
        logits = model(
            input_ids=ids, position_ids=trace["student_in.position_ids"], attention_mask=mask
        ).logits
    expected = trace["student_logits"]
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)


def test_attention_is_bidirectional_and_honours_padding(qwen3_folder: Path) -> None:
    model, _ = load_student(qwen3_folder, attention="sdpa")
    model.eval()
    ids = torch.randint(0, 290, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 290
    with torch.no_grad():
        plain, other = model(input_ids=ids).logits, model(input_ids=changed).logits
        assert (plain[0, 0] - other[0, 0]).abs().max() > 1e-3  # the last token reaches the first
        hidden = torch.ones(1, 9, dtype=torch.int64)
        hidden[0, -1] = 0
        a, b = (model(input_ids=x, attention_mask=hidden).logits[0, :-1] for x in (ids, changed))
        torch.testing.assert_close(a, b)  # a padded one reaches nobody
        torch.testing.assert_close(a, model(input_ids=ids[:, :-1]).logits[0])


def test_weights_of_an_autoregressive_checkpoint(qwen3_folder: Path, qwen3: Qwen3ForCausalLM) -> None:
    """Under a causal mask the student is the Qwen3 it came from."""
    model, tokenizer = load_student(qwen3_folder, attention="sdpa")
    assert model.config.model_type == "a2d-qwen3"
    assert tokenizer.mask_token_id == 294
    ids = torch.arange(20)[None]
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=causal).logits, qwen3(input_ids=ids).logits
        )


def test_logits_only_where_read(qwen3_folder: Path) -> None:
    model, _ = load_student(qwen3_folder, attention="sdpa")
    ids = torch.arange(24).reshape(2, 12)
    read = torch.tensor([0, 13, 5, 23])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, read=read).logits, model(input_ids=ids).logits.flatten(0, 1)[read]
        )


def test_labels_are_not_shifted(qwen3_folder: Path) -> None:
    model, _ = load_student(qwen3_folder, attention="sdpa")
    ids = torch.arange(10)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 4] = 7
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, -out.logits[0, 4].log_softmax(-1)[7])


def test_saved_students_load_with_plain_transformers(tmp_path: Path, qwen3_folder: Path) -> None:
    model, tokenizer = load_student(qwen3_folder, attention="sdpa")
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is A2DQwen3LMHeadModel
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert tokenizer_hash(load_tokenizer(tmp_path / "out")) == tokenizer_hash(tokenizer)


def test_a_mask_token_is_added_once(tmp_path: Path, qwen3: Qwen3ForCausalLM, golden: Path) -> None:
    """To a tokenizer without one, with a row for it in the embedding, in the same way every time."""
    spec = json.loads((golden / "D_trace" / "models" / "student_tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != MASK_TOKEN]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    size = len(bare)
    Qwen3ForCausalLM(Qwen3Config(**qwen3.config.to_dict() | {"vocab_size": size})).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    (first, tokenizer), (second, _) = load_student(tmp_path), load_student(tmp_path)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK_TOKEN, size)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert first.config.vocab_size == size + 1
    assert first.lm_head.weight is first.model.embed_tokens.weight
    torch.testing.assert_close(first.lm_head.weight[size], first.lm_head.weight[:size].mean(dim=0))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_the_hash_follows_what_decides_ids(
    student_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Truncation and padding, which calls leave behind, do not count; a new token or another mask id does."""
    student_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], truncation=True, max_length=2, padding=True)
    assert tokenizer_hash(tokenizer) == before
    other = load_tokenizer(tmp_path)
    other.mask_token = other.eos_token
    assert tokenizer_hash(other) != before
    tokenizer.add_tokens(["zzz"])
    assert tokenizer_hash(tokenizer) != before


def test_unusable_models_are_refused_in_one_line(tmp_path: Path, qwen3_folder: Path, golden: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ModelError) as caught:
            load_student(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such model folder" in refusal(tmp_path / "nowhere")
    assert "no tokenizer" in refusal(golden / "D_trace" / "models" / "student")
    config = json.loads((qwen3_folder / "config.json").read_text())
    (qwen3_folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in (message := refusal(qwen3_folder))
    assert "a2d-qwen3, qwen3" in message
    (qwen3_folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    assert "accepted model_type: a2d-qwen3, qwen3" in refusal(qwen3_folder)
    (qwen3_folder / "config.json").write_text(json.dumps(config))
    weights = load_file(qwen3_folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, qwen3_folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(qwen3_folder)
    (qwen3_folder / "model.safetensors").unlink()
    assert "weights cannot be loaded" in refusal(qwen3_folder)


def test_attention_is_this_machines_not_the_checkpoints(qwen3_folder: Path, tmp_path: Path) -> None:
    """How attention is computed is chosen at loading; no saved config asks for it."""
    model, tokenizer = load_student(qwen3_folder)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert "attn_implementation" not in text
    assert model.config._attn_implementation not in text
