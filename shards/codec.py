"""How teacher log-probs are stored: the sparse codec's parameters and quantisers, and the dense codec.

Sparse: head log-probs as u8 multiples of a step (1/16 nat: 4e-5 nats of KL on average), tail logsumexps as
signed bytes, because at temperature 2 and a vocabulary of 152k they exceed +5. Dense: float32, nothing lost.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from shards.errors import UsageError, VersionError
from shards.untrusted import build

HEAD_CODES = 255
"""Largest head code; with the default step it stands for -15.94 nats (a probability of 1e-7)."""
TAIL_CODES = 127
EMPTY_TAIL = -128
"""Code of a tail without tokens (-inf)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseCodec:
    """A head of the distribution per distilled position, and the log-mass of the rest at each temperature."""

    name: ClassVar[str] = "sparse"
    cap: int = 64
    """Most entries kept per distilled position."""
    tail_bound: float = 1e-3
    """The smallest head whose dropped mass (at temperature 1) is below this is kept, up to `cap`."""
    step: float = 1 / 16
    """Nats per head code (u8)."""
    tail_step: float = 1 / 8
    """Nats per tail code (int8)."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """Softmax temperatures whose tail logsumexp is stored; an objective may only ask for these."""

    def __post_init__(self) -> None:
        if not 1 <= self.cap <= 255:
            raise UsageError(f"codec cap must lie in 1..255 (counts are bytes), got {self.cap}")
        if not 0 <= self.tail_bound < 1:
            raise UsageError(f"codec tail_bound must lie in [0, 1), got {self.tail_bound}")
        for name, value in (("step", self.step), ("tail_step", self.tail_step)):
            if not 1e-4 <= value <= 1:
                raise UsageError(f"codec {name} must lie in [1e-4, 1] nat, got {value}")
        t = self.temperatures
        if not 1 <= len(t) <= 16 or len(set(t)) != len(t) or not all(0 < x < math.inf for x in t):
            raise UsageError(f"codec temperatures must be 1 to 16 different positive numbers, got {list(t)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCodec:
    """The whole distribution per distilled position, as float32."""

    name: ClassVar[str] = "dense"


Codec = SparseCodec | DenseCodec
_CODECS: dict[str, type[SparseCodec] | type[DenseCodec]] = {c.name: c for c in (SparseCodec, DenseCodec)}


def codec_to_json(codec: Codec) -> dict[str, Any]:
    """A JSON object that `codec_from_json` turns back into an equal codec."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(codec).items()}
    return {"name": codec.name, **settings}


def codec_from_json(data: Any) -> Codec:
    """Raises: VersionError for an unknown codec, ManifestError for settings it cannot have."""
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in _CODECS:
        raise VersionError(
            f"unknown codec {name!r} (known: {', '.join(_CODECS)}); update tide to read this dataset"
        )
    return build(_CODECS[name], {k: v for k, v in data.items() if k != "name"}, f"codec {name}")


def quantise_head(logp: np.ndarray, step: float) -> np.ndarray:
    """Log-probs (nats, <= 0) as u8 codes of the same shape; below 255 steps they are clipped to 255.

    Error: at most step / 2 inside the range. Raises: ValueError for NaN or infinities.
    """
    return np.clip(_rounded(-logp, step), 0, HEAD_CODES).astype(np.uint8)


def dequantise_head(codes: np.ndarray, step: float) -> np.ndarray:
    """float32 log-probs of u8 codes."""
    return (0.0 - np.arange(HEAD_CODES + 1) * step).astype(np.float32)[codes]


def quantise_tail(zeta: np.ndarray, step: float) -> np.ndarray:
    """Tail logsumexps (nats, signed; -inf = no token in the tail) as int8 codes, clipped to +-127 steps.

    Error: at most step / 2 inside the range, none for -inf. Raises: ValueError for NaN or +inf.
    """
    empty = np.isneginf(zeta)
    codes = np.clip(_rounded(np.where(empty, 0.0, zeta), step), -TAIL_CODES, TAIL_CODES)
    return np.where(empty, EMPTY_TAIL, codes).astype(np.int8)


def dequantise_tail(codes: np.ndarray, step: float) -> np.ndarray:
    """float32 tail logsumexps of int8 codes."""
    return np.where(codes == EMPTY_TAIL, -np.inf, codes * step).astype(np.float32)


def _rounded(values: np.ndarray, step: float) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("log-probs must be finite")
    return np.rint(values.astype(np.float64) / step)
