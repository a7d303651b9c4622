"""Options shared by the commands: `--config FILE` (YAML, below the flags), `--json`; saving those used.

A configuration file holds long option names, with `-` or `_`, and their values. These take the place of the
built-in defaults, so that a flag always wins; paths in it are relative to the current folder, as elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from shards.atomic import write_atomic
from shards.errors import UsageError
from tools.console import Progress, Report, is_main_process

NOT_SAVED = ("config", "json", "help")
"""Options about the call itself rather than about what it makes."""


def option_names(ctx: typer.Context) -> dict[str, str]:
    """Long option name (no dashes, `_` for `-`) -> parameter name, of what a configuration file may set."""
    names = {}
    for param in ctx.command.params:
        for flag in param.opts:
            key = flag.removeprefix("--").replace("-", "_")
            if param.name and flag.startswith("--") and key not in NOT_SAVED:
                names[key] = param.name
    return names


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: make the file's values the defaults of the command's other options.

    Raises:
        UsageError: the file cannot be read, is no mapping of single values, or names an unknown option.
    """
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"--config {path}: {e.strerror}") from e
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected `option: value` lines, found {type(values).__name__}")
    names = option_names(ctx)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0].replace("_", "-")
            raise UsageError(
                f"--config {path}: {ctx.command.name} has no option {key!r}; the nearest is {near!r} "
                f"(tide {ctx.command.name} --help lists all)"
            )
        if isinstance(value, dict | list):
            raise UsageError(f"--config {path}: {key} must be one value, got {value!r}")
        if value is not None:
            # As text, so that the file and the command line are converted and checked by the same code.
            defaults[names[name]] = value if isinstance(value, bool) else str(value)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    ctx.meta["tide.config"] = path
    return path


@contextmanager
def saved_options(ctx: typer.Context, path: Path) -> Iterator[Callable[[Report], Report]]:
    """Save the options this call resolved to, as a file `--config` takes, where the work inside succeeds.

    Yields a wrapper of a progress report that saves them with the first work done where none are saved yet: a
    killed run has them too. A call refused on a folder that another one filled leaves its options alone.
    """

    def save() -> None:
        values = {
            key: str(value) if isinstance(value, Path) else value
            for key, name in option_names(ctx).items()
            if (value := ctx.params.get(name)) is not None
        }
        write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())

    def early(report: Report) -> Report:
        def with_options(done: float, *args: Any) -> None:
            if done and is_main_process() and path.parent.is_dir() and not path.exists():
                save()
            report(done, *args)

        return with_options

    yield early
    if is_main_process():
        save()


def opt(text: str, metavar: str | None = None, panel: str | None = None) -> Any:
    """An option with its help text (units said there), the name of its value, and its group in `--help`."""
    return typer.Option(help=text, metavar=metavar, rich_help_panel=panel)


def megabytes(progress: Progress, title: str) -> Callable[[float, float | None], None]:
    """The line of a title, as what workers call with bytes done and bytes in all."""
    line = progress.line(title, "MB")
    return lambda done, total: line(done / 1e6, None if total is None else total / 1e6)


def numbers(text: str, flag: str) -> tuple[float, ...]:
    """Comma-separated numbers.

    Raises:
        UsageError: names the flag and what is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as e:
        raise UsageError(f"--{flag} must be numbers with commas, such as 1,2; got {text!r}") from e


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        help="YAML file of these options (`steps: 500`); flags win over it.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object on the last line of standard output."),
]
