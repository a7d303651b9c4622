"""What the layouts of `tools.layouts` run, counted, and how far the rows they make are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from precompute.inputs import make_jobs, questions
from shards.row import Row, SparseTarget
from student.attention import Coordinates
from student.layout import group, pack
from student.run_attention import run_mask
from tools.layouts import ROWS, Work, batches


@dataclass(frozen=True, slots=True)
class Cost:
    """What one side runs, from its layout alone."""

    tokens: int
    """Through the layers."""
    head_positions: int
    """Through the LM head."""
    pairs: int
    """Query-key pairs that attention computes, over all layers."""
    flops: int
    """Of matrix products: layers, attention, head."""


def cost(work: Work, length: int | None = None, *, packed: bool = False) -> Cost:
    """Of the engine (`packed`), else of `Work.padded(length)`."""
    config = work.teacher.model.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    query, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    dense, experts = 3 * hidden * config.intermediate_size, getattr(config, "n_routed_experts", 0)
    mlps = [dense] * layers
    if experts:
        active = (config.num_experts_per_tok + config.n_shared_experts) * 3 * config.moe_intermediate_size
        first = config.first_k_dense_replace
        mlps[first:] = [hidden * (active + experts)] * (layers - first)
    asked = [
        (i, len(q.asked))
        for i, sample in enumerate(work.samples)
        for view, plan in enumerate(work.plans[i])
        for q in questions(sample, view, plan, compdemo=work.asking.compdemo)
    ]
    read = sum(n for _, n in asked)
    if packed:
        pieces = [
            j.piece
            for i, s in enumerate(work.samples)
            for j in make_jobs(s, work.plans[i], work.asking, index=i)
        ]
        tokens, per_layer, last = sum(map(len, pieces)), 0, 0
        for indices in group(map(len, pieces), work.asking.row_tokens):
            row = pack([pieces[i] for i in indices], sum(len(pieces[i]) for i in indices))
            at = Coordinates(*(torch.from_numpy(x) for x in (row.sample, row.stream, row.block, row.order)))
            reads = Coordinates(*(x[:, torch.from_numpy(row.read)] for x in at))
            for calls, is_last in ((run_mask(work.asking.attention, at, at).calls, False),
                                   (run_mask(work.asking.attention, reads, at).calls, True)):  # fmt: skip
                pairs = sum(len(c.queries) * len(c.keys) // c.runs for c in calls)
                per_layer, last = (per_layer, last + pairs) if is_last else (per_layer + pairs, last)
        pairs, head = per_layer * (layers - 1) + last, read
        linear = tokens * (layers * 2 * hidden * keys + (layers - 1) * 2 * hidden * query + sum(mlps[:-1]))
        linear += read * (2 * hidden * query + mlps[-1])
    else:
        streams = 2 if work.asking.attention in ("staircase", "staircase-causal") else 1
        lengths = [len(work.samples[i].teacher_ids) for i, _ in asked]
        if length is None:
            lengths.sort()
        padded = [max(b) if length is None else length for b in batches(lengths, ROWS) for _ in b]
        tokens = head = streams * sum(padded)
        pairs = layers * sum((streams * n) ** 2 for n in padded)
        linear = tokens * (layers * 2 * hidden * (query + keys) + sum(mlps))
    flops = 2 * linear + 4 * query * pairs + 2 * hidden * config.vocab_size * head
    return Cost(tokens, head, pairs, flops)


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    """How far two sides' rows are apart: largest errors in nats, and the share of positions whose heads have
    one size (rounding may move an entry across the bound) and, of those, the same ids in the same order."""
    worst = {"logp": 0.0, "tails": 0.0, "gold_logp": 0.0}
    positions = same_count = same_ids = 0
    for a, b in zip(ours, theirs, strict=True):
        if a.positions is None or b.positions is None:
            raise ValueError("only rows with distributions can be compared")
        x, y = a.positions.target, b.positions.target
        if not (isinstance(x, SparseTarget) and isinstance(y, SparseTarget)):
            raise ValueError("only sparse targets can be compared")
        np.testing.assert_array_equal(a.positions.positions, b.positions.positions)
        positions += len(x.counts)
        if len(x.counts):
            gold = np.abs(a.positions.gold_logp - b.positions.gold_logp)
            worst["gold_logp"] = max(worst["gold_logp"], float(gold.max()))
        for i, (n, m) in enumerate(zip(x.counts, y.counts)):
            if n != m:
                continue
            s, t = (int(z.counts[:i].sum()) for z in (x, y))
            same_count += 1
            same_ids += int((x.ids[s : s + n] == y.ids[t : t + n]).all())
            worst["logp"] = max(worst["logp"], float(np.abs(x.logp[s : s + n] - y.logp[t : t + n]).max()))
            worst["tails"] = max(worst["tails"], float(np.abs(x.tails[i] - y.tails[i]).max()))
    return {
        **{f"max_error_{k}": v for k, v in worst.items()},
        "same_count": same_count / max(1, positions),
        "same_ids": same_ids / max(1, same_count),
    }
