"""Corpora that are on every machine: the functions of Python's standard library, and those of its tests too.

The task is to write a function's body from its signature and docstring. About 6,000 functions have both;
bundled third-party code is left out. `builtin:stdlib-tests` adds the functions of the library's tests, which
seldom have a docstring: there the signature is enough. A test belongs to the group of the module it tests.
The source differs between Python versions, and so does the fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STDLIB, WITH_TESTS = "builtin:stdlib", "builtin:stdlib-tests"
BUILTIN = (STDLIB, WITH_TESTS)
LICENCE = "PSF-2.0"
TESTS = frozenset(("test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"))
TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))
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


FOUND: dict[str, tuple[Function, ...]] = {}
"""Corpora that this process has read."""


def stdlib_functions(name: str = STDLIB) -> tuple[Function, ...]:
    """Every function of a built-in corpus, each text once, in the order of a hash of the text, so that the
    first N are a fair sample of all. Seconds (six, and some thirty with tests), then kept."""
    if name not in FOUND:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = INSTALLED if name == WITH_TESTS else TESTS | INSTALLED
        found: dict[tuple[str, str], Function] = {}
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
            relative = path.relative_to(root)
            if not left_out & set(relative.parts):
                for function in _functions(path, relative):
                    found.setdefault((function.stub, function.body), function)
        FOUND[name] = tuple(
            sorted(found.values(), key=lambda f: hashlib.sha256((f.stub + f.body).encode()).digest())
        )
    return FOUND[name]


def stdlib_fingerprint(name: str = STDLIB) -> str:
    total = hashlib.sha256(platform.python_version().encode())
    for function in stdlib_functions(name):
        total.update("\0".join(function).encode())
    return total.hexdigest()


def _functions(path: Path, relative: Path) -> Iterator[Function]:
    try:
        with tokenize.open(path) as file:  # honours the coding line
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):  # templates, deliberately broken files
        return
    lines = source.splitlines()
    is_test = bool(TEST_FOLDERS & set(relative.parts))
    for node in sorted(_definitions(tree), key=lambda n: n.lineno):
        end = _end_of_stub(node, lines, bare=is_test)
        if end is None:
            continue
        stub = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))
        body = textwrap.dedent("\n".join(lines[end : node.end_lineno])).strip("\n")
        yield Function(f"{relative.as_posix()}:{node.lineno}", _group(relative), stub, body)


def _end_of_stub(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], *, bare: bool) -> int | None:
    """The last line of signature and docstring (with `bare`, of the signature if there is no docstring); None
    where they are missing, or share a line with the rest."""
    if ast.get_docstring(node, clean=False):
        end = node.body[0].end_lineno or 0
        return end if len(node.body) > 1 and node.body[1].lineno > end else None
    first = node.body[0]
    line = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
    begins_line = not lines[first.lineno - 1].encode()[: first.col_offset].strip()
    return line - 1 if bare and begins_line and line > node.lineno else None


def _group(relative: Path) -> str:
    """Top-level module or package; of `test/test_NAME...` NAME."""
    parts = relative.parts
    named = parts[1].removeprefix("test_") if parts[0] == "test" and len(parts) > 1 else parts[0]
    return named.removesuffix(".py")


def _definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones too. Statements only: most of a tree's nodes are expressions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "orelse", "handlers", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))
