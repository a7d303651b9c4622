"""Exact attention over packed rows without a mask of their square: SDPA calls over runs of tokens.

A *run* is the tokens of one (sample, stream, block). Under every attention kind a run either sees another
one whole, not at all, or, inside itself and in the order-dependent kinds, by order. So the one predicate,
asked about runs instead of tokens, says which keys each run needs; runs of one shape go to
scaled_dot_product_attention together, and only those that see something by order need a mask. The cost is
that of the pairs that attend to one another, where a dense mask pays for the square of the row (a row of
1,024 tokens: an eighth of the time). The CPU's counterpart to FlexAttention's block mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from student.attention import Coordinates, may_attend, one_row
from student.layout import Attention

RUNS = "tide_runs"
"""Name under which transformers models are given this attention (`attn_implementation`)."""
QUERY_STEP = 8
"""Queries of a run are filled up to a multiple of this, by repeating one, so that more runs share a shape."""


class Call(NamedTuple):
    """One call of scaled_dot_product_attention: n runs of l queries that each see k keys."""

    queries: Tensor
    """[n * l] int64 into all queries."""
    keys: Tensor
    """[n * k] int64 into all keys."""
    mask: Tensor | None
    """[n, 1, l, k] bool, True = may attend; None = every query sees all of its run's keys."""
    runs: int
    """n."""


class RunMask(NamedTuple):
    """Which queries see which keys, as calls over runs; what the attention function gets as its mask."""

    calls: list[Call]
    back: Tensor
    """[queries] int64: where each query's output is among those of all calls, one after another."""


class _Runs(NamedTuple):
    """Tokens sorted by run."""

    tokens: np.ndarray
    """[N] int64: token indices, run after run, ascending inside a run."""
    start: np.ndarray
    length: np.ndarray
    """[runs] int64."""
    lowest: Coordinates
    highest: Coordinates
    """[runs] each: coordinates with the lowest and the highest order of the run's tokens."""

    @classmethod
    def of(cls, at: Coordinates) -> _Runs:
        key = np.stack([at.sample, at.stream, at.block])
        tokens = np.lexsort(key[::-1])
        ordered = key[:, tokens]
        new = (
            np.append(True, (ordered[:, 1:] != ordered[:, :-1]).any(0)) if len(tokens) else np.zeros(0, bool)
        )
        start = np.flatnonzero(new)
        length = np.diff(np.append(start, len(tokens)))
        order = at.order[tokens]
        extremes = (f.reduceat(order, start) if len(start) else order for f in (np.minimum, np.maximum))
        here = ordered[:, start]
        return cls(tokens, start, length, *(Coordinates(here[0], here[1], here[2], o) for o in extremes))

    def of_run(self, run: Any) -> np.ndarray:
        """Token indices of a run."""
        return self.tokens[self.start[run] : self.start[run] + self.length[run]]


def run_mask(attention: Attention, queries: Coordinates, keys: Coordinates) -> RunMask:
    """The predicate as calls over runs. `queries` holds [R, Q] tensors, `keys` [R, K]."""
    device = keys.sample.device
    if queries is keys:
        queries = keys = one_row(keys)
    q_at, k_at = (Coordinates(*(x.flatten().cpu().numpy() for x in at)) for at in (queries, keys))
    k_runs, q_runs = _Runs.of(k_at), _Runs.of(q_at)

    def between(q: Coordinates, k: Coordinates) -> np.ndarray:
        pairs = (Coordinates(*(x[:, None] for x in q)), Coordinates(*(x[None] for x in k)))
        return np.asarray(may_attend(attention, *pairs))

    # Order enters the predicate only as o_k <= o_q, so a run's extremes stand for all of its tokens.
    sees_some = between(q_runs.highest, k_runs.lowest)
    sees_all = between(q_runs.lowest, k_runs.highest)
    by_order = (sees_some & ~sees_all).any(1)
    # Runs that see the same keys whole are one run (the blocks of a bidirectional stream).
    alike = np.where(by_order, 1 + np.arange(len(by_order)), 0)
    group = np.unique(np.column_stack([np.packbits(sees_some, 1), alike.view(np.uint8).reshape(-1, 8)]),
                      axis=0, return_inverse=True)[1].ravel()  # fmt: skip
    shapes: dict[tuple[int, int, bool], list[tuple[np.ndarray, np.ndarray, int]]] = {}
    members = np.split(np.argsort(group, kind="stable"), np.flatnonzero(np.diff(np.sort(group))) + 1)
    for runs in members if len(group) else []:
        q = np.concatenate([q_runs.of_run(r) for r in runs])
        k = np.concatenate([k_runs.of_run(r) for r in np.flatnonzero(sees_some[runs[0]])])
        real = len(q)
        q = np.append(q, np.repeat(q[:1], -real % QUERY_STEP))
        shapes.setdefault((len(q), len(k), bool(by_order[runs[0]])), []).append((q, k, real))

    calls, back, done = [], np.zeros(len(q_at.sample), dtype=np.int64), 0
    for (length, _, masked), same in shapes.items():
        q, k = (np.stack([x[i] for x in same]) for i in (0, 1))
        for i, (_, _, real) in enumerate(same):
            back[q[i, :real]] = done + i * length + np.arange(real)
        done += q.size
        mask = None
        if masked:
            pairs = (
                Coordinates(*(x[q][:, :, None] for x in q_at)),
                Coordinates(*(x[k][:, None] for x in k_at)),
            )
            mask = torch.from_numpy(np.asarray(may_attend(attention, *pairs)))[:, None].to(device)
        where = [torch.from_numpy(x.ravel()).to(device) for x in (q, k)]
        calls.append(Call(where[0], where[1], mask, len(same)))
    return RunMask(calls, torch.from_numpy(back).to(device))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    run_mask: RunMask | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: [B, heads, Q, D] queries over [B, kv heads, K, D] keys and
    values, to [B, Q, heads, D].

    Args:
        attention_mask: a RunMask; a tensor or None is for the library's own SDPA.
        run_mask: a RunMask that came through a model's `forward`, which passes on no other kind of mask.
    """
    mask = attention_mask if run_mask is None else run_mask
    if not isinstance(mask, RunMask):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
    rows, heads, _, depth = query.shape
    # One gather for all calls: the backward pass of each scatters into a whole [tokens, heads, depth].
    queries, keys = (torch.cat([getattr(call, name) for call in mask.calls]) for name in ("queries", "keys"))
    gathered = [
        x.transpose(1, 2).flatten(0, 1).index_select(0, i)
        for x, i in ((query, queries), (key, keys), (value, keys))
    ]
    q_sizes, k_sizes = ([len(getattr(call, name)) for call in mask.calls] for name in ("queries", "keys"))
    each = zip(*(x.split(sizes) for x, sizes in zip(gathered, (q_sizes, k_sizes, k_sizes))))
    outputs = []
    for call, split in zip(mask.calls, each):
        q, k, v = (x.unflatten(0, (call.runs, -1)).transpose(1, 2) for x in split)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=call.mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(out.transpose(1, 2).reshape(-1, heads, depth))
    return torch.cat(outputs).index_select(0, mask.back).unflatten(0, (rows, -1)), None


AttentionInterface.register(RUNS, attend)
AttentionMaskInterface.register(RUNS, sdpa_mask)
