"""Workers that are actors of a Ray cluster that runs already.

An actor takes one GPU (on a cluster without any: as many CPUs as the model has threads). Nodes that join
later get actors, those that leave are done without. Actors end with the run.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from precompute.crew import Lost
from precompute.part_maker import AT_ONCE, PartMaker
from shards.errors import UsageError

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 10.0
"""Seconds that a cluster's head gets to answer."""
START = "start one (ray start --head), or give its --ray-address HOST:PORT"


class RayCrew:
    """Actors of the cluster at an address, as many as it has room for, or `most`.

    Args:
        address: HOST:PORT; None = as RAY_ADDRESS says, else a cluster of this machine.
        most: actors that are asked for, also where there is no room for them yet: a cluster that grows on
            demand does so then.
        device: `cpu` or `cuda`; None = cuda where the cluster has GPUs.
        threads: of a worker on CPUs; None = as torch has it here, but no more than a node has.

    Raises:
        UsageError: ray is not installed, or there is no cluster.
    """

    def __init__(
        self, address: str | None, *, most: int | None, device: str | None, threads: int | None = None
    ) -> None:
        self._ray, self._most = _connect(address), most
        if device is None:
            device = "cuda" if self._ray.cluster_resources().get("GPU") else "cpu"
        self.device = torch.device(device).type
        self._resource, self._need, self.threads = "GPU", 1, None
        if self.device == "cpu":
            largest = max((int(cpus) for cpus in self._nodes("CPU")), default=0)
            self.threads = threads or min(torch.get_num_threads(), max(1, largest))
            self._resource, self._need = "CPU", self.threads
        self._actor = self._ray.remote(
            num_cpus=self._need if self.device == "cpu" else 1,
            num_gpus=0 if self.device == "cpu" else 1,
            max_restarts=0,
            max_concurrency=AT_ONCE,
        )(PartMaker)
        self._workers: list[RayWorker] = []

    def seats(self) -> int:
        room = sum(int(there // self._need) for there in self._nodes(self._resource))
        return room if self._most is None else min(room, self._most)

    def waiting(self) -> str:
        what = f"{self._need} {self._resource}{'s' * (self._need > 1)}"
        return "starting workers" if self.seats() else f"waiting for a node of the cluster with {what}"

    def _nodes(self, resource: str) -> list[float]:
        """How much of a resource each node has in all."""
        return [n["Resources"].get(resource, 0.0) for n in self._ray.nodes() if n["Alive"]]

    def recruit(self) -> Sequence[RayWorker]:
        self._workers = [w for w in self._workers if not w.dismissed]
        wanted = self._most or max(1, self.seats())
        came = [RayWorker(self._ray, self._actor.remote()) for _ in range(wanted - len(self._workers))]
        self._workers += came
        return came

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()


class RayWorker:
    """An actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.dismissed = False

    def start(self, method: str, *args: Any) -> Future[Any]:
        told: Future[Any] = Future()

        def tell(result: Future[Any]) -> None:
            error = result.exception()
            if error is None:
                told.set_result(result.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                told.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            elif isinstance(error, self._ray.exceptions.RayError):
                told.set_exception(Lost(f"died ({_reason(error)})"))
            else:
                told.set_exception(error)

        getattr(self._actor, method).remote(*args).future().add_done_callback(tell)
        return told

    def dismiss(self) -> None:
        self.dismissed = True
        self._ray.kill(self._actor)


def _reason(error: BaseException) -> str:
    """Ray's explanation, which takes a page: its last line, without its guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0][:200] if lines else type(error).__name__


def _connect(address: str | None) -> Any:
    """The ray module, connected to the cluster at an address."""
    # Of workers that die it would print a paragraph to standard output; the run itself says so.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--engine ray needs ray: pip install 'tide[ray]'") from e
    where = address or os.environ.get(ADDRESS) or "auto"
    if where != "auto":
        _check_reachable(where)
    try:
        ray.init(address=where, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as e:
        found = "running on this machine" if where == "auto" else f"at {where} ({_reason(e)})"
        raise UsageError(f"no Ray cluster {found}: {START}") from e
    return ray


def _check_reachable(where: str) -> None:
    """Ray itself would try for a minute, and tell a page."""
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or "/" in where:
        raise UsageError(f"--ray-address must be HOST:PORT, as ray start --head prints it; got {where!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as e:
        raise UsageError(f"no Ray cluster at {where} ({e}): {START}") from e
