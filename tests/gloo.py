"""Runs a test's function in processes of its own: two ranks that talk over gloo, or one that gets killed.

The processes are forked from a server that has torch and the trainer imported already, so one costs
milliseconds rather than seconds, and nothing of the test process (accelerate's state, threads) is in them.
"""

import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "student.trainer"])
LIMIT_S = 120.0


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2) -> None:
    """Call `function(*args)`, a module's top-level function, on `world` ranks; torch.distributed's variables
    are set, the process group is the callee's to make (as accelerate does).

    Raises:
        AssertionError: a rank failed (with its traceback) or took longer than `LIMIT_S`.
    """
    codes, errors = _run(function, args, world)
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(errors)


def run_until_killed(function: Callable[..., Any], *args: Any) -> int:
    """Call the function in a process of its own; returns the exit code, -9 after SIGKILL.

    Raises:
        AssertionError: it failed by itself.
    """
    [code], errors = _run(function, args, 1)
    assert code <= 0, "\n".join(errors)
    return code


def _run(function: Callable[..., Any], args: Sequence[Any], world: int) -> tuple[list[int], list[str]]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        where = (function.__module__, function.__code__.co_filename, function.__name__)
        ranks = [
            SERVER.Process(target=_rank, args=(where, args, rank, world, port, folder))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT_S)
        for process in ranks:
            process.kill()
            process.join()
        return [int(p.exitcode or 0) for p in ranks], [f.read_text() for f in Path(folder).iterdir()]


def _rank(
    where: tuple[str, str, str], args: Sequence[Any], rank: int, world: int, port: int, folder: str
) -> None:
    import torch

    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        name, file, function = where
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        getattr(module, function)(*args)
    except BaseException:
        (Path(folder) / f"rank{rank}").write_text(traceback.format_exc())
        raise
