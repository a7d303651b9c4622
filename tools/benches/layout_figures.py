"""What the layouts of `tools.benches.layouts` run, counted, and how far the rows they make are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from precompute.cost import Cost, Network, packed_cost, padded_cost
from precompute.inputs import make_jobs, questions
from shards.row import Row, SparseTarget
from student.layout import group
from tools.benches.layouts import ROWS, Work, batches


def cost(work: Work, length: int | None = None, *, packed: bool = False) -> Cost:
    """Of the engine (`packed`), else of `Work.padded(length)`."""
    network, attention = Network.of(work.teacher.model.config), work.asking.attention
    if packed:
        pieces = [
            j.piece
            for i, s in enumerate(work.samples)
            for j in make_jobs(s, work.plans[i], work.asking, index=i)
        ]
        rows = group(map(len, pieces), work.asking.row_tokens)
        return packed_cost(network, ([pieces[i] for i in row] for row in rows), attention, "runs")
    asked = (
        len(sample.teacher_ids)
        for i, sample in enumerate(work.samples)
        for view, plan in enumerate(work.plans[i])
        for _ in questions(sample, view, plan, compdemo=work.asking.compdemo)
    )
    lengths = list(asked) if length is not None else sorted(asked)
    padded = (max(b) if length is None else length for b in batches(lengths, ROWS) for _ in b)
    return padded_cost(network, padded, attention)


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
