"""Who does the work of a run that is spread: workers that come, make parts, and may die.

What a kind of workers has to offer (processes of this machine: `precompute.local_crew`, actors of a Ray
cluster: `precompute.ray_engine`), and which of them a command asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from precompute.parts import Range
from shards.errors import UsageError
from shards.locks import Claim

Engine = Literal["local", "ray"]


class Lost(Exception):
    """A worker died while it was to do something; the message says how, as `was ended by SIGKILL`."""


class Worker(Protocol):
    """A `precompute.part_maker.PartMaker` somewhere else."""

    def start(self, method: str, *args: Any) -> Future[Any]:
        """Begin a call of a method; two may be under way. The result raises what the call raises, or
        `Lost`."""

    def dismiss(self) -> None:
        """End it, whatever it does."""


class Crew(Protocol):
    """Workers of one kind; a context manager that ends all of them."""

    device: str
    """Torch device that each of them uses."""
    threads: int | None
    """Threads that each of them gets, where the dataset does not decide; None = as torch has it."""

    def seats(self) -> int:
        """How many workers there is room for now."""

    def waiting(self) -> str:
        """What is waited for while no worker is there, in words."""

    def recruit(self) -> Sequence[Worker]:
        """New workers, where there are fewer than there should be; they may take a while to come up."""

    def __enter__(self) -> Crew: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(slots=True)
class Member:
    """A worker and what it does."""

    worker: Worker
    name: str = "a worker that has not come up"
    ready: bool = False
    refused: bool = False
    parts: int = 0
    """In its hands."""
    busy: tuple[float, float] = (0.0, 0.0)
    """Seconds of its model, and with a part in hand."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something that a worker was asked for, and what is to be done with the answer."""

    member: Member
    answered: Callable[[Member, Any], None]
    work: Range | None = None
    claim: Claim | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """On how many processes the model runs, and where."""

    engine: Engine = "local"
    """Processes of this machine, or actors of a Ray cluster."""
    processes: int | None = None
    """How many (`ray`: at most), each with a model of its own; on CUDA each takes the next device. None = one
    (`ray`: as many as the cluster has room for, now and later)."""
    gpus: int | Literal["all"] | None = None
    """The same, of CUDA devices: one process each."""
    ray_address: str | None = None
    """HOST:PORT of the cluster's head; None = as the environment says (RAY_ADDRESS), else the one that runs
    here."""

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise UsageError(f"--engine must be one of {', '.join(get_args(Engine))}, got {self.engine!r}")
        if self.processes is not None and self.gpus is not None:
            raise UsageError("--gpus says how many processes there are, one each: leave out --processes")
        for name in ("processes", "gpus"):
            value = getattr(self, name)
            if value is not None and value != "all" and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        if self.ray_address is not None and self.engine != "ray":
            raise UsageError("--ray-address is of no use without --engine ray")

    @property
    def most(self) -> int | None:
        """Processes, where a number is given."""
        return self.processes if self.gpus in (None, "all") else self.gpus  # type: ignore[return-value]
