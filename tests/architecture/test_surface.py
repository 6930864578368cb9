"""What scripts and programs hold on to: options, exit codes, JSON keys, the library's names. A move may change none.

``support/recorded/surface.json`` is what they were. Where a change is meant, record it:
``QSNAP_RECORD=1 pytest tests/architecture/test_surface.py``.
"""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
from importlib import import_module
from typing import Any

import click
import pytest

import qsnap
import qsnap.cli
from qsnap import errors
from qsnap.cli import commands
from support.guest import RECORDED, Guest, cli, needs_snapshot_jobs

SURFACE = RECORDED / "surface.json"


def hold(name: str, now: Any) -> None:
    """Compare with what is recorded under that name, or record it."""
    recorded = json.loads(SURFACE.read_text()) if SURFACE.exists() else {}
    if os.environ.get("QSNAP_RECORD"):
        SURFACE.write_text(json.dumps(recorded | {name: now}, indent=1, sort_keys=True) + "\n")
        return
    assert now == recorded[name], "if that is meant, record it: QSNAP_RECORD=1"


def option(parameter: click.Parameter) -> dict[str, Any]:
    """What a user can rely on in it; an option that is hidden is no less in somebody's script."""
    told: dict[str, Any] = {
        "names": sorted([*parameter.opts, *parameter.secondary_opts]), "type": parameter.type.name,
        "nargs": parameter.nargs, "required": parameter.required, "default": repr(parameter.default),
    }  # fmt: skip
    if isinstance(parameter, click.Option):
        told |= {"multiple": parameter.multiple, "env": parameter.envvar, "flag": parameter.is_flag}
    return told


@pytest.mark.no_qemu
def test_every_command_is_listed() -> None:
    """One that is written and not listed would be found by nobody."""
    modules = (import_module(f"qsnap.cli.commands.{one.name}") for one in pkgutil.iter_modules(commands.__path__))
    written = {one.name for module in modules for one in vars(module).values() if isinstance(one, click.Command)}
    assert written == set(qsnap.cli.cli.commands)


@pytest.mark.no_qemu
def test_options() -> None:
    hold("options", {
        name: sorted((option(one) for one in command.params), key=lambda told: told["names"])
        for name, command in qsnap.cli.cli.commands.items()
    })  # fmt: skip


@pytest.mark.no_qemu
def test_exit_codes() -> None:
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.QsnapError)]
    hold("exit codes", {one.__name__: one.exit_code for one in classes})


@pytest.mark.no_qemu
def test_the_library_s_names() -> None:
    methods = inspect.getmembers(qsnap.VM, lambda member: inspect.isfunction(member) or isinstance(member, property))
    hold("library", {
        "names": sorted(qsnap.__all__),
        "connect": list(inspect.signature(qsnap.connect).parameters),
        "VM": {
            name: list(inspect.signature(one).parameters) if inspect.isfunction(one) else "property"
            for name, one in methods if not name.startswith("_")
        },
    })  # fmt: skip


def keys(document: Any, path: str = "") -> set[str]:
    """The paths of all values in a document, those of a list's items as one."""
    if isinstance(document, dict):
        return {path, *(key for name, value in document.items() for key in keys(value, f"{path}.{name}"))}
    if isinstance(document, list):
        return {path, *(key for value in document for key in keys(value, f"{path}[]"))}
    return {path}


@needs_snapshot_jobs
@pytest.mark.parametrize("transport", ["qmp", "hmp"], indirect=True)
def test_json_keys(guest: Guest, transport: str) -> None:
    """Every command's document, with as much in it as two disks, a fault and a live snapshot can fill."""
    lines = [
        ("check", "--json"),
        ("save", "t", "--json", "--description", "a text", "-n"),
        ("save", "t", "--json", "--description", "a text"),
        ("save", "--prefix", "s", "--keep-last", "1", "--json", "-n"),
        ("save", "--prefix", "s", "--keep-last", "1", "--json"),
        ("list", "--json"),
        ("show", "t", "--json"),
        ("status", "--json"),
        ("protect", "t", "--json"),
        ("delete", "t", "--json"),
        ("unprotect", "t", "--json"),
        ("describe", "t", "other", "--json"),
        ("load", "t", "--json"),
        ("load", "nope", "--json"),
        ("prune", "--prefix", "s", "--keep-last", "1", "--json"),
        ("ensure", "e", "--json", "--", "true"),
        ("run", "--revert", "--json", "--", "true"),
        ("save", "bad\ntag", "--json"),
        ("save", "live", "--live", "--json"),
        ("load", "live", "--json"),
        ("delete", "t", "live", "--json"),
        ("recover", "--json"),
    ]
    told = {}
    for line in lines:
        run = cli(*line, monitor=guest.address, expect=None)
        documents = [
            json.loads(text) for stream in (run.out, run.err) for text in stream.splitlines() if text[:1] in "[{"
        ]
        told[" ".join(line)] = {"exit": run.code, "keys": sorted({key for one in documents for key in keys(one)})}
    hold(f"json {transport}", told)
