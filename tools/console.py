"""Where a command talks to people and to programs: results, progress, the JSON line, one-line errors.

Results for people go to standard output, or to standard error where `--json` claims standard output for its
line. Progress goes to standard error: a bar on a terminal, elsewhere a plain line now and then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import rich.box
import rich.table
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from shards.errors import TideError
from tools.tables import Table

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where standard error is not a terminal."""
WIDE = 100
"""Columns of a terminal that has room for long bars."""
Report = Callable[..., None]
"""Called with what is done, how much there is in all (None = not known), and optionally what is going on."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


def is_main_process() -> bool:
    """Whether this process speaks for the run: alone, or rank 0 of those torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


class Rate(ProgressColumn):
    """Steps per second in the task's own unit; per minute below one a second."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.speed or task.finished_speed or 0.0, task.fields["unit"]), style="cyan")


class TimeLeft(ProgressColumn):
    """`ETA 1:02:03` where the end can be told, else the time since the beginning."""

    def render(self, task: Task) -> Text:
        left = None if task.finished or not task.total else task.time_remaining
        seconds, word = (left, "ETA ") if left is not None else (task.finished_time or task.elapsed, "")
        minutes, rest = divmod(int(seconds or 0), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
        return Text(f"{word}{clock}", style="cyan" if word else "dim")


def rate(per_second: float, unit: str) -> str:
    """`12.3 views/s`, or `4.0 views/min` for what takes more than a second each."""
    if per_second <= 0:
        return ""
    value, per = (per_second, "s") if per_second >= 1 else (per_second * 60, "min")
    return f"{value:,.0f} {unit}/{per}" if value >= 100 else f"{value:.1f} {unit}/{per}"


class Progress:
    """Progress of pieces of work, one after another or side by side, a line for each: a context manager.

    Bars with rate and time left on a terminal; elsewhere a plain line every `PLAIN_INTERVAL_S`, or none with
    `plain=False`, for work that logs lines of its own. A rate's clock starts with the first amount that is
    not 0: loading, and what an earlier call of a resumed command has done, count in none.
    """

    def __init__(self, *, plain: bool = True) -> None:
        terminal = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if terminal.width >= WIDE else 8),
            TextColumn("{task.fields[count]}", justify="right"),
            Rate(),
            TimeLeft(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        self._bars = Bars(*columns, console=terminal) if terminal.is_terminal and is_main_process() else None
        self._plain = plain and is_main_process()
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, float]] = {}
        """Title -> time and count where its rate begins."""
        self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(
        self, title: str, done: float, total: float | None = None, *, unit: str = "steps", note: str = ""
    ) -> None:
        """`done` of `total` (None = not known) on the line of this title."""
        count = f"{int(done):,}{'' if total is None else f'/{total:,.0f}'}"
        if self._bars:
            # A total of None makes a bar that moves to and fro: work is going on that does not count yet.
            shown: dict[str, Any] = {"total": total, "count": count, "note": note}
            if not done:
                shown |= {"total": None, "count": f"{count} {unit}"}
            if title not in self._tasks:
                self._tasks[title] = self._bars.add_task(title, unit=unit, **shown)
            self._bars.update(self._tasks[title], completed=done, **shown)
        elif self._plain:
            self._print(title, done, total, f"{count} {unit}", unit, note)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A line, on a terminal, while something goes on that cannot be counted, such as loading a model."""
        if self._bars is None:
            yield
            return
        task = self._bars.add_task(what, total=None, unit="", count="", note="")
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def line(self, title: str, unit: str) -> Report:
        """The line of a title, as what workers call with (done, total, what is going on)."""
        return lambda done, total, note="": self(title, done, total, unit=unit, note=note)

    def _print(self, title: str, done: float, total: float | None, count: str, unit: str, note: str) -> None:
        now = time.monotonic()
        start, first = self._began.setdefault(title, (now, done)) if done else (now, done)
        if now - self._printed < PLAIN_INTERVAL_S:
            return
        self._printed = now
        # A rate over less than a second says nothing.
        speed = (done - first) / (now - start) if now - start > 1 else 0.0
        left = f"{(total - done) / speed:,.0f} s left" if total is not None and speed > 0 else ""
        shown = ", ".join(filter(None, (count, rate(speed, unit), left, note)))
        print(f"{title}: {shown}", file=sys.stderr, flush=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """`Progress.doing` where nothing else goes on."""
    with Progress(plain=False) as progress, progress.doing(what):
        yield


class Lines(logging.Handler):
    """Log lines on standard error; above a bar where one is shown, since a bar replaces `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr, flush=True)


def set_up_logging() -> None:
    """Our own packages say what they do; libraries are heard from a warning up."""
    logging.basicConfig(level=logging.WARNING, handlers=[Lines()])
    for package in ("shards", "student", "precompute", "tools"):
        logging.getLogger(package).setLevel(logging.INFO)


class Output:
    """What a command prints at its end."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        people = Console(stderr=as_json, highlight=False)
        self._people = people if people.is_terminal else Console(stderr=as_json, highlight=False, width=160)

    def say(self, text: str) -> None:
        """A line for people."""
        if is_main_process():
            self._people.print(text, markup=False, soft_wrap=True)

    def show(self, piece: RenderableType) -> None:
        """Something of rich's for people: styled text, a table that folds."""
        if is_main_process():
            self._people.print(piece)

    def report(self, table: Table) -> None:
        """A table for people, its note below."""
        if not is_main_process():
            return
        grid = rich.table.Table(title=Text(table.title), title_justify="left", box=rich.box.SIMPLE_HEAD)
        grid.show_header = any(column.label for column in table.columns)
        for column in table.columns:
            grid.add_column(Text(column.label), justify=column.align)
        for row in table.texts():
            grid.add_row(*map(Text, row))
        self._people.print(grid)
        if table.note:
            self.say(table.note)

    def result(self, payload: Mapping[str, Any]) -> None:
        """The last line of standard output under `--json`, else nothing. NaN and infinity become null."""
        if self.as_json and is_main_process():
            print(json.dumps(_plain(payload), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def guard(run: Callable[[], Any]) -> int:
    """Run the command line and turn what it raises into an exit code and one line on standard error.

    A `TideError` carries its own message and code; usage errors of the option parser exit with 2. Anything
    that is neither those, nor the operating system's refusal, nor Ctrl-C is a bug, and keeps its traceback.
    """
    try:
        code = run()
        if code == INTERRUPTED:  # how Typer reports Ctrl-C
            return fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except TideError as e:
        return fail(str(e), e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", INTERRUPTED)
    except OSError as e:
        return fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", 1)
    except Exception as e:
        message = getattr(
            e, "format_message", None
        )  # the option parser's errors; their class has moved with versions
        if message is not None:
            return fail(message().rstrip(".") + _where(e), getattr(e, "exit_code", 2))
        print(
            "error: this is a bug in tide; please report it with the command and these lines:",
            file=sys.stderr,
        )
        traceback.print_exception(e)
        return 1


def fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _where(error: Any) -> str:
    """What was given, which the parser's message leaves out, and whose help to read."""
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if ctx is None:
        return ""
    given = ""
    if param is not None:
        typed = [_value_after(flag) for flag in param.opts]
        if any(typed):
            given = f"; got {next(filter(None, typed))!r}"
        elif ctx.default_map and param.name in ctx.default_map:
            given = f"; got {ctx.default_map[param.name]!r} from {ctx.meta.get('tide.config')}"
    return f"{given} (see {ctx.command_path} --help)"


def _value_after(flag: str) -> str | None:
    """The value a flag has on this process's command line, the last one if given twice."""
    for word, following in reversed(list(zip(sys.argv, [*sys.argv[1:], ""]))):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
