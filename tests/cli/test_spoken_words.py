"""The words that people type: other names, wrong words, options before the verb, and the examples of the help."""

from __future__ import annotations

import re
import shlex

import click
import pytest

import qsnap.cli
from qsnap.cli.examples import EXAMPLES
from qsnap.cli.words import _MEANINGS, ALIASES, SHARED, meant_by, verb_first
from support.guest import Guest, cli
from support.terminal import lines_on_terminal

COMMANDS = set(qsnap.cli.cli.commands)


@pytest.mark.no_qemu
def test_words_mean_commands() -> None:
    assert {*ALIASES.values(), *_MEANINGS.values()} <= COMMANDS
    assert not {*ALIASES, *_MEANINGS} & COMMANDS


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("stop", "pause"), ("suspend", "pause"), ("paus", "pause"), ("purne", "prune"), ("unpause", "resume"),
        ("cont", "resume"), ("rollback", "load"), ("restoer", "load"), ("LIST", "list"), ("snapshots", "list"),
        ("remvoe", "delete"), ("xyzzy", ""), ("forget", "prune"),
    ],
)  # fmt: skip
def test_a_wrong_word(word: str, meant: str) -> None:
    """By meaning first: "pause" is near to "prune", and what was meant must not be removed."""
    assert meant_by(word, COMMANDS) == meant
    assert meant_by("pause", COMMANDS - {"pause"}) != "prune"


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--vm web list --json", "list --vm web --json"),
        ("--vm=web -q list", "list --vm=web -q"),
        ("-m /x/list save t", "save -m /x/list t"),
        ("-m/x save", "save -m/x"),
        ("--json --timeout 5 run -- make -k", "run --json --timeout 5 -- make -k"),
        ("--force load t", "--force load t"),
        ("--version", "--version"),
        ("-- list", "-- list"),
        ("--vm", "--vm"),
        ("list --vm web", "list --vm web"),
    ],
)
def test_options_before_the_verb(line: str, expected: str) -> None:
    assert verb_first(line.split()) == expected.split()


@pytest.mark.no_qemu
def test_the_shared_options_are_those_of_the_commands() -> None:
    shared = [one for one in qsnap.cli.cli.commands["check"].params if isinstance(one, click.Option)]
    taken = {name: not one.is_flag for one in shared for name in one.opts}
    assert taken == {**SHARED, "--vmstate": True, "--exclude": True}


@pytest.mark.no_qemu
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_are_valid(name: str) -> None:
    """Two of each command, which click takes; they are in its help."""
    assert len(EXAMPLES[name]) >= 2
    text = cli(name, "--help").out
    for line, _ in EXAMPLES[name]:
        assert line in text
        match = re.search(r"qsnap ([a-z]+) ?([^)>]*)", line)
        assert match is not None
        assert match[1] == name
        qsnap.cli.cli.commands[name].make_context(name, shlex.split(match[2]))
    assert name in EXAMPLES


@pytest.mark.no_qemu
def test_help_of_a_wrong_word() -> None:
    assert "Did you mean 'load'?" in cli("help", "lod", expect=2).err
    assert "Usage: qsnap" in cli("help", "rm").out
    assert isinstance(qsnap.cli.cli.get_command(click.Context(qsnap.cli.cli), "ls"), click.Command)


def test_as_a_user_types(guest: Guest) -> None:
    """Other names do the same; a wrong tag is answered by the one that is near."""
    cli("-m", guest.address, "take", "before-upgrade")
    assert cli("-m", guest.address, "-q", "ls").out == "before-upgrade\n"
    assert (
        cli("info", "before-upgrade", monitor=guest.address).out
        == cli("show", "before-upgrade", monitor=guest.address).out
    )
    text = cli("restore", "before-upgade", monitor=guest.address, expect=7).err
    assert "Did you mean 'before-upgrade'?" in text
    assert "There is 'before-upgrade'" in cli("rm", "x", "y", monitor=guest.address, expect=7).err
    cli("revert", "before-upgrade", monitor=guest.address)
    cli("rm", "before-upgrade", monitor=guest.address)
    assert "There are no snapshots" in cli("load", "x", monitor=guest.address, expect=7).err


def test_pause_and_resume(guest: Guest) -> None:
    assert cli("pause", monitor=guest.address).out == "guest paused\n"
    count = guest.counter
    assert cli("pause", monitor=guest.address).out == "guest paused, as it was\n"
    assert cli("pause", "--json", monitor=guest.address).json["before"] == "paused"
    cli("save", "one", monitor=guest.address)
    assert guest.counter == count
    lines = lines_on_terminal("load", "one", "-m", guest.address, columns=200)
    assert "qsnap resume" in lines[-1]
    assert cli("resume", monitor=guest.address).out == "guest running\n"
    guest.assert_running()
    guest.qmp("stop")
    guest.qmp.hmp("object_add authz-simple,id=qsnap-half-restored,identity=yes")
    text = cli("resume", monitor=guest.address, expect=6).err
    assert "a load has failed midway" in text
    assert guest.runstate == "paused"


def test_the_latest(guest: Guest) -> None:
    """The newest that can be loaded; not what undo keeps, unless that is asked for."""
    for tag in ("one", "n-20261126T031500", "two", "before-load-20261126T031600"):
        assert guest.qmp.hmp(f"savevm {tag}") == ""

    def loaded(*options: str) -> str:
        return str(cli("load", "--latest", *options, "--json", monitor=guest.address).json["tag"])

    assert loaded() == "two"
    assert loaded("--prefix", "n") == "n-20261126T031500"
    assert loaded("--prefix", "before-load") == "before-load-20261126T031600"
    guest.qmp("blockdev-snapshot-delete-internal-sync", device="disk1", name="two")
    assert loaded() == "n-20261126T031500"
    cli("load", "--latest", "--prefix", "none", monitor=guest.address, expect=7)
    cli("load", "--latest", "one", monitor=guest.address, expect=2)
    cli("load", monitor=guest.address, expect=2)
