"""After a load the guest runs the code that its RAM holds, not what TCG had translated before."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import qsnap.guest
from qsnap.errors import JobFailed
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.operations import translation
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
    newer,
    tool,
    until,
)
from support.killed import Killer, marks, wait_for_the_guard
from support.proxy import Intercept

#: Where the guest's code has its letter.
LETTER = 0x7C03

#: A live snapshot is loaded by QMP alone.
WAYS = [("qmp", []), ("hmp", []), *([("qmp", ["--live"])] if HAS_SNAPSHOT_JOBS else [])]


class Modifier:
    """The guest that changes its own code."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        until("the guest to print", lambda: self.printed().endswith("a"))

    def printed(self) -> str:
        """All that it has printed."""
        return self.guest.serial.read_text() if self.guest.serial.exists() else ""

    @property
    def letter(self) -> str:
        """The letter in its code, in RAM."""
        return chr(self.guest.word(LETTER) & 0xFF)

    def change(self) -> str:
        """Have it change its code, and execute that; the new letter."""
        letter = chr(ord(self.letter) + 1)
        self.guest.qmp("send-key", keys=[{"type": "qcode", "data": "x"}])
        until("the new code", lambda: self.printed().endswith(letter))
        return letter

    def assert_runs(self, letter: str, *, since: int, before: str = "") -> None:
        """It prints *letter*, and had printed nothing since then but what it may have in the time *before* a load."""
        until(f"the guest to print {letter}", lambda: letter in self.printed()[since:], 10)
        assert re.fullmatch(f"{before or letter}*{letter}+", self.printed()[since:])
        assert self.letter == letter


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    sector = (GUESTS / "selfmod.bin").read_bytes()
    qsnap.guest.make_disk(tmp_path / "a", qemu_img=tool("qemu-img"), sector=sector)
    return [*blockdev("a", tmp_path / "a"), *disk_device("a")]


@pytest.fixture
def modifier(launch: Launch, disk: list[str]) -> Modifier:
    return Modifier(launch(*disk))


@pytest.mark.parametrize(("transport", "how"), WAYS, indirect=["transport"])
def test_a_running_guest(modifier: Modifier, how: list[str], transport: str) -> None:
    cli("save", "t", *how, monitor=modifier.guest.address)
    for _ in range(2):
        changed = modifier.change()
        seen = len(modifier.printed())
        result = cli("load", "t", "--json", monitor=modifier.guest.address).json
        by_delta = HAS_SNAPSHOT_JOBS and transport == "qmp"
        assert (result["runstate"], result["method"]) == ("running", "delta" if by_delta else "full")
        modifier.assert_runs("a", since=seen, before=changed)


@pytest.mark.parametrize(("transport", "how"), WAYS, indirect=["transport"])
@pytest.mark.parametrize("paused_by", ["user", "load"])
def test_a_paused_guest(modifier: Modifier, how: list[str], paused_by: str) -> None:
    """By the user before the load, or by it: it stands still at the saved moment, in no run state but "paused"."""
    guest = modifier.guest
    cli("save", "t", *how, monitor=guest.address)
    for _ in range(2):
        modifier.change()
        if paused_by == "user":
            guest.qmp("stop")
        option = ["--paused"] if paused_by == "load" else []
        assert cli("load", "t", *option, "--json", monitor=guest.address).json["runstate"] == "paused"
        assert (guest.runstate, modifier.letter) == ("paused", "a")
        seen = len(modifier.printed())
        guest.qmp("cont")
        modifier.assert_runs("a", since=seen)


@both_monitors
def test_a_paused_guest_that_is_to_run(modifier: Modifier) -> None:
    cli("save", "t", monitor=modifier.guest.address)
    modifier.change()
    modifier.guest.qmp("stop")
    seen = len(modifier.printed())
    assert cli("load", "t", "--running", "--json", monitor=modifier.guest.address).json["runstate"] == "running"
    modifier.assert_runs("a", since=seen, before="b")


@both_monitors
def test_a_guest_that_panics_at_once(launch: Launch, disk: list[str]) -> None:
    """Whenever it runs: before QEMU can be asked to drop the code. A reset helps; and what has happened is told."""
    pauses = ["-action", "panic=pause"] if HAS_SNAPSHOT_JOBS else ["-no-shutdown"]
    guest = launch(*disk, "-device", "pvpanic", *pauses)
    modifier = Modifier(guest)
    cli("save", "t", monitor=guest.address)
    for option in ["--running"], [], ["--paused"]:
        panic(modifier)
        cli("load", "t", *option, monitor=guest.address)
        assert modifier.letter == "a"
        assert (guest.runstate == "running") is (option != ["--paused"])
        seen = len(modifier.printed())
        if option == ["--paused"]:
            guest.qmp("cont")
        modifier.assert_runs("a", since=seen)
    panic(modifier)
    assert "to go on, load an older snapshot" in cli("save", "bad", monitor=guest.address).err
    for _ in range(20):  # qsnap may have looked before
        run = cli("load", "bad", monitor=guest.address, expect=None)
        until("the panic", lambda: guest.runstate == "guest-panicked" or None)
        if run.code:
            break
    told = "since then the guest is guest-panicked (its kernel has panicked): load an older snapshot, or try `cont`"
    assert (run.code, f"'bad' was loaded; {told}" in run.err) == (1, True), run.err
    cli("load", "t", monitor=guest.address)
    assert modifier.letter == "a"


def panic(modifier: Modifier) -> None:
    """Have the guest change its code to that which panics."""
    while modifier.letter < "d":
        modifier.change()
    modifier.guest.qmp("send-key", keys=[{"type": "qcode", "data": "x"}])
    until("the panic", lambda: modifier.guest.runstate == "guest-panicked" or None)


@newer((10, 1), "before 10.2 QEMU itself drops translated code in every load")
def test_a_guest_that_panics_at_once_and_is_not_reset(launch: Launch, disk: list[str]) -> None:
    """With -no-reboot a reset would end QEMU; the cure that is told helps."""
    guest = launch(*disk, "-device", "pvpanic", "-action", "panic=pause", "-no-reboot")
    modifier = Modifier(guest)
    cli("save", "t", monitor=guest.hmp_address)
    panic(modifier)
    for _ in range(5):  # QEMU may be quicker than the panic
        run = cli("load", "t", "--paused", monitor=guest.hmp_address, expect=None)
        if run.code:
            break
        guest.qmp("cont")
        panic(modifier)
    assert run.code == 9, run.err
    assert "QEMU keeps code that it has translated" in run.err
    assert "`set-action` with reboot=reset" in run.err
    assert modifier.letter == "e"
    guest.qmp("set-action", reboot="reset")
    guest.qmp("system_reset")
    until("the reset", lambda: guest.runstate == "prelaunch" or None)
    cli("load", "t", "--running", monitor=guest.hmp_address)
    assert modifier.letter == "a"


@newer((10, 1), "before 10.2 QEMU itself drops translated code in every load")
@pytest.mark.parametrize("command", ["flush", "stop"])
@both_monitors
def test_killed_while_translated_code_is_dropped(
    modifier: Modifier, intercept: Intercept, runtime_directory: Path, command: str, transport: str
) -> None:
    """The guest that the user had paused is paused again, and not loaded; QEMU translates as before."""
    guest = modifier.guest
    cli("save", "t", monitor=guest.address)
    changed = modifier.change()
    guest.qmp("stop")
    killer = Killer(command)
    killer.run("load", "t", monitor=intercept(guest, on_command=killer).address)
    wait_for_the_guard(runtime_directory)
    assert (guest.runstate, modifier.letter, marks(guest)) == ("paused", changed, [])
    assert "one-insn-per-tb: off" in guest.qmp.hmp("info jit")


@dataclass
class Translating(FakeMonitor):
    """Goes from run state to run state as QEMU does."""

    lines: list[str] = field(default_factory=list)
    #: As soon as it runs, the guest stops so.
    stops: RunState | None = None
    kvm: str = "kvm support: disabled\r\n"

    async def human_answer(self, line: str) -> str:
        self.lines.append(line.partition("qsnap-none-")[0].strip())
        if line == "info kvm":
            return self.kvm
        if line == "cont":
            self.state = self.stops or RunState.RUNNING
        elif self.state is RunState.RUNNING:
            self.state = RunState.PAUSED if line == "stop" else RunState.RESTORE_VM
        return ""


LOOK, DROP, LEAVE = ["info kvm"], ["cont", "loadvm"], ["cont", "stop"]
ON, OFF = ["one-insn-per-tb on"], ["one-insn-per-tb off"]


@pytest.mark.no_qemu
@pytest.mark.parametrize(
    ("how", "runs", "lines"),
    [
        ({"version": QemuVersion(10, 0, 99)}, True, []),
        ({"version": QemuVersion(10, 0, 99), "state": RunState.GUEST_PANICKED}, False, LEAVE),
        ({"version": QemuVersion(10, 1, 0)}, True, [*LOOK, *DROP]),
        ({}, False, [*LOOK, *ON, *DROP, *LEAVE, *OFF]),
        ({"kvm": "kvm support: enabled\r\n"}, True, LOOK),
        ({"kvm": "kvm support: enabled\r\n", "state": RunState.IO_ERROR}, False, [*LOOK, *LEAVE]),
        ({"kvm": "of another QEMU"}, True, [*LOOK, *DROP]),
    ],
)
async def test_what_it_takes_to_drop_translated_code(how: dict[str, Any], runs: bool, lines: list[str]) -> None:
    """QEMU is never asked how much there is: it may not survive that question."""
    monitor = Translating(**{"state": RunState.PAUSED, **how})
    await translation.flush_translations(monitor, runs=runs)
    assert monitor.lines == lines
    assert monitor.state is (RunState.RESTORE_VM if lines[-2:] == DROP else RunState.PAUSED)


@pytest.mark.no_qemu
async def test_translated_code_that_stays_refuses_the_load() -> None:
    """As of a guest that panics at once: the run state tells that QEMU had nothing to stop."""
    monitor = Translating(state=RunState.PAUSED, stops=RunState.GUEST_PANICKED)
    for runs in True, False:
        monitor.lines.clear()
        with pytest.raises(JobFailed, match="QEMU keeps code that it has translated"):
            await translation.flush_translations(monitor, runs=runs)
        assert monitor.lines == [*LOOK, *DROP] if runs else [*LOOK, *ON, *DROP, *OFF]


@pytest.mark.no_qemu
@pytest.mark.parametrize("was_running", [True, False])
async def test_what_ends_a_flush(was_running: bool) -> None:
    monitor = Translating(state=RunState.RESTORE_VM)
    await translation.end_flush(monitor, was_running=was_running)
    assert monitor.lines == [*OFF, *([] if was_running else LEAVE)]
    monitor = Translating(state=RunState.PAUSED, version=QemuVersion(10, 0, 99))
    await translation.end_flush(monitor, was_running=was_running)
    assert monitor.lines == []


@pytest.mark.no_qemu
@pytest.mark.parametrize("runstate", RunState)
async def test_what_is_made_a_pause(runstate: RunState) -> None:
    """A guest that a load has left in "restore-vm", or running; one that has stopped by itself, and may go on."""
    left = RunState.RESTORE_VM, RunState.RUNNING, RunState.SUSPENDED
    own = RunState.GUEST_PANICKED, RunState.IO_ERROR, RunState.WATCHDOG
    for leave, those in (translation.leave_restore_vm, left), (translation._leave_own_stop, own):
        monitor = Translating(state=runstate)
        await leave(monitor)
        assert monitor.lines == (LEAVE if runstate in those else [])
        assert monitor.state is (RunState.PAUSED if runstate in those else runstate)
