"""The demo's models: two tokenizers, a dense and a mixture-of-experts teacher, the student's start, and
autoregressive teachers for either tokenizer.

All are trained here, from nothing, on functions of Python's standard library outside the held-out modules,
and saved in the layouts that published checkpoints have: WeDLM (dense), LLaDA2 (experts), a2d-qwen3
(student), Qwen3 (autoregressive). A model is a pure function of its recipe and corpus, so a folder that holds
one with the same key is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import __version__ as transformers_version

from precompute.prepare import PrepareConfig, Preparer
from precompute.sample import Conversation, Sample
from precompute.teachers.llada2 import save_llada2
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from student.pretrain import PretrainConfig, TrainingText, pretrain

Role = Literal["teacher-dense", "teacher-moe", "student-start", "teacher-ar", "teacher-ar-cross"]
Report = Callable[[int, int, str], None]

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ROLES = """\
{%- for m in messages %}{{ '<role>' + ('HUMAN' if m['role'] == 'user' else m['role'] | upper) + '</role>' }}
{{- m['content'] + '<|role_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one of the demo's models is made."""

    role: Role
    vocab_size: int
    training: PretrainConfig
    max_length: int
    """Longest sample, tokens."""
    seed: int = 0
    """Of the initial weights."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the network's configuration, in place of the demo's."""

    @property
    def chatml(self) -> bool:
        """ChatML template, shared with the student; cross-tokenizer teachers have one of their own."""
        return self.role not in ("teacher-moe", "teacher-ar-cross")


def make_tokenizer(
    conversations: Iterable[Conversation], *, vocab_size: int, chatml: bool
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab_size` entries, with chat template and special tokens."""
    eos = "<|im_end|>" if chatml else "<|role_end|>"
    roles = ["<|im_start|>"] if chatml else ["<role>", "</role>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", eos, *roles, "<|mask|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = "user\nassistant\n" if chatml else "HUMANASSISTANT"  # of every prompt: worth entries of their own
    tokenizer.train_from_iterator(
        (names + "".join(m.content for m in c.messages) for c in conversations), trainer
    )
    tokenizer.add_special_tokens(specials)  # after the ordinary ids, as published tokenizers have them
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=CHATML if chatml else ROLES,
    )


def training_samples(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    *,
    block_size: int,
    max_length: int,
    holdout: float,
    seed: int,
) -> list[Sample]:
    """Samples of the train split, under this tokenizer as the student's: ids, and which may be masked."""
    config = PrepareConfig(
        kind="shared",
        block_size=block_size,
        student_max_length=max_length,
        teacher_max_length=max_length,
        holdout=holdout,
        seed=seed,
    )
    preparer = Preparer(tokenizer, tokenizer, config)
    prepared = (preparer.prepare(c) for c in conversations)
    return [s for s in prepared if isinstance(s, Sample) and s.split == "train"]


def build(recipe: Recipe) -> Any:
    """The recipe's network with its initial weights."""
    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {
        "vocab_size": recipe.vocab_size,
        "max_position_embeddings": 1024,
        "attn_implementation": "sdpa",
    }

    def sized(**fields: Any) -> dict[str, Any]:
        return common | fields | dict(recipe.sizes)

    if recipe.role == "teacher-moe":
        return Glm4MoeForCausalLM(
            Glm4MoeConfig(
                **sized(
                    hidden_size=96,
                    intermediate_size=256,
                    moe_intermediate_size=96,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=32,
                    n_routed_experts=6,
                    num_experts_per_tok=2,
                    n_shared_experts=1,
                    n_group=2,
                    topk_group=1,
                    first_k_dense_replace=1,
                    routed_scaling_factor=1.0,
                    norm_topk_prob=True,
                    use_qk_norm=True,
                    attention_bias=False,
                    rope_parameters={
                        "rope_type": "default",
                        "rope_theta": 10000.0,
                        "partial_rotary_factor": 0.5,
                    },
                    tie_word_embeddings=False,
                    num_mtp_layers=0,
                    pad_token_id=None,
                )
            )
        )
    if recipe.role in ("teacher-dense", "teacher-ar", "teacher-ar-cross"):
        return Qwen3ForCausalLM(
            Qwen3Config(
                **sized(
                    hidden_size=128,
                    intermediate_size=320,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=32,
                    tie_word_embeddings=True,
                )
            )
        )
    return A2DQwen3LMHeadModel(
        A2DQwen3Config(
            **sized(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                tie_word_embeddings=True,
            )
        )
    )


def model_key(recipe: Recipe, fingerprint: str, corpus_seed: int, holdout: float) -> str:
    """What decides a model: recipe, corpus, split, and the libraries that do the arithmetic."""
    decides = [asdict(recipe), fingerprint, corpus_seed, holdout, torch.__version__, transformers_version]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def make_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[TrainingText],
    out: Path,
    *,
    key: str,
    report: Report,
    device: str = "cpu",
) -> bool:
    """Train a model and write its folder; False if `out` already holds the one with this key.

    The folder appears whole or not at all: it is written beside its place and renamed.
    """
    stamp = out / "demo-key.json"
    if stamp.is_file() and json.loads(stamp.read_text()).get("key") == key:
        return False
    assert tokenizer.mask_token_id is not None
    model = build(recipe).to(device)
    losses = pretrain(model, texts, recipe.training, mask_token_id=tokenizer.mask_token_id, progress=report)
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    _save(model, recipe.role, tokenizer, fresh)
    (fresh / "demo-key.json").write_text(json.dumps({"key": key, "last_losses": losses[-10:]}))
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return True


def _save(model: Any, role: Role, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if role == "teacher-moe":
        save_llada2(model, folder)
    else:
        model.save_pretrained(folder)
    if role == "teacher-dense":
        path = folder / "config.json"
        published = json.loads(path.read_text()) | {
            "model_type": "wedlm",
            "architectures": ["WeDLMForCausalLM"],
            "qk_norm": True,
            "mask_token_id": tokenizer.mask_token_id,
        }
        path.write_text(json.dumps(published, indent=2))
    tokenizer.save_pretrained(folder)
