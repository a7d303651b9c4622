"""Small teachers, and questions to them, for the tests of backend vllm; run as a program, with a folder, it
asks them in vLLM and leaves what they say there. The test that runs it asks transformers, in its own process.
"""

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from precompute.backends.vllm_requests import to_bytes
from precompute.engine import Pace, Targets, ask_all, plans_of
from precompute.inputs import Asking, Job, as_read, make_jobs
from precompute.rows import Answers, join
from precompute.sample import PositionPairs, Sample
from precompute.teachers.base import Teacher, TeacherSpec
from precompute.teachers.llada2 import save_llada2
from precompute.teachers.load import describe_teacher
from shards.codec import Codec, DenseCodec, ExactCodec, SparseCodec
from shards.noise import NoiseConfig

VOCAB, SHARED, MASK, BLOCK, LONGEST = 320, 300, 319, 32, 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "rope_theta": 5000.0, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
"""Positions beyond the 64 that they are made for, as transformers allows them."""
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "use_qk_norm": True, "num_mtp_layers": 0,
    "pad_token_id": None, "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
CODECS: dict[str, Codec | None] = {
    "dense": DenseCodec(),
    "sparse": SparseCodec(cap=12, tail_bound=1e-6, temperatures=(1.0, 2.0, 3.0)),
    "exact": ExactCodec(width=128),
    "gold": None,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A teacher, how it is asked, and how much room the engine has."""

    teacher: str
    attention: str | None = None
    kind: str = "diffusion"
    block: int = BLOCK
    alone: bool = False
    """Its requests run one at a time."""
    cache_tokens: int | None = None

    @property
    def name(self) -> str:
        said = [self.teacher, self.attention or self.kind, f"block {self.block}"]
        said += ["alone"] * self.alone + ["little room"] * (self.cache_tokens is not None)
        return ", ".join(said)


MASKS = ("bidirectional", "block-causal", "staircase", "causal")
CASES = [
    *(Case(teacher=t, attention=a) for t in ("qwen3", "qwen2", "llama", "llada2") for a in MASKS),
    Case(teacher="llada"),  # other names for everything
    Case(teacher="dream"),  # reads at the left neighbour, and is tied
    Case(teacher="fast", attention="staircase"),  # so does this one, a block's first token in the clean text
    Case(teacher="qwen3", kind="ar"),
    Case(teacher="llama", kind="ar"),
    Case(teacher="qwen3", attention="staircase", block=4),
    Case(teacher="qwen3", attention="staircase", block=48),
    Case(teacher="qwen3", attention="block-causal", alone=True),
    Case(teacher="qwen3", attention="staircase", cache_tokens=2 * LONGEST),
    Case(teacher="llada2", attention="block-causal", cache_tokens=2 * LONGEST),
]
SHARED_OUT = Case(teacher="llada2", attention="staircase")
"""What several devices are asked together."""


def make_folder(root: Path, teacher: str) -> Path:
    """A random model in its published layout."""
    folder = root / teacher
    if folder.is_dir():
        return folder
    torch.manual_seed(len(teacher))
    if teacher == "llada2":
        model: Any = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **EXPERTS))
        routers = [m for n, m in model.named_buffers() if n.endswith("e_score_correction_bias")]
        for bias in routers:
            bias.copy_(torch.randn_like(bias) * 0.05)
    elif teacher in ("llama", "llada"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=teacher == "llama"))
    elif teacher == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        sizes = SIZES | {"tie_word_embeddings": teacher == "dream", "use_sliding_window": True}
        sizes |= {"sliding_window": 8, "max_window_layers": 1}  # of no effect: masks decide
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():  # norms and biases too: at their initial values a forgotten one would not show
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    if teacher == "llada2":
        save_llada2(model, folder)
        return _note(folder, mask_token_id=MASK)
    model.save_pretrained(folder)
    if teacher != "llada":
        names = {"qwen2": "wedlm", "dream": "Dream", "fast": "Fast_dLLM_Qwen"}
        changes: dict[str, Any] = {"model_type": names[teacher]} if teacher in names else {}
        return _note(folder, mask_token_id=MASK, **changes)
    from test_precompute_families import llada_config, llada_name  # with its names

    state = {llada_name(name): x.detach() for name, x in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    sizes = {"d_model": 128, "mlp_hidden_size": 96, "n_layers": 3, "max_sequence_length": 64}
    (folder / "config.json").write_text(json.dumps(llada_config(VOCAB) | sizes | {"rms_norm_eps": 1e-6}))
    return _note(folder, mask_token_id=MASK)


def _note(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def asking_of(case: Case, spec: TeacherSpec) -> Asking:
    return Asking(
        mask_id=spec.mask_token_id,
        attention=spec.attention,
        block_size=case.block,
        shifted=spec.shifted,
        row_tokens=LONGEST + (LONGEST if spec.attention == "staircase" else 0) if case.alone else 2000,
        compdemo=spec.kind != "ar" and not case.alone,
    )


def questions(case: Case, asking: Asking) -> tuple[list[Sample], list[Job]]:
    """Samples of all lengths, most of them not whole blocks, with two views each."""
    rng = np.random.default_rng(5)
    noise = NoiseConfig(views=1 if case.alone else 2, compdemo=asking.compdemo)
    samples = []
    for i, length in enumerate((LONGEST, 97, 40, 130, 32, 3, LONGEST, 64)):
        ids = rng.integers(0, MASK, length).astype(np.int32)
        where = np.flatnonzero(np.arange(length) >= length // 4).astype(np.int32)
        maskable = np.isin(np.arange(length), where)
        sample = Sample(f"{i:032}", "train", ids, maskable, length, length, ids, PositionPairs(where, where))
        samples.append(as_read(sample, asking))
    plans = [plans_of(s, noise) for s in samples]
    return samples, [j for i, s in enumerate(samples) for j in make_jobs(s, plans[i], asking, index=i)]


def ask(case: Case, teacher: Teacher, asking: Asking) -> Iterator[tuple[str, Answers]]:
    """Codec and answers."""
    samples, jobs = questions(case, asking)
    for name, codec in CODECS.items():
        targets = Targets(codec=codec, vocab_size=VOCAB if name == "gold" else SHARED, head_rows=100)
        pace = Pace(rows=1 if case.alone else 3, head_rows=100)
        yield name, join(ask_all(teacher, samples, jobs, asking=asking, targets=targets, pace=pace))


def main(root: Path, devices: int) -> None:
    from precompute.backends.vllm_teacher import EngineSettings, load_vllm_teacher

    for case in CASES if devices == 1 else [SHARED_OUT]:
        found = describe_teacher(root / case.teacher, kind=case.kind, attention=case.attention)
        # Of a token: keys and values of 2 heads of 32 in 3 layers, in float32.
        room = None if case.cache_tokens is None else case.cache_tokens * 2 * 2 * 32 * 3 * 4 / 1e9
        teacher = load_vllm_teacher(
            found,
            dtype=torch.float32,
            device=torch.device("cpu"),
            codec=SparseCodec(),
            block_size=case.block,
            longest=LONGEST,
            settings=EngineSettings(cache_gb=room, tensor_parallel=devices),
        )
        for name, answers in ask(case, teacher, asking_of(case, teacher.spec)):
            (root / f"{case.name}, {devices}.{name}").write_bytes(to_bytes(answers.gold_logp, answers.target))
        del teacher
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
