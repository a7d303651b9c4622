"""The pooler of a teacher: hidden states where they are read -> what a row keeps, in the process that has
them.

It calls the functions that the transformers backend calls (`precompute.reduce`), so both make the same rows
of the same hidden states. A request says in its `extra_kwargs` where it is read, and what is to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata

from precompute.backends.vllm_requests import to_bytes
from precompute.engine import Targets, reduce
from precompute.reduce import Head
from precompute.rows import Answers
from shards.codec import DenseCodec, ExactCodec, SparseCodec, codec_to_json

TASK: PoolingTask = "token_classify"
"""Of vLLM's pooling tasks the one that gives a value for each token."""
CODECS: dict[str, Any] = {codec.name: codec for codec in (SparseCodec, DenseCodec, ExactCodec)}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants."""

    read: list[int]
    """[m], ascending: positions."""
    gold: list[int]
    """[m]: true tokens."""
    targets: dict[str, Any]
    """`targets_to_json`."""


def targets_to_json(targets: Targets) -> dict[str, Any]:
    """As plain values, which go to other processes; of a codec without a sketch."""
    codec = None if targets.codec is None else codec_to_json(targets.codec)
    return {"codec": codec, "vocab_size": targets.vocab_size, "head_rows": targets.head_rows}


def targets_from_json(data: dict[str, Any]) -> Targets:
    """The inverse. Not `codec_from_json`, which reads what others wrote: hidden states are asked for before
    the file that their codec names is made."""
    codec = data["codec"]
    if codec is not None:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in codec.items() if k != "name"}
        codec = CODECS[codec["name"]](**settings)
    return Targets(codec=codec, vocab_size=data["vocab_size"], head_rows=data["head_rows"])


class ReadPooler(Pooler):
    """Keeps a request's hidden states where it is read until it is through, then reduces those of all that
    are through in one go.

    The whole head is on every rank, so the first one reduces alone, and nobody waits for another.
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        self._head = head

    def get_supported_tasks(self) -> set[PoolingTask]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """One uint8 tensor (`vllm_requests.to_bytes`) for each request that is through, None for the others.

        Args:
            hidden_states: [tokens of this step, H].
        """
        cursor = pooling_metadata.get_pooling_cursor()
        lengths, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        through = cursor.get_finished_mask()
        outputs: list[Tensor | None] = [None] * len(lengths)
        asked: dict[int, Asked] = {}
        offset = 0
        for i, (length, end) in enumerate(zip(lengths, ends)):
            kept = pooling_metadata.pooling_states[i].hidden_states_cache
            settings = pooling_metadata.pooling_params[i].extra_kwargs
            if settings is not None:  # else it is vLLM's own, to warm up
                asked[i] = Asked(**settings)
                keep(kept, hidden_states[offset : offset + length], np.array(asked[i].read), end - length)
            offset += length
        if get_tensor_model_parallel_rank() == 0:
            done = [i for i in asked if through[i]]
            states = [pooling_metadata.pooling_states[i].hidden_states_cache for i in done]
            for i, answer in zip(done, self._reduce([asked[i] for i in done], states)):
                outputs[i] = torch.frombuffer(bytearray(answer), dtype=torch.uint8)
        for i, ready in enumerate(through):
            if ready:
                pooling_metadata.pooling_states[i].clean()
                if outputs[i] is None:
                    outputs[i] = torch.zeros(0, dtype=torch.uint8)
        return outputs

    def _reduce(self, asked: Sequence[Asked], states: Sequence[Sequence[Tensor]]) -> list[bytes]:
        if not asked:
            return []
        hidden = torch.cat([x for parts in states for x in parts])
        sizes = [len(a.read) for a in asked]
        if [sum(map(len, parts)) for parts in states] != sizes:
            raise RuntimeError("a request was read where the engine took its keys and values from the cache")
        gold = np.concatenate([np.array(a.gold, dtype=np.int64) for a in asked])
        targets = targets_from_json(asked[0].targets)
        logp, target = reduce(hidden, gold, self._head, targets)
        none = np.zeros(len(gold), dtype=np.int64)
        parts = Answers(none, none, none, logp, target).split(np.cumsum(sizes)[:-1])
        return [to_bytes(p.gold_logp, p.target) for p in parts]


def keep(kept: list[Tensor], hidden: Tensor, read: np.ndarray, first: int) -> None:
    """Add what is read of a request's step to what was kept of its earlier ones.

    A request that was put back to make room begins again: what it had is dropped.

    Args:
        hidden: [n, H], of the tokens from `first` on.
    """
    before, upto = np.searchsorted(read, (first, first + len(hidden)))
    have = sum(map(len, kept))
    if have > before:
        kept[:] = [torch.cat(kept)[:before]]
    at = torch.from_numpy(read[before:upto] - first).to(hidden.device, torch.long)
    kept.append(hidden.index_select(0, at))
