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

from tools.console import guard, set_up_logging
from tools.run_bench import bench
from tools.run_compare import compare
from tools.run_demo import demo
from tools.run_eval import evaluate
from tools.run_export import export
from tools.run_generate import generate
from tools.run_inspect import inspect
from tools.run_plan import plan
from tools.run_precompute import precompute
from tools.run_report import report
from tools.run_share import merge, pull, push
from tools.run_train import train
from tools.run_verify import verify
from tools.run_walk import walk

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
