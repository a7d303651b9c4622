"""The basis of a dataset's sketches: in which directions this teacher's distributions vary most.

Fitted once, from the teacher's hidden states at some thousand asked positions of the corpus's first samples.
x is a position's log-probs minus their mean in the token weights w, w_j proportional to the mean of
softmax(logits / 2)_j: a token counts as it does at the temperature of training. m is the mean of x, and U
its first R principal directions in that metric, U^T W U = I. Logits being linear in the hidden state, they
follow from the covariance of hidden states and the head: an eigenproblem of the hidden size, whatever the
vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from shards.codec import NARROW_CODES, SparseCodec, quantise_sketch
from shards.errors import CorpusError
from student.tensors import Basis

POSITIONS = 4096
"""Most positions that a fit looks at, spread evenly over those there are."""
ROWS = 128
"""Of logits at once."""
DEVIATIONS = 4.0
"""A coefficient has codes of half a byte where they reach as many standard deviations."""
LEAST_VARIANCE = 1e-10
"""Of a direction, as a share of the first one's; below it there is nothing but rounding."""


def fit_sketch(hidden: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> bytes:
    """A safetensors file: `basis` [V, R] float16, `mean`, `weight` [V] and `scale` [R] (standard deviations
    of the coefficients), float32.

    Args:
        hidden: [n, H]. weight, bias: of the head, [V, H] and [V], on the device to compute on.

    Raises:
        CorpusError: too few different positions for so many directions.
    """
    every = max(1, -(-len(hidden) // POSITIONS))
    h = hidden[::every].to(weight.device, torch.float32)
    head = weight.float()
    shift = torch.zeros(len(head), device=head.device) if bias is None else bias.float()
    w = torch.zeros(len(head), device=head.device, dtype=torch.float64)
    for start in range(0, len(h), ROWS):
        w += torch.softmax((h[start : start + ROWS] @ head.T + shift) / 2, -1).sum(0)
    w = (w / w.sum()).float()
    centred = head - w @ head
    middle = h.mean(0)
    # In float64: a covariance of few positions has variances of 0, and square roots of rounding errors.
    covariance = torch.cov(h.double().T).reshape(2 * head.shape[1:])
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    metric = (centred * w[:, None]).T.double() @ centred.double()
    variance, q = torch.linalg.eigh(root.T @ metric @ root)
    variance, q = variance.flip(0)[:rank], q.flip(1)[:, :rank]
    if len(variance) < rank or not variance[-1] > LEAST_VARIANCE * variance[0]:
        raise CorpusError(
            f"a sketch of {rank} coefficients cannot be fitted to {len(h)} positions of the corpus and a "
            f"teacher of hidden size {head.shape[1]}: use a smaller --sketch or a longer corpus"
        )
    basis = centred @ (root @ q / variance.sqrt()).float()
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    tables = {
        "basis": basis.half(),
        "mean": centred @ middle + shift - w @ shift,
        "weight": w,
        "scale": variance.sqrt().float(),
    }
    return save({name: x.contiguous().cpu() for name, x in tables.items()})


def fitted(codec: SparseCodec, table: bytes) -> int:
    """How many coefficients of this codec need codes of a byte each, given the spread that the fit saw."""
    scale = load(table)["scale"]
    wide = int((scale[: codec.sketch] * DEVIATIONS > NARROW_CODES * codec.sketch_step).sum())
    return wide + (codec.sketch - wide) % 2


class SketchCoder:
    """Logits to codes: c = U^T W (x - m), x being centred in the weights, for a whole chunk at a time."""

    def __init__(self, basis: Basis, codec: SparseCodec, device: torch.device) -> None:
        directions, mean, weight = basis.on(torch.zeros(0, device=device))
        scaled = directions * weight[:, None]
        self._codec = codec
        self._project = torch.cat([scaled, weight[:, None]], dim=1)
        self._total, self._offset = scaled.sum(0), mean @ scaled

    def __call__(self, logits: Tensor) -> np.ndarray:
        """[q, R] int8 of [q, V] float32, which may be shifted by any constant."""
        found = logits @ self._project
        coefficients = found[:, :-1] - found[:, -1:] * self._total - self._offset
        # Where the teacher is not finite, its log-probs say so a few lines on.
        return quantise_sketch(coefficients.nan_to_num(0.0, 0.0, 0.0).cpu().numpy(), self._codec)
