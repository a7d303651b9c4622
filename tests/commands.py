"""Running `tide` inside a test's process (the fixture `tide` of conftest), and what a refusal looks like."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

Tide = Callable[..., SimpleNamespace]
"""`tide(ARGUMENTS...)` -> exit code, standard output and standard error."""


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tide:
    from tools import cli  # most tests need no command line

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()  # what was printed before is not the command's
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return run


def refused(result: SimpleNamespace, code: int, *words: object) -> None:
    """The command failed with this code and one line of standard error that holds these words."""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: ")
    assert result.code == code, result.err
    for word in words:
        assert str(word) in result.err
