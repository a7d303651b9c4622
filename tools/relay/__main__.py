"""`python -m tools.relay OUT`."""

import sys

import typer

from tools.console import guard
from tools.relay.run import main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    sys.exit(guard(lambda: app(standalone_mode=False)))
