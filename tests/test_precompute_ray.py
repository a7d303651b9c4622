"""`--engine ray` on a real cluster of this machine: a head without room, and nodes with room for one worker
each. What comes out is the dataset of a single process, byte for byte."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_precompute_spread import contents, corpus, kill_first, make, pid_of, when_all_are_busy, whole

from precompute.crew import Spread
from precompute.launch import launch
from precompute.release import PACKAGES, RELEASE
from precompute.spread import Run
from shards.errors import ConfigMismatch, UsageError

pytest.importorskip("ray", reason="the extra `ray` is not installed")

FIXTURES = (corpus, make, whole)
STORE_BYTES = 100 << 20
Join = Callable[..., None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster  # starts the processes that `ray start` does

    made = Cluster()
    made.add_node(num_cpus=0, object_store_memory=STORE_BYTES, include_dashboard=False)
    yield made
    made.shutdown()


@pytest.fixture
def join(cluster: Any) -> Iterator[Join]:
    """`join()` adds a node, with other environment variables if given some; all leave after the test."""
    nodes = []

    def add(**environment: str) -> None:
        more = {"env_vars": environment} if environment else {}
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, **more))

    yield add
    for node in nodes:
        cluster.remove_node(node)


@pytest.fixture
def on_ray(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Spread:
    # Ray lets workers import from the driver's folder first; elsewhere they take what their node has.
    monkeypatch.chdir(tmp_path)
    return Spread(engine="ray", ray_address=cluster.address)


def test_one_of_two_workers_is_killed(
    make: Any,
    whole: dict[str, bytes],
    join: Join,
    on_ray: Spread,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SIGKILL with parts in its hands: others make them, and the run ends as if nothing had happened."""
    join()
    join()
    killed: list[int] = []
    when_all_are_busy(monkeypatch, 2, kill_first(killed))
    config = make()
    launch(config, on_ray)
    assert killed
    assert any(" died (" in r.message for r in caplog.records)
    assert contents(config.out) == whole


@pytest.mark.slow
def test_a_worker_that_joins_later_gets_parts(
    make: Any, whole: dict[str, bytes], join: Join, on_ray: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one there is stopped in mid-part, a node comes and makes all others, then it goes on."""
    join()
    stopped: list[int] = []

    def stop_and_join(run: Run) -> bool:
        stopped.append(pid_of(run.members[0].name))
        os.kill(stopped[0], signal.SIGSTOP)
        join()
        return True

    when_all_are_busy(monkeypatch, 1, stop_and_join)
    made, by = Run.made, []

    def noted(run: Run, work: Any, claim: Any, member: Any, result: Any) -> None:
        by.append(member.name)
        made(run, work, claim, member, result)
        if len(run.calls) == 2:  # all that is left is in the hands of the first
            os.kill(stopped[0], signal.SIGCONT)

    monkeypatch.setattr(Run, "made", noted)
    config = make()
    launch(config, on_ray)
    assert len(set(by)) == 2
    assert contents(config.out) == whole


@pytest.mark.slow
def test_a_worker_of_another_program_is_refused(
    make: Any,
    whole: dict[str, bytes],
    join: Join,
    on_ray: Spread,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Alone it ends the run before anything is written; beside a good one it is told of, and does nothing."""
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        shutil.copytree(root / package, tmp_path / "other" / package)
    with (tmp_path / "other" / PACKAGES[0] / "release.py").open("a") as file:
        file.write("# changed\n")
    join(PYTHONPATH=str(tmp_path / "other"))
    config = make()
    with pytest.raises(ConfigMismatch) as refusal:
        launch(config, on_ray)
    words = str(refusal.value)
    assert f"this run is made by {RELEASE}: install the same on both" in words
    assert words.count("(code ") == 2
    assert not config.out.exists()
    join()
    launch(config, on_ray)
    assert contents(config.out) == whole
    assert sum("is refused" in r.message and RELEASE in r.message for r in caplog.records) == 1


def test_no_cluster_at_the_address(make: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            UsageError, match=rf"no Ray cluster at {address} .*: start one \(ray start --head\)"
        ):
            launch(make(), Spread(engine="ray", ray_address=address))
    assert time.monotonic() - began < 60
    for wrong in ("ray://head:10001", "head", "head:port"):
        with pytest.raises(UsageError, match=f"--ray-address must be HOST:PORT.*got '{wrong}'"):
            launch(make(), Spread(engine="ray", ray_address=wrong))


def test_without_ray(tide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ("--teacher", "t", "--student", "s", "--corpus", "c", "--out", tmp_path, "--engine", "ray")
    result = tide("precompute", *given)
    assert (result.code, result.err) == (2, "error: --engine ray needs ray: pip install 'tide[ray]'\n")
