"""From a study to its tasks: what each arm needs for each seed, and what is chosen for it on validation.

A choice is a pure function of results that exist; while they do not, it asks for the tasks that make them.
So the same code says what is to be done, what is done, and what came out, at any moment of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from student.objective import REGISTRY
from studies.config import Arm, DataSpec, Study, Why
from studies.tasks import Task

Settings = dict[str, float]
"""Field of `TUNABLE` -> value."""
DEFAULTS: Settings = {"weight": 1.0, "temperature": 2.0}


@dataclass
class Choice:
    """What validation said about an arm's candidates."""

    settings: Settings
    """As far as they are chosen."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """Field, value and mean validation bits per byte of every candidate."""
    wanted: list[Task] = field(default_factory=list)
    """What must be done before more can be chosen; none = all is chosen."""


class Plan:
    """The tasks of a study whose results lie, or will lie, in a folder."""

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self._chosen: dict[tuple[str, str], Choice] = {}

    # models and data

    def corpus(self) -> Task:
        c, s = self.study.corpus, self.study.samples
        most = {"train": max(s.train, s.pretrain), "validation": s.validation, "test": s.test}
        return Task("corpus", "corpus", asdict(c) | {"at_most": most})

    def tokenizer(self) -> Task:
        s = self.study.samples
        spec = {"sizes": dict(s.tokenizers), "smollm2": s.smollm2, "conversations": s.pretrain}
        return Task("tokenizer", "tokenizers", spec, {"corpus": self.corpus()})

    def _texts(self) -> dict[str, Task]:
        return {"corpus": self.corpus(), "tokenizer": self.tokenizer()}

    def model(self, name: str, seed: int = 0) -> Task:
        """A teacher is the same for every seed; a student's start is not."""
        s, m = self.study.samples, self.study.models[name]
        spec = asdict(m) | {"sizes": dict(m.sizes), "seed": seed, "device": self.study.device}
        spec |= {"block_size": s.block_size, "max_length": s.max_length, "conversations": s.pretrain}
        return Task("model", f"model {name}, seed {seed}", spec, self._texts())

    def data(self, name: str, seed: int) -> Task:
        s = self.study.samples
        d: DataSpec = self.study.data[name]
        spec = asdict(d) | {"seed": seed, "conversations": d.samples or s.train, "device": self.study.device}
        spec |= {"block_size": s.block_size, "max_length": s.max_length, "dtype": self.study.dtype}
        del spec["teacher"], spec["samples"]
        needs = self._texts() | {"teacher": self.model(d.teacher)}
        return Task("data", f"data {name}, seed {seed}", spec, needs)

    def _judged(self) -> dict[str, Any]:
        s = self.study.samples
        return {
            "held_out": {"validation": s.validation, "test": s.test},
            "block_size": s.block_size,
            "max_length": s.max_length,
            "device": self.study.device,
        }

    def start(self, name: str, seed: int) -> Task:
        """A student before any distillation, judged."""
        needs = self._texts() | {"model": self.model(name, seed)}
        return Task("judge", f"start {name}, seed {seed}", self._judged() | {"teacher": False}, needs)

    def teacher(self, name: str) -> Task:
        """A block-diffusion teacher, judged as a student is."""
        needs = self._texts() | {"model": self.model(name)}
        return Task("judge", f"teacher {name}", self._judged() | {"teacher": True}, needs)

    # arms

    def train(self, arm: Arm, settings: Settings, seed: int, looks: int = 0) -> Task:
        t = self.study.train
        spec: dict[str, Any] = {
            "objective": arm.objective,
            "axes": arm.axes,
            "timestep_weighting": arm.timestep_weighting,
            "lambda_initial": arm.lambda_initial,
            "lambda_maximum": arm.lambda_maximum,
            "fresh_noise": arm.fresh_noise,
            "online": arm.online,
            "tail": arm.tail,
            "steps": round(arm.longer * t.steps),
            "batch_tokens": t.batch_tokens,
            "warmup": t.warmup,
            "looks": looks,
            "seed": seed,
        }
        needs = self._texts() | {
            "data": self.data(arm.data, seed),
            "student": self.model(arm.student, seed),
        }
        return Task("arm", f"{arm.name}, seed {seed}", spec | settings | self._judged(), needs)

    def choice(self, question: str, arm: Arm) -> Choice:
        """What is chosen for an arm, as far as results allow."""
        at = question, arm.name
        known = self._chosen.get(at)
        if known is None or known.wanted:
            known = self._chosen[at] = self._choose(question, arm)
        return known

    def _choose(self, question: str, arm: Arm) -> Choice:
        settings = DEFAULTS | {"learning_rate": self.study.train.learning_rate}
        if arm.like is not None:
            there, other = self.study.look_up(question, arm.like)
            taken = self.choice(there, other)
            if taken.wanted:
                return Choice(settings, wanted=taken.wanted)
            settings |= taken.settings
        made = Choice(settings | dict(arm.set))
        for name in arm.tune:
            bits: dict[float, float] = {}
            for value in self._candidates(arm, name):
                tasks = [
                    self.train(arm, made.settings | {name: value}, seed)
                    for seed in range(self.study.tuning_seeds)
                ]
                found = [r["validation"] for t in tasks if (r := t.result(self.out)) is not None]
                if len(found) < len(tasks):
                    made.wanted += [t for t in tasks if not t.done(self.out)]
                else:
                    bits[value] = sum(found) / len(found)
                    made.tried.append({"field": name, "value": value, "validation": bits[value]})
            if made.wanted:
                return made
            made.settings[name] = min(bits, key=lambda v: bits[v])
        return made

    def _candidates(self, arm: Arm, name: str) -> tuple[float, ...]:
        over_chunks = arm.objective != "ce" and REGISTRY[arm.objective].needs == "chunks"
        if name == "temperature" and over_chunks:
            return self.study.chunk_temperatures
        return tuple(float(v) for v in self.study.tune[name])

    # questions

    def arm(self, question: str, arm: Arm) -> tuple[Choice, list[Task]]:
        """The choice, and a task for every seed; none while the choice is open."""
        choice = self.choice(question, arm)
        if choice.wanted:
            return choice, []
        looks = self.study.questions[question].curves
        return choice, [self.train(arm, choice.settings, s, looks) for s in range(self.study.seeds)]

    def why(self, question: str, why: Why) -> Task | None:
        """None while the arm it looks at is not chosen."""
        _, trained = self.arm(question, self.study.questions[question].arm(why.after))
        if not trained:
            return None
        needs = self._texts() | {
            "data": self.data(why.data, 0),
            "start": trained[0].needs["student"],
            "after": trained[0],
            "teacher": self.model(self.study.data[why.data].teacher),
        }
        spec = self._judged() | {"objectives": list(why.objectives)}
        return Task("why", f"why {question}: {why.data}", spec, needs)

    def codecs(self, question: str) -> Task | None:
        q = self.study.questions[question]
        if not q.codecs:
            return None
        spec = {"codecs": list(q.codecs), "positions": q.codec_positions}
        return Task("codec", "codecs on SmolLM2", spec)

    def references(self, question: str) -> dict[str, Task]:
        """Ends of the scale: each start's seed 0, and each block-diffusion teacher with the student's
        tokenizer."""
        arms = self.study.questions[question].arms
        found: dict[str, Task] = {}
        for name in dict.fromkeys(a.student for a in arms):
            found |= {f"{name}/{s}": self.start(name, s) for s in range(self.study.seeds)}
        for name in dict.fromkeys(self.study.data[a.data].teacher for a in arms):
            if self.study.models[name].role in ("teacher-dense", "smollm2"):
                found[name] = self.teacher(name)
        return found

    def wanted(self, question: str) -> Iterator[Task]:
        """What is to be done next for a question, as far as can be said now: tasks, done or not. Codecs come
        when all else is done: they need a package that may be missing."""
        q = self.study.questions[question]
        found = list(self.references(question).values())
        for arm in q.arms:
            choice, tasks = self.arm(question, arm)
            found += [*choice.wanted, *tasks]
        found += [task for why in q.why if (task := self.why(question, why)) is not None]
        yield from found
        codecs = self.codecs(question)
        if codecs is not None and all(task.done(self.out) for task in found):
            yield codecs

    def open(self, question: str) -> list[Task]:
        """Those of `wanted` that are not done; none = the question is answered."""
        return list({t.key: t for t in self.wanted(question) if not t.done(self.out)}.values())
