"""How teacher distributions are stored: the parameters of the three codecs, and the quantisers.

Sparse: head log-probs as u8 multiples of a step, tail logsumexps as signed bytes, because at temperature 2
and a vocabulary of 152k they exceed +5; with a sketch, also the tail's shape, as a few coefficients of a
basis that the dataset holds once. Exact: final hidden states, and the teacher's head once. Dense: float32
log-probs.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from shards.errors import ManifestError, UsageError, VersionError
from shards.untrusted import build

HEAD_CODES = 255
"""Largest head code; with the default step it stands for -31.9 nats."""
TAIL_CODES = 127
"""Largest code of a byte with a sign; the smallest is its negative."""
NARROW_CODES = 7
"""Largest code of half a byte."""
MAX_SKETCH = 512
SUM_WINDOW = 1 << 13
"""Codes whose sums come from doubling; a power of two."""
EXACT_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the exact codec's dtype."""
TABLE_FRAME_BYTES = 1 << 16
"""Of a safetensors file, beside its numbers."""
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
    step: float = 1 / 8
    """Nats per head code (u8)."""
    tail_step: float = 1 / 8
    """Nats per tail code (int8)."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """Softmax temperatures whose tail logsumexp is stored; an objective may only ask for these."""
    sketch: int = 0
    """Coefficients per position that describe the tail's shape (`student.losses.sketch`); 0 = none, the tail
    then has the student's shape."""
    sketch_wide: int = 0
    """How many of them, the first, have codes of a byte (+-127); the codes of the others, which vary less,
    are of half a byte (+-7). The fit decides."""
    sketch_step: float = 0.4
    """Of the codes, in units of the basis."""
    sketch_mix: float = 0.6
    """Weight of the student's own shape beside the sketch, where a target is filled."""
    table: str = ""
    """sha256 of the file that holds the basis; empty without a sketch, or until it is made."""

    @property
    def sketch_bytes(self) -> int:
        """Per position."""
        return self.sketch_wide + (self.sketch - self.sketch_wide) // 2

    def __post_init__(self) -> None:
        if not 1 <= self.cap <= 255:
            raise UsageError(f"codec cap must lie in 1..255 (counts are bytes), got {self.cap}")
        if not 0 <= self.tail_bound < 1:
            raise UsageError(f"codec tail_bound must lie in [0, 1), got {self.tail_bound}")
        for name, value in (("step", self.step), ("tail_step", self.tail_step)):
            if not 1e-4 <= value <= 1:
                raise UsageError(f"codec {name} must lie in [1e-4, 1] nat, got {value}")
        if not 0 <= self.sketch <= MAX_SKETCH:
            raise UsageError(f"codec sketch must lie in 0..{MAX_SKETCH}, got {self.sketch}")
        if not 0 <= self.sketch_wide <= self.sketch or (self.sketch - self.sketch_wide) % 2:
            raise UsageError(
                f"codec sketch_wide must leave an even number of the {self.sketch} coefficients, "
                f"got {self.sketch_wide}"
            )
        if not 1e-4 <= self.sketch_step <= 100:
            raise UsageError(f"codec sketch_step must lie in [1e-4, 100], got {self.sketch_step}")
        if not 0 <= self.sketch_mix <= 1:
            raise UsageError(f"codec sketch_mix must lie in [0, 1], got {self.sketch_mix}")
        t = self.temperatures
        if not 1 <= len(t) <= 16 or len(set(t)) != len(t) or not all(0 < x < math.inf for x in t):
            raise UsageError(f"codec temperatures must be 1 to 16 different positive numbers, got {list(t)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCodec:
    """The whole distribution per distilled position, as float32."""

    name: ClassVar[str] = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactCodec:
    """The teacher's final hidden state per distilled position, and its head once, in a file of its own."""

    name: ClassVar[str] = "exact"
    width: int = 0
    """Numbers in a hidden state; 0 = not known until the teacher is."""
    dtype: str = "float32"
    """Of hidden states and head: `float32` or `bfloat16`."""
    table: str = ""
    """sha256 of the file that holds the head; empty until it is made."""

    def __post_init__(self) -> None:
        if not 0 <= self.width <= 1 << 16:
            raise UsageError(f"codec width must lie in 0..65536, got {self.width}")
        if self.dtype not in EXACT_BYTES:
            raise UsageError(f"codec dtype must be one of {', '.join(EXACT_BYTES)}, got {self.dtype!r}")


Codec = SparseCodec | DenseCodec | ExactCodec
_CODECS: dict[str, type[SparseCodec] | type[DenseCodec] | type[ExactCodec]] = {
    c.name: c for c in (SparseCodec, DenseCodec, ExactCodec)
}


def table_of(codec: Codec) -> tuple[str, str] | None:
    """Name and sha256 of the file that rows of this codec cannot be used without; None = there is none."""
    if isinstance(codec, ExactCodec):
        return "head.safetensors", codec.table
    return ("sketch.safetensors", codec.table) if isinstance(codec, SparseCodec) and codec.sketch else None


def table_limit(codec: Codec, vocab_size: int) -> int:
    """Most bytes that the file of `table_of` may have."""
    if isinstance(codec, ExactCodec):
        return EXACT_BYTES[codec.dtype] * vocab_size * (codec.width + 1) + TABLE_FRAME_BYTES
    sketch = codec.sketch if isinstance(codec, SparseCodec) else 0
    return 4 * vocab_size * (sketch + 2) + TABLE_FRAME_BYTES


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
    codec: Codec = build(_CODECS[name], {k: v for k, v in data.items() if k != "name"}, f"codec {name}")
    if (table := table_of(codec)) and not re.fullmatch("[0-9a-f]{64}", table[1]):
        raise ManifestError(f"codec {name}: table must be the sha256 of {table[0]}, got {table[1]!r}")
    if isinstance(codec, ExactCodec) and not codec.width:
        raise ManifestError("codec exact: width must be at least 1, got 0")
    return codec


def quantise_head(logp: np.ndarray, step: float) -> np.ndarray:
    """Log-probs (nats, <= 0) as u8 codes of the same shape; below 255 steps they are clipped to 255.

    Error: at most step / 2 inside the range. Raises: ValueError for NaN or infinities.
    """
    return np.clip(_rounded(-logp, step), 0, HEAD_CODES).astype(np.uint8)


def dequantise_head(codes: np.ndarray, step: float, out: np.ndarray | None = None) -> np.ndarray:
    """float32 log-probs of u8 codes: -code * step, the product taken in float32."""
    return np.multiply(codes, np.float32(-step), out=out, dtype=np.float32)


def sketch_limits(codec: SparseCodec) -> np.ndarray:
    """[R] int8: the largest code of each coefficient; the smallest is its negative."""
    return np.where(np.arange(codec.sketch) < codec.sketch_wide, TAIL_CODES, NARROW_CODES).astype(np.int8)


def quantise_sketch(coefficients: np.ndarray, codec: SparseCodec) -> np.ndarray:
    """Coefficients of a basis [N, R] as int8 codes, clipped to `sketch_limits`.

    Raises: ValueError for NaN or infinities.
    """
    limits = sketch_limits(codec)
    return np.clip(_rounded(coefficients, codec.sketch_step), -limits, limits).astype(np.int8)


def pack_sketch(codes: np.ndarray, codec: SparseCodec) -> np.ndarray:
    """Codes [N, R] as they are stored, [N, bytes] int8: half bytes in pairs, the first one lower."""
    wide, narrow = codes[:, : codec.sketch_wide], codes[:, codec.sketch_wide :]
    return np.concatenate([wide, (narrow[:, ::2] & 15) | (narrow[:, 1::2] << 4)], axis=1)


def unpack_sketch(stored: np.ndarray, codec: SparseCodec) -> np.ndarray:
    """The codes [N, R] that `pack_sketch` stored."""
    out = np.empty((len(stored), codec.sketch), np.int8)
    out[:, : codec.sketch_wide] = stored[:, : codec.sketch_wide]
    pairs = stored[:, codec.sketch_wide :]
    out[:, codec.sketch_wide :: 2] = (pairs << 4) >> 4  # arithmetic shifts: the sign comes back
    out[:, codec.sketch_wide + 1 :: 2] = pairs >> 4
    return out


def differences(codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Codes (u8) as differences, mod 256, to the code before; those at `starts` to 0."""
    out = codes.copy()
    out[1:] -= codes[:-1]
    inside = starts[starts < len(codes)]  # a list may be empty, the last ones too
    out[inside] = codes[inside]
    return out


def undo_differences(stored: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The codes of lists, offsets [rows + 1], that `differences` made of them from each list's first on."""
    running = _running_sum(stored)
    before, codes = running[offsets[:-1]], running[1:]
    codes -= np.repeat(before, np.diff(offsets))
    return codes


def _running_sum(values: np.ndarray) -> np.ndarray:
    """[K + 1] u8: sums mod 256 of the first 0, 1, ... values. First, by doubling, of each value and those
    right before it, a window's length; whole windows then follow one another."""
    now = np.append(np.uint8(0), values)
    after, step = np.empty_like(now), 1
    while step < min(SUM_WINDOW, len(now)):
        after[:step] = now[:step]
        np.add(now[step:], now[:-step], out=after[step:])
        now, after, step = after, now, 2 * step
    for start in range(step, len(now), step):
        window = now[start : start + step]
        window += now[start - step :][: len(window)]
    return now


def quantise_tail(zeta: np.ndarray, step: float) -> np.ndarray:
    """Tail logsumexps (nats, signed; -inf = no token in the tail) as int8 codes, clipped to +-127 steps.

    Error: at most step / 2 inside the range, none for -inf. Raises: ValueError for NaN or +inf.
    """
    empty = np.isneginf(zeta)
    codes = np.clip(_rounded(np.where(empty, 0.0, zeta), step), -TAIL_CODES, TAIL_CODES)
    return np.where(empty, EMPTY_TAIL, codes).astype(np.int8)


def dequantise_tail(codes: np.ndarray, step: float, out: np.ndarray | None = None) -> np.ndarray:
    """float32 tail logsumexps of int8 codes, the product taken in float64."""
    out = np.empty(codes.shape, np.float32) if out is None else out
    np.multiply(codes, step, out=out, dtype=np.float64, casting="same_kind")
    if (empty := codes == EMPTY_TAIL).any():
        out[empty] = -np.inf
    return out


def _rounded(values: np.ndarray, step: float) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("log-probs must be finite")
    return np.rint(values.astype(np.float64) / step)
