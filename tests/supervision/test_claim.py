"""One qsnap at a time on a VM, by whatever monitor and name it is reached."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import qsnap
from qsnap.errors import CommandFailed, MonitorBusy, MonitorLost, NotSupported, PrecheckRefused, QsnapError, VMLocked
from qsnap.host.processes import Process, is_alive, is_stopped, process, this_process
from qsnap.model.qemu import RunState
from qsnap.model.requests import SaveRequest
from qsnap.model.results import Recovered, SaveResult
from qsnap.monitor.address import TcpAddress, UnixAddress
from qsnap.monitor.connection import AnotherAnswers
from qsnap.monitor.names import RECOVERY
from qsnap.operations.save import do_savevm
from qsnap.runs import mark
from qsnap.runs.journal import Journal, found, new_record
from qsnap.runs.record import LiveWork, Record, SaveWork
from qsnap.runs.run import Run
from qsnap.supervision import claim, recovery
from support.busy import big_guest, in_the_write
from support.fake_monitor import FakeMonitor
from support.guest import (
    Guest,
    Launch,
    assert_nothing_left,
    blockdev,
    both_monitors,
    cli,
    deliver,
    disk_device,
    finish,
    make_boot_disk,
    open_files,
    start_cli,
    tags,
    until,
    waits,
)
from support.killed import CLAIM, assert_all_is_well, guards, journals, kill_guard, set_claim, wait_for_the_guard
from support.killed import marks as marks_of
from support.proxy import Intercept, Proxy, deed


@pytest.fixture
def busy(launch: Launch, tmp_path: Path) -> Iterator[tuple[Guest, Path, subprocess.Popen[str]]]:
    """A guest that a qsnap is saving, held still in the middle of it; it goes on when the test ends."""
    guest, image = big_guest(launch, tmp_path)
    process = start_cli("save", "--no-prepare", "first", monitor=guest.address)
    with in_the_write(guest, image):
        yield guest, image, process
    assert finish(process).code == 0
    assert_nothing_left(guest, {image: ["first"]})


@both_monitors
@pytest.mark.parametrize("verb", [("save", "x"), ("load", "x"), ("delete", "x"), ("list",), ("recover",)])
def test_the_second_is_refused_and_told_who_is_first(
    busy: tuple[Guest, Path, subprocess.Popen[str]], verb: tuple[str, ...]
) -> None:
    guest, _, first = busy
    error = cli(*verb, "--lock-wait", "0", "--json", monitor=guest.address, expect=11).error
    assert (error["error"], error["holder_pid"]) == ("VMLocked", first.pid)
    assert "save 'first' since" in error["holder"]


def test_other_names_of_the_socket_are_the_same_vm(
    busy: tuple[Guest, Path, subprocess.Popen[str]], tmp_path: Path
) -> None:
    guest, _, _ = busy
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(guest.address)
    os.link(guest.address, hard)
    for name in (str(link), f"unix:{hard}", f"{guest.directory}/../{guest.directory.name}/qmp"):
        cli("save", "x", "--lock-wait", "0", monitor=name, expect=11)


@both_monitors
def test_the_second_by_another_monitor_of_the_same_vm(guest: Guest, tmp_path: Path) -> None:
    """QEMU has the claim. (While it writes it answers nobody, so the first is held between two commands.)"""
    mine = mark.holder(_record(), None, was_running=True).encode()
    guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=mine)
    error = cli("save", "x", "--lock-wait", "0.3", "--json", monitor=guest.address, expect=11).error
    assert error["holder_pid"] == os.getpid()
    assert "after 0.3 s of waiting" in error["message"]
    status = cli("status", "--json", monitor=guest.address).json["run"]
    assert (status["pid"], status["is_alive"]) == (os.getpid(), True)
    assert "in use by:" in cli("status", monitor=guest.address).out
    assert cli("list", monitor=guest.address).code == 0, "who only looks is not kept waiting"
    guest.qmp("object-del", id=CLAIM)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": []})


def _record(**changes: object) -> Record:
    record = new_record("save", ("theirs",), FakeMonitor(TcpAddress("localhost", 1)))
    return msgspec.structs.replace(record, **changes)


def test_the_second_by_another_monitor_while_qemu_answers_nobody(
    busy: tuple[Guest, Path, subprocess.Popen[str]],
) -> None:
    guest, _, first = busy
    for address in (guest.hmp_address, str(guest.directory / "test")):
        error = cli("save", "x", "--lock-wait", "0", "--json", monitor=address, expect=11).error
        assert error["holder_pid"] == first.pid


def test_a_holder_that_is_stopped_itself(launch: Launch, tmp_path: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    first = start_cli("save", "--no-prepare", "first", monitor=guest.address)
    with in_the_write(guest, image):
        first.send_signal(signal.SIGSTOP)
        run = cli("save", "x", "--lock-wait", "0", monitor=guest.address, expect=11)
        assert f"kill -CONT {first.pid}" in run.err
        first.send_signal(signal.SIGCONT)
    assert finish(first).code == 0


async def test_a_qemu_that_ends_as_a_run_begins(
    guest: Guest, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that does not say of which QEMU it is would stay for ever."""
    async with qsnap.connect(guest.address) as vm:
        answer = vm._monitor.runstate

        async def last_answer() -> RunState:
            state = await answer()
            guest.process.kill()
            until("QEMU to be gone", lambda: not is_alive(guest.pid))
            return state

        monkeypatch.setattr(vm._monitor, "runstate", last_answer)
        with pytest.raises(MonitorLost, match="QEMU has ended"):
            await vm.save("t")
    assert journals(runtime_directory) == []


def test_of_two_who_come_upon_a_dead_claim_one_recovers(guest: Guest) -> None:
    """Without the journal it is the mark of the recovery that keeps them apart."""
    dead = Process(pid=os.getpid(), start=1)
    set_claim(guest, mark.holder(_record(owner=dead), None, was_running=True))
    guest.qmp("stop")
    alive = mark.of_this_process("recover", "").encode()
    guest.qmp("object-add", qom_type="authz-simple", id=RECOVERY, identity=alive)
    cli("save", "x", "--lock-wait", "0.3", monitor=guest.address, expect=11)
    assert guest.runstate == "paused"
    guest.qmp("object-del", id=RECOVERY)
    gone = mark.holder(_record(owner=dead), None, was_running=False).encode()
    guest.qmp("object-add", qom_type="authz-simple", id=RECOVERY, identity=gone)
    cli("save", "x", monitor=guest.address)
    guest.assert_running()
    assert marks_of(guest) == []


def test_nobody_gives_up_the_claim_of_another(guest: Guest, intercept: Intercept) -> None:
    """Whoever took it by force, as by recover --force, keeps it."""
    theirs = mark.holder(_record(), None, was_running=True).encode()

    def usurp(message: dict[str, Any]) -> None:
        if deed(message) == "cont":
            guest.qmp("object-del", id=CLAIM)
            guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=theirs)

    cli("save", "x", monitor=intercept(guest, on_command=usurp).address)
    assert guest.qmp("qom-get", path=f"/objects/{CLAIM}", property="identity") == theirs


def test_the_claim_of_a_dead_process_does_not_block(guest: Guest) -> None:
    """Its number may be another's by now: the time of its start tells."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for owner in (Process(pid=ended.pid, start=1), Process(pid=os.getpid(), start=1)):
        set_claim(guest, mark.holder(_record(owner=owner), None, was_running=True))
        guest.qmp("stop")
        run = cli("save", "x", "--lock-wait", "0", monitor=guest.address)
        assert "cleaned up after a qsnap that died (save theirs" in run.err
        guest.assert_running()
        assert marks_of(guest) == []


def test_a_living_guard_is_a_living_holder(guest: Guest) -> None:
    """On this machine that can be told, so nobody can force it; the guest is as the holder has left it."""
    dead = Process(pid=os.getpid(), start=1)
    set_claim(guest, mark.holder(_record(owner=dead), this_process(), was_running=True))
    guest.qmp("stop")
    for verb in (("save", "x"), ("recover", "--force")):
        cli(*verb, "--lock-wait", "0", monitor=guest.address, expect=11)
    assert (guest.runstate, marks_of(guest)) == ("paused", [CLAIM])


def test_a_holder_on_another_machine(guest: Guest, tmp_path: Path) -> None:
    """Whether it lives cannot be told, even if its number is nobody's here; only a person can say so."""
    not_here = Process(pid=os.getpid(), start=1)
    holder = msgspec.structs.replace(
        mark.holder(_record(owner=not_here), None, was_running=True), machine="another boot", host="far\x1b[1maway"
    )
    set_claim(guest, holder)
    guest.qmp("stop")
    run = cli("save", "x", "--lock-wait", "0", monitor=guest.address, expect=11)
    assert "on far\\x1b[1maway" in run.err
    assert "qsnap recover --force" in run.err
    cli("recover", "--lock-wait", "0", monitor=guest.address, expect=11)
    assert guest.runstate == "paused"
    assert cli("status", "--json", monitor=guest.address).json["run"]["is_alive"] is None
    assert "may be dead" in cli("status", monitor=guest.address).out
    cli("recover", "--force", monitor=guest.address)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": []})
    cli("save", "x", monitor=guest.address)


@both_monitors
@pytest.mark.parametrize(
    "damage",
    [{"qom_type": "authz-simple", "identity": "garbage"}, {"qom_type": "rng-builtin"}],
    ids=["garbage", "no mark"],
)
def test_a_claim_that_cannot_be_read(guest: Guest, tmp_path: Path, damage: dict[str, str]) -> None:
    """As of a later qsnap: it is respected, and the message names the way out. No guest is resumed blindly."""
    Journal.create(_record()).close(remove=False)  # of another VM
    guest.qmp("object-add", id=CLAIM, **damage)
    guest.qmp("object-add", id=RECOVERY, **damage)
    guest.qmp("stop")
    for verb in (("save", "x"), ("recover",)):
        run = cli(*verb, "--lock-wait", "0", monitor=guest.address, expect=11)
        assert "of another version, or damaged" in run.err
        assert "qsnap recover --force" in run.err
    assert "qsnap recover --force" in cli("status", monitor=guest.address).out
    cli("recover", "--force", monitor=guest.address, expect=11)
    run = cli("recover", "--force", monitor=guest.address)
    assert "the guest was left as it is, paused: nothing tells what stopped it" in run.out
    assert marks_of(guest) == []
    guest.qmp("cont")
    cli("save", "x", monitor=guest.address)
    assert_nothing_left(guest, {tmp_path / "disk0.qcow2": ["x"]})


@both_monitors
def test_the_second_waits_for_its_turn(launch: Launch, tmp_path: Path, runtime_directory: Path) -> None:
    guest, image = big_guest(launch, tmp_path)
    first = start_cli("save", "--no-prepare", "first", monitor=guest.address)
    with in_the_write(guest, image):
        second = start_cli("save", "second", "--lock-wait", "100", monitor=guest.address)
    assert (finish(first).code, finish(second).code) == (0, 0)
    assert_nothing_left(guest, {image: ["first", "second"]})
    assert journals(runtime_directory) == []


@pytest.mark.parametrize(
    ("option", "verb", "way"),
    [("-qmp", "save", "tcp"), ("-qmp", "save", "proxy"), ("-monitor", "save", "tcp"), ("-qmp", "load", "tcp")],
)
def test_another_qemu_in_the_place_of_the_first(
    launch: Launch, tmp_path: Path, runtime_directory: Path, option: str, verb: str, way: str
) -> None:
    """No process of QEMU's can be seen there. It is sent nothing but the question whether it is the same."""
    monitor = (option, f"unix:{tmp_path}/mon,server=on,wait=off")
    first = launch(*blockdev("a", make_boot_disk(tmp_path / "a")), *disk_device("a"), *monitor)
    first.wait_for_ticks()
    cli("save", "old", monitor=first.address)

    def replace(message: dict[str, Any]) -> None:
        if deed(message) == f"snapshot-{verb}" and not second:
            first.process.kill()
            first.process.wait(30)
            second.append(launch("-S", *monitor))

    second: list[Guest] = []
    proxy = Proxy(f"{tmp_path}/mon", None if way == "tcp" else tmp_path / "proxy", on_command=replace)
    try:
        run = cli(verb, "old", "--json", monitor=proxy.address, expect=None)
    finally:
        proxy.close()
    assert (run.code, run.error["error"]) == (4, "MonitorLost"), run.err
    assert "QEMU has ended" in run.error["message"]
    wait_for_the_guard(runtime_directory)
    (other,) = second
    assert (other.runstate, marks_of(other)) == ("prelaunch", [])
    sent = proxy.commands[proxy.commands.index(f"snapshot-{verb}") + 1 :]
    assert set(sent) <= {"qmp_capabilities", "qom-list", "qom-get", "hmp"}, sent


def test_a_journal_that_is_just_being_made_is_left_alone(runtime_directory: Path) -> None:
    """It is not locked yet: who looks then must not take it for one of a run that died. That is removed."""
    runtime_directory.mkdir(mode=0o700, exist_ok=True)
    beginning = runtime_directory / f"{'a' * 16}.beginning"
    beginning.touch()
    assert list(found()) == []
    assert beginning.exists()
    os.utime(beginning, (0, 0))
    assert list(found()) == []
    assert not beginning.exists()


def test_a_journal_that_is_held_is_not_removed(runtime_directory: Path) -> None:
    """Not even if its QEMU has ended: its run, or its guard, is about to say so."""
    ended = Process(pid=os.getpid(), start=1)
    ours = Journal.create(_record(qemu=ended))
    assert [other.is_held for other in found()] == [True]
    assert len(journals(runtime_directory)) == 1
    ours.close(remove=False)
    assert (list(found()), journals(runtime_directory)) == ([], [])


def test_a_journal_that_finds_no_room_leaves_nothing(runtime_directory: Path) -> None:
    """Not even its name: it would be taken for that of a run which died before it wrote down what it does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    files = open_files()
    try:
        with pytest.raises(QsnapError, match="cannot be written: File too large; nothing was done"):
            Journal.create(_record())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(runtime_directory.iterdir()) == []
    assert open_files() == files


def test_looking_at_journals_leaves_none_open(runtime_directory: Path) -> None:
    for _ in range(3):
        Journal.create(_record()).close(remove=False)
    before = open_files()
    assert len(list(found())) == 3
    assert open_files() == before


def test_of_two_who_take_one_journal_one_gets_it(monkeypatch: pytest.MonkeyPatch, runtime_directory: Path) -> None:
    """The other has opened it, and before he locks it all is done and it is gone."""
    Journal.create(_record()).close(remove=False)
    (dead,) = found()
    lock = fcntl.flock

    def after_the_other(file: int, how: int) -> None:
        monkeypatch.undo()
        other = dead.take()
        assert other is not None
        other.close(remove=True)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    assert dead.take() is None


@both_monitors
def test_many_at_once_never_interleave(guest: Guest, tmp_path: Path, runtime_directory: Path, transport: str) -> None:
    """By all monitors, saving and replacing under two names and deleting; whatever the order, all is whole."""
    addresses = [guest.qmp_address, guest.hmp_address]
    running = [
        start_cli(verb, tag, "--lock-wait", "100", *more, monitor=addresses[number % 2])
        for number in range(3)
        for verb, tag, *more in (("save", "a"), ("delete", "a", "--missing-ok"), ("save", "b"))
    ]
    runs = [finish(process, 110) for process in running]
    assert [(run.code, run.err) for run in runs if run.code] == []
    wait_for_the_guard(runtime_directory)
    for snapshot in cli("list", "--json", monitor=guest.address).json["snapshots"]:
        assert (snapshot["kind"], snapshot["problems"]) == ("full", [])
        cli("load", snapshot["tag"], monitor=guest.address)
    held = sorted(tags(tmp_path / "disk0.qcow2"))
    assert held in (["a", "b"], ["b"])
    assert sorted(tags(tmp_path / "disk1.qcow2")) == held
    guest.assert_running()


async def test_calls_on_one_object_and_on_two_take_stop_resume_events(guest: Guest, tmp_path: Path) -> None:
    async with (
        qsnap.connect(guest.address, lock_wait_s=30) as vm,
        qsnap.connect(guest.hmp_address, lock_wait_s=30) as other,
    ):
        results = await asyncio.gather(vm.save("a"), vm.save("b"), other.save("c"), vm.delete("d", missing_ok=True))
    assert [result.tag for result in results if isinstance(result, SaveResult)] == ["a", "b", "c"]
    assert sorted(tags(tmp_path / "disk0.qcow2")) == ["a", "b", "c"]
    guest.assert_running()


async def test_a_library_that_is_refused_can_go_on(guest: Guest) -> None:
    mine = mark.holder(_record(), None, was_running=True).encode()
    async with qsnap.connect(guest.address, lock_wait_s=0.3) as vm:
        guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=mine)
        with pytest.raises(VMLocked):
            await vm.save("a")
        guest.qmp("object-del", id=CLAIM)
        await vm.save("a")
        assert [snapshot.tag for snapshot in await vm.list()] == ["a"]


async def test_a_library_that_is_refused_by_a_busy_monitor_can_go_on(guest: Guest) -> None:
    """While it waits it lets go of the monitor, and somebody else is next: it makes a new connection later."""
    mine = mark.holder(_record(), None, was_running=True).encode()
    async with qsnap.connect(guest.address, lock_wait_s=0.3) as vm:
        guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=mine)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(guest.address)
            with pytest.raises(VMLocked):
                await vm.save("a")
        guest.qmp("object-del", id=CLAIM)
        await vm.save("a")
        assert [snapshot.tag for snapshot in await vm.list()] == ["a"]


def test_an_interrupt_while_waiting(busy: tuple[Guest, Path, subprocess.Popen[str]]) -> None:
    guest, _, _ = busy
    tell = {"PYTHONPROFILEIMPORTTIME": "1"}
    waiting = start_cli("save", "x", "--lock-wait", "1000", monitor=guest.address, env=tell)
    assert waiting.stderr is not None
    # Python tells of each import when it is done; this one comes when it looks who is there, and then it waits
    for line in waiting.stderr:
        if line.rpartition("|")[2].strip() == "qsnap.supervision.claim":
            break
    until("it to wait", lambda: waits(waiting.pid))
    waiting.send_signal(signal.SIGTERM)
    assert finish(waiting).code == 143


@both_monitors
def test_an_interrupt_while_the_claim_is_made(
    guest: Guest, intercept: Intercept, tmp_path: Path, runtime_directory: Path, transport: str
) -> None:
    """QEMU has taken it, and its answer is held until the signal was taken too: it is given back."""
    seen = threading.Event()

    def interrupt(data: bytes) -> bytes:
        if not seen.is_set() and marks_of(guest):
            seen.set()
            deliver(saving, signal.SIGTERM)
        return data

    saving = start_cli("save", "t", monitor=intercept(guest, on_data=interrupt).address)
    assert finish(saving).code == 143
    assert seen.is_set()
    assert_all_is_well(guest, runtime_directory, {tmp_path / "disk0.qcow2": []})


async def test_a_journal_that_cannot_be_written() -> None:
    """Nothing is done that it could not tell of."""
    monitor = FakeMonitor()
    with pytest.raises(QsnapError, match="cannot be written: No space left on device"):
        await do_savevm(
            Run(monitor, journal=Journal(_record(), os.open("/dev/full", os.O_WRONLY))), SaveRequest(tag="t")
        )
    assert monitor.calls == []


async def test_a_journal_that_can_be_written_no_more() -> None:
    """In the middle of a save: the guest runs, nothing half made is left."""
    monitor = FakeMonitor()

    class Full(Journal):
        def note(self, **facts: Any) -> None:
            if isinstance(work := facts.get("work"), SaveWork) and work.saving:
                raise QsnapError("the journal cannot be written: No space left on device")
            super().note(**facts)

    await do_savevm(Run(monitor), SaveRequest(tag="t"))
    with pytest.raises(QsnapError, match="had already been deleted; the guest is running"):
        await do_savevm(Run(monitor, journal=Full()), SaveRequest(tag="t"))
    assert monitor.state == "running"


class Claimed(FakeMonitor):
    """Each time another QEMU answers."""

    def __init__(self, text: str) -> None:
        super().__init__(texts={CLAIM: text})
        self.is_closed = asyncio.Event()

    async def aclose(self) -> None:
        self.is_closed.set()

    async def reconnect(self, timeout_s: float) -> None:
        self.pid = (self.pid or 0) + 1


async def _claim_of(monitor: FakeMonitor, wait_s: float) -> None:
    async with claim.claimed(monitor, "save", ("t",), wait_s=wait_s, tell=lambda _: None):
        pass


async def test_who_waits_does_not_keep_the_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder, or its guard, may need just that one."""
    monkeypatch.setattr(claim, "_LOOK_S", 1000)
    monitor = Claimed(mark.holder(_record(), None, was_running=True).encode())
    waiting = asyncio.create_task(_claim_of(monitor, 2000))
    async with asyncio.timeout(10):
        await monitor.is_closed.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_another_qemu_comes_while_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_LOOK_S", 0)
    with pytest.raises(AnotherAnswers):
        await _claim_of(Claimed(mark.holder(_record(), None, was_running=True).encode()), 10)


async def test_who_does_not_wait_is_refused_at_once() -> None:
    monitor = Claimed(mark.holder(_record(), None, was_running=True).encode())
    with pytest.raises(VMLocked, match="save 'theirs' since") as refused:
        await _claim_of(monitor, 0)
    assert refused.value.pid == os.getpid()
    assert monitor.pid == 1, "what an earlier refusal has closed is opened once more"


async def test_somebody_else_is_next_while_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_LOOK_S", 0)

    class Busy(Claimed):
        async def mark(self, name: str) -> str | None:
            if self.is_closed.is_set():
                raise MonitorLost("it is closed")
            return await super().mark(name)

        async def reconnect(self, timeout_s: float) -> None:
            if self.is_closed.is_set():
                raise MonitorBusy("no greeting", "another client")

    with pytest.raises(VMLocked, match="save 'theirs' since"):
        await _claim_of(Busy(mark.holder(_record(), None, was_running=True).encode()), 10)


async def test_what_was_done_about_a_dead_run_is_told() -> None:
    dead = _record(owner=Process(pid=os.getpid(), start=1))
    monitor = FakeMonitor(state=RunState.PAUSED, texts={CLAIM: mark.holder(dead, None, was_running=True).encode()})
    told: list[Recovered] = []
    async with claim.claimed(monitor, "save", ("t",), wait_s=0, patience_s=7, tell=told.append) as ours:
        assert ours.patience_s == 7
        holder = mark.decode(monitor.texts[CLAIM])
        assert holder is not None
        assert (holder.token, holder.is_alive) == (ours.record.token, True)
    assert [(one.tags, one.actions) for one in told] == [(("theirs",), ("the guest was resumed",))]
    assert (monitor.state, monitor.texts) == (RunState.RUNNING, {})


class Refusing(FakeMonitor):
    """QEMU does not set the mark."""

    refusal: BaseException | None = None
    is_closed = False

    async def aclose(self) -> None:
        self.is_closed = True

    async def set_mark(self, name: str, text: str) -> bool:
        if self.refusal:
            raise self.refusal
        return False


async def test_a_claim_that_is_not_made_leaves_nothing(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a guard nor a journal, whatever was in the way."""
    monitor = Refusing()
    assert await claim._claim(monitor, "save", ("t",)) is None
    assert (guards(runtime_directory), journals(runtime_directory)) == ([], [])
    refused = CommandFailed("object-add", "The command is permitted only after machine initialization has completed")
    for refusal, raised in ((refused, PrecheckRefused), (NotSupported("no objects"), NotSupported)):
        monitor.refusal = refusal
        with pytest.raises(raised):
            await claim._claim(monitor, "save", ("t",))
        assert (guards(runtime_directory), journals(runtime_directory)) == ([], [])
    monitor.pid = os.getpid()
    with pytest.raises(NotSupported):
        await claim._claim(monitor, "save", ("t",))
    monitor.pid = 1 << 30  # above all that there can be
    with pytest.raises(MonitorLost, match="QEMU has ended; nothing was done"):
        await claim._claim(monitor, "save", ("t",))
    monitor.pid = None
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(QsnapError, match="no guard can be started: No such file or directory; nothing was done"):
        await claim._claim(monitor, "save", ("t",))
    assert journals(runtime_directory) == []


@pytest.fixture
def silent() -> Iterator[UnixAddress]:
    """The address of a monitor that greets nobody: a guard waits for it as long as it may live."""
    with tempfile.TemporaryDirectory(prefix="qs-") as directory, socket.socket(socket.AF_UNIX) as one:
        one.bind(f"{directory}/monitor")
        one.listen()
        yield UnixAddress(one.getsockname())


async def test_a_claim_that_may_have_been_made_is_left_to_the_guard(
    runtime_directory: Path, silent: UnixAddress
) -> None:
    """It goes to work, and has the journal for itself."""
    monitor = Refusing(silent)
    monitor.refusal = MonitorLost("the monitor was lost")
    with pytest.raises(MonitorLost):
        await claim._claim(monitor, "save", ("t",))
    assert monitor.is_closed, "two processes cannot use one connection"
    (pid,) = guards(runtime_directory)
    memory = Path(f"/proc/{pid}/maps")
    until("the guard to go to work", lambda: "msgspec" in memory.read_text())
    assert [one.is_held for one in found()] == [True]
    kill_guard(runtime_directory)
    (one,) = found()
    assert not one.is_held


@pytest.mark.parametrize("left", ["stopped", "live", "nothing"])
async def test_what_a_run_leaves_is_its_guard_s_to_do(
    runtime_directory: Path, silent: UnixAddress, tmp_path: Path, left: str
) -> None:
    """As long as it works, the claim is kept."""
    work = LiveWork("t", "disk0", (), (), (), str(tmp_path / "path"), str(tmp_path / "part"))
    facts: dict[str, Any] = {"stopped": left == "stopped", "work": work if left == "live" else None}
    monitor = FakeMonitor(silent)
    with pytest.raises(QsnapError, match="it failed"):
        async with claim.claimed(monitor, "save", ("t",), wait_s=0, tell=lambda _: None) as ours:
            ours.note(**facts)
            raise QsnapError("it failed")
    is_left = any(facts.values())
    assert (list(monitor.texts), len(guards(runtime_directory))) == (([CLAIM], 1) if is_left else ([], 0))
    if is_left:
        kill_guard(runtime_directory)


async def test_a_claim_that_qemu_does_not_take_back_is_left_to_the_guard(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is done, although QEMU, which is still there, does not answer any more."""
    monkeypatch.setattr(claim, "_RELEASE_TIMEOUT_S", 0.1)

    class Silent(FakeMonitor):
        async def clear_mark(self, name: str) -> None:
            await asyncio.Event().wait()

    monitor = Silent(pid=os.getpid())
    await _claim_of(monitor, 0)
    assert (list(monitor.texts), len(guards(runtime_directory))) == ([CLAIM], 1)
    kill_guard(runtime_directory)


async def test_what_is_done_is_written_down_before_the_claim_is_given_back() -> None:
    """Whoever should have to give it back looks for nothing that is half done."""
    seen: list[bool] = []

    class Looking(FakeMonitor):
        async def clear_mark(self, name: str) -> None:
            seen.extend(one.record.is_done for one in found())
            await super().clear_mark(name)

    monitor = Looking()
    await _claim_of(monitor, 0)
    assert (seen, monitor.texts, list(found())) == ([True], {}, [])


def test_what_is_said_of_a_holder() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        owner = process(child.pid)
        assert owner is not None
        here = mark.holder(_record(owner=owner), None, was_running=True)
        far = msgspec.structs.replace(here, machine="another boot", host="far")
        working = claim._locked(here, 0)
        child.send_signal(signal.SIGSTOP)
        until("it to be stopped", lambda: is_stopped(child.pid))
        stopped, not_here, unknown = (claim._locked(holder, 0) for holder in (here, far, None))
    finally:
        child.kill()
        child.wait()
    assert f"process {child.pid} (user " in str(working)
    assert "kill" not in str(working)
    assert f"kill -CONT {child.pid}" in str(stopped)
    assert f"process {child.pid} on far (user " in str(not_here)
    assert "qsnap recover --force" in str(not_here)
    assert "kill" not in str(not_here)
    assert "of another version, or damaged" in str(unknown)
    pids = [error.pid for error in (working, stopped, not_here, unknown)]
    assert pids == [child.pid, child.pid, None, None]


async def test_the_journal_tells_whether_a_run_lives() -> None:
    """Its process goes on, as a library's does that has lost its monitor, and its guard was killed."""
    record, other = _record(), _record()
    monitor = FakeMonitor(texts={CLAIM: mark.holder(record, None, was_running=True).encode()})
    others = Journal.create(other)
    run = await claim.run_of(monitor)
    assert run is not None
    assert run.is_alive, "there is no journal of it: its process tells"
    ours = Journal.create(record)
    ours.close(remove=False)
    run = await claim.run_of(monitor)
    assert run is not None
    assert (run.is_alive, run.operation, run.tags, run.pid) == (False, "save", ("theirs",), os.getpid())
    others.close(remove=True)
    gone = Process(pid=os.getpid(), start=1)
    far = msgspec.structs.replace(mark.holder(_record(owner=gone), None, was_running=True), machine="another boot")
    run = await claim.run_of(FakeMonitor(texts={CLAIM: far.encode()}))
    assert run is not None
    assert run.is_alive is None


def test_whose_journals_there_are() -> None:
    """A run is known by its monitor's socket, or by its QEMU, where that can be seen."""

    def known(monitor: FakeMonitor) -> list[str]:
        return [one.record.token for one in claim._journals(monitor)]

    tcp = Journal.create(_record())
    assert known(FakeMonitor(TcpAddress("127.0.0.1", 1)))
    assert not known(FakeMonitor(TcpAddress("127.0.0.1", 2)))
    assert not known(FakeMonitor(TcpAddress("127.0.0.1", 2), pid=os.getpid()))
    seen = Journal.create(msgspec.structs.replace(_record(), qemu=this_process()))
    assert known(FakeMonitor(TcpAddress("127.0.0.1", 2), pid=os.getpid()))
    assert not known(FakeMonitor(TcpAddress("127.0.0.1", 2), pid=os.getppid()))
    assert not known(FakeMonitor(TcpAddress("127.0.0.1", 2)))
    for ours in (tcp, seen):
        ours.close(remove=True)


async def test_who_waits_for_a_run_goes_on_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_LOOK_S", 0)
    ours = Journal.create(_record())

    async def end() -> None:
        ours.close(remove=True)

    ending = asyncio.create_task(end())
    assert await claim.wait_for_monitor(TcpAddress("localhost", 1), asyncio.get_running_loop().time() + 10, 10)
    await ending


async def test_journals_without_a_mark() -> None:
    """One is of a run that has just begun; the others are of dead ones, of which nothing is left to do."""
    record = msgspec.structs.replace(_record(), owner=Process(pid=os.getpid(), start=1))
    living = Journal.create(_record())
    for name in "ab":
        Journal.create(msgspec.structs.replace(record, token=name * 16)).close(remove=False)
    assert await claim.recover_all(FakeMonitor(TcpAddress("localhost", 1))) == []
    assert [one.record.token for one in found()] == [living.record.token]
    living.close(remove=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("who", "may_be"), [("dead", True), ("living", False), ("far", None), ("unknown", None)], ids=str
)
async def test_whose_claim_is_taken(runtime_directory: Path, who: str, may_be: bool | None, force: bool) -> None:
    """That of a dead run; with force that of one of which nothing is known. The journal of another VM stays."""
    gone = Process(pid=os.getpid(), start=1)
    theirs = Journal.create(_record(owner=gone, stopped=True))
    theirs.close(remove=False)
    holder = mark.holder(_record(owner=this_process() if who == "living" else gone), None, was_running=True)
    if who == "far":
        holder = msgspec.structs.replace(holder, machine="another boot")
    text = "garbage" if who == "unknown" else holder.encode()
    monitor = FakeMonitor(state=RunState.PAUSED, texts={CLAIM: text})
    if may_be or (may_be is None and force):
        (recovered,) = await claim.recover_all(monitor, force=force)
        assert len(recovered.actions) == 1
        assert (monitor.texts, monitor.calls) == ({}, [] if who == "unknown" else ["cont"])
    else:
        with pytest.raises(VMLocked):
            await claim.recover_all(monitor, force=force)
        assert (monitor.texts, monitor.calls) == ({CLAIM: text}, [])
    assert journals(runtime_directory) == [theirs.path]


async def test_a_run_that_cannot_be_recovered_now_can_be_later() -> None:
    """Nobody holds its journal."""
    record = msgspec.structs.replace(_record(), owner=Process(pid=os.getpid(), start=1), settings={"max-bandwidth": 1})
    Journal.create(record).close(remove=False)
    monitor = FakeMonitor(
        TcpAddress("localhost", 1), texts={CLAIM: mark.holder(record, None, was_running=True).encode()}
    )
    with pytest.raises(NotSupported):
        await claim.recover_all(monitor)
    assert [one.is_held for one in found()] == [False]


async def test_whose_monitor_it_is(launch: Launch, tmp_path: Path) -> None:
    """A run is seen by its socket and by its QEMU; that of another VM is nobody's business."""
    first, second = launch(memory="16"), launch(memory="16")

    async def waits_for(record: Record, address: str | TcpAddress) -> bool:
        where = UnixAddress(address) if isinstance(address, str) else address
        ours = Journal.create(msgspec.structs.replace(record, token=os.urandom(8).hex()))
        try:
            assert await claim.wait_for_monitor(where, 0, 0) is False
        except VMLocked as locked:
            return locked.pid == os.getpid()
        finally:
            ours.close(remove=True)
        return False

    run = new_record("save", ("t",), FakeMonitor(UnixAddress(first.qmp_address), pid=first.pid))
    assert await waits_for(run, first.qmp_address)
    assert await waits_for(run, first.hmp_address)
    assert not await waits_for(run, second.qmp_address)
    assert not await waits_for(run, str(tmp_path / "none"))
    away = msgspec.structs.replace(run, socket=(), qemu=None)
    assert not await waits_for(away, first.qmp_address)
    assert not await waits_for(away, str(tmp_path / "none"))
    assert not await waits_for(_record(), first.qmp_address)
    assert await waits_for(_record(), TcpAddress("127.0.0.1", 1))
    with socket.socket(socket.AF_UNIX) as proxy:
        proxy.bind(str(tmp_path / "proxy"))
        proxy.listen()
        proxy.setblocking(False)
        theirs = new_record("save", ("t",), FakeMonitor(UnixAddress(first.qmp_address), pid=os.getpid()))
        assert not await waits_for(theirs, str(tmp_path / "proxy")), "who listens there is no QEMU"
        proxy.accept()[0].close()
        # That costs a connection, and is not asked without need
        assert not await claim.wait_for_monitor(UnixAddress(str(tmp_path / "proxy")), 0, 0)
        here = new_record("save", ("t",), FakeMonitor(UnixAddress(str(tmp_path / "proxy"))))
        assert await waits_for(here, str(tmp_path / "proxy"))
        with pytest.raises(BlockingIOError):
            proxy.accept()


async def test_settings_that_only_qmp_can_put_back_are_not_given_up() -> None:
    """The guest is resumed by any monitor; the claim and the record of the settings stay for QMP."""
    record = msgspec.structs.replace(_record(), owner=this_process(), stopped=True, settings={"max-bandwidth": 1000})
    monitor = FakeMonitor(state=RunState.PAUSED)
    assert await monitor.set_mark(CLAIM, mark.holder(record, None, was_running=True).encode())
    dead = Journal(record)
    with pytest.raises(NotSupported, match="take QMP"):
        await recovery.recover(monitor, dead)
    assert monitor.state == "running"
    assert CLAIM in monitor.texts
    assert dead.record == msgspec.structs.replace(record, stopped=False)


def test_a_wait_that_cannot_be_meant(guest: Guest) -> None:
    cli("save", "x", "--lock-wait", "-1", monitor=guest.address, expect=2)
    cli("save", "x", "--lock-wait", "soon", monitor=guest.address, expect=2)
    cli("save", "x", "--lock-wait", "nan", monitor=guest.address, expect=2)


def test_holders_are_encoded_for_every_monitor() -> None:
    """HMP takes a line of about a thousand characters, and a comma would end the text."""
    holder = mark.holder(_record(tags=("ü,\x1b" * 80, "b" * 255)), this_process(), was_running=True)
    text = holder.encode()
    assert len(text) < 900
    assert text.replace("-", "").replace("_", "").isalnum()
    assert mark.decode(text) == holder
    gone = Process(pid=os.getpid(), start=1)
    lives = [
        msgspec.structs.replace(holder, owner=owner, guard=guard).is_alive
        for owner in (this_process(), gone)
        for guard in (this_process(), gone, None)
    ]
    assert lives == [True, True, True, True, False, False]
    for broken in ("", "!", "e30", "bnVsbA", text[:-9], json.dumps({})):
        assert mark.decode(broken) is None


def test_processes() -> None:
    assert this_process().is_alive
    assert not Process(pid=os.getpid(), start=this_process().start + 1).is_alive
    ended = subprocess.Popen(["true"])
    until("a zombie", lambda: Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert process(ended.pid) is None
    assert not is_alive(ended.pid)
    ended.wait()
    assert not is_alive(ended.pid)
