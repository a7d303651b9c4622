"""What a teacher's pass costs: FLOPs of the packed engine and of the layout it replaces, and memory.

Counted on the layout that runs, token by token and pair by pair; nothing is computed. A multiply and an add
are two FLOPs. Matrix products and attention alone, of experts only those that a token goes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from precompute.budget import token_bytes
from student.attention import Coordinates
from student.layout import PAD, SHARED_CLEAN, Attention, Piece, pack
from student.pairs import TILE, Counting, computed_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Sizes of a decoder of the Qwen, Llama or GLM-4-MoE structure."""

    hidden: int
    query: int
    """Heads times their size."""
    keys: int
    """Key heads times their size."""
    mlps: tuple[int, ...]
    """By layer: weights of its MLP that a token meets."""
    vocab: int

    @classmethod
    def of(cls, config: Any) -> Network:
        """From a transformers configuration."""
        hidden, layers = config.hidden_size, config.num_hidden_layers
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        mlps = [3 * hidden * config.intermediate_size] * layers
        if experts := getattr(config, "n_routed_experts", 0):
            met = (config.num_experts_per_tok + config.n_shared_experts) * 3 * config.moe_intermediate_size
            first = config.first_k_dense_replace
            mlps[first:] = [hidden * (met + experts)] * (layers - first)
        return cls(
            hidden=hidden,
            query=config.num_attention_heads * head,
            keys=config.num_key_value_heads * head,
            mlps=tuple(mlps),
            vocab=config.vocab_size,
        )

    @property
    def attention(self) -> int:
        """Weights of a layer's four projections."""
        return 2 * self.hidden * (self.query + self.keys)

    @property
    def active(self) -> int:
        """Weights that a token meets, head included."""
        return len(self.mlps) * self.attention + sum(self.mlps) + self.hidden * self.vocab


@dataclass(frozen=True, slots=True)
class Cost:
    """What one layout runs."""

    tokens: int
    """Through the layers."""
    head_positions: int
    """Through the LM head."""
    pairs: int
    """Query-key pairs that attention computes, over all layers, of one head."""
    flops: int
    """Of matrix products: layers, attention, head."""


def packed_cost(
    network: Network, forwards: Iterable[Sequence[Piece]], attention: Attention, how: Counting
) -> Cost:
    """Of `precompute.engine`: the pieces of each forward in one row, the last layer's queries, output and MLP
    where it is read alone, the head there too.

    Args:
        forwards: the pieces of each.
        how: as attention runs: `tiles` on CUDA, `runs` on a CPU.
    """
    layers, tokens, read, inner, last = len(network.mlps), 0, 0, 0, 0
    for pieces in forwards:
        row = pack(pieces, sum(map(len, pieces)))
        fill = (0, -row.ids.shape[1] % TILE if how == "tiles" else 0)
        at = Coordinates(
            torch.from_numpy(np.pad(row.sample, ((0, 0), fill), constant_values=PAD)),
            *(torch.from_numpy(np.pad(x, ((0, 0), fill))) for x in (row.stream, row.block, row.order)),
        )
        tokens += row.tokens
        read += len(row.read)
        inner += computed_pairs(how, attention, at) if layers > 1 else 0
        last += computed_pairs(how, attention, at, torch.from_numpy(row.read)) if len(row.read) else 0
    pairs = (layers - 1) * inner + last
    keys = 2 * network.hidden * network.keys
    linear = tokens * ((layers - 1) * network.attention + sum(network.mlps[:-1]) + keys)
    # The library's attention makes keys and values of what is read again.
    linear += read * (network.attention + network.mlps[-1])
    flops = 2 * linear + 4 * network.query * pairs + 2 * network.hidden * network.vocab * read
    return Cost(tokens, read, pairs, flops)


def padded_cost(network: Network, lengths: Iterable[int], attention: Attention) -> Cost:
    """Of whole padded sequences, one forward for each CompDemo half: all pairs, the head at every position.

    Args:
        lengths: of each sequence, padding included; with a shared clean stream each counts twice, [x0, xt].
    """
    streams = 2 if attention in SHARED_CLEAN else 1
    whole = [streams * n for n in lengths]
    tokens, layers = sum(whole), len(network.mlps)
    pairs = layers * sum(n**2 for n in whole)
    return Cost(tokens, tokens, pairs, 2 * network.active * tokens + 4 * network.query * pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryAssumptions:
    """What the estimate of a teacher's memory takes for granted."""

    context_gb: float = 0.6
    """CUDA context, libraries' workspaces."""
    chunk_copies: float = 2.5
    """Float32 tensors of a chunk of logits that exist at once: as the head gives them, as floats, what the
    largest entries are found in."""


@dataclass(frozen=True, slots=True)
class TeacherMemory:
    """Bytes of one GPU."""

    parts: dict[str, float]
    moments: dict[str, float]
    """Moment -> bytes in use, context included."""

    @property
    def peak(self) -> float:
        return max(self.moments.values())


def teacher_memory(
    config: Any,
    *,
    parameters: int,
    dtype: torch.dtype,
    forward_tokens: int,
    reads: int,
    head_rows: int,
    assumed: MemoryAssumptions | None = None,
) -> TeacherMemory:
    """Of a forward of the packed engine and of the reduction of what it gives.

    Args:
        config: of a transformers model.
        forward_tokens, reads: of the largest forward: tokens, and hidden states that go to the head.
        head_rows: rows of logits at once.
    """
    network, a = Network.of(config), assumed or MemoryAssumptions()
    parts = {
        "weights": float(parameters * dtype.itemsize),
        "activations": float(forward_tokens * token_bytes(config, dtype)),
        "of these, a layer's keys and values": 2.0 * forward_tokens * network.keys * dtype.itemsize,
        "hidden states that are read": float(reads * network.hidden * dtype.itemsize),
        "chunk of logits": 4.0 * a.chunk_copies * min(head_rows, max(reads, 1)) * network.vocab,
        "CUDA context": a.context_gb * 1e9,
    }
    always = parts["weights"] + parts["CUDA context"]
    moments = {
        "layers": always + parts["activations"],
        "head": always + parts["hidden states that are read"] + parts["chunk of logits"],
    }
    return TeacherMemory(parts, moments)
