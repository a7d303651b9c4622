"""What training needs of a GPU's memory, from a model's configuration alone, and settings that fit a card.

Bytes kept for the backward pass are counted layer by layer, as autograd keeps them for this network (a test
compares with what it does keep). The peak is the highest of three moments, because gradients come as
activations go: the loss (all activations, the head's gradient, a chunk of logits), the end of the backward
pass (all gradients, one layer's activations), the optimiser's step. What is not counted but assumed is in
`Assumptions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from shards.errors import UsageError
from student.config import AdapterConfig

GB = 1e9
CARDS = (8, 12, 16, 24)
"""Sizes in GiB, as cards are sold, that `--vram` is named after; any other number serves as well."""
MIN_TOKENS = 2048
"""Least micro-batch preferred to running layers twice: below it a GPU has too little to do at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of an a2d-qwen3 network."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration of the family."""
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of a layer's linear maps."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def in_layers(self) -> int:
        """Weights of all linear maps."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        norms = self.layers * 2 * (self.hidden + self.head_dim) + self.hidden
        return self.in_layers + norms + self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The settings that decide memory."""

    batch_tokens: int = 8192
    """Packed tokens per optimiser step, over all GPUs."""
    world: int = 1
    """GPUs, each with the whole student (DDP)."""
    accumulation: int = 1
    bf16: bool = True
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch"
    eight_bit_embedding: bool = False
    adapter: AdapterConfig | None = None
    flex: bool = True
    """FlexAttention; else SDPA, which repeats keys and values and keeps a dense mask per layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What the estimate takes for granted."""

    context_gb: float = 0.6
    """CUDA context, libraries' workspaces."""
    slack: float = 0.05
    """Share of the card that is lost to fragmentation or used by others."""
    row_tokens: int = 1024
    """Packed tokens of the longest row, clean and noisy: what a micro-batch may exceed its share by."""
    masked_share: float = 0.4
    """Masked positions per packed token, whose hidden states go to the loss."""
    chunk_mb: float = 256.0
    """Float32 logits that the fused loss makes at a time (`student.fused`)."""
    chunk_copies: float = 3.0
    """Tensors of that size at a time: products in bfloat16, logits, gradient."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by what they are for, and the moments they add up at."""

    parts: dict[str, float]
    moments: dict[str, float]
    """Moment -> bytes in use, context included."""
    micro_tokens: int
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    def fits(self, vram_gib: float) -> bool:
        return self.peak <= vram_gib * 2**30 * (1 - self.assumptions.slack)


def layer_bytes(shape: Shape, plan: Plan, row_tokens: int = 0) -> float:
    """Bytes per token that one layer keeps for its backward pass, weights left out.

    H of the hidden size: inputs and normalised inputs of both norms (float32 throughout: the residual is),
    and what the linear maps read, which autocast copies for each of them. I: gate, its SiLU, up, product.
    Q: queries before and after their norm, rotated queries, attention's output. K: the same of keys, rotated
    keys, values; SDPA has the last two repeated for every head, and a mask of `row_tokens` per token.
    """
    h, i = shape.hidden, shape.intermediate
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    narrow = 2 if plan.bf16 else 4
    read = 5 * narrow * h if plan.bf16 else 2 * 4 * h
    heads = (4 + narrow) * (q + k) + 2 * narrow * q + 2 * narrow * (k if plan.flex else q)
    statistics = 4 * (2 + 2 * shape.heads + shape.kv_heads)
    mask = 0 if plan.flex else narrow * row_tokens
    return 4 * 4 * h + read + 4 * narrow * i + heads + statistics + mask


def kept_bytes(shape: Shape, plan: Plan, row_tokens: int = 0) -> float:
    """Bytes per token that the whole network keeps, head left out."""
    layer = 4 * shape.hidden if plan.gradient_checkpointing else layer_bytes(shape, plan, row_tokens)
    rotary = 0 if plan.gradient_checkpointing else 2 * 4 * shape.head_dim
    return shape.layers * layer + 2 * 4 * shape.hidden + 4 + 8 + rotary


def trained(shape: Shape, adapter: AdapterConfig | None) -> int:
    """Trained parameters."""
    if adapter is None:
        return shape.parameters
    pairs = [shape.linears[name] for name in adapter.targets if name in shape.linears]
    return shape.layers * adapter.rank * sum(a + b for a, b in pairs)


def weight_bytes(shape: Shape, plan: Plan) -> float:
    """Float32 weights; with QLoRA those of the linear maps in 4 bits and a constant per 64 (itself in 8)."""
    if plan.adapter is None or not plan.adapter.four_bit:
        return 4.0 * (shape.parameters + (trained(shape, plan.adapter) if plan.adapter else 0))
    rest = shape.parameters - shape.in_layers + trained(shape, plan.adapter)
    return 4.0 * rest + shape.in_layers * (0.5 + 1 / 64 + 4 / (64 * 256))


def optimiser_bytes(shape: Shape, plan: Plan) -> float:
    """AdamW's two moments: float32, or 8 bits with a float32 constant per 256; transformers keeps the
    embedding's in float32 either way unless `eight_bit_embedding`."""
    n = trained(shape, plan.adapter)
    if "8bit" not in plan.optimizer:
        return 8.0 * n
    wide = 0 if plan.adapter or plan.eight_bit_embedding else shape.embedding
    return 8.0 * wide + (2 + 8 / 256) * (n - wide)


def estimate(shape: Shape, plan: Plan, assumptions: Assumptions | None = None) -> Estimate:
    """Memory of one GPU."""
    a = assumptions or Assumptions()
    share = -(-plan.batch_tokens // (plan.world * plan.accumulation))
    tokens = min(plan.batch_tokens, share + (a.row_tokens if share < plan.batch_tokens else 0))
    n, full = trained(shape, plan.adapter), plan.adapter is None
    layer = layer_bytes(shape, plan, a.row_tokens) * tokens
    copies = 0.0 if plan.gradient_checkpointing or not plan.bf16 else 2.0 * (shape.in_layers + n * (not full))
    head = 4.0 * shape.embedding if full else 0.0
    parts = {
        "weights": weight_bytes(shape, plan),
        "optimiser state": optimiser_bytes(shape, plan),
        "gradients": 4.0 * n * (2 if plan.world > 1 else 1),  # DDP keeps its buckets beside them
        "bfloat16 copies of weights": copies,
        "activations": kept_bytes(shape, plan, a.row_tokens) * tokens,
        "one layer's activations": layer,
        "hidden states at masked positions": 10.0 * shape.hidden * a.masked_share * tokens,
        "gradient of head or embedding": head,
        "chunk of logits": a.chunk_copies * a.chunk_mb * 1e6,
        "optimiser's step": 4.0 * n if plan.optimizer == "adamw_torch" else 0.0,
        "CUDA context": a.context_gb * GB,
    }
    always = parts["weights"] + parts["optimiser state"] + parts["CUDA context"]
    # DDP's buckets exist from the start, gradients from the first micro-batch on.
    early = parts["gradients"] if plan.accumulation > 1 else 4.0 * n * (plan.world > 1)
    moments = {
        "loss": always + early + copies + parts["activations"] + head + parts["chunk of logits"]
        + parts["hidden states at masked positions"],
        "end of backward": always + parts["gradients"] + layer + head,
        "optimiser's step": always + parts["gradients"] + parts["optimiser's step"],
    }  # fmt: skip
    return Estimate(parts, moments, tokens, a)


def candidates(plan: Plan, longest: int) -> Iterator[Plan]:
    """Settings from the fastest to the leanest: micro-batches cut while they stay large, then layers run
    twice, then smaller micro-batches, then the embedding's optimiser state in 8 bits."""
    share = plan.batch_tokens / plan.world
    cuts = [2**n for n in range(12) if share / 2**n >= longest / 2] or [1]
    large = [n for n in cuts if share / n >= MIN_TOKENS] or [1]
    for checkpointing, eight_bit in ((False, False), (True, False), (True, True)):
        for accumulation in cuts if checkpointing else large:
            yield replace(
                plan,
                accumulation=accumulation,
                gradient_checkpointing=checkpointing,
                eight_bit_embedding=eight_bit,
            )


def fit(
    shape: Shape, vram_gib: float, plan: Plan, assumptions: Assumptions | None = None
) -> tuple[Plan, Estimate]:
    """The fastest settings that fit a card of `vram_gib` GiB; `plan` gives those that are not chosen here.

    Raises:
        UsageError: nothing fits (names what the leanest needs and the remedy).
    """
    a = assumptions or Assumptions()
    tried = [(p, estimate(shape, p, a)) for p in candidates(plan, a.row_tokens)]
    for chosen, needs in tried:
        if needs.fits(vram_gib):
            return chosen, needs
    least = min(needs.peak for _, needs in tried)
    other = "a smaller student" if plan.adapter and plan.adapter.four_bit else "--lora 16"
    if plan.adapter and not plan.adapter.four_bit:
        other = "--qlora"
    raise UsageError(
        f"--vram {vram_gib:g}: the leanest settings need {least / GB:.1f} GB of {vram_gib * 2**30 / GB:.1f}; "
        f"use {other}, or a larger card"
    )
