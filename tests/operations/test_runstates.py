"""Guests that are not simply running: asleep, panicked, shut down; what is loaded into them, and saved of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qsnap.guest
from qsnap.errors import PrecheckRefused
from qsnap.model import runstates
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.model.requests import LoadRequest, SaveRequest
from qsnap.operations import reset
from qsnap.operations.load import do_loadvm
from qsnap.operations.save import do_savevm
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.guest import (
    GUESTS,
    HAS_SNAPSHOT_JOBS,
    Guest,
    Launch,
    blockdev,
    both_monitors,
    cli,
    disk_device,
    finish,
    newer,
    qemu_version,
    start_cli,
    tags,
    tool,
    until,
)

SECTOR = GUESTS / "states.bin"
#: Where the guest counts how often a mark was made: what is in its RAM tells which moment it is.
MARKS = 0x604

#: Whether this QEMU keeps S3 over a save and a load.
S3_IS_SAVED = qemu_version() >= (9, 0)

Boot = Callable[..., Guest]

#: The keys, and the run states that they bring the guest into.
STATES = {"s": "suspended", "q": "shutdown", "p": "guest-panicked"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    qsnap.guest.make_disk(path, qemu_img=tool("qemu-img"), sector=SECTOR.read_bytes())
    return path


@pytest.fixture
def boot(launch: Launch, image: Path) -> Boot:
    """Start the guest, which may shut down and panic while QEMU stays."""

    def start(*more: str) -> Guest:
        panic = ["-action", "panic=pause"] if HAS_SNAPSHOT_JOBS else []
        args = (*blockdev("a", image), *disk_device("a"), "-device", "pvpanic", "-no-shutdown")
        guest = launch(*args, *panic, *more, memory="16")
        until("the guest to count", lambda: guest.counter > 100 or None)
        return guest

    return start


def send_key(guest: Guest, key: str) -> None:
    """Press it down. (HMP's sendkey lets go by a timer of the VM clock, which a load puts back.)"""
    event = {"type": "key", "data": {"down": True, "key": {"type": "qcode", "data": key}}}
    guest.qmp("input-send-event", events=[event])


def press(guest: Guest, key: str) -> None:
    """The key that brings the guest into a run state."""
    send_key(guest, key)
    until(STATES[key], lambda: guest.runstate == STATES[key] or None)


def mark(guest: Guest) -> None:
    """Make what is in RAM another than what was saved."""
    before = guest.word(MARKS)
    send_key(guest, "m")
    until("the mark", lambda: guest.word(MARKS) == before + 1 or None)


@contextmanager
def command_in(*args: str, guest: Guest, code: int = 0) -> Iterator[None]:
    """While the command of a run or an ensure runs."""
    fifo = guest.directory / "fifo"
    os.mkfifo(fifo)
    run = start_cli(*args, "--", "sh", "-c", f"echo begun; read line < {fifo}", monitor=guest.address)
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    yield
    fifo.write_text("go on\n")
    done = finish(run)
    assert done.code == code, done.err


def assert_back(guest: Guest, marks: int = 0) -> None:
    """The guest runs, from the moment at which it had that many marks."""
    assert guest.runstate == "running"
    before = guest.counter
    until("the guest to count", lambda: guest.counter != before or None)
    assert guest.word(MARKS) == marks


def test_resume_is_refused_where_cont_does_not_help(boot: Boot) -> None:
    """What does help is said."""
    guest = boot()
    cli("save", "up", monitor=guest.address)
    for key, cure in (("s", "system_wakeup"), ("q", "system_reset")):
        press(guest, key)
        text = cli("resume", monitor=guest.address, expect=6).err
        assert f"it is {STATES[key]}" in text
        assert cure in text
        assert guest.runstate == STATES[key]
        cli("load", "up", monitor=guest.address)


@both_monitors
def test_a_load_brings_back_a_guest_that_has_stopped_by_itself(boot: Boot) -> None:
    """That is no pause of the user's."""
    guest = boot()
    cli("save", "up", monitor=guest.address)
    for key in STATES:
        mark(guest)
        press(guest, key)
        assert cli("load", "up", "--json", monitor=guest.address).json["runstate"] == "running"
        assert_back(guest)
    mark(guest)
    press(guest, "s")
    cli("load", "up", "--paused", monitor=guest.address)
    assert guest.runstate in ("paused", "prelaunch")
    assert guest.word(MARKS) == 0
    cli("load", "up", monitor=guest.address)
    assert guest.runstate in ("paused", "prelaunch"), "that is a pause of the user's"


@both_monitors
def test_a_load_that_leaves_a_panicked_guest_paused(boot: Boot) -> None:
    """As the user asks for: it stands at the saved moment, and is no longer called panicked; so a series takes it."""
    guest = boot()
    guest.qmp("stop")
    cli("save", "t", monitor=guest.address)
    saved = guest.counter
    guest.qmp("cont")
    mark(guest)
    press(guest, "p")
    assert cli("load", "t", "--paused", "--json", monitor=guest.address).json["runstate"] == "paused"
    assert (guest.runstate, guest.counter, guest.word(MARKS)) == ("paused", saved, 0)
    cli("save", "--prefix", "n", monitor=guest.address)
    cli("load", "t", "--running", monitor=guest.address)
    assert_back(guest)


@both_monitors
def test_run_brings_back_a_guest_that_powers_off(boot: Boot, image: Path) -> None:
    guest = boot()
    mark(guest)
    with command_in("run", "--revert", guest=guest):
        mark(guest)
        press(guest, "q")
    assert_back(guest, marks=1)
    assert tags(image) == []


@both_monitors
def test_a_reset_that_would_end_qemu_is_not_made(boot: Boot) -> None:
    """With -no-reboot, system_reset shuts the guest down."""
    guest = boot("-no-reboot")
    cli("save", "up", monitor=guest.address)
    press(guest, "q")
    error = cli("load", "up", "--running", monitor=guest.address, expect=6).err
    assert "-no-reboot" in error
    assert "set-action" in error
    assert guest.runstate == "shutdown"
    if HAS_SNAPSHOT_JOBS:  # and with it set-action; the cure helps
        guest.qmp("set-action", reboot="reset")
        guest.qmp("system_reset")
        until("the reset", lambda: guest.runstate == "prelaunch" or None)
        cli("load", "up", "--running", monitor=guest.address)
        assert_back(guest)


async def test_a_reset_that_changes_nothing(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP nobody sees that QEMU was started with -no-reboot."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    guest = boot("-no-reboot", "-qmp", f"{address},server=on,wait=off")
    cli("save", "up", monitor=guest.address)
    press(guest, "q")
    monkeypatch.setattr(reset, "_RESET_S", 0.5)
    async with qsnap.connect(address) as vm:
        with pytest.raises(PrecheckRefused, match="stays shutdown after a reset"):
            await vm.load("up", running=True)
    assert guest.runstate == "shutdown"


@newer((9, 0), "before 9.0 QEMU does not keep S3")
@both_monitors
def test_a_guest_that_was_saved_asleep_sleeps_again(boot: Boot) -> None:
    """HMP's loadvm wakes it, where it is loaded into a guest that runs (system/runstate.c: load_snapshot_resume)."""
    guest = boot()
    mark(guest)
    press(guest, "s")
    cli("save", "asleep", monitor=guest.address)
    assert guest.runstate == "suspended"
    guest.qmp("system_wakeup")
    guest.qmp("stop")
    cli("load", "asleep", monitor=guest.address)
    assert (guest.runstate, guest.word(MARKS)) == ("paused", 1)
    assert "system_wakeup" in cli("load", "asleep", "--running", monitor=guest.address, expect=1).err
    assert guest.runstate == "suspended"
    guest.qmp("system_wakeup")
    until("the guest to wake", lambda: guest.runstate == "running" or None)
    out = cli("load", "asleep", monitor=guest.address).out
    if guest.address == guest.hmp_address:
        assert ("guest running" in out) == (guest.runstate == "running")
    else:
        assert "guest suspended, as it was saved: `system_wakeup`" in out
        assert (guest.runstate, guest.word(MARKS)) == ("suspended", 1)


@newer((9, 0), "before 9.0 QEMU does not keep S3")
@both_monitors
def test_run_brings_back_a_guest_asleep(boot: Boot, image: Path) -> None:
    """It sleeps, as it was: nothing is wrong, and nothing is left. (HMP's loadvm would wake one that runs.)"""
    guest = boot()
    mark(guest)
    press(guest, "s")
    with command_in("run", "--revert", guest=guest):
        if guest.address == guest.qmp_address:
            guest.qmp("system_wakeup")
            until("the guest to begin anew, as it does", lambda: guest.word(MARKS) == 0 or None)
    assert (guest.runstate, guest.word(MARKS), tags(image)) == ("suspended", 1, [])


def test_a_guest_that_has_shut_down_does_not_push_good_snapshots_out(boot: Boot, image: Path) -> None:
    guest = boot()
    save = ("save", "--prefix", "n", "--keep-last", "1")
    good = cli(*save, "--json", monitor=guest.address).json["tag"]
    press(guest, "q")
    assert "shutdown" in cli(*save, "-q", monitor=guest.address, expect=6).err
    assert tags(image) == [good]
    check = cli("check", monitor=guest.address).out
    assert "warning: the guest is shutdown: it has shut down" in check
    assert "to go on, load an older snapshot" in check
    age = ("status", "--max-age", "1h")
    assert "the guest is shutdown" in cli(*age, monitor=guest.address, expect=1).out

    assert "the guest is shutdown" in cli("save", "off", "-q", monitor=guest.address).err
    listed = {one["tag"]: one["runstate"] for one in cli("list", "--json", monitor=guest.address).json["snapshots"]}
    assert listed == {good: "", "off": "shutdown"}
    cli("load", good, monitor=guest.address)
    assert "it is of a guest that was shutdown" in cli(*age, monitor=guest.address, expect=1).out
    assert "OK" in cli(*age, "--prefix", "n", monitor=guest.address).out


@pytest.mark.skipif(S3_IS_SAVED, reason="from 9.0 on QEMU keeps S3")
def test_a_guest_asleep_that_could_not_wake(boot: Boot, image: Path) -> None:
    guest = boot()
    press(guest, "s")
    assert "nothing wakes it" in cli("save", "asleep", "-q", monitor=guest.address).err
    assert "nothing wakes it" in cli("save", "--prefix", "n", monitor=guest.address, expect=6).err
    assert "nothing wakes it" in cli("run", "--revert", "--", "true", monitor=guest.address, expect=125).err
    assert tags(image) == ["asleep"]


def test_ensure_makes_nothing_of_a_guest_that_has_shut_down(boot: Boot, image: Path) -> None:
    guest = boot()
    with command_in("ensure", "ready", guest=guest, code=123):
        press(guest, "q")
    assert tags(image) == []


@pytest.mark.parametrize("state", ["guest-panicked", "shutdown", "internal-error", "io-error", "watchdog"])
def test_what_a_guest_has_come_into_by_itself_is_no_pause(state: str) -> None:
    runstate = RunState(state)
    assert state in runstates.trouble_of(runstate, QemuVersion(11, 1, 0))
    assert runstates.runs_after_load(runstate)
    assert not runstates.runs_after_load(RunState.PAUSED)
    assert not runstates.trouble_of(RunState.PAUSED, QemuVersion(11, 1, 0))


async def test_no_reset_where_it_is_not_seen_whether_it_would_end_qemu() -> None:
    """TCG has no internal-error; and over TCP nobody sees QEMU's command line."""
    monitor = FakeMonitor()
    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    monitor.state = RunState.INTERNAL_ERROR
    monitor.calls.clear()
    with pytest.raises(PrecheckRefused, match="-no-reboot, which is not seen"):
        await do_loadvm(Run(monitor), LoadRequest(tag="t"))
    monitor.state = RunState.SHUTDOWN  # QEMU has shown that it does not end at a shutdown
    await do_loadvm(Run(monitor), LoadRequest(tag="t"))
    assert "reset" in monitor.calls
    assert monitor.state is RunState.RUNNING
