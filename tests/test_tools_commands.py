"""What holds for every command that `tools.cli` registers, also those that are added later: `--json`, help
that names units and defaults; for those that fit a small folder, what they print under `--json`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from commands import Tide

from tools import cli


def leaves(command: Any, name: str = "tide") -> Iterator[tuple[str, Any]]:
    """Every command under its full name, those of groups too."""
    if isinstance(below := getattr(command, "commands", None), dict):
        for word, one in below.items():
            yield from leaves(one, f"{name} {word}")
    else:
        yield name, command


COMMANDS = dict(leaves(typer.main.get_command(cli.app)))


def test_the_walk_finds_them() -> None:
    assert {
        "tide demo",
        "tide train",
        "tide report",
        "tide bench train",
        "tide plan train",
    } <= COMMANDS.keys()
    assert len(COMMANDS) >= 18


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    options = {flag for p in command.params for flag in p.opts}
    assert "--json" in options
    assert command.help
    assert command.help.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_units_and_defaults(name: str) -> None:
    """Every option says what it does, every value has a name that says what it counts or is, and the default
    is shown; where a number has none, the help says what leaving it out means."""
    types = get_type_hints(COMMANDS[name].callback)
    for p in COMMANDS[name].params:
        if p.param_type_name != "option" or p.name in ("help", "config", "json"):
            continue
        flag = max(p.opts, key=len)
        assert p.help, f"{name} {flag}: no help"
        if p.is_flag:
            continue
        assert p.metavar, f"{name} {flag}: its value has no name"
        shown = p.show_default and p.default is not None
        number = re.search(r"\b(int|float)\b", str(types[p.name]))
        assert p.required or shown or not number or "default" in p.help, f"{name} {flag}: what without it?"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and {i + 1} follow."} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_json_is_one_object_on_the_last_line(tide: Tide, model: Path, corpus: Path, tmp_path: Path) -> None:
    """From a corpus to a page: each command's standard output is that one line and names its command; what
    people read goes to standard error."""
    data, run = tmp_path / "data", tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\nTwo\n")
    calls = [
        ("precompute", "--teacher", model, "--student", model, "--corpus", corpus, "--out", data, "--kind",
         "shared", "--block-size", 8, "--student-max-length", 64, "--views", 2, "--holdout", 0.5),
        ("verify", data),
        ("push", data, tmp_path / "pushed"),
        ("pull", tmp_path / "pushed", tmp_path / "pulled"),
        ("merge", tmp_path / "merged", tmp_path / "pulled"),
        ("train", "--data", data, "--student", model, "--out", run, "--objective", "kl", "--steps", 2,
         "--batch-tokens", 64, "--eval-every", 1, "--sample-every", 1, "--sample-tokens", 8),
        ("report", run),
        ("eval", "--model", run, "--data", data, "--out", tmp_path / "a.json"),
        ("compare", tmp_path / "a.json", model, "--data", data),
        ("generate", "--model", run, "--prompts", prompts, "--max-new-tokens", 8),
        ("generate", "--model", run, "--prompt", "One", "--max-new-tokens", 8),
        ("export", "--model", run, "--out", tmp_path / "exported"),
        ("plan", "train", "--student", model),
    ]  # fmt: skip
    for call in calls:
        done = tide(*call, "--json")
        assert done.code == 0, done.err
        assert done.out.endswith("}\n"), call
        assert done.out.count("\n") == 1, call
        command = json.loads(done.out)["command"]
        assert " ".join(map(str, call)).startswith(command)
        assert done.err, call
