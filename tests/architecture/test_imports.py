"""The source itself: which module may import which, the drawn tree of errors, and the table of scripts/mutate."""

from __future__ import annotations

import ast
import runpy
from functools import cache
from pathlib import Path

import pytest

import qsnap
from qsnap import errors
from qsnap.errors import QsnapError

pytestmark = pytest.mark.no_qemu


def test_the_error_tree_is_drawn() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, QsnapError)]
    for error in classes:
        assert error.__name__ in (errors.__doc__ or "")
    codes = {code for code, _ in errors.EXIT_TABLE}
    assert {str(c.exit_code) for c in classes} - {"130"} <= codes


PACKAGE = Path(qsnap.__file__).parent
#: Which modules may import which library: each has one home.
HOMES = {
    "rich": ("cli/output/lines.py", "cli/output/show.py", "cli/output/bar.py"),
    "click": (
        "cli/__init__.py", "cli/options.py", "cli/policy.py", "cli/completion.py",
        *(f"cli/commands/{name}.py" for name in ("save", "snapshots", "series", "notes", "guest", "job", "elsewhere")),
    ),
    "qemu": ("monitor/qmp/channel.py",),
    "psutil": ("targets/running.py", "cli/child.py"),
    "pytest": ("pytest_plugin.py",),
}  # fmt: skip
#: From top to bottom; a package imports from itself and from the layers below.
LAYERS = [
    ["__main__", "__init__"],
    ["cli", "pytest_plugin", "sync"],
    ["connecting", "joint"],
    ["vm", "offline"],
    ["supervision"],
    ["operations"],
    ["upkeep"],
    ["runs"],
    ["inventory"],
    ["targets"],
    ["monitor"],
    ["host"],
    ["tags"],
    ["errors"],
    ["model"],
    ["guest"],
]


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, for type checking too."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {f"{item.module}.{alias.name}" for alias in item.names} | {item.module}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    level = next(number for number, layer in enumerate(LAYERS) if own in layer)
    above = {name for layer in LAYERS[: level + 1] for name in layer} - {own}
    for name in imports(path):
        library, *rest = name.split(".")
        assert str(relative) in HOMES.get(library, (str(relative),)), f"{relative} imports {name}"
        assert library != "qsnap" or not rest or rest[0] not in above, f"{relative} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """What only looks downwards can be read from the bottom up."""
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    left: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = imports(path) & paths.keys() - {name}
        # To import a module of a package is not to use what the package itself says
        left[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_each_module_that_guards_a_guest_has_tests_that_find_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of scripts/mutate names modules and tests that are there."""
    monkeypatch.syspath_prepend(PACKAGE.parent / "scripts")
    script = runpy.run_path(str(PACKAGE.parent / "scripts" / "mutate"))
    for module, tests in script["TESTS"].items():
        assert script["Changes"](module).found
        assert all((PACKAGE.parent / "tests" / name).exists() for name in tests)
