"""The `tide` command: registers the subcommands and turns errors into one line and an exit code.

Command modules import torch, transformers and pyarrow inside their functions, so that `tide --help` answers
at once.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from tools.commands.bench import bench
from tools.commands.compare import compare
from tools.commands.demo import demo
from tools.commands.eval import evaluate
from tools.commands.export import export
from tools.commands.generate import generate
from tools.commands.inspect import inspect
from tools.commands.plan import plan
from tools.commands.precompute import precompute
from tools.commands.report import report
from tools.commands.share import merge, pull, push
from tools.commands.train import train
from tools.commands.verify import verify
from tools.commands.walk import walk
from tools.console import guard, set_up_logging

app = typer.Typer(
    name="tide",
    help="Offline distillation of diffusion language models: run the teacher once, train students anywhere.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(precompute)
app.command()(train)
app.add_typer(plan, name="plan")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(report)
app.command()(generate)
app.command()(export)
app.command()(inspect)
app.command()(verify)
app.command()(walk)
app.command()(push)
app.command()(pull)
app.command()(merge)
app.add_typer(bench)


@app.callback(invoke_without_command=True)
def tide(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"tide {version('tide')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the `tide` script."""
    # Libraries speak up for errors alone: what a user should know is said by tide itself.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    set_up_logging()
    sys.exit(guard(lambda: app(prog_name="tide", standalone_mode=False)))


if __name__ == "__main__":
    main()
