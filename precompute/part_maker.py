"""A worker of a run that is spread over processes or machines: models in memory; ranges of the corpus in,
encoded parts out.

It reads no corpus and writes nothing, so that it needs no folder in common with others and may be ended at
any moment. `precompute.spread` hands it its work.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch

from precompute.busy import Busy
from precompute.config import PrecomputeConfig
from precompute.inputs import Asking
from precompute.loop import build
from precompute.parts import Range
from precompute.pipeline import Workers
from precompute.ready import Prepared
from precompute.recipe import Recipe, asker, decide, fidelity_of
from precompute.release import RELEASE
from precompute.rows import Answers
from precompute.runner import make_preparer, open_teacher, with_teacher_kind, worker_count
from shards.build import BuiltPart, PartBuilder
from shards.codec import DenseCodec
from shards.schema import Kind

P = ParamSpec("P")
T = TypeVar("T")

AT_ONCE = 2
"""Parts that a worker has: the model works on one while the other is prepared or encoded."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker would make a dataset of."""

    kind: Kind
    identity: dict[str, Any]
    """`precompute.identity.manifest_config`."""
    table: tuple[str, bytes] | None
    """Name and content of the codec's file (`precompute.tables`), where it needs one."""


@dataclass(frozen=True, slots=True)
class Compute:
    """What a dataset that is there decides of the machine's settings."""

    row_tokens: int
    threads: int | None


@dataclass(frozen=True, slots=True)
class Made:
    """A part that is made, and not yet on disk."""

    built: BuiltPart
    report: dict[str, Any]
    counts: Prepared
    """Its counts alone."""
    model_s: float
    """Seconds that the worker's model has worked up to now; see `precompute.busy.Busy`."""
    loop_s: float
    """Seconds that the worker had a part in hand up to now."""


class PartMaker:
    """Calls may come from several threads; the model has one of its own, in which it is loaded too."""

    def __init__(self) -> None:
        self._model = ThreadPoolExecutor(1)
        self._serial = Lock()
        self._busy, self._in_hand, self._counting = Busy(), 0, Lock()
        self._asked: tuple[Compute, Asking, Callable[..., list[Answers]]] | None = None
        self._recipe: Recipe

    def arrive(self) -> tuple[str, str]:
        """Who it is, in words, and of which program."""
        return f"process {os.getpid()} on {socket.gethostname()}", RELEASE

    def load(self, config: PrecomputeConfig, threads: int | None) -> None:
        """Load the models, torch's number of CPU threads set before.

        Raises: see `precompute.runner.precompute`.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._config = with_teacher_kind(config)
        self._preparer = make_preparer(self._config)
        device = torch.device(self._config.device or "cpu")
        self._workers = Workers(worker_count(self._config, device), self._preparer)

        def opened() -> None:
            _set_threads(threads)
            self._teacher = open_teacher(self._config, self._preparer, device)

        self._in_model(opened)

    def terms(self, source: dict[str, Any], first: Range, table: bytes | None) -> Terms:
        """
        Args:
            source: `precompute.identity.source_of` the corpus. first: its part 0.
            table: the codec's file, where the dataset has it already.

        Raises: see `precompute.recipe.decide`.
        """
        kept: tuple[str, bytes] | None = None

        def keep(name: str, make: Callable[[], bytes]) -> bytes:
            nonlocal kept
            kept = name, make() if table is None else table
            return kept[1]

        self._first = first

        def decided() -> Recipe:
            quiet: Callable[..., None] = lambda *told: None  # noqa: E731
            return decide(self._config, source, first, self._preparer, self._teacher, quiet, keep=keep)

        self._recipe = self._in_model(decided)
        return Terms(self._recipe.kind, self._recipe.identity, kept)

    def make(self, work: Range, builder: PartBuilder, compute: Compute) -> Made:
        """
        Raises:
            ModelError: see `precompute.engine.ask_all`. RowError, PlanMismatch: see `PartBuilder.build`.
        """
        self._count(1)
        try:
            if self._workers.count:
                ready, built, report = self._make(work, builder, compute)
            else:  # tokenizers are not for two threads
                with self._serial:
                    ready, built, report = self._make(work, builder, compute)
        finally:
            self._count(-1)
        counts = replace(ready, samples=[], plans=[], jobs=[])
        return Made(built, report, counts, self._busy.model.seconds, self._busy.loop.seconds)

    def _make(
        self, work: Range, builder: PartBuilder, compute: Compute
    ) -> tuple[Prepared, BuiltPart, dict[str, Any]]:
        asking, ask = self._asker(compute)
        ready = self._workers.prepare(work.conversations, self._recipe.noise, asking)()

        def answered() -> list[Answers]:
            _set_threads(compute.threads)
            with self._busy.model:
                return ask(ready.samples, ready.jobs)

        answers = self._in_model(answered)
        ready = replace(ready, jobs=[])
        what = builder, replace(work, conversations=[]), ready, answers
        # Dense answers are larger than what they would cost to encode here.
        dense = self._config.codec == DenseCodec()
        return ready, *(build(*what) if dense else self._workers.start(build, *what)())

    def fidelity(self, compute: Compute) -> dict[str, Any]:
        """`precompute.recipe.fidelity_of` part 0."""

        def measured() -> dict[str, Any]:
            _set_threads(compute.threads)
            asking, _ = self._asker(compute)
            return fidelity_of(self._config, self._recipe, asking, self._first, self._preparer, self._teacher)

        return self._in_model(measured)

    def _asker(self, compute: Compute) -> tuple[Asking, Callable[..., list[Answers]]]:
        """The same one for all parts: it remembers how much the memory holds."""
        with self._counting:
            if self._asked is None or self._asked[0] != compute:
                made = asker(self._config, self._recipe, self._teacher, compute.row_tokens)
                self._asked = compute, *made
            return self._asked[1:]

    def _in_model(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._model.submit(function, *args, **kwargs).result()

    def _count(self, by: int) -> None:
        with self._counting:
            if not self._in_hand:
                self._busy.loop.__enter__()
            self._in_hand += by
            if not self._in_hand:
                self._busy.loop.__exit__()


def _set_threads(count: int | None) -> None:
    """For the calling thread and those that begin later."""
    if count:
        torch.set_num_threads(count)
