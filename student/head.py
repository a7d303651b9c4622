"""An LM head run a few rows at a time: logits of a chunk, then the gradients that the chunk's logits got.

Shape suffixes: N rows, n rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards.errors import UsageError

SLICE_BYTES = 32 << 20
"""Largest piece of a weight gradient that is made in a format other than the one it is summed in."""


class ChunkedHead(Protocol):
    """What a loss needs of a head. `logits` and `backward` alternate; gradients add up in `gradients`."""

    parameters: list[Tensor]
    """Those that may need a gradient."""
    gradients: list[Tensor | None]
    """Of `parameters`, in float32 or wider; None where not asked for."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] in float32 or wider, the caller's to overwrite until the next call."""

    def backward(self, gradient: Tensor) -> Tensor | None:
        """[n, H] gradient of the hidden states of the last call, from that of its logits [n, V]."""


def chunked_head(head: nn.Module, hidden: Tensor, rows: int, *, grad: bool) -> ChunkedHead:
    """The head in chunks of at most `rows` rows of hidden states like `hidden` [N, H].

    A plain linear layer is computed here; anything else (LoRA, a bias, hooks) is called as the module it is.

    Args:
        grad: gradients are wanted, of whatever asks for them.

    Raises:
        UsageError: the head's weights are sharded at this point.
    """
    if any(type(p).__name__ == "DTensor" for p in head.parameters()):
        raise UsageError(
            "the LM head is sharded apart from the model, so its weights are not whole where the loss needs "
            "them; leave it to the root: fully_shard the layers and the model, not lm_head"
        )
    hooked = head._forward_hooks or head._forward_pre_hooks
    if type(head) is nn.Linear and head.bias is None and not hooked:
        return _Linear(head.weight, hidden, rows, grad=grad)
    return _Module(head, hidden, grad=grad)


def vocab_size(head: nn.Module, hidden: Tensor) -> int:
    """Columns of the logits that `head` makes of hidden states like `hidden`."""
    size = getattr(head, "out_features", None)
    if isinstance(size, int):
        return size
    # Not under no_grad: autocast would keep weights cast without a graph for the calls that need one.
    return head(hidden.new_zeros(1, hidden.shape[-1])).shape[-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Linear:
    """Logits and gradients go into buffers that are reused; matrix products in autocast's format, if any."""

    def __init__(self, weight: Tensor, hidden: Tensor, rows: int, *, grad: bool) -> None:
        device = hidden.device.type
        cast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
        self.weight = weight.detach().to(self.dtype)
        self.hidden_gradient = grad and hidden.requires_grad
        wide = _wide(self.dtype)
        self.buffer = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=self.dtype)
        self.parameters: list[Tensor] = [weight]
        self.gradients: list[Tensor | None] = [None]
        if grad and weight.requires_grad:
            self.gradients = [torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format)]
        self.kept = 0
        """Whether `gradients` holds anything yet: 0 or 1, what a product is added to."""

    def logits(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden.detach().to(self.dtype)
        z = torch.mm(self.hidden, self.weight.t(), out=self.buffer[: len(hidden)])
        return z.to(_wide(self.dtype))

    def backward(self, gradient: Tensor) -> Tensor | None:
        d = gradient.to(self.dtype)
        total = self.gradients[0]
        if total is not None and total.dtype == self.dtype:
            total.addmm_(d.t(), self.hidden, beta=self.kept)
        elif total is not None:
            step = max(1, SLICE_BYTES // (self.hidden.shape[1] * self.dtype.itemsize))
            for v in range(0, len(total), step):
                made = d[:, v : v + step].t() @ self.hidden
                total[v : v + step] = total[v : v + step] + made if self.kept else made
        self.kept = 1
        return d @ self.weight if self.hidden_gradient else None


class _Module:
    """Any head, by autograd; one chunk's graph at a time."""

    def __init__(self, head: nn.Module, hidden: Tensor, *, grad: bool) -> None:
        self.head, self.grad = head, grad
        self.hidden_gradient = grad and hidden.requires_grad
        self.parameters: list[Tensor] = [p for p in head.parameters() if p.requires_grad]
        self.gradients = [
            torch.zeros_like(p, dtype=_wide(p.dtype)) if grad else None for p in self.parameters
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.grad):
            self.hidden = hidden.detach().requires_grad_(self.hidden_gradient)
            self.output = self.head(self.hidden)
        return self.output.detach().to(_wide(self.output.dtype), copy=True)

    def backward(self, gradient: Tensor) -> Tensor | None:
        inputs: list[Any] = [*self.parameters, *([self.hidden] if self.hidden_gradient else [])]
        got = torch.autograd.grad(self.output, inputs, gradient.to(self.output.dtype), allow_unused=True)
        for total, g in zip(self.gradients, got):
            if total is not None and g is not None:
                total += g
        return got[-1] if self.hidden_gradient else None
