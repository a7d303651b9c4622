"""A run that is spread over several processes or machines.

One process, the one that was started, reads the corpus, hands ranges of it to workers, and writes what they
make of them: it alone has the dataset's folder open. Workers hold the models and may come late or die; a part
in the hands of one that died goes to another. Each must be of the same program and have the same models and
settings as the dataset: the others are refused before they make anything.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from precompute.busy import Busy
from precompute.config import PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.crew import Call, Crew, Lost, Member
from precompute.drops import DropLimit
from precompute.identity import source_of
from precompute.loop import WAIT_S, Progress
from precompute.part_maker import AT_ONCE, Compute, Made, Terms
from precompute.parts import Range, begun, unfinished
from precompute.recipe import taken_over
from precompute.release import RELEASE
from precompute.runner import finish, interrupted
from precompute.tables import once, same_codec
from shards.agreement import agree, recorded_config
from shards.codec import table_of
from shards.errors import ConfigMismatch, TideError
from shards.locks import Claim
from shards.manifest import Manifest
from shards.writer import DatasetWriter

logger = logging.getLogger(__name__)

TRIES = 3
"""Workers that may die over one part, or one after another before they are ready, until the run stops."""
LONGEST_PAUSE_S = 300.0
"""Between two attempts to replace workers that die before they are ready."""


def spread(
    config: PrecomputeConfig, crew: Crew, progress: Progress | None = None, *, busy: Busy | None = None
) -> Manifest:
    """`precompute.runner.precompute`, by the workers of a crew; the same dataset, byte for byte.

    Raises:
        TideError: workers died, one after another, or all were refused; the same call goes on where it was.
        Others: see `precompute`.
    """
    tell = progress or (lambda done, total, message: None)
    tell(0, config.limit, crew.waiting())
    with ExitStack() as stack:
        stack.enter_context(crew)
        run = Run(config, crew, tell, stack)
        try:
            run.make_parts()
            done = finish(config, run.writer, run.fidelity, tell)
        except KeyboardInterrupt as e:
            if run.begun:
                raise interrupted(run.writer) from e
            raise
        if busy is not None:
            for member in run.members:
                busy.model.seconds += member.busy[0]
                busy.loop.seconds += member.busy[1]
        return done


class Run:
    """The process that hands out the work."""

    def __init__(self, config: PrecomputeConfig, crew: Crew, tell: Progress, stack: ExitStack) -> None:
        self.config, self.crew, self.tell, self._stack = config, crew, tell, stack
        corpus = open_corpus(config.corpus, limit=config.limit)
        ranges = begun(corpus, config.samples_per_part)
        self.first = next(ranges)
        self._ranges = chain([self.first], ranges)
        self.source = source_of(corpus)
        self.limit = DropLimit(corpus, config.max_dropped)
        recorded = (recorded_config(config.out) or {}).get("compute", {})
        self.threads: int | None = recorded.get("threads", crew.threads)
        """On a CPU; None elsewhere."""
        self.table = self._table_there()
        self.members: list[Member] = []
        self.calls: dict[Future[Any], Call] = {}
        self.writer: DatasetWriter
        self.begun = False
        """Whether `writer` is there: a worker has said what the dataset is."""
        self._asked: Member | None = None
        """Who is saying so."""
        self._waiting: list[Member] = []
        """Workers that have their models, and wait until somebody has."""
        self._refusals: list[Exception] = []
        self._untold: list[str] = []
        """Refusals, until it is known that the run goes on without those workers."""
        self._again: list[tuple[Range, Claim]] = []
        self._tries: dict[int, int] = {}
        self._failed, self._next_look = 0, 0.0
        self._reached, self._exhausted = 0, False

    # -- parts

    def make_parts(self) -> None:
        """Until every part is on disk that is to be made here."""
        while not self.begun:
            self.turn("; ".join([self.crew.waiting(), *self._untold]))
        i, n = self.config.worker()
        self._parts = unfinished(self._ranges, self.writer, mine=lambda part: part % n == i)
        while True:
            others = self.hand_out()
            hands = sum(m.parts for m in self.members)
            if self._exhausted and not self._again and not hands:
                return
            self.turn(others or f"workers: {self.ready}, parts in hand: {hands}")

    @property
    def ready(self) -> int:
        """Workers that can make parts."""
        return sum(m.ready for m in self.members)

    def hand_out(self) -> str | None:
        """Parts to workers that have hands free; says whom it waits for, if that is what there is to do."""
        while (member := self._idlest()) is not None:
            if self._again:
                work, claim = self._again.pop()
            elif self._exhausted:
                return None
            else:
                following = next(self._parts, None)
                if following is None:
                    self._exhausted = True
                    return None
                work, free = following
                self._reached = max(self._reached, work.last)
                if free is None:
                    return f"waiting for part {work.part}, which {self.writer.claimant(work.part)} makes"
                claim = free
            member.parts += 1
            call = Call(member, partial(self.made, work, claim), work, claim)
            self.ask(call, "make", work, self.writer.builder, self.compute)
        return None

    def made(self, work: Range, claim: Claim, member: Member, made: Made) -> None:
        member.parts -= 1
        member.busy = made.model_s, made.loop_s
        self.limit.check(work, made.counts)
        with claim:
            self.writer.publish(made.built, made.report)

    def _idlest(self) -> Member | None:
        """Of the workers that can take a part, one that has fewest."""
        free = [m for m in self.members if m.ready and m.parts < AT_ONCE]
        return min(free, key=lambda m: m.parts, default=None)

    # -- workers

    def turn(self, doing: str) -> None:
        """Take in new workers and whatever the others have to say, within a second."""
        in_hand = sum(c.work.last - c.work.first for c in self.calls.values() if c.work)
        again = sum(work.last - work.first for work, _ in self._again)
        self.tell(self._reached - in_hand - again, self.config.limit, doing)
        needed = not self._exhausted or self._again or not self.ready
        if needed and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + WAIT_S
            for worker in self.crew.recruit():
                self.members.append(member := Member(worker))
                self.ask(Call(member, self.arrived), "arrive")
        done, _ = wait(self.calls, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        for future in done:
            if call := self.calls.pop(future, None):
                self.answer(call, future)
        if not done and not self.calls:
            time.sleep(WAIT_S)

    def ask(self, call: Call, method: str, *args: Any) -> None:
        self.calls[call.member.worker.start(method, *args)] = call

    def answer(self, call: Call, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, Lost):
            self.lost(call, str(error))
        elif error is None:
            call.answered(call.member, future.result())
        elif call.member.ready or not isinstance(error, Exception):
            raise error
        else:
            self.refuse(call.member, error)

    def arrived(self, member: Member, said: tuple[str, str]) -> None:
        member.name, theirs = said
        if theirs != RELEASE:
            self.refuse(
                member,
                ConfigMismatch(
                    f"{member.name} has tide {theirs}, but this run is made by {RELEASE}: install the same "
                    "on both"
                ),
            )
            return
        config = replace(self.config, device=self.crew.device)
        self.ask(Call(member, self.loaded), "load", config, self.threads)

    def loaded(self, member: Member, _: None) -> None:
        if self.begun or self._asked is None:
            self.ask_terms(member)
        else:
            self._waiting.append(member)

    def ask_terms(self, member: Member) -> None:
        if not self.begun:
            self._asked = member
        self.ask(Call(member, self.agreed), "terms", self.source, self.first, self.table)

    def agreed(self, member: Member, terms: Terms) -> None:
        """The first worker's terms are the dataset's, unless the folder has one; those of others must be the
        same."""
        config, begins = self.config, taken_over(self.config)
        try:
            if self.begun:
                agree(config.out, terms.kind, terms.identity, take_over=begins)
            elif self._keep(terms):
                verify = config.verify_parts
                writer = DatasetWriter(
                    config.out, terms.kind, terms.identity, take_over=begins, verify=verify
                )
                self.writer = self._stack.enter_context(writer)
                compute = self.writer.config["compute"]
                self.compute = Compute(compute["row_tokens"], compute["threads"])
                self.begun = True
            else:  # another run has begun this dataset in the meantime
                self.ask_terms(member)
                return
        except ConfigMismatch as e:
            self.refuse(member, e)
            return
        member.ready, self._failed = True, 0
        self._tell()
        self._next()

    def _keep(self, terms: Terms) -> bool:
        """Put the codec's file into the folder; False where there is another one.

        Raises:
            ConfigMismatch: the folder holds a dataset of another codec.
        """
        if terms.table is None:
            return True
        same_codec(self.config.out, terms.identity["codec"])
        name, data = terms.table
        self.table = once(self.config.out, name, lambda: data)
        return self.table == data

    def _table_there(self) -> bytes | None:
        """The codec's file, where the folder has it."""
        table = table_of(self.config.codec)
        path = None if table is None else self.config.out / table[0]
        return path.read_bytes() if path is not None and path.is_file() else None

    def _next(self) -> None:
        """Whoever said what the dataset is has done so, or cannot."""
        self._asked = None
        waiting, self._waiting = self._waiting, []
        for member in waiting:
            self.loaded(member, None)

    def refuse(self, member: Member, why: Exception) -> None:
        """It stays, so that nobody like it comes in its place, and gets nothing to do."""
        member.refused = True
        self._refusals.append(why)
        self._untold.append(f"{member.name} is refused: {why}")
        if self.ready:
            self._tell()
        elif sum(m.refused for m in self.members) >= max(1, self.crew.seats()):
            raise self._refusals[0]
        if member is self._asked:
            self._next()

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for line in untold:
            logger.warning(line)

    def lost(self, call: Call, how: str) -> None:
        """A worker died: what it had in hand is given out again."""
        member = call.member
        others = [f for f, c in self.calls.items() if c.member is member]
        calls = [call, *(self.calls.pop(f) for f in others)]
        self.members.remove(member)
        self._waiting = [m for m in self._waiting if m is not member]
        member.worker.dismiss()
        logger.warning("%s %s; its parts go to others", member.name, how)
        for work, claim in ((c.work, c.claim) for c in calls):
            if work is not None and claim is not None:
                self._again.append((work, claim))
                self._tries[work.part] = self._tries.get(work.part, 0) + 1
                if self._tries[work.part] >= TRIES:
                    raise TideError(
                        f"part {work.part}: {TRIES} workers died over it, the last one {how}; "
                        "finished parts are kept, the same command goes on from there"
                    )
        if not member.ready:
            self._failed += 1
            self._next_look = time.monotonic() + min(LONGEST_PAUSE_S, WAIT_S * 2**self._failed)
            if self._failed >= TRIES and not self.ready:
                raise TideError(
                    f"{self._failed} workers in a row died before they were ready, the last one {how}; is "
                    "there memory enough, and tide installed?"
                )
            if member is self._asked:
                self._next()

    # -- fidelity

    def fidelity(self) -> dict[str, Any]:
        """Measured by whoever has a model."""
        found: list[dict[str, Any]] = []
        while not found:
            member = self._idlest()
            if member is None:
                self.turn("measuring fidelity")
                continue
            member.parts = AT_ONCE
            self.ask(Call(member, lambda who, record: found.append(record)), "fidelity", self.compute)
            while not found and member in self.members:
                self.turn("measuring fidelity")
        return found[0]
