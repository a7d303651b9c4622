"""LM head and loss in one, a chunk of rows at a time: no [N, V] tensor outlives its chunk.

For each chunk: logits -> readout (`student.objective.Readout`: a few numbers per row) -> loss and its
gradient over the readout, by autograd -> gradient of the logits, written over them -> hidden states and head
weights, summed in float32. Gradients are formed in the forward pass; the backward pass only hands them on,
scaled. So every objective is fused, and a target's inside is known to `student.losses` alone.
`Objective.__call__` on whole logits is the specification.

Passes over a chunk's logits go tile by tile: a few rows that stay in a CPU's cache from one pass to the next.
The head's three matrix products take the whole chunk.

Shape suffixes: N masked positions, n rows of a chunk, r rows of a tile, H hidden size, V vocabulary, D
distilled positions, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from student.head import ChunkedHead, chunked_head, vocab_size
from student.losses.sparse import Classes, logits_gradient, named_classes
from student.objective import Objective, Readout
from student.parts import Part, parts
from student.tensors import Batch, LossOut, PositionBatch, take_rows

LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes of a chunk's float32 logits, by device. Each chunk reads and writes the gradient of the whole head
once; a GPU needs more rows than a CPU to make up for that."""
TILE_BYTES = 2 << 20
"""Of a tile's logits, on a CPU."""


class FusedLoss:
    """The loss that a model's `forward` calls, as `loss_head`, with its hidden states and its head.

    It runs there because wrappers (FSDP, DDP, autocast) have the head's weights ready inside `forward` alone.
    One object serves a whole run and is told about each batch: a compiled `forward` would be compiled again
    for another object.
    """

    def __init__(self, objective: Objective, *, logits_bytes: int | None = None) -> None:
        """
        Args:
            logits_bytes: bound on the float32 logits that exist at a time; None = by device. A single
                position, or the tokens of one CALM chunk, are the least a chunk of rows can be.
        """
        self.objective = objective
        self.logits_bytes = logits_bytes
        self.batch: Batch | None = None
        self.progress = 0.0

    def about(self, batch: Batch, progress: float) -> FusedLoss:
        """Set what the next call is about; `progress` is the share of training done."""
        self.batch, self.progress = batch, progress
        return self

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, head: nn.Module) -> LossOut:
        """The loss of hidden states [N, H] at the batch's masked positions under `head`.

        Raises:
            ValueError: masked positions without the targets a term needs, or nothing said about a batch.
            UsageError: the head's weights are sharded at this point.
        """
        if self.batch is None:
            raise ValueError("FusedLoss was called before it was told about a batch")
        return fused_loss(self.objective, self.batch, self.progress, hidden, head, self.logits_bytes)


def fused_loss(
    objective: Objective,
    batch: Batch,
    progress: float,
    hidden: Tensor,
    head: nn.Module,
    logits_bytes: int | None = None,
) -> LossOut:
    """`objective(head(hidden), batch, progress)`; `FusedLoss` says the rest. Under no_grad, values only."""
    row_bytes = 4 * vocab_size(head, hidden)
    device = hidden.device.type
    limit = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) if logits_bytes is None else logits_bytes
    cut = parts(batch, max(1, limit // row_bytes), objective.requirements())
    grad = torch.is_grad_enabled()
    rows = max(part.rows for part in cut)
    on_chunks = chunked_head(head, hidden, rows, grad=grad)
    tile = max(1, TILE_BYTES // row_bytes) if device == "cpu" else max(1, rows)
    run = _Run(objective, progress, cut, on_chunks, tile)
    total = _Fused.apply(run, hidden, *on_chunks.parameters) if grad else run(hidden, grad=False)[0]
    return LossOut(total, run.terms)


class _Fused(torch.autograd.Function):
    """Forms every gradient in forward; may be run backward more than once if the graph is retained."""

    @staticmethod
    def forward(ctx: Any, run: _Run, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total, gradient = run(hidden, grad=any(ctx.needs_input_grad))
        made = [gradient, *run.head.gradients]
        inputs = (hidden, *parameters)
        ctx.save_for_backward(*(None if g is None else g.to(x.dtype) for g, x in zip(made, inputs)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if scale != 1:  # the usual 1 saves a copy of the head's gradient
            gradients = [None if g is None else g * scale.to(g.dtype) for g in gradients]
        return (None, *gradients)


class _Run:
    """One pass over all chunks of a batch."""

    def __init__(
        self, objective: Objective, progress: float, cut: list[Part], head: ChunkedHead, tile: int
    ) -> None:
        """
        Args:
            tile: rows of a tile.
        """
        self.objective, self.progress = objective, progress
        self.parts, self.head, self.tile = cut, head, tile
        self.terms: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, hidden: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """The total loss and, if wanted, the gradient [N, H] of the hidden states; sets `terms`."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gradient = torch.empty_like(hidden, dtype=wide) if grad and hidden.requires_grad else None
        total = hidden.new_zeros((), dtype=wide)
        for part in self.parts:
            logits = self.head.logits(hidden[part.rows_at])
            with torch.autocast(hidden.device.type, enabled=False):
                loss = self._part(part, logits, grad)
            total += loss.total
            for name, value in loss.terms.items():
                self.terms[name] = self.terms[name] + value if name in self.terms else value
            if grad:
                of_hidden = self.head.backward(logits)
                if gradient is not None and of_hidden is not None:
                    gradient[part.rows_at] = of_hidden
        return total, gradient

    def _part(self, part: Part, logits: Tensor, grad: bool) -> LossOut:
        """The loss of a chunk; with `grad`, its gradient is written over `logits` [n, V]."""
        tiles = [slice(i, min(i + self.tile, part.rows)) for i in range(0, part.rows, self.tile)]
        gold = _Gold(logits, part.batch.gold, self.objective.chunk_vocab(part.batch), tiles)
        at = part.batch.positions
        positions = _Positions(logits, at, part, tiles, self) if at is not None and len(at.index) else None
        with torch.set_grad_enabled(grad):
            losses = positions.losses() if positions is not None else {}
            loss = self.objective.of(gold.readout(losses), part.batch, self.progress)
        if grad:
            leaves = [*gold.leaves, *(positions.leaves if positions is not None else [])]
            got = torch.autograd.grad(loss.total, leaves, allow_unused=True)
            made = [torch.zeros_like(x) if g is None else g for g, x in zip(got, leaves)]
            if positions is not None:
                positions.gradients = made[len(gold.leaves) :]
            for rows in tiles:
                extra = None if positions is None else positions.gradient(logits, rows)
                gold.write_gradient(logits, rows, made[: len(gold.leaves)])
                if positions is not None and extra is not None:
                    positions.add(logits, rows, extra)
        return LossOut(loss.total.detach(), loss.terms)


class _Gold:
    """Log-probs of the true tokens of a chunk, over all tokens and, where chunks ask for it, the first
    `cut`. Their gradient is a multiple of softmax and one-hot, written over the logits."""

    def __init__(self, logits: Tensor, gold: Tensor, cut: int | None, tiles: list[slice]) -> None:
        n, vocab = logits.shape
        self.gold, self.cut = gold[:, None], cut if cut is not None and cut < vocab else None
        self.lse = logits.new_empty(n, 1)
        self.cut_lse = logits.new_empty(n, 1) if self.cut else self.lse
        for rows in tiles:
            z = logits[rows]
            if self.cut:
                torch.logsumexp(z[:, : self.cut], -1, keepdim=True, out=self.cut_lse[rows])
                beyond = z[:, self.cut :].logsumexp(-1, keepdim=True)
                torch.logaddexp(self.cut_lse[rows], beyond, out=self.lse[rows])
            else:
                torch.logsumexp(z, -1, keepdim=True, out=self.lse[rows])
        self.leaves = [(logits.gather(-1, self.gold) - self.lse)[:, 0].requires_grad_()]
        if self.cut:
            self.cut_gold = self.gold.clamp_max(self.cut - 1)
            cut_logp = logits.gather(-1, self.cut_gold) - self.cut_lse
            self.leaves.append(cut_logp[:, 0].requires_grad_())

    def readout(self, losses: dict[str, Tensor]) -> Readout:
        return Readout(self.leaves[0], self.leaves[1] if self.cut else None, losses)

    def write_gradient(self, logits: Tensor, rows: slice, gradients: list[Tensor]) -> None:
        """From d loss / d log-prob, g: g (one-hot - softmax), of both softmaxes in one pass."""
        z = logits[rows]
        g = gradients[0][rows, None]
        if self.cut:
            g_cut, cut_lse, lse = gradients[1][rows, None], self.cut_lse[rows], self.lse[rows]
            # softmax over all tokens = softmax over the first `cut`, times a share of at most 1
            share = (cut_lse - lse).exp_()
            z[:, : self.cut].sub_(cut_lse).exp_().mul_(-(g * share + g_cut))
            z[:, self.cut :].sub_(lse).exp_().mul_(-g)
            z.scatter_add_(-1, self.cut_gold[rows], g_cut)
        else:
            z.sub_(self.lse[rows]).exp_().mul_(-g)
        z.scatter_add_(-1, self.gold[rows], g)


class _Positions:
    """Losses at the distilled positions of a chunk.

    Of sparse targets, the weights of a few classes are read, and their gradient spread over the logits. Of
    dense ones the losses themselves are read, tile by tile, and made again, with autograd, for the gradient:
    no [n, V] tensor beside the logits either way.
    """

    def __init__(self, logits: Tensor, at: PositionBatch, part: Part, tiles: list[slice], run: _Run) -> None:
        self.at, self.objective, self.progress, self.index = at, run.objective, run.progress, part.index
        self.gradients: list[Tensor] = []
        self.ids: Tensor | None = None
        read: list[Any] = []
        for rows in tiles:
            spots = self._spots(rows)
            both, ids = named_classes(
                self._logits(logits, rows), take_rows(at.target, spots), self.temperature
            )
            read.append((both, ids) if ids is not None else self._losses(both, spots))
        if read and isinstance(read[0], dict):
            self.leaves = [torch.cat([x[name] for x in read]).requires_grad_() for name in read[0]]
            self.names = list(read[0])
        else:
            self.leaves = [torch.cat([both.student for both, _ in read]).requires_grad_()]
            self.teacher = torch.cat([both.teacher for both, _ in read])
            self.ids = torch.cat([ids for _, ids in read])

    @property
    def temperature(self) -> float:
        return self.objective.temperature

    def _spots(self, rows: slice) -> slice:
        """Which of the D distilled positions lie in a tile."""
        first, end = np.searchsorted(self.index, [rows.start, rows.stop])
        return slice(int(first), int(end))

    def _rows(self, rows: slice) -> slice | Tensor:
        """Rows of the logits of a tile's distilled positions: the tile, where those are all of its rows."""
        spots = self._spots(rows)
        every = spots.stop - spots.start == rows.stop - rows.start
        return rows if every else self.at.index[spots]

    def _logits(self, logits: Tensor, rows: slice) -> Tensor:
        return logits[self._rows(rows)][:, : self.at.vocab_size]

    def _losses(self, both: Classes, spots: slice) -> dict[str, Tensor]:
        return self.objective.position_losses(both, self.at.t[spots], self.progress)

    def losses(self) -> dict[str, Tensor]:
        """Position term -> [D], as functions of the leaves."""
        if self.ids is None:
            return dict(zip(self.names, self.leaves))
        return self._losses(Classes(self.leaves[0], self.teacher), slice(None))

    def gradient(self, logits: Tensor, rows: slice) -> Tensor:
        """[r, shared vocabulary]: what the logits of a tile get from the position terms."""
        spots, z = self._spots(rows), self._logits(logits, rows)
        if self.ids is not None:
            student, of = self.leaves[0].detach(), self.gradients[0]
            return logits_gradient(of[spots], student[spots], self.ids[spots], z, self.temperature)
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            both, _ = named_classes(leaf, take_rows(self.at.target, spots), self.temperature)
            losses = self._losses(both, spots)
            made, wanted = [losses[name] for name in self.names], [of[spots] for of in self.gradients]
            return torch.autograd.grad(made, leaf, wanted)[0]

    def add(self, logits: Tensor, rows: slice, gradient: Tensor) -> None:
        at = self._rows(rows)
        if isinstance(at, slice):
            logits[at, : self.at.vocab_size] += gradient
        else:
            logits[:, : self.at.vocab_size].index_add_(0, at, gradient)
