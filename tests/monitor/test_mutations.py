"""A hostile monitor: whatever it answers, a command ends in time, with a code of the table, and prints no control
characters. ``QSNAP_MUTANTS=5000`` tries so many; ``QSNAP_MUTANT=qmp:17`` shows one."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

import pytest

import qsnap.cli
from qsnap import vm
from qsnap.errors import EXIT_TABLE
from qsnap.host.processes import Process
from qsnap.monitor.qmp import channel
from qsnap.monitor.qmp import monitor as qmp
from qsnap.runs import mark, pause
from qsnap.runs.record import Record
from qsnap.supervision import claim, guard, recovery
from support.guest import Guest, blockdev, make_boot_disk, make_disk, qemu_version
from support.killed import set_claim
from support.mutations import Conversation, Replayer, recorded

CODES = {int(code) for code, _ in EXIT_TABLE if code.isdigit()}
#: Seconds for a command with --timeout 1, on a machine that does much else.
TIMEOUT_S = 1
LONG_S = 20.0
SHORT_FORM = 500
#: Of C0, C1 and Unicode's text in two directions; and halves of characters.
_CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\u2029\u202f-\ud7ff\ue000-\U0010ffff]")

COMMANDS = (
    ("save", "a"),
    ("save", "n-20260101T000000"),
    ("save", "n-20260102T000000"),
    ("list",),
    ("list", "--json"),
    ("show", "a"),
    ("check",),
    ("status",),
    ("status", "--max-age", "1h"),
    ("save", "a", "--json"),
    ("save", "a", "--safe-replace"),
    ("load", "a"),
    ("prune", "--prefix", "n", "--keep-last", "1"),
    ("delete", "a"),
    ("recover",),
)


class NoGuard(guard.Guard):
    """It would go on with what was handed over to it long after the command."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    async def ready(self) -> None: ...

    def dismiss(self) -> None: ...

    def hand_over(self) -> None: ...


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No guards, and short waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSNAP_RUNTIME_DIR", str(tmp_path_factory.mktemp("run", numbered=True)))
        patch.setattr(guard, "start", lambda *_: NoGuard())
        for module, name, value in (
            (qmp, "POLL_S", 0.01), (channel, "EVENT_S", 0.05), (qmp, "STUCK_POLLS", 3),
            (pause, "RECONNECT_TIMEOUT_S", 1.0), (vm, "TIMED_PATIENCE_S", 1.0), (claim, "_RELEASE_TIMEOUT_S", 0.5),
            (recovery, "_RETRY_S", 0.001), (recovery, "_CONT_TRIES", 3),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        yield


def run(*arguments: str) -> tuple[int, str]:
    """A command in this process: its exit code, and all that it printed."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = qsnap.cli._exit_code(list(arguments))
    return code, out.getvalue()


@pytest.fixture(scope="module", params=["qmp", "hmp"])
def conversations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, quick: None
) -> Iterator[tuple[str, list[tuple[tuple[str, ...], Conversation]]]]:
    """What each command and a real QEMU said."""
    directory = tmp_path_factory.mktemp("mutants")
    guest = Guest(
        *blockdev("disk0", make_boot_disk(directory / "a")), "-device", "virtio-blk,drive=disk0,id=vd0",
        *blockdev("disk1", make_disk(directory / "b")), "-device", "virtio-blk,drive=disk1,id=vd1",
        transport=request.param,
    )  # fmt: skip
    found: list[tuple[tuple[str, ...], Conversation]] = []
    try:
        guest.wait_for_ticks()
        for command in COMMANDS:
            if command == ("recover",):
                dead = Record(operation="save", owner=Process(pid=os.getpid(), start=1))
                set_claim(guest, mark.holder(dead, None, was_running=True))
                guest.qmp("stop")
            with recorded(is_human=request.param == "hmp") as talk:
                code, text = run(*command, "-m", guest.address)
            assert code == 0, (command, text)
            found.append((command, talk))
        yield request.param, found
    finally:
        guest.kill()


@pytest.fixture
def replayer() -> Iterator[Replayer]:
    server = Replayer()
    yield server
    server.close()


def test_answers_that_are_not_spoiled(
    conversations: tuple[str, list[tuple[tuple[str, ...], Conversation]]], replayer: Replayer
) -> None:
    """The replay is good: each command comes as far with it as with the real QEMU."""
    for command, talk in conversations[1]:
        replayer.play(talk, (*qemu_version(), 0), lambda _: None)
        code, text = run(*command, "-m", replayer.address, "--timeout", "20")
        assert code == 0, (command, text)


@pytest.mark.timeout(60 + int(os.environ.get("QSNAP_MUTANTS", SHORT_FORM)))
def test_mutants(conversations: tuple[str, list[tuple[tuple[str, ...], Conversation]]], replayer: Replayer) -> None:
    transport, found = conversations
    only = os.environ.get("QSNAP_MUTANT", "").partition(":")
    seeds = range(int(os.environ.get("QSNAP_MUTANTS", SHORT_FORM)) // 2)
    if only[0]:
        seeds = range(int(only[2]), int(only[2]) + 1) if only[0] == transport else range(0)
    failures = [
        failure for seed in seeds if (failure := problem(f"{transport}:{seed}", found, replayer, bool(only[0])))
    ]
    assert not failures, "\n".join(failures)


def problem(name: str, found: list[tuple[tuple[str, ...], Conversation]], replayer: Replayer, is_shown: bool) -> str:
    """What is wrong with what a command makes of the mutations of that seed; "" if nothing is."""
    chance = random.Random(name)  # noqa: S311 (to be repeated)
    command, talk = chance.choice(found)
    total = sum(len(answers) for _, answers in talk.said)
    chosen = {
        chance.randint(1, total): random.Random(f"{name} {number}")  # noqa: S311
        for number in range(chance.choice((1, 1, 1, 2, 4)))
    }
    replayer.play(talk, (*qemu_version(), 0), chosen.get)
    began = time.monotonic()
    try:
        code, text = run(*command, "-m", replayer.address, "--timeout", str(TIMEOUT_S), "--lock-wait", "0")
    except Exception as error:
        if is_shown:
            raise
        return f"{name} {command}: {type(error).__name__}: {error!s:.300}"
    took = time.monotonic() - began
    if is_shown:
        sys.stderr.write(f"{command}: exit {code}, {took:.1f} s: {text!r:.3000}\n")
    bad = sorted(set(_CONTROL.findall(text)))
    if code not in CODES or bad or took > LONG_S:
        return f"{name} {command}: exit {code}, {took:.1f} s, characters {bad!r}: {text!r:.300}"
    return ""
