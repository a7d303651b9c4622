"""A corpus that is on every machine: the functions of Python's standard library.

The task is to write a function's body from its signature and docstring. About 6,000 functions have both;
tests and bundled third-party code are left out. The source differs between Python versions, and so does the
fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

STDLIB = "builtin:stdlib"
LICENCE = "PSF-2.0"
TESTS = frozenset(("test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"))
INSTALLED = frozenset(("site-packages", "dist-packages", "_bundled", "__pycache__"))


class Function(NamedTuple):
    where: str
    """File and line, relative to the library."""
    group: str
    """Top-level module or package."""
    stub: str
    """Signature and docstring, as source."""
    body: str
    """The rest, without indentation."""


@cache
def stdlib_functions() -> tuple[Function, ...]:
    """Every function with a docstring and a body, each text once, in the order of a hash of the text, so that
    the first N are a fair sample of all. About six seconds, then cached."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str], Function] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not (TESTS | INSTALLED) & set(relative.parts):
            for function in _functions(path, relative):
                found.setdefault((function.stub, function.body), function)
    return tuple(sorted(found.values(), key=lambda f: hashlib.sha256((f.stub + f.body).encode()).digest()))


def stdlib_fingerprint() -> str:
    total = hashlib.sha256(platform.python_version().encode())
    for function in stdlib_functions():
        total.update("\0".join(function).encode())
    return total.hexdigest()


def _functions(path: Path, relative: Path) -> Iterator[Function]:
    try:
        with tokenize.open(path) as file:  # honours the coding line
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # a few templates and deliberately broken files
        return
    lines = source.splitlines()
    for node in sorted(_definitions(tree), key=lambda n: n.lineno):
        if len(node.body) < 2 or not ast.get_docstring(node, clean=False):
            continue
        end = node.body[0].end_lineno or 0
        if node.body[1].lineno <= end:  # all on one line
            continue
        stub = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))
        body = textwrap.dedent("\n".join(lines[end : node.end_lineno])).strip("\n")
        group = relative.parts[0].removesuffix(".py")
        yield Function(f"{relative.as_posix()}:{node.lineno}", group, stub, body)


def _definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones too. Statements only: most of a tree's nodes are expressions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "orelse", "handlers", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))
