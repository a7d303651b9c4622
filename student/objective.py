"""What is minimised: CE plus any weighted sum of distillation terms, from logits and a batch to one scalar.

Losses see the logits through a `Readout` alone, a few numbers per position. Calling an `Objective` with
whole logits is the plain form, its specification; `student.fused` makes the same readouts a chunk of rows at
a time.

Strings appear in `parse_objective` alone; behind it an `Objective` is a value of types. Every term is a local
sum divided by its own count over the *global* batch, so the sum over micro-batches and ranks is the loss of
the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from shards.errors import UsageError
from student.losses import chunks, divergence
from student.losses.ce import NoiseSchedule, Normalisation, ce_share, gold_log_probs, timestep_weight
from student.losses.sparse import Classes, classes
from student.schedule import LambdaSchedule
from student.tensors import Batch, LossOut

Need = Literal["positions", "chunks"]
TimestepWeighting = Literal["uniform", "mid-range"]
CEWeighting = Literal["scheduler", "uniform"]

ABOVE_HALF = "active_above_half"
"""Logged with chunk terms: share of active chunks whose tempered teacher probability exceeds 1/2. Reverse
CALM pushes the student's probability of the right text down on all others."""


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """A loss at distilled positions, [D], from (classes, temperature, lambda_t [D])."""

    needs: ClassVar[Need | None] = "positions"
    value: Callable[[Classes, float, Tensor], Tensor]
    interpolated: bool = False
    """Its target moves with lambda_t; the timestep weighting applies."""


@dataclass(frozen=True, slots=True)
class ChunkLoss:
    """A loss of active chunks, [C], from (student and teacher log-probs [C], T, lambda_t [C], clamp)."""

    needs: ClassVar[Need | None] = "chunks"
    value: Callable[[Tensor, Tensor, float, Tensor, chunks.Clamp], Tensor]
    interpolated: bool = False
    """Its target moves with lambda_t; the timestep weighting applies."""


@dataclass(frozen=True, slots=True)
class UniformCE:
    """CE with weight 1 instead of 1/t: the control for what an added term does by re-weighting alone."""

    needs: ClassVar[Need | None] = None


REGISTRY: dict[str, PositionLoss | ChunkLoss | UniformCE] = {
    "ce-uniform": UniformCE(),
    "kl": PositionLoss(lambda c, T, _: divergence.kl(*c, T)),
    "reverse-kl": PositionLoss(lambda c, T, _: divergence.reverse_kl(*c, T)),
    "tidal": PositionLoss(lambda c, T, lam: divergence.tidal(*c, T, lam), interpolated=True),
    "calm": ChunkLoss(lambda s, t, T, _, clamp: chunks.calm(s, t, T, clamp=clamp)),
    "reverse-calm": ChunkLoss(lambda s, t, T, _, clamp: chunks.reverse_calm(s, t, T, clamp=clamp)),
    "bernoulli-kl": ChunkLoss(lambda s, t, T, _, clamp: chunks.bernoulli_kl(s, t, T, clamp=clamp)),
    "calm-tidal": ChunkLoss(
        lambda s, t, T, lam, clamp: chunks.calm_tidal(s, t, T, lam, clamp=clamp), interpolated=True
    ),
    "reverse-calm-tidal": ChunkLoss(
        lambda s, t, T, lam, clamp: chunks.reverse_calm_tidal(s, t, T, lam, clamp=clamp), interpolated=True
    ),
}
NAMES: tuple[str, ...] = ("ce", *REGISTRY)
"""What an objective may be made of; `ce` names what is always there and adds nothing."""
FED: dict[str, frozenset[Need]] = {
    "shared": frozenset({"positions", "chunks"}),
    "cross": frozenset({"chunks"}),
}
"""What a dataset of each kind can feed; with a shared tokenizer every true token is a chunk."""


@dataclass(frozen=True, slots=True)
class Term:
    """One added loss."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in REGISTRY:
            raise UsageError(f"unknown objective {self.name!r}; the valid ones are {', '.join(NAMES)}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"the weight of {self.name} must be positive and finite, got {self.weight}")


class Readout(NamedTuple):
    """All that the losses need of the logits of a batch's N masked positions. Float32 or wider."""

    logp: Tensor
    """[N] log-prob of the true token."""
    shared_logp: Tensor | None
    """[N] the same over the first `ChunkBatch.vocab_size` tokens, where those are not all. Gold ids beyond
    feed no chunk; they have any value here."""
    positions: Mapping[str, Tensor]
    """Position term -> [D] its loss at the distilled positions; empty where the batch has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """CE and distillation terms with all their settings. A pure function of (logits, batch, progress)."""

    terms: tuple[Term, ...] = ()
    ce_weight: float = 1.0
    """Weight of CE; 0 drops it."""
    temperature: float = 2.0
    """Softmax temperature of KL and TIDAL; a sparse dataset must declare it."""
    chunk_temperature: float = 2.0
    """Temperature of chunk probabilities, any value (the paper's LLaDA2 scripts use 5)."""
    schedule: LambdaSchedule = field(default_factory=LambdaSchedule)
    """lambda_t of the TIDAL terms."""
    timestep_weighting: TimestepWeighting = "uniform"
    """Weight v(t) of the TIDAL terms."""
    ce_weighting: CEWeighting = "scheduler"
    """`scheduler`: the weight of `ce_schedule`; `uniform`: 1."""
    ce_schedule: NoiseSchedule = "linear"
    """Noise schedule of the weight. Views are masked by the linear one, whose weight, about 1/t, makes CE the
    likelihood bound; `cosine` only weighs the same views differently."""
    ce_normalisation: Normalisation = "token"
    """CE is divided by the maskable tokens of the batch, per view and by views, or by views alone."""
    clamp: chunks.Clamp = "log"
    """How chunk probabilities are kept inside (0, 1); `reference`: as the paper's implementation does."""

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(
                f"objective names {', '.join(twice)} more than once: give it one weight, as kl:2"
            )
        if not (math.isfinite(self.ce_weight) and self.ce_weight >= 0):
            raise UsageError(f"ce weight must be 0 or more and finite, got {self.ce_weight}")
        if not self.ce_weight and not self.terms:
            raise UsageError(
                "ce weight 0 leaves nothing to train on: add an objective such as tidal, or keep CE"
            )
        for name in ("temperature", "chunk_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name.replace('_', ' ')} must be positive and finite, got {value}")
        choices: dict[str, Any] = {
            "timestep_weighting": TimestepWeighting,
            "ce_weighting": CEWeighting,
            "ce_schedule": NoiseSchedule,
            "ce_normalisation": Normalisation,
            "clamp": chunks.Clamp,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"{name.replace('_', ' ')} must be one of {', '.join(get_args(kind))}, "
                    f"got {getattr(self, name)!r}"
                )

    def requirements(self) -> frozenset[Need]:
        """What a batch must carry besides CE's tensors."""
        needs = (REGISTRY[term.name].needs for term in self.terms)
        return frozenset(need for need in needs if need)

    def __call__(self, logits: Tensor, batch: Batch, progress: float) -> LossOut:
        """The part of the global batch's loss that this micro-batch holds.

        Args:
            logits: [N, V_student] at the batch's masked positions, any float dtype. N may be 0: the loss is
                then a 0 that is still connected to `logits`, so a backward pass works on every rank.
            progress: share of training done; clamped to [0, 1].

        Raises:
            ValueError: masked positions without the targets a term needs (`check_dataset` refuses
                such datasets).
        """
        logp, shared_logp, at = gold_log_probs(logits, batch.gold), None, batch.positions
        if (cut := self.chunk_vocab(batch)) is not None and cut < logits.shape[-1]:
            shared_logp = gold_log_probs(logits[:, :cut], batch.gold.clamp_max(cut - 1))
        positions: dict[str, Tensor] = {}
        if "positions" in self.requirements() and at is not None and len(at.index):
            both = classes(logits[at.index, : at.vocab_size], at.target, self.temperature)
            positions = self.position_losses(both, at.t, progress)
        return self.of(Readout(logp, shared_logp, positions), batch, progress)

    def chunk_vocab(self, batch: Batch) -> int | None:
        """Tokens that the student's chunk log-probs are normalised over, where not all of them."""
        wanted = "chunks" in self.requirements() and batch.chunks is not None and len(batch.chunks.logp)
        return batch.chunks.vocab_size if wanted and batch.chunks is not None else None

    def position_losses(self, both: Classes, t: Tensor, progress: float) -> dict[str, Tensor]:
        """[D] loss of every position term, from the classes of D positions and their timesteps [D]."""
        lambda_t = self.schedule.at(_clamped(progress), t)
        return {
            term.name: loss.value(both, self.temperature, lambda_t)
            for term in self.terms
            if isinstance(loss := REGISTRY[term.name], PositionLoss)
        }

    def of(self, readout: Readout, batch: Batch, progress: float) -> LossOut:
        """The loss as a function of the readout; `__call__` says the rest."""
        values = {"ce": self._ce(readout.logp, batch, self.ce_weighting)}
        needs = self.requirements()
        if "positions" in needs:
            values |= self._positions(readout, batch)
        if "chunks" in needs:
            values |= self._chunks(readout, batch, _clamped(progress))
        if any(isinstance(REGISTRY[term.name], UniformCE) for term in self.terms):
            values["ce-uniform"] = self._ce(readout.logp, batch, "uniform")
        total = self.ce_weight * values["ce"]
        for term in self.terms:
            total = total + term.weight * values[term.name]
        return LossOut(total, {name: value.detach() for name, value in values.items()})

    def _ce(self, logp: Tensor, batch: Batch, weighting: CEWeighting) -> Tensor:
        share = ce_share(
            self.ce_normalisation,
            batch.view,
            batch.maskable,
            total_maskable=batch.counts.maskable,
            total_views=batch.counts.views,
        )
        if weighting == "scheduler":
            share = share * timestep_weight(batch.t, self.ce_schedule)[batch.view]
        return -(share * logp).sum()

    def _positions(self, readout: Readout, batch: Batch) -> dict[str, Tensor]:
        losses = {t.name: loss for t in self.terms if isinstance(loss := REGISTRY[t.name], PositionLoss)}
        at, count = batch.positions, batch.counts.distilled
        if at is None and len(batch.gold):
            raise ValueError("the objective needs distilled positions, the batch carries none")
        if at is None or not len(at.index):
            return {name: readout.logp.new_zeros(()) for name in losses}
        return {
            name: mean_over(count, readout.positions[name], self._weight(loss, at.t))
            for name, loss in losses.items()
        }

    def _chunks(self, readout: Readout, batch: Batch, progress: float) -> dict[str, Tensor]:
        losses = {t.name: loss for t in self.terms if isinstance(loss := REGISTRY[t.name], ChunkLoss)}
        at, count, T = batch.chunks, batch.counts.chunks, self.chunk_temperature
        if at is None and len(batch.gold):
            raise ValueError("the objective needs chunks, the batch carries none")
        if at is None or not len(at.logp):
            return {name: readout.logp.new_zeros(()) for name in (*losses, ABOVE_HALF)}
        logp = readout.logp if readout.shared_logp is None else readout.shared_logp
        student = chunks.chunk_log_probs(logp[at.token], at.chunk, len(at.logp))
        lambda_t = self.schedule.at(progress, at.t)
        values = {
            name: mean_over(
                count, loss.value(student, at.logp, T, lambda_t, self.clamp), self._weight(loss, at.t)
            )
            for name, loss in losses.items()
        }
        above_half = (at.logp / T > -math.log(2)).to(at.logp.dtype)
        return values | {ABOVE_HALF: mean_over(count, above_half)}

    def _weight(self, loss: PositionLoss | ChunkLoss, t: Tensor) -> Tensor | None:
        mid_range = loss.interpolated and self.timestep_weighting == "mid-range"
        return divergence.mid_range_weight(t) if mid_range else None


def _clamped(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


def mean_over(count: int, values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of `values` [n], times `weight` [n] if given, over a count of the global batch (at least 1).

    Weights scale the sum, never the denominator.
    """
    return (values if weight is None else weight * values).sum() / max(count, 1)


def parse_objective(text: str, **settings: Any) -> Objective:
    """An objective from its name: terms joined by `+`, each with an optional weight, as `tidal:1+kl:4`.

    Args:
        settings: the other fields of `Objective`.

    Raises:
        UsageError: unknown name (lists the valid ones), weight that is no positive number, name given twice.
    """
    terms = []
    for part in text.split("+"):
        name, colon, weight = part.strip().partition(":")
        if name == "ce":
            if colon:
                raise UsageError(
                    f"objective {text!r}: ce takes no weight here, set it with --ce-weight {weight}"
                )
            continue
        try:
            terms.append(Term(name, float(weight) if colon else 1.0))
        except ValueError:
            raise UsageError(
                f"objective {text!r}: the weight of {name} must be a number, got {weight!r}"
            ) from None
    return Objective(terms=tuple(terms), **settings)


def check_dataset(objective: Objective, kind: str, temperatures: tuple[float, ...] | None) -> None:
    """Refuse a dataset that cannot feed an objective, before anything is loaded.

    Args:
        kind: the manifest's, `shared` or `cross`; any other (noise alone) feeds CE only.
        temperatures: those the dataset's tails are stored at; None = dense or exact targets, which serve any.

    Raises:
        UsageError: a term needs targets or a temperature that the dataset does not have.
    """
    fed = FED.get(kind, frozenset())
    for term in objective.terms:
        needs = REGISTRY[term.name].needs
        if needs and needs not in fed:
            fits = [name for name, loss in REGISTRY.items() if loss.needs is None or loss.needs in fed]
            raise UsageError(
                f"objective {term.name} needs teacher {needs}, which a dataset of kind {kind!r} does not "
                f"hold; it can train {', '.join(('ce', *fits))}"
            )
        if needs == "positions" and temperatures is not None and objective.temperature not in temperatures:
            declared = ", ".join(f"{T:g}" for T in temperatures) or "none"
            raise UsageError(
                f"objective {term.name} at temperature {objective.temperature:g}: the dataset stores tails "
                f"for {declared}; choose one of these, or precompute with that temperature"
            )
