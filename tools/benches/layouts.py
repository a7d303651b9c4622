"""A teacher asked in three layouts about the same samples and noise, for `tide bench precompute`.

- `reference`: as the paper's own script: every sample padded to one length, [x0, xt] in one forward per
  CompDemo half, the head over all of its positions;
- `fair`: the same, but sorted by length and padded to the longest of the batch;
- `engine`: `precompute.engine.make_part`.

All three reduce what they get to the same sparse targets and make the rows of a dataset of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from precompute.budget import default_row_tokens
from precompute.corpus import open_corpus
from precompute.engine import Pace, Targets, make_part, plans_of, reduce
from precompute.inputs import Asking, Question, questions
from precompute.prepare import PrepareConfig, Preparer
from precompute.rows import Answers, join, make_rows
from precompute.sample import Conversation, PositionPairs, Sample
from precompute.teachers.base import TeacherSpec, TransformersTeacher
from shards.codec import SparseCodec
from shards.noise import NoiseConfig, Plan
from shards.row import Row
from student.attention import Coordinates, attention_mask
from student.run_attention import RUNS
from tools.demo.models import make_tokenizer

ROWS = 4
"""Sequences per batch of the padded sides; more were no faster on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is measured. The defaults are the ones that figures are compared at."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 32000
    experts: int = 0
    """0 = dense."""
    experts_active: int = 8
    expert_intermediate: int = 128
    samples: int = 64
    length: int = 512
    """Most tokens of a sample; what `reference` pads to."""
    block_size: int = 32
    views: int = 4
    seed: int = 0


def sft_samples(sizes: Sizes) -> list[Sample]:
    """Random tokens in lengths as instruction data has them: prompt log-normal(4.3, 0.8) up to 300, response
    log-normal(5.3, 0.7), together within `length`; the last block filled."""
    g = np.random.default_rng(sizes.seed)
    samples: list[Sample] = []
    while len(samples) < sizes.samples:
        prompt, response = int(min(300, g.lognormal(4.3, 0.8))), int(g.lognormal(5.3, 0.7))
        if prompt + response <= sizes.length:
            n = -(-(prompt + response) // sizes.block_size) * sizes.block_size
            ids = g.integers(0, sizes.vocab - 10, n).astype(np.int32)
            samples.append(_sample(f"s{len(samples)}", ids, np.arange(n) >= prompt))
    return samples


def _sample(name: str, ids: np.ndarray, maskable: np.ndarray) -> Sample:
    """A sample whose teacher has the student's tokenizer and template."""
    where = np.flatnonzero(maskable).astype(np.int32)
    return Sample(
        sample_id=name,
        split="train",
        student_ids=ids,
        maskable=maskable,
        real_length=len(ids),
        content_bytes=len(ids),
        teacher_ids=ids,
        alignment=PositionPairs(where, where),
    )


def stdlib_preparer(sizes: Sizes) -> tuple[list[Conversation], Preparer]:
    """Functions of Python's standard library as chats, and a tokenizer of at most 4,096 entries trained on
    them."""
    conversations = list(open_corpus("builtin:stdlib", limit=4 * sizes.samples))
    tokenizer = make_tokenizer(conversations, vocab_size=min(sizes.vocab, 4096), chatml=True)
    settings = PrepareConfig(kind="shared", block_size=sizes.block_size, student_max_length=sizes.length)
    return conversations, Preparer(tokenizer, None, settings)


def stdlib_samples(sizes: Sizes) -> list[Sample]:
    """The first samples that `stdlib_preparer` gives."""
    conversations, preparer = stdlib_preparer(sizes)
    made = (preparer.prepare(c) for c in conversations)
    return [s for s in made if isinstance(s, Sample)][: sizes.samples]


CORPORA: dict[str, Callable[[Sizes], list[Sample]]] = {"sft": sft_samples, "stdlib": stdlib_samples}
"""Where lengths come from: instruction data's distribution, or the corpus that is on every machine."""


def make_teacher(sizes: Sizes, *, device: torch.device, dtype: torch.dtype) -> TransformersTeacher:
    """A teacher of these sizes with random weights: Qwen3's structure asked by the staircase, or LLaDA2's
    asked bidirectionally."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 4 * sizes.length,
    }
    torch.manual_seed(sizes.seed)
    if sizes.experts:
        moe = {
            "n_routed_experts": sizes.experts,
            "num_experts_per_tok": sizes.experts_active,
            "moe_intermediate_size": sizes.expert_intermediate,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 8,
            "topk_group": 4,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "num_mtp_layers": 0,
            "pad_token_id": None,
            "routed_scaling_factor": 2.5,
        }
        model_class: Any = Glm4MoeForCausalLM
        config: Any = Glm4MoeConfig(**shape, **moe)
    else:
        model_class, config = Qwen3ForCausalLM, Qwen3Config(**shape, tie_word_embeddings=True)
    model = model_class._from_config(config, dtype=dtype).to(device)
    spec = TeacherSpec(
        name="random",
        revision=None,
        architecture=config.model_type,
        attention="bidirectional" if sizes.experts else "staircase",
        mask_token_id=sizes.vocab - 1,
        vocab_size=sizes.vocab,
        shifted=False,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash="",
    )
    return TransformersTeacher(model, spec)


@dataclass(frozen=True, slots=True)
class Work:
    """Samples, their noise, and a teacher to ask: the same for every side."""

    teacher: TransformersTeacher
    samples: list[Sample]
    plans: list[list[Plan]]
    asking: Asking
    targets: Targets

    def engine(self, pace: Pace | None = None) -> list[Row]:
        choose(self.teacher, "engine")
        return make_part(
            self.teacher, self.samples, self.plans, asking=self.asking, targets=self.targets, pace=pace
        )[0]

    def padded(self, length: int | None) -> list[Row]:
        """The rows by whole sequences, one forward per half and batch, logits at every position.

        Args:
            length: what every sequence is padded to; None = sorted by length, padded to the batch's longest.
        """
        choose(self.teacher, "padded")
        asked = [
            (i, q)
            for i, sample in enumerate(self.samples)
            for view, plan in enumerate(self.plans[i])
            for q in questions(sample, view, plan, compdemo=self.asking.compdemo)
        ]
        if length is None:
            asked.sort(key=lambda x: len(self.samples[x[0]].teacher_ids))
        return make_rows(
            self.samples, self.plans, join([self._batch(b, length) for b in batches(asked, ROWS)])
        )

    @torch.inference_mode()
    def _batch(self, batch: Sequence[tuple[int, Question]], length: int | None) -> Answers:
        device, attention, mask_id = self.teacher.device, self.asking.attention, self.asking.mask_id
        assert mask_id is not None
        ids = [self.samples[i].teacher_ids for i, _ in batch]
        length = length or max(map(len, ids))
        both = attention in ("staircase", "staircase-causal")
        tokens = np.zeros((len(batch), 2 if both else 1, length), dtype=np.int64)
        sample = np.full_like(tokens, -1)
        picked = np.zeros(tokens.shape, dtype=bool)
        for r, (clean, (_, q)) in enumerate(zip(ids, batch)):
            n = len(clean)
            sample[r, :, :n] = 0
            tokens[r, :, :n] = clean
            tokens[r, -1, q.hidden] = mask_id
            picked[r, -1, q.asked] = True
        position = np.broadcast_to(np.arange(length), tokens.shape)
        stream = np.broadcast_to(np.arange(tokens.shape[1])[:, None], tokens.shape)
        flat = (
            torch.from_numpy(x.reshape(len(batch), -1).copy()).to(device)
            for x in (tokens, position, sample, stream, position // self.asking.block_size, position)
        )
        x, where, *at = flat
        mask = attention_mask(attention, Coordinates(*at), self.teacher.model)
        logits = self.teacher.model(
            input_ids=x, position_ids=where, attention_mask=mask, use_cache=False
        ).logits
        kept = logits[torch.from_numpy(picked.reshape(len(batch), -1)).to(device)]
        gold = np.concatenate([i[q.asked] for i, (_, q) in zip(ids, batch)])
        logp, target = reduce(kept, gold, torch.clone, self.targets)
        count = [len(q.asked) for _, q in batch]
        return Answers(
            np.repeat([i for i, _ in batch], count),
            np.repeat([q.view for _, q in batch], count),
            np.concatenate([q.slot for _, q in batch]),
            logp,
            target,
        )


def choose(teacher: TransformersTeacher, side: str) -> None:
    """Attention and experts as a side's user has them: the engine's, or the library's defaults."""
    model = teacher.model
    cuda = teacher.device.type == "cuda"
    model.set_attn_implementation(("flex_attention" if cuda else RUNS) if side == "engine" else "sdpa")
    if hasattr(model.config, "n_routed_experts"):
        model.set_experts_implementation("grouped_mm" if side == "engine" else "eager")


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cut into pieces of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def make_work(
    sizes: Sizes, samples: list[Sample], teacher: TransformersTeacher, row_tokens: int | None = None
) -> Work:
    noise = NoiseConfig(seed=sizes.seed, views=sizes.views)
    spec = teacher.spec
    asking = Asking(
        mask_id=spec.mask_token_id,
        attention=spec.attention,
        block_size=sizes.block_size,
        shifted=False,
        row_tokens=row_tokens
        or default_row_tokens(
            sizes.length,
            streams=2 * sizes.views,
            attention=spec.attention,
            block_size=sizes.block_size,
            device=teacher.device,
            token_bytes=teacher.token_bytes,
        ),
        compdemo=True,
    )
    targets = Targets(codec=SparseCodec(), vocab_size=spec.vocab_size, head_rows=128)
    return Work(teacher, samples, [plans_of(s, noise) for s in samples], asking, targets)
