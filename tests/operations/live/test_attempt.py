"""How a live save is concluded or undone, with a QEMU that is played; and when it is made the ordinary way instead."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import pytest

from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorLost,
    NotSupported,
    PrecheckRefused,
    QsnapError,
    VerifyFailed,
)
from qsnap.host import files
from qsnap.host.processes import Process
from qsnap.inventory.devices import survey
from qsnap.inventory.state_file import Content
from qsnap.model.checks import Severity
from qsnap.model.qemu import NodeSnapshot, RunState
from qsnap.model.requests import SaveRequest
from qsnap.model.results import SaveResult
from qsnap.model.snapshots import Kind
from qsnap.operations.live import choose, save
from qsnap.operations.live.save import LiveSaveAttempt
from qsnap.runs import runtime_dir
from qsnap.runs.journal import Journal
from qsnap.runs.record import LiveWork, Record
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.fake_proc import as_nobody
from support.graphs import graph
from support.state_files import DATE, written

pytestmark = pytest.mark.no_qemu

CLOCK = 7_000_000
SETTINGS = {"background-snapshot": 0}


@dataclass
class Played(FakeMonitor):
    """A guest of which a live save was begun.

    :ivar is_lost: the connection broke; nothing is answered over it.
    :ivar comes_back: a new one can be made.
    :ivar remembers: QEMU does not forget that a migration has failed.
    :ivar refuses: the disks' snapshots cannot be deleted.
    """

    is_lost: bool = False
    comes_back: bool = True
    remembers: bool = False
    refuses: bool = False
    shares: bool = True
    bytes_of_ram: int = 32 << 20
    settings: list[object] = field(default_factory=list)

    @property
    def live(self) -> Any:
        return self

    def _look(self) -> None:
        if self.is_lost:
            raise MonitorLost("the connection broke")

    async def runstate(self) -> RunState:
        self._look()
        return await super().runstate()

    async def reconnect(self, timeout_s: float) -> None:
        self.is_lost = not self.comes_back
        self._look()

    async def memory_size(self) -> int:
        return self.bytes_of_ram

    async def end_stream(self) -> None:
        self._look()
        self.calls.append("end")

    async def forget_failure(self) -> None:
        self.calls.append("forget")
        if self.remembers:
            raise JobFailed("migrate", "QEMU goes on to note that")

    async def tidy(self) -> None:
        self.calls.append("tidy")

    async def put_back(self, settings: object) -> None:
        self.calls.append("put back")
        self.settings.append(settings)

    async def snapshot_delete(self, tag: str, devices: Any) -> None:
        await super().snapshot_delete(tag, devices)
        if self.refuses:
            raise JobFailed("snapshot-delete", "QEMU says why")

    async def writers(self) -> list[str]:
        return []

    async def shares_memory(self) -> bool:
        return self.shares


def row(clock: int = CLOCK, *, tag: str = "t", later_s: int = 0) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=0, date=DATE + timedelta(seconds=later_s), vm_clock_ns=clock)


@pytest.fixture
def monitor() -> Played:
    """Both disks have the new snapshot, and disk1 a second later by its image's clock."""
    return Played(rows={"disk0": [row()], "disk1": [row(later_s=1)]})


class Begun:
    """A live save that was begun, and has a file.

    :ivar part: the file; or *path* when it is complete.
    """

    def __init__(self, monitor: Played, directory: Path) -> None:
        self.monitor = monitor
        self.path, self.part = directory / "vm.t.qsnap", directory / "vm.t.qsnap-part"
        self.part.write_bytes(b"state")
        work = LiveWork(
            disk_tag="t", vmstate="disk1", devices=("disk0", "disk1"), older=(), older_files=(),
            path=str(self.path), part=str(self.part), made=files.identity_of(self.part.stat()),
        )  # fmt: skip
        self.journal = Journal(Record(tags=("t",), work=work, settings=SETTINGS))

    def complete(self, *, tag: str = "t", clock: int = CLOCK) -> None:
        self.part.unlink(missing_ok=True)
        written(self.path, Content(tag, "/vm", 9, DATE, clock))

    def works_on(self, **facts: Any) -> None:
        self.journal.advance(**facts)

    async def attempt(self, file: int | None = None) -> LiveSaveAttempt:
        devices = survey(await self.monitor.block_graph()).devices
        return LiveSaveAttempt(self.monitor, self.journal, devices, file)

    async def is_complete(self) -> bool:
        return (await self.attempt())._is_complete(await self.monitor.block_graph())

    @property
    def left(self) -> list[str]:
        """The tags on the disks and the files."""
        tags = [one.tag for rows in self.monitor.rows.values() for one in rows]
        return [*tags, *sorted(path.name for path in self.path.parent.iterdir())]


@pytest.fixture
def begun(monitor: Played, tmp_path: Path) -> Begun:
    return Begun(monitor, tmp_path)


async def test_what_the_file_says(begun: Begun, monitor: Played) -> None:
    """The clock as the disks have it, and the date of the one beside which it lies."""

    async def content() -> Content:
        return await (await begun.attempt()).content(9, Path("/vm"))

    async def problems() -> tuple[str, ...]:
        with pytest.raises(VerifyFailed) as failed:
            await content()
        assert failed.value.tag == "t"
        return failed.value.problems

    assert await content() == Content("t", "/vm", 9, DATE + timedelta(seconds=1), CLOCK)
    begun.works_on(vmstate="elsewhere")
    assert (await content()).date == DATE
    monitor.rows["disk1"] = [row(CLOCK + 1)]
    assert await problems() == ("the disks have it of different moments",)
    monitor.rows["disk1"] *= 2
    begun.works_on(devices=("disk0", "disk1", "disk2"))
    assert await problems() == tuple(f"disk{n} holds it {n_th} times instead of once" for n, n_th in ((1, 2), (2, 0)))


async def test_when_a_snapshot_is_complete(begun: Begun, monitor: Played) -> None:
    """All disks have it, once, and the file, of that moment, is whole."""
    rows = monitor.rows
    assert not await begun.is_complete()
    begun.complete()
    assert await begun.is_complete()
    for others in ([], [row(), row()], [row(CLOCK + 1)], [row(tag="u")]):
        monitor.rows = {"disk0": rows["disk0"], "disk1": others}
        assert not await begun.is_complete()
    monitor.rows = rows
    begun.works_on(devices=("disk2",))
    assert not await begun.is_complete()
    begun.works_on(devices=("disk0", "disk2"))
    assert await begun.is_complete(), "a disk that was unplugged since"
    os.truncate(begun.path, begun.path.stat().st_size - 1)
    assert not await begun.is_complete()
    begun.complete(tag="u")
    monitor.rows["disk0"] = [row(tag="u")]
    assert not await begun.is_complete()


async def test_it_is_concluded(begun: Begun, monitor: Played, tmp_path: Path) -> None:
    begun.complete()
    older = written(tmp_path / "vm.t.qsnap-2.qsnap", Content("t.qsnap-2", "/vm", 9, DATE, 5))
    begun.works_on(older=("t.qsnap-2",), older_files=(str(older), str(begun.path)))
    monitor.rows["disk0"].insert(0, row(5, tag="t.qsnap-2"))
    found, left = await (await begun.attempt()).conclude()
    assert (found.path, left) == (str(begun.path), ())
    assert begun.left == ["t", "t", "vm.t.qsnap"]
    assert monitor.calls == ["tidy", "put back", "delete", "tidy"]
    assert monitor.settings == [SETTINGS]
    assert begun.journal.record.work is None


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_file_that_is_not_whole_at_the_end(begun: Begun, is_there: bool) -> None:
    """The older snapshot stays then."""
    begun.complete()
    os.truncate(begun.path, begun.path.stat().st_size - 1) if is_there else begun.path.unlink()
    with pytest.raises(VerifyFailed, match="is not a state file"):
        await (await begun.attempt()).conclude()
    assert begun.monitor.calls == []


@pytest.mark.parametrize(
    ("older", "words"),
    [({}, ""), *(({key: ("x",)}, "; the older snapshot 't' is as it was") for key in ("older", "older_files"))],
)
async def test_it_is_undone(begun: Begun, monitor: Played, older: dict[str, Any], words: str) -> None:
    begun.works_on(**older)
    attempt = await begun.attempt()
    assert await attempt.undo() == f"nothing of it is left{words}"
    assert begun.left == []
    assert monitor.calls == ["end", "delete", "forget", "tidy", "put back"]
    assert monitor.settings == [SETTINGS]
    assert begun.journal.record.work is None


async def test_one_that_is_complete_is_kept(begun: Begun, monitor: Played) -> None:
    """Also where its maker died before the name that does not count was gone."""
    begun.complete()
    begun.part.hardlink_to(begun.path)
    begun.works_on(made=files.identity_of(begun.path.stat()))
    assert await (await begun.attempt()).undo() == "the new snapshot 't' was complete and is kept"
    assert begun.left == ["t", "t", "vm.t.qsnap"]
    assert monitor.calls == ["end", "tidy", "put back"]


@pytest.mark.parametrize("is_decided", [True, False])
@pytest.mark.parametrize("is_complete", [True, False])
async def test_in_a_group_all_decide(begun: Begun, is_decided: bool, is_complete: bool) -> None:
    """What one has is of no use without the others' parts."""
    begun.journal.note(group="a" * 16)
    if is_decided:
        runtime_dir.decide("a" * 16)
    if is_complete:
        begun.complete()
        begun.works_on(made=files.identity_of(begun.path.stat()))
    await (await begun.attempt()).undo()
    assert begun.left == (["t", "t", "vm.t.qsnap"] if is_decided and is_complete else [])


async def test_what_fails_then_keeps_no_room_and_no_settings(begun: Begun, monitor: Played) -> None:
    """The file is given up whatever becomes of the disks, and the settings whatever QEMU remembers."""
    monitor.remembers = True
    with pytest.raises(JobFailed, match="QEMU goes on to note that"):
        await (await begun.attempt()).undo()
    assert monitor.settings == [SETTINGS]
    begun.part.write_bytes(b"state")
    begun.works_on(made=files.identity_of(begun.part.stat()))
    monitor.rows["disk0"] = [row()]
    monitor.refuses = True
    with pytest.raises(JobFailed, match="QEMU says why"):
        await (await begun.attempt()).undo()
    assert not begun.part.exists()


FAILURE = "the disk is full"


async def cleared_up(begun: Begun, failure: QsnapError, file: int | None = None) -> QsnapError:
    await (await begun.attempt(file)).clear_up(failure)
    return failure


@pytest.mark.parametrize("is_lost", [True, False])
async def test_it_says_what_is_left(begun: Begun, monitor: Played, is_lost: bool) -> None:
    """Over a new connection, if the one that it had is lost."""
    monitor.is_lost = is_lost
    failure = await cleared_up(begun, QsnapError(FAILURE))
    assert str(failure) == f"{FAILURE}; nothing of it is left; the guest is running"
    assert failure.undone
    assert begun.left == []


async def test_it_says_no_more_than_that_the_guest_is_stopped(begun: Begun) -> None:
    failure = await cleared_up(begun, GuestLeftStopped(FAILURE))
    assert (str(failure), begun.left) == (FAILURE, [])


async def test_a_guest_that_has_stopped_by_itself(begun: Begun, monitor: Played) -> None:
    monitor.state = RunState.IO_ERROR
    with pytest.raises(GuestLeftStopped, match=f"{FAILURE}; nothing of it is left; the guest is io-error"):
        await cleared_up(begun, QsnapError(FAILURE))


async def test_clearing_up_that_fails(begun: Begun, monitor: Played) -> None:
    """Nobody is to try that again."""
    monitor.refuses = True
    failure = await cleared_up(begun, QsnapError(FAILURE))
    assert str(failure).startswith(f"{FAILURE}; clearing up after it failed: snapshot-delete failed: QEMU says why")
    assert not failure.undone
    assert begun.journal.record.work is None


@pytest.mark.parametrize("how", ["lives", "has ended", "was seen to have ended"])
async def test_a_connection_that_stays_lost(
    begun: Begun, monitor: Played, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """While its QEMU lives its guard goes on; of one that has ended the file goes, and the disks' owner is told."""
    monitor.is_lost, monitor.comes_back = True, False
    monkeypatch.setattr("qsnap.runs.pause.RECONNECT_ATTEMPTS", 1)
    if how != "lives":
        begun.journal.note(qemu=Process(pid=1 << 30, start=0))
    work, ended = begun.journal.record.work, "QEMU has ended; there is no guest any more"
    made = os.open(begun.part, os.O_RDWR)
    moved = begun.part.rename(begun.part.with_name("moved"))
    try:
        failure = await cleared_up(begun, MonitorLost(ended if how == "was seen to have ended" else FAILURE), made)
    finally:
        os.close(made)
    assert not failure.undone
    if how == "lives":
        assert str(failure) == f"{FAILURE}; clearing up after it failed: the connection broke"
        assert begun.journal.record.work is work
        assert moved.read_bytes() == b"state"
        return
    cure = "if its disks have snapshots of it: qsnap delete t"
    assert str(failure) == (f"{FAILURE}; {ended}. {cure}" if how == "has ended" else f"{ended}; {cure}")
    assert begun.journal.record.work is None
    assert moved.stat().st_size == 0


def test_a_file_that_cannot_be_completed(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(part=tmp_path / "part", path=tmp_path / "path")
    plan.part.touch()
    file = os.open(plan.part, os.O_RDONLY)
    try:
        with pytest.raises(JobFailed, match=f"write failed: the state file {tmp_path}/path cannot be written"):
            save._complete(file, plan, Content("t", "/vm", 9, DATE, 7))
    finally:
        os.close(file)


async def test_memory_that_others_may_have_mapped(monitor: Played) -> None:
    """Shared, of a QEMU whose process is not seen from here."""
    with pytest.raises(NotSupported, match="it cannot be seen whether another process has it mapped"):
        await save._refuse_other_writers(monitor, graph())
    monitor.shares = False
    await save._refuse_other_writers(monitor, graph())


async def test_the_place_of_the_file(monitor: Played, tmp_path: Path) -> None:
    """What will not do is said before anything is done."""

    async def found(path: Path, *, force: bool = False, is_taken: bool = False) -> list[tuple[str, Severity, str]]:
        findings = await save._place_findings(monitor, path, force, is_taken=is_taken)
        return [(one.code, one.severity, one.message) for one in findings]

    path = tmp_path / "file"
    assert await found(path) == []
    ((code, severity, words),) = await found(path, is_taken=True)
    assert (code, severity) == ("state-file-taken", Severity.REFUSE)
    ((code, severity, words),) = await found(tmp_path / "none" / "file")
    assert (code, severity, words.endswith(": it is not there")) == ("state-dir", Severity.REFUSE, True)
    with as_nobody():
        ((code, severity, words),) = await found(Path("/file"))
    assert (code, severity, words.endswith(": it cannot be written")) == ("state-dir", Severity.REFUSE, True)
    monitor.bytes_of_ram = 1 << 60
    for force, expected in ((False, Severity.REFUSE), (True, Severity.WARN)):
        ((code, severity, words),) = await found(path, force=force)
        assert (code, severity, "little room" in words) == ("no-room", expected, True)


RESULT = SaveResult(
    tag="t", replaced=False, kind=Kind.FULL, vmstate="a", devices=("a",), excluded=(), carried=(), vm_state_size=1,
    date=DATE, vm_clock_ns=1, pause_ms=1, duration_ms=1, runstate=RunState.RUNNING, warnings=(), dry_run=False,
    labels={}, file=None,
)  # fmt: skip


def undone() -> QsnapError:
    error = QsnapError("it failed")
    error.undone = True
    return error


@pytest.mark.parametrize(
    ("live", "state", "plans", "saves", "member", "outcome"),
    [
        (False, "running", None, None, None, "ordinary"),
        (True, "running", None, None, None, "live"),
        (True, "paused", None, None, None, "ordinary: the guest does not run, so nothing is gained by a live save"),
        ("auto", "running", None, None, None, "live"),
        (True, "running", NotSupported("no"), None, None, "no"),
        ("auto", "running", NotSupported("no"), None, None, "ordinary: no"),
        ("auto", "running", PrecheckRefused("no", ()), None, None, "ordinary: no; the guest was not touched"),
        ("auto", "running", MonitorLost("no"), None, None, "no"),
        ("auto", "running", None, undone, None, "ordinary: it failed"),
        (True, "running", None, undone, None, "it failed"),
        ("auto", "running", None, lambda: QsnapError("it failed"), None, "it failed"),
        ("auto", "running", None, undone, object(), "it failed"),
    ],
)
async def test_how_a_guest_is_saved(
    monkeypatch: pytest.MonkeyPatch,
    live: bool | Literal["auto"],
    state: str,
    plans: QsnapError | None,
    saves: Callable[[], QsnapError] | None,
    member: Any,
    outcome: str,
) -> None:
    """The ordinary way where that was asked for, or where it is allowed and a live one was not possible or undone."""
    run = Run(FakeMonitor(state=RunState(state)))
    run.journal.member = member

    async def plan_live(*_: object) -> None:
        if plans is not None:
            raise plans

    async def do_live_save(*_: object) -> SaveResult:
        if saves is not None:
            raise saves()
        return msgspec.structs.replace(RESULT, kind=Kind.LIVE)

    async def do_savevm(*_: object) -> SaveResult:
        return RESULT

    monkeypatch.setattr(save, "plan_live", plan_live)
    monkeypatch.setattr(save, "do_live_save", do_live_save)
    monkeypatch.setattr(choose, "do_savevm", do_savevm)
    try:
        result = await choose.save_live_or_not(run, SaveRequest("t"), live, None)
        why = "".join(one.message.replace("saved the ordinary way", "") for one in result.warnings)
        told = result.kind.replace("full", "ordinary") + why
    except QsnapError as error:
        told = str(error)
    assert told == outcome
