"""Which statements a test executes, also in the processes below it: in the copy of the tree that scripts/mutate makes.

There this file is ``qsnap/_reach.py``: a plugin of pytest, and where :func:`probed` has put a probe before each
statement, what that calls. All write one log, line by line and at once, because many of these processes are killed;
what stands between two tests belongs to the first. Importing it takes no time, because a guard does it too.
"""

from __future__ import annotations

import ast
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pytest

LOG = os.path.join(os.path.dirname(__file__), "reach.log")  # noqa: PTH118, PTH120 (pathlib takes time)

_seen: set[str] = set()
#: Their own names: tests put others in place of those in ``os``.
_open, _write_to, _close = os.open, os.write, os.close


class Reached(NamedTuple):
    """A test that was run.

    :ivar seconds: for its setup, itself, and its teardown.
    :ivar places: the statements that it executed: "module:line".
    :ivar qemu: the QEMU that it ran on; "" for the usual one.
    """

    test: str
    seconds: float
    has_failed: bool
    places: frozenset[str]
    qemu: str = ""


def probe(place: str) -> None:
    """Called before a statement is executed."""
    if place not in _seen:
        _seen.add(place)
        _write(place)


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _seen.clear()
    _write(f"> {nodeid}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The setup of a test, itself, or its teardown is over."""
    _write(f"= {report.duration:.3f} {'failed' if report.failed else ''}")


def _write(line: str) -> None:
    # Opened each time, because the guard's process closes what it does not know; the log belongs to all.
    try:
        file = _open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        _write_to(file, line.encode() + b"\n")
        _close(file)
    except OSError:
        pass  # a test has taken the right to write files, or the descriptors


def read(log: str) -> list[Reached]:
    """The tests that a log tells of, in the order in which they ran."""
    tests: list[Reached] = []
    for part in ("\n" + log).split("\n> ")[1:]:
        test, *lines = part.split("\n")
        reports = [line.split(" ") for line in lines if line.startswith("= ")]
        tests.append(
            Reached(
                test=test,
                seconds=sum(float(report[1]) for report in reports),
                has_failed=any(report[2] for report in reports),
                places=frozenset(line for line in lines if line and not line.startswith("= ")),
            )
        )
    return tests


def probed(module: str, source: bytes) -> bytes:
    """The source of a module with a probe before each statement in a function."""
    tree = ast.fix_missing_locations(_Probes(module).visit(ast.parse(source)))
    after = next(
        number
        for number, item in enumerate(tree.body)
        if not (isinstance(item, ast.Expr) or (isinstance(item, ast.ImportFrom) and item.module == "__future__"))
    )
    tree.body.insert(after, ast.parse("from qsnap._reach import probe as _probe").body[0])
    return ast.unparse(tree).encode()


def place(module: str, line: int) -> str:
    """What a probe calls the statement that begins in that line."""
    return f"{module}:{line}"


class _Probes(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self._module = module
        self._depth = 0

    def visit(self, node: ast.AST) -> ast.AST:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        self._depth += is_function
        super().generic_visit(node)
        if self._depth:
            for field in ("body", "orelse", "finalbody"):
                if isinstance(body := getattr(node, field, None), list):
                    setattr(node, field, [each for item in body for each in self._with_probe(item)])
        self._depth -= is_function
        return node

    def _with_probe(self, item: ast.stmt) -> list[ast.stmt]:
        if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
            return [item]  # a docstring
        return [*ast.parse(f"_probe({place(self._module, item.lineno)!r})").body, item]
