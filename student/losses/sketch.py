"""The tail of a sparse target filled in the shape of a sketch: what a basis and a few coefficients say of the
teacher's tail, and, in what they leave open, the student's own shape.

A dataset's basis is fitted once (`precompute.sketch`): U, the R directions in which the teacher's centred
log-probs vary most, their mean m, and token weights w with U^T W U = I. Per position the target stores
c = U^T W (x - m), x being the teacher's log-probs minus their mean in w, in steps of d. With the student's
logits centred alike, x_s = s - w.s - m and c_s = U^T W x_s, a tail token j gets

    f_j = m_j + U_j (c' - b c_s) + b x_s,j        c' = c_s clipped to [c - d/2, c + d/2]

shifted so that the tail's mass is the stored one, and capped at the smallest kept entry as in
`student.losses.sparse`. b, the mix, is the codec's: 0 = the sketch alone, 1 = the student corrected where the
sketch contradicts it.

Shape suffixes: D distilled positions, V shared vocabulary, R coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student.tensors import Basis


@torch.no_grad()
def sketched_shape(logits: Tensor, sketch: Tensor, basis: Basis) -> Tensor:
    """f [D, V], nats at temperature 1, up to a constant per position.

    Args:
        logits: [D, V] the student's, float32 or wider.
        sketch: [D, R] codes of the coefficients.
    """
    directions, mean, weight = basis.on(logits)
    x = logits - (logits @ weight)[:, None] - mean
    mine = (x * weight) @ directions
    theirs = sketch.to(logits.dtype) * basis.step
    half = basis.step / 2
    wanted = torch.clamp(mine, theirs - half, theirs + half) - basis.mix * mine
    return torch.addmm(x.mul_(basis.mix).add_(mean), wanted, directions.t())
