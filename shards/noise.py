"""The noise plan: timestep, masked positions and CompDemo halves of one view, decided once for both stages.

A plan is a pure function of (seed, sample id, view) and of what may be masked. The teacher is asked about
it, the row stores it, and the reader computes it again and compares.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from shards.columns import RowBatch
from shards.errors import PlanMismatch, UsageError
from shards.row import Row

Timesteps = Literal["stratified", "iid"]
Unit = Literal["token", "chunk"]

EPSILON = 1e-3
"""Smallest timestep (paper: t in [eps, 1))."""


class _Generator(threading.local):
    """Each thread's own: making one gathers entropy, at ten times the cost of starting it anew."""

    def __init__(self) -> None:
        zeros = (0, 0, 0, 0)
        self.philox = np.random.Philox(0)
        self.start: dict[str, Any] = {"counter": zeros, "key": (0, 0)}
        self.state: Any = {
            "bit_generator": "Philox",
            "state": self.start,
            "buffer": zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }


_generator = _Generator()
_KEY = struct.Struct("<2Q")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """Everything that decides the noise of a dataset; kept whole in its manifest."""

    seed: int = 0
    views: int = 4
    """Noisings per sample; epoch e trains on view e mod views."""
    timesteps: Timesteps = "stratified"
    """`stratified`: a sample's views cover the range evenly; `iid`: independent, as in online training."""
    unit: Unit = "token"
    """What is masked and split as a whole: single tokens (shared tokenizer) or chunks (cross tokenizer)."""
    compdemo: bool = True
    """Split the masked set into two halves, each shown while the other is predicted."""
    demo_ratio: float = 0.5
    """Expected share of half A."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise UsageError(f"views must be at least 1, got {self.views}")
        if self.timesteps not in get_args(Timesteps):
            raise UsageError(
                f"timesteps must be one of {', '.join(get_args(Timesteps))}, got {self.timesteps!r}"
            )
        if self.unit not in get_args(Unit):
            raise UsageError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if not 0.0 < self.demo_ratio < 1.0:
            raise UsageError(f"demo_ratio must lie between 0 and 1, got {self.demo_ratio}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The noise of one view. Shapes: L student positions, C chunks (0 for unit `token`)."""

    t: np.float32
    masked: np.ndarray
    """[L] bool."""
    half_a: np.ndarray
    """[L] bool, a subset of `masked`."""
    chunk_masked: np.ndarray
    """[C] bool: chunks hidden whole, on both sides."""
    chunk_active: np.ndarray
    """[C] bool: masked chunks that touch no unmaskable token."""
    chunk_half_a: np.ndarray
    """[C] bool, a subset of `chunk_masked`."""


def uniform01(seed: int, sample_id: str, stream: str, n: int) -> np.ndarray:
    """`n` float64 in [0, 1), equal on every machine and a prefix of any longer draw of the same name.

    Raw Philox words rather than a Generator's method, which numpy may change, or torch's, which differ by
    device.
    """
    return _uniform(_words(seed, sample_id, stream, n))


def _uniform(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def _words(seed: int, sample_id: str, stream: str, n: int) -> np.ndarray:
    """The raw words [n] uint64 of `uniform01`."""
    key = hashlib.blake2b(f"{seed}|{stream}|{sample_id}".encode(), digest_size=16).digest()
    _generator.start["key"] = _KEY.unpack(key)
    _generator.philox.state = _generator.state
    words: np.ndarray = _generator.philox.random_raw(n)
    return words


def _below(p: float | np.ndarray) -> np.ndarray:
    """uint64: the words below it are those whose uniform is below `p`, 0 <= p < 1. Exact: so compared, words
    need not become uniforms."""
    return np.ceil(np.asarray(p, np.float64) * 2.0**53).astype(np.uint64) << np.uint64(11)


def timestep(u: Any, view: Any, config: NoiseConfig) -> Any:
    """t (float32) of a view from its uniform `u`, or of many from theirs: one `u` per sample when stratified,
    one per view when iid.

    Stratified: t_v = eps + (1 - eps) * ((u + v / R) mod 1), so that each view's marginal is uniform.
    """
    if config.timesteps == "stratified":
        u = (u + view / config.views) % 1.0
    below_one = np.nextafter(np.float32(1), np.float32(0))  # what float32 would round up to 1
    return np.minimum(np.float32(EPSILON + (1 - EPSILON) * u), below_one)


def plan_from_uniforms(
    t: np.float32,
    u_mask: np.ndarray,
    u_demo: np.ndarray,
    maskable: np.ndarray,
    *,
    config: NoiseConfig,
    chunk_start: np.ndarray | None = None,
    chunk_length: np.ndarray | None = None,
) -> Plan:
    """The plan that given uniforms decide (paper: masking, CompDemo, chunk-consistent masking).

    Args:
        t: timestep; a maskable position is masked iff u_mask < 1 - (1 - t), in float32 (as the
            paper's implementation has it).
        u_mask: [L] uniforms, one per position.
        u_demo: uniforms of the split, one per position ([L], unit `token`) or per chunk ([C], unit `chunk`).
        maskable: [L] bool.
        chunk_start, chunk_length: [C] int, disjoint student spans; required by unit `chunk`.

    A chunk with one masked token is masked whole; its unmaskable tokens stay visible and silence its loss.
    """
    probability = np.float32(1) - (np.float32(1) - np.float32(t))
    masked = maskable & (u_mask < probability)
    if config.unit == "token":
        half_a = masked & (u_demo < config.demo_ratio) if config.compdemo else np.zeros_like(masked)
        none = np.zeros(0, dtype=bool)
        return Plan(np.float32(t), masked, half_a, none, none, none)
    if chunk_start is None or chunk_length is None:
        raise ValueError("unit 'chunk' needs the chunk spans of the sample")
    n_chunks = len(chunk_start)
    owner = np.full(len(maskable), n_chunks)  # chunk of each position; n_chunks = none
    first = np.asarray(chunk_start) - (np.cumsum(chunk_length) - chunk_length)
    owner[np.arange(np.sum(chunk_length)) + np.repeat(first, chunk_length)] = np.repeat(
        np.arange(n_chunks), chunk_length
    )
    touched = np.zeros(n_chunks + 1, dtype=bool)
    touched[owner[masked]] = True
    prompt = np.zeros(n_chunks + 1, dtype=bool)
    prompt[owner[~maskable]] = True
    touched[-1] = False
    masked = masked | (maskable & touched[owner])
    chunk_masked = touched[:-1]
    chunk_half_a = (
        chunk_masked & (u_demo < config.demo_ratio) if config.compdemo else np.zeros(n_chunks, dtype=bool)
    )
    half_a = masked & np.append(chunk_half_a, False)[owner]
    return Plan(np.float32(t), masked, half_a, chunk_masked, chunk_masked & ~prompt[:-1], chunk_half_a)


def make_plan(
    config: NoiseConfig,
    sample_id: str,
    view: int,
    maskable: np.ndarray,
    *,
    chunk_start: np.ndarray | None = None,
    chunk_length: np.ndarray | None = None,
) -> Plan:
    """The plan of one view, from uniforms keyed by (seed, sample id, view). See `plan_from_uniforms`."""

    def draw(stream: str, n: int) -> np.ndarray:
        return uniform01(config.seed, sample_id, stream, n)

    u = draw("t" if config.timesteps == "stratified" else f"t|{view}", 1)[0]
    n_demo = len(maskable) if config.unit == "token" or chunk_start is None else len(chunk_start)
    return plan_from_uniforms(
        timestep(u, view, config),
        draw(f"mask|{view}", len(maskable)),
        draw(f"demo|{view}", n_demo),
        maskable,
        config=config,
        chunk_start=chunk_start,
        chunk_length=chunk_length,
    )


def iid_mask(seed: int, sample_id: str, stream: str, maskable: np.ndarray, t: float) -> np.ndarray:
    """[L] bool: a fresh token mask at timestep `t`, independent of every stored view."""
    return maskable & (uniform01(seed, sample_id, f"{stream}|{t:.6g}", len(maskable)) < t)


def check_plan(config: NoiseConfig, row: Row) -> None:
    """Compute the row's plan again and compare.

    Raises:
        PlanMismatch: timestep, mask or halves differ (names sample, view and what differs).
    """
    chunks = row.chunks if config.unit == "chunk" else None
    plan = make_plan(
        config,
        row.sample_id,
        row.view,
        row.maskable,
        chunk_start=None if chunks is None else chunks.start,
        chunk_length=None if chunks is None else chunks.length,
    )
    at = row.positions
    differs = [name for name, same in (
        ("timestep", plan.t == np.float32(row.t)),
        ("mask", np.array_equal(plan.masked, row.masked)),
        ("halves", at is None or np.array_equal(plan.half_a[at.positions], at.half_a)),
        ("chunk mask", chunks is None or np.array_equal(plan.chunk_masked, chunks.masked)),
        ("active chunks", chunks is None or np.array_equal(plan.chunk_active, chunks.active)),
        ("chunk halves", chunks is None or np.array_equal(plan.chunk_half_a, chunks.half_a)),
    ) if not same]  # fmt: skip
    if differs:
        raise PlanMismatch(
            f"sample {row.sample_id} view {row.view}: stored {', '.join(differs)} differ from the noise plan "
            f"of seed {config.seed}; the row was changed, or made by another version: run tide precompute "
            "again"
        )


def check_plans(config: NoiseConfig, rows: RowBatch) -> None:
    """`check_plan` of every row of a record batch, several times as fast for unit `token`.

    Raises:
        PlanMismatch: see `check_plan`.
    """
    if config.unit == "chunk":
        for row in rows:
            check_plan(config, row)
        return
    seed, views = config.seed, rows.scalars["view"]
    maskable, masked, at = rows.lists["maskable"], rows.lists["masked"], rows.lists.get("positions")
    names = list(zip(rows.scalars["sample_id"].tolist(), views.tolist()))
    stratified = config.timesteps == "stratified"
    first = [_words(seed, s, "t" if stratified else f"t|{v}", 1) for s, v in names]
    t = timestep(_uniform(np.concatenate([np.zeros(0, np.uint64), *first])), views, config)
    limits = _below(np.float32(1) - (np.float32(1) - t)).tolist()
    plan, in_a = np.empty(len(masked.values), np.bool_), np.zeros(len(masked.values), np.bool_)
    with_halves, half = at is not None and config.compdemo, _below(config.demo_ratio)
    cuts = pairwise(masked.offsets.tolist())
    for (sample, view), limit, (start, end) in zip(names, limits, cuts):  # a row's words stay in the cache
        np.less(_words(seed, sample, f"mask|{view}", end - start), limit, out=plan[start:end])
        if with_halves:
            np.less(_words(seed, sample, f"demo|{view}", end - start), half, out=in_a[start:end])
    plan &= maskable.values
    wrong = t != rows.scalars["t"]
    wrong[masked.row[plan != masked.values]] = True
    if at is not None:
        place = at.values + np.repeat(masked.offsets[:-1], at.lengths)
        in_a &= plan
        wrong[at.row[in_a[place] != rows.lists["half_a"].values]] = True
    for i in np.flatnonzero(wrong).tolist():
        check_plan(config, rows[i])
