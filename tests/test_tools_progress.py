"""Progress as people and logs see it: bars on a terminal, with what is being done, a rate and the time left;
a line now and then elsewhere; never anything on standard output.

Commands run on a pseudo-terminal, in a process of their own, slowed down so that a bar is drawn more than
once over data that fit a test.
"""

import json
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gloo import run_until_killed
from small_runs import write_dataset, write_student
from transformers import PreTrainedTokenizerFast

from precompute.corpus_size import rows_in, told_total
from tools import console
from tools.console import Progress, rate

BAR = r"{title} +[━╸╺ ]+ [\d,]+/[\d,]+ +[\d.,]+ {unit}/(s|min) +ETA \d+:\d\d"
"""A line of a bar at work: title, bar, done of all, rate, time left."""


def slowly(owner: Any, name: str, seconds: float) -> None:
    method: Callable[..., Any] = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **kwargs)

    setattr(owner, name, slow)


def on_this_terminal(name: str, arguments: list[str], out: str) -> None:
    """`tide ARGUMENTS` with the terminal as its input and standard error; standard output goes to a file."""
    terminal, file = os.open(name, os.O_RDWR), os.open(out, os.O_CREAT | os.O_WRONLY)
    for here, descriptor in ((0, terminal), (1, file), (2, terminal)):
        os.dup2(descriptor, here)
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    from shards import parallel
    from student import evaluate
    from tools import cli

    slowly(console.Progress, "__call__", 0.12)
    slowly(parallel.Work, "add", 0.05)
    slowly(evaluate, "read_log_probs", 0.12)
    sys.argv = ["tide", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"exit code {ended.code}") from None


def on_terminal(arguments: list[object], out: Path) -> list[str]:
    """What a terminal showed, line by line, without its control codes."""
    screen, terminal = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(screen, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                return
            if not data:
                return
            seen.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    run_until_killed(on_this_terminal, os.ttyname(terminal), [*map(str, arguments)], str(out))
    os.close(terminal)
    reader.join(10)
    os.close(screen)
    text = b"".join(seen).decode(errors="replace")
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A dataset of twelve shards, `data`, a student and a corpus."""
    root = tmp_path_factory.mktemp("progress")
    write_student(root / "student", student_tokenizer)
    write_dataset(root / "data", student_tokenizer, samples=48, parts=12)
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and {i + 1} follow."} for i in range(24)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def cases(root: Path, model: Path, out: Path) -> dict[str, tuple[list[object], str, str, str]]:
    """Command -> its arguments, the bar's title and unit, and what it says before it counts."""
    data, student = root / "data", root / "student"
    return {
        "precompute": (
            ["precompute", "--teacher", model, "--student", model, "--corpus", root / "corpus.jsonl", "--out",
             out / "made", "--block-size", 8, "--student-max-length", 64, "--views", 1, "--samples-per-part",
             4, "--kind", "shared"],
            "precompute", "corpus rows", "loading models",
        ),
        "train": (
            ["train", "--data", data, "--student", student, "--out", out / "run", "--objective", "kl",
             "--steps", 6, "--batch-tokens", 200, "--eval-every", 6, "--eval-samples", 4],
            "training", "steps", "loading the student",
        ),
        "eval": (
            ["eval", "--model", student, "--data", data, "--grid", ",".join(["0.9"] * 200)],
            "evaluating", "samples", "loading the student",
        ),
        "verify": (["verify", data], "verifying", "MB", ""),
        "pull": (["pull", data, out / "pulled"], "pulling", "MB", ""),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["precompute", "train", "eval", "verify", "pull"])
def test_a_terminal_sees_a_bar(name: str, folder: Path, model: Path, tmp_path: Path) -> None:
    """What is being done, how much of it, a rate in the work's own unit, and the time left; loading is work
    too. Standard output holds the JSON line alone."""
    arguments, title, unit, before = cases(folder, model, tmp_path)[name]
    lines = on_terminal([*arguments, "--json"], tmp_path / "out.txt")
    drawn = "\n".join(dict.fromkeys(lines))
    assert re.search(BAR.format(title=title, unit=unit), drawn), drawn
    assert before in drawn
    (line,) = (tmp_path / "out.txt").read_text().splitlines()
    assert json.loads(line)["command"] == name


def test_elsewhere_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With amount, rate and time left; nothing for work that logs lines of its own, nothing on standard
    output; the clock of a resumed line starts where that run begins."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress() as progress, progress.doing("loading"):
        line = progress.line("pulling", "MB")
        for at, done in ((0, 0), (60, 500), (64, 510), (71, 570), (80, 660)):
            now[0] = 100.0 + at
            line(done, 1000, "part 3")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "pulling: 500/1,000 MB, part 3",
        "pulling: 570/1,000 MB, 6.4 MB/s, 68 s left, part 3",
    ]
    with Progress(plain=False) as progress:
        now[0] = 1000.0
        progress("training", 5, 10)
    assert capsys.readouterr() == ("", "")


def test_rates_read_well() -> None:
    assert rate(12.34, "views") == "12.3 views/s"
    assert rate(0.05, "steps") == "3.0 steps/min"
    assert rate(1234.5, "MB") == "1,234 MB/s"
    assert rate(0.0, "MB") == ""


def test_the_end_of_a_corpus_is_told_where_it_is_cheap(tmp_path: Path) -> None:
    """Lines, also the last one without its end, and Parquet's own count; unknown where only reading tells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}')
    pq.write_table(pa.table({"text": ["1", "2", "3"]}), tmp_path / "b.parquet")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "c.jsonl.zst").write_bytes(b"")
    assert rows_in(str(tmp_path / "a.jsonl")) == 2
    assert rows_in(str(tmp_path / "b.parquet")) == 3
    both = tmp_path / "both"
    both.mkdir()
    for file in ("a.jsonl", "b.parquet"):
        (both / file).write_bytes((tmp_path / file).read_bytes())
    assert rows_in(str(both)) == 5
    assert rows_in(str(tmp_path / "zip")) is None
    assert rows_in(f"{tmp_path}/a.jsonl[lang:x]") is None
    assert rows_in(f"2*{tmp_path}/a.jsonl+{tmp_path}/b.parquet") is None
    told: list[tuple[Any, ...]] = []
    report = told_total(lambda *args: told.append(args), str(tmp_path / "a.jsonl"))
    end = time.monotonic() + 20
    while not told or told[-1][1] is None:
        assert time.monotonic() < end
        report(1, None, "part 0")
    assert told[-1] == (1, 2, "part 0")
    report(1, 1, "with a limit")
    assert told[-1] == (1, 1, "with a limit")
