"""Held-out likelihood of a masked diffusion model: NLL over timesteps, and its bound in bits per byte.

At timestep t each counted token is hidden with probability t; NLL_t = (1/t) * sum of the cross entropy at the
hidden ones. Its mean over uniform t bounds -log p(answer | prompt) from above (MDLM; BD3LM section 3);
the default grid is the midpoint rule with five cells.

Counted are maskable tokens of the content and end-of-turn tokens. The EOS that fills the last block is hidden
at every t and never counted: left visible it would give the answer's length away and NLL would no longer be a
bound. A model of any-order conditionals that never looks at some tokens still bounds the likelihood of the
others.

Masks come from (seed, sample id, t) alone: equal for every model and dataset, never the stored ones that
training saw. So two results over the same samples are paired, and `paired_bootstrap` tells a difference from
the samples' noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UsageError
from shards.noise import iid_mask
from shards.row import Row
from student.attention import Coordinates
from student.forward import hidden_at
from student.layout import Piece, Stream, lay_out, pack
from student.losses.ce import gold_log_probs

GRID = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True, eq=False)
class EvalResult:
    """Likelihood of S samples at G timesteps."""

    grid: tuple[float, ...]
    seed: int
    sample_ids: tuple[str, ...]
    nll_nats: np.ndarray
    """[S, G] float64: NLL_t of each sample, summed over its tokens."""
    bytes: np.ndarray
    """[S] int64: UTF-8 bytes of the content that the counted tokens stand for."""

    @property
    def bits_per_byte(self) -> float:
        """Total NLL in bits over total bytes, averaged over the grid."""
        return float(_bits_per_byte(self.nll_nats.mean(1), self.bytes))

    @property
    def by_t(self) -> dict[float, float]:
        """Bits per byte at each timestep of the grid."""
        return {t: float(_bits_per_byte(self.nll_nats[:, g], self.bytes)) for g, t in enumerate(self.grid)}

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; the summary values are there for people and not read back."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "by_t": {f"{t:g}": v for t, v in self.by_t.items()},
            "grid": list(self.grid),
            "seed": self.seed,
            "sample_ids": list(self.sample_ids),
            "nll_nats": self.nll_nats.tolist(),
            "bytes": self.bytes.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EvalResult:
        """The inverse of `to_json`.

        Raises:
            UsageError: not an evaluation result, or one whose parts do not fit together.
        """
        try:
            result = cls(
                grid=tuple(float(t) for t in data["grid"]),
                seed=int(data["seed"]),
                sample_ids=tuple(data["sample_ids"]),
                nll_nats=np.asarray(data["nll_nats"], dtype=np.float64),
                bytes=np.asarray(data["bytes"], dtype=np.int64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not an evaluation result ({error!r}): run tide eval again") from error
        shape = (len(result.sample_ids), len(result.grid))
        if result.nll_nats.shape != shape or result.bytes.shape != shape[:1]:
            raise UsageError(
                f"not an evaluation result: nll_nats has shape {result.nll_nats.shape}, expected {shape}: "
                "run tide eval again"
            )
        return result


@torch.no_grad()
def evaluate(
    model: Any,
    samples: Iterable[Row],
    *,
    mask_token_id: int,
    block_size: int,
    grid: Sequence[float] = GRID,
    seed: int = 0,
    row_tokens: int = 1024,
    batch_rows: int = 8,
    head_rows: int = 256,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Evaluate a block diffusion model. Neither packing nor batch size changes the result beyond rounding.

    Args:
        model: any decoder-only transformers model; its training mode is left as it was.
        samples: rows, of which the first view of each sample is used; the caller chooses the split.
        grid: timesteps in (0, 1]; all of a sample's share one clean stream.
        row_tokens: packed row length; a sample that needs more gets a row of its own.
        batch_rows: rows per forward pass, about.
        head_rows: positions per pass of the LM head, which makes [head_rows, V] float32 logits.
        device: where the model is, if not where its parameters say.
        progress: called with the number of samples done so far.

    Raises:
        UsageError: no samples, no content in them, or a timestep outside (0, 1].
    """
    if not grid or not all(0 < t <= 1 for t in grid):
        raise UsageError(
            f"evaluation timesteps must lie in (0, 1], got {', '.join(map(str, grid)) or 'none'}"
        )
    device = next(model.parameters()).device if device is None else device
    ids: list[str] = []
    content_bytes: list[int] = []
    nll: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    try:
        for asked in _batches(samples, grid, seed, mask_token_id, block_size, row_tokens * batch_rows):
            logp = read_log_probs(
                model,
                [a.piece for a in asked],
                np.concatenate([a.gold for a in asked]),
                pad_id=mask_token_id,
                row_tokens=row_tokens,
                head_rows=head_rows,
                device=device,
            )
            for a, values in zip(asked, np.split(logp, np.cumsum([len(a.gold) for a in asked])[:-1])):
                ids.append(a.row.sample_id)
                content_bytes.append(a.row.content_bytes)
                nll.append(np.bincount(a.grid_index, -values, minlength=len(grid)) / np.asarray(grid))
            if progress is not None:
                progress(len(ids))
    finally:
        model.train(was_training)
    if not sum(content_bytes):
        raise UsageError(
            f"nothing to evaluate: {len(ids)} held-out samples with no content; precompute with "
            "--holdout above 0"
        )
    return EvalResult(
        grid=tuple(grid),
        seed=seed,
        sample_ids=tuple(ids),
        nll_nats=np.stack(nll),
        bytes=np.asarray(content_bytes, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """One sample, laid out, and what is asked of it."""

    row: Row
    piece: Piece
    gold: np.ndarray
    """[all asked] int64: true token of each hidden, counted position, timestep after timestep."""
    grid_index: np.ndarray
    """[all asked] int64: the timestep it belongs to."""


def _ask(row: Row, grid: Sequence[float], seed: int, mask_token_id: int, block_size: int) -> _Asked:
    fill = np.arange(len(row.input_ids)) >= row.real_length
    streams = []
    for t in grid:
        hidden = iid_mask(seed, row.sample_id, "eval", row.maskable, t) & ~fill
        noisy = np.where(hidden | fill, mask_token_id, row.input_ids)
        streams.append(Stream(noisy, np.flatnonzero(hidden)))
    return _Asked(
        row,
        lay_out(row.input_ids, streams, attention="staircase", block_size=block_size),
        np.concatenate([row.input_ids[s.asked] for s in streams]).astype(np.int64),
        np.repeat(np.arange(len(grid)), [len(s.asked) for s in streams]),
    )


def _batches(
    samples: Iterable[Row], grid: Sequence[float], seed: int, mask_token_id: int, block_size: int, tokens: int
) -> Iterator[list[_Asked]]:
    """Samples in order, one view each, in groups of at least `tokens` packed tokens (but the last)."""
    seen: set[str] = set()
    batch: list[_Asked] = []
    for row in samples:
        if row.sample_id in seen:
            continue
        seen.add(row.sample_id)
        batch.append(_ask(row, grid, seed, mask_token_id, block_size))
        if sum(len(a.piece) for a in batch) >= tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def read_log_probs(
    model: Any,
    pieces: Sequence[Piece],
    gold: np.ndarray,
    *,
    pad_id: int,
    row_tokens: int,
    head_rows: int,
    device: torch.device | str,
) -> np.ndarray:
    """[all asked of all pieces] float64 log-probs of the true tokens `gold`, one for each read."""
    if not len(gold):
        return np.zeros(0)
    packed = pack(pieces, row_tokens, pad_id=pad_id)

    def on_device(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    at = Coordinates(*map(on_device, (packed.sample, packed.stream, packed.block, packed.order)))
    hidden = hidden_at(
        model, on_device(packed.ids), on_device(packed.position), at, on_device(packed.read), "staircase"
    )
    head = model.get_output_embeddings()
    parts = [
        gold_log_probs(head(h), g) for h, g in zip(hidden.split(head_rows), on_device(gold).split(head_rows))
    ]
    return torch.cat(parts).double().cpu().numpy()


def _bits_per_byte(nll_nats: np.ndarray, content_bytes: np.ndarray) -> np.ndarray:
    """Ratio estimate over the last axis. A resample may hold no content at all; it then counts one byte."""
    return nll_nats.sum(-1) / np.maximum(content_bytes.sum(-1), 1) / math.log(2)


def _resampled(results: Sequence[EvalResult], seed: int, n: int) -> np.ndarray:
    """[n, results] bits per byte of samples drawn with replacement, the same draw for all results."""
    rng = np.random.Generator(np.random.Philox(seed))
    nll = [r.nll_nats.mean(1) for r in results]
    size = len(results[0].bytes)
    draws = (rng.integers(0, size, size) for _ in range(n))
    return np.array([[_bits_per_byte(x[i], r.bytes[i]) for x, r in zip(nll, results)] for i in draws])


def bootstrap(result: EvalResult, *, seed: int = 0, n: int = 2000) -> tuple[float, float, float]:
    """(bits per byte, low, high): the 95 % percentile interval over samples."""
    low, high = np.percentile(_resampled([result], seed, n)[:, 0], [2.5, 97.5])
    return result.bits_per_byte, float(low), float(high)


def paired_bootstrap(
    a: EvalResult, b: EvalResult, *, seed: int = 0, n: int = 2000
) -> tuple[float, float, float]:
    """(difference, low, high) of bits per byte, `a` minus `b`: the 95 % percentile interval over common
    samples.

    Raises:
        UsageError: the two were not measured on the same samples, timesteps and masks.
    """
    if (a.sample_ids, a.grid, a.seed) != (b.sample_ids, b.grid, b.seed):
        raise UsageError(
            "evaluations differ in samples, timesteps or seed and cannot be compared: evaluate both on "
            "the same data"
        )
    values = _resampled([a, b], seed, n)
    low, high = np.percentile(values[:, 0] - values[:, 1], [2.5, 97.5])
    return a.bits_per_byte - b.bits_per_byte, float(low), float(high)
