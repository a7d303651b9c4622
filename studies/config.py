"""What a study is made of, from its YAML file: sizes, models, datasets, questions and their arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml

from shards.errors import UsageError

T = TypeVar("T")

TUNABLE = ("learning_rate", "weight", "temperature")
"""What is chosen on validation, one after the other, each with the others as they stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSpec:
    """Text, and how its groups (top-level modules) are dealt."""

    source: str = "builtin:stdlib-tests"
    """Corpus SPEC, as `tide precompute` takes it."""
    validation: float = 0.12
    """Share of the groups that hyper-parameters are chosen on."""
    test: float = 0.18
    """Share of the groups that results are reported on."""
    seed: int = 0
    """Decides which groups; the same for every seed of the study."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """How many samples, and how long."""

    train: int = 960
    """Distilled on: the first so many of the training groups."""
    pretrain: int = 6000
    """What models are trained on: the first so many of the training groups, those distilled on included."""
    validation: int = 160
    test: int = 240
    max_length: int = 96
    """Tokens of a sample, at most."""
    block_size: int = 8
    tokenizers: Mapping[str, int] = field(default_factory=lambda: {"chatml": 1024, "roles": 768})
    """Entries of the student's tokenizer (`chatml`) and of the other one (`roles`)."""
    smollm2: bool = False
    """The student's tokenizer is SmolLM2's own, with a mask token added, in place of `chatml`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model and its training."""

    role: str = "student-start"
    """Of `tools.demo.models`; or `smollm2`: SmolLM2-135M, trained further as a block-diffusion model."""
    ar_steps: int = 340
    diffusion_steps: int = 320
    learning_rate: float = 4e-3
    diffusion_learning_rate: float = 2.5e-3
    batch_size: int = 16
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Fields of the network's configuration in place of the demo's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """A logit dataset: one for every seed."""

    teacher: str
    """Name of a model."""
    compdemo: bool = True
    views: int = 4
    timesteps: str = "stratified"
    codec: str = "sparse"
    """As `tide bench codec` takes it: `sparse:cap=8`, `dense`, ..."""
    teacher_kind: str = "diffusion"
    samples: int | None = None
    """The first so many of the training samples; None = all that are distilled on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """What every student has in common."""

    steps: int = 192
    batch_tokens: int = 1800
    """Packed student tokens per step: with equal steps, equal tokens for all."""
    learning_rate: float = 3e-3
    """Where it is not chosen."""
    warmup: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train a student, for every seed."""

    name: str
    objective: str = "ce"
    """A single name of `student.objective`."""
    data: str
    """Name of a dataset."""
    student: str = "start"
    """Name of the model it starts from."""
    tune: tuple[str, ...] = ()
    """What is chosen for it on validation, in this order (`TUNABLE`)."""
    like: str | None = None
    """`ARM` or `QUESTION/ARM`, whose choices it takes over."""
    set: Mapping[str, float] = field(default_factory=dict)
    """Values of `TUNABLE` fields that are given."""
    axes: str = "both"
    timestep_weighting: str = "uniform"
    lambda_initial: float = 0.1
    lambda_maximum: float = 0.9
    longer: float = 1.0
    """Steps, as a multiple of the study's."""
    fresh_noise: float = 0.0
    """Share of the rows that redraw their noise and carry CE alone."""
    online: bool = False
    """Fresh noise at every step, with the teacher in the loop, asked through the same engine."""
    tail: str | None = None
    """`dropped:K` or `uniform:K`: dense targets cut to their K best, the rest dropped or spread evenly."""
    against: str | None = None
    """Arm of the same question that it is compared with; None = the question's baseline."""

    def __post_init__(self) -> None:
        unknown = [n for n in (*self.tune, *self.set) if n not in TUNABLE]
        if unknown:
            raise UsageError(f"arm {self.name}: {unknown[0]} is none of {', '.join(TUNABLE)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """What is measured to explain a result (`studies.why`), at the start and after training an arm."""

    data: str
    objectives: tuple[str, ...]
    """Terms whose gradients are compared, as NAME@T or NAME@T@PROGRESS."""
    after: str
    """The arm after whose training (seed 0) it is measured again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A table and a plot."""

    title: str
    asks: str = ""
    """The question in a sentence."""
    baseline: str
    control: str | None = None
    arms: tuple[Arm, ...]
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of arms that are compared with each other besides: the first minus the second."""
    curves: int = 0
    """Evaluations on validation while training, evenly spread."""
    why: tuple[Why, ...] = ()
    codecs: tuple[str, ...] = ()
    """Codecs measured on SmolLM2's gradients too (`tide bench codec`)."""
    codec_positions: int = 512

    def arm(self, name: str) -> Arm:
        """Raises: UsageError: no such arm."""
        found = next((a for a in self.arms if a.name == name), None)
        if found is None:
            raise UsageError(
                f"question {self.title!r} has no arm {name!r}; it has {', '.join(a.name for a in self.arms)}"
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The whole file."""

    corpus: CorpusSpec = field(default_factory=CorpusSpec)
    samples: SampleSpec = field(default_factory=SampleSpec)
    models: Mapping[str, ModelSpec]
    data: Mapping[str, DataSpec]
    train: TrainSpec = field(default_factory=TrainSpec)
    tune: Mapping[str, tuple[float, ...]]
    """Field of `TUNABLE` -> its candidates."""
    chunk_temperatures: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Candidates of `temperature` for objectives over chunks."""
    tuning_seeds: int = 2
    seeds: int = 5
    device: str = "auto"
    """Of models and students: `cpu`, `cuda`, or `auto`: cuda where there is one."""
    dtype: str = "float32"
    """Number format of teachers that score."""
    questions: Mapping[str, Question]

    def look_up(self, question: str, name: str) -> tuple[str, Arm]:
        """The question and arm that `name` means inside `question`. Raises: UsageError: there is none."""
        there, _, arm = name.rpartition("/")
        there = there or question
        if there not in self.questions:
            raise UsageError(f"no question {there!r}; there are {', '.join(self.questions)}")
        return there, self.questions[there].arm(arm)


def read_study(path: Path, *, smoke: bool = False, scale: float = 1.0, seeds: int | None = None) -> Study:
    """
    Args:
        smoke: with the file's section `smoke` laid over it.
        scale: of steps, samples and batches.
        seeds: in place of the file's.

    Raises:
        UsageError: no such file, or one that is no study (names the field).
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(e).split())}); give a study's YAML") from e
    if not isinstance(given, dict):
        raise UsageError(f"{path}: not a study; see studies/cpu.yaml for one")
    over = given.pop("smoke", {})
    if smoke:
        given = laid_over(given, over)
    study = _study(given, str(path))
    if study.device == "auto":
        import torch

        study = replace(study, device="cuda" if torch.cuda.is_available() else "cpu")
    if seeds is not None:
        study = replace(study, seeds=seeds, tuning_seeds=min(seeds, study.tuning_seeds))
    return scaled(study, scale) if scale != 1 else study


def laid_over(base: Any, over: Any) -> Any:
    """Mappings field by field, anything else as a whole. `null` takes a field away."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = {k: laid_over(base.get(k), v) for k, v in over.items()}
    return {k: v for k, v in (base | merged).items() if v is not None}


def scaled(study: Study, by: float) -> Study:
    """Steps, samples and batches times `by`, at least 2 each; lengths and networks stay."""

    def less(n: int) -> int:
        return max(2, round(n * by)) if n else 0

    s = study.samples
    return replace(
        study,
        samples=replace(
            s,
            train=less(s.train),
            pretrain=less(s.pretrain),
            validation=less(s.validation),
            test=less(s.test),
        ),
        models={
            name: replace(
                m,
                ar_steps=less(m.ar_steps),
                diffusion_steps=less(m.diffusion_steps),
                batch_size=less(m.batch_size),
            )
            for name, m in study.models.items()
        },
        data={
            name: replace(d, samples=None if d.samples is None else less(d.samples))
            for name, d in study.data.items()
        },
        train=replace(
            study.train, steps=less(study.train.steps), batch_tokens=less(study.train.batch_tokens)
        ),
    )


def _study(given: dict[str, Any], where: str) -> Study:
    def each(cls: type[T], section: str) -> dict[str, T]:
        found = given.get(section) or {}
        return {name: _read(cls, value, f"{where}: {section}.{name}") for name, value in found.items()}

    questions = {}
    for name, q in (given.get("questions") or {}).items():
        at = f"{where}: questions.{name}"
        arms = tuple(_read(Arm, a, f"{at}.arms") for a in q.get("arms", ()))
        why = tuple(_read(Why, w, f"{at}.why") for w in q.get("why", ()))
        contrasts = tuple(tuple(pair) for pair in q.get("contrasts", ()))
        if any(len(pair) != 2 for pair in contrasts):
            raise UsageError(f"{at}: contrasts are pairs of arms")
        questions[name] = _read(Question, q | {"arms": arms, "why": why, "contrasts": contrasts}, at)
    parts = {
        "corpus": _read(CorpusSpec, given.get("corpus") or {}, f"{where}: corpus"),
        "samples": _read(SampleSpec, given.get("samples") or {}, f"{where}: samples"),
        "train": _read(TrainSpec, given.get("train") or {}, f"{where}: train"),
        "models": each(ModelSpec, "models"),
        "data": each(DataSpec, "data"),
        "questions": questions,
    }
    study = _read(Study, given | parts, where)
    for name, question in study.questions.items():
        for arm in question.arms:
            _check(study, name, arm, where)
        for other in (question.baseline, question.control, *chain.from_iterable(question.contrasts)):
            if other is not None:
                question.arm(other)
    return study


def _check(study: Study, question: str, arm: Arm, where: str) -> None:
    at = f"{where}: questions.{question}, arm {arm.name}"
    for kind, name, known in (("data", arm.data, study.data), ("model", arm.student, study.models)):
        if name not in known:
            raise UsageError(f"{at}: no {kind} {name!r}; there are {', '.join(known)}")
    teacher = study.data[arm.data].teacher
    if teacher not in study.models:
        raise UsageError(f"{at}: no model {teacher!r}; there are {', '.join(study.models)}")
    for other in (arm.like, arm.against):
        if other is not None:
            study.look_up(question, other)


def _read(cls: type[T], value: Any, where: str) -> T:
    """A dataclass from a mapping; lists become tuples."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected fields, got {value!r}")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = [k for k in value if k not in known]
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(known)}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
    except TypeError as e:
        raise UsageError(f"{where}: {' '.join(str(e).split())}") from e
