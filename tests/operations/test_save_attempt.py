"""How a save is undone or concluded: what stays, what goes, and what is said of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qsnap.errors import CommandFailed, GuestLeftStopped, JobFailed, MonitorLost, QsnapError, VerifyFailed
from qsnap.inventory.devices import survey
from qsnap.inventory.state_file import Content
from qsnap.model.qemu import NodeSnapshot, RunState
from qsnap.model.requests import SaveRequest
from qsnap.model.snapshots import StateFile
from qsnap.operations.plan import plan_save
from qsnap.operations.save import SaveAttempt, save_result
from qsnap.runs import runtime_dir
from qsnap.runs.journal import Journal
from qsnap.runs.pause import Pause
from qsnap.runs.record import Record, SaveWork, row_keys
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.state_files import written

pytestmark = pytest.mark.no_qemu

DISKS = ("disk0", "disk1")
DATE = datetime(2026, 11, 24, tzinfo=UTC)
AS_IT_WAS = "the older snapshot 't' is as it was"
DELETED = "the older snapshot 't' had already been deleted"
REMOVED = "what this save made was removed from disk0, disk1"
KEPT = "the new snapshot 't' was complete and is kept"
REPLACED = f"{KEPT}: it replaced an older one"


def row(tag: str = "t", *, second: int = 0, size: int = 0) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=DATE + timedelta(seconds=second), vm_clock_ns=7)


def whole(tag: str = "t", *, second: int = 0) -> dict[str, list[NodeSnapshot]]:
    return {"disk0": [row(tag, second=second, size=9)], "disk1": [row(tag, second=second)]}


OLD, NEW, SECOND = whole(), whole(second=5), whole("t.qsnap-2", second=5)
#: A journal's rows of the older snapshot.
ROWS = {name: row_keys(tuple(rows)) for name, rows in OLD.items()}


class Noting(FakeMonitor):
    """Its calls are those of an outcome that is looked for."""

    async def settle(self) -> QsnapError | None:
        self.calls.append("settle")
        return None

    async def reconnect(self, timeout_s: float) -> None:
        self.calls.append("reconnect")


async def attempt_of(
    held: Mapping[str, list[NodeSnapshot]], journal: Journal | None = None, /, state: RunState = RunState.RUNNING,
    **work: Any,
) -> tuple[SaveAttempt, Noting]:  # fmt: skip
    monitor = Noting(rows={name: [*rows] for name, rows in held.items()}, state=state)
    journal = journal or Journal(Record(tags=("t",)))
    given: dict[str, Any] = {"disk_tag": "t", "older": (), "older_files": (), **work}
    journal.note(work=SaveWork(vmstate="disk0", devices=DISKS, **given))
    return SaveAttempt(monitor, journal, survey(await monitor.block_graph()).devices), monitor


@pytest.mark.parametrize(
    ("held", "work", "keeps_whole", "removed", "outcome", "left"),
    [
        # Nothing was to be replaced
        ({"disk0": [], "disk1": []}, {"saving": True}, True, (), "nothing of it is left", ()),
        (NEW, {"saving": True}, True, DISKS, REMOVED, ()),
        (NEW, {"saving": True, "is_complete": True}, False, (), KEPT, DISKS),
        ({**NEW, "disk1": []}, {"saving": True, "is_complete": True}, True, ("disk0",), REMOVED[:-7], ()),
        # The older one is deleted before
        (OLD, {"rows": ROWS}, True, (), "the older snapshot 't' was to be deleted from disk0, disk1, and is on disk0, "
                                        "disk1", DISKS),
        ({**OLD, "disk0": []}, {"rows": ROWS}, True, (), "the older snapshot 't' was to be deleted from disk0, disk1, "
                                                         "and is on disk1", ("disk1",)),
        ({"disk0": [], "disk1": []}, {"rows": ROWS}, True, (), DELETED, ()),
        (NEW, {"rows": ROWS, "saving": True}, True, (), REPLACED, DISKS),
        (NEW, {"rows": ROWS, "saving": True}, False, DISKS, f"{REMOVED}; {DELETED}", ()),
        ({**NEW, "disk1": []}, {"rows": ROWS, "saving": True}, True, ("disk0",), f"{REMOVED[:-7]}; {DELETED}", ()),
        # QEMU deletes it itself
        (OLD, {"rows": ROWS, "saving": True, "qemu_replaces": True}, True, (), AS_IT_WAS, DISKS),
        (NEW, {"rows": ROWS, "saving": True, "qemu_replaces": True}, True, (), REPLACED, DISKS),
        # It stays beside the new one until that is complete
        (OLD, {"disk_tag": "t.qsnap-2", "older": ("t",), "saving": True}, True, (),
         f"nothing of it is left; {AS_IT_WAS}", DISKS),
        ({name: OLD[name] + SECOND[name] for name in DISKS},
         {"disk_tag": "t.qsnap-2", "older": ("t",), "saving": True}, True, DISKS, f"{REMOVED}; {AS_IT_WAS}", DISKS),
        ({name: OLD[name] + SECOND[name] for name in DISKS},
         {"disk_tag": "t.qsnap-2", "older": ("t",), "saving": True, "is_complete": True}, True, (), REPLACED, DISKS),
    ],
)  # fmt: skip
async def test_what_is_undone(
    held: dict[str, list[NodeSnapshot]], work: dict[str, Any], keeps_whole: bool, removed: tuple[str, ...],
    outcome: str, left: tuple[str, ...],
) -> None:  # fmt: skip
    attempt, monitor = await attempt_of(held, **work)
    assert await attempt.undo(keeps_whole=keeps_whole) == (removed, outcome)
    assert tuple(name for name, rows in monitor.rows.items() if rows) == left
    assert all(len(rows) < 2 for rows in monitor.rows.values())
    assert attempt.work.is_complete is (KEPT in outcome or work.get("is_complete", False))


@pytest.mark.parametrize("is_decided", [True, False])
async def test_what_the_group_has_decided(is_decided: bool, runtime_directory: Path) -> None:
    """It counts alone: whatever this save knows of itself."""
    journal = Journal(Record(tags=("t",), group="0123456789abcdef"))
    if is_decided:
        runtime_dir.decide("0123456789abcdef")
    attempt, monitor = await attempt_of(NEW, journal, saving=True, rows=ROWS, is_complete=not is_decided)
    _, outcome = await attempt.undo(keeps_whole=not is_decided)
    assert outcome == (f"{KEPT}, as that of every other VM" if is_decided else f"{REMOVED}; {DELETED}")
    assert [len(rows) for rows in monitor.rows.values()] == ([1, 1] if is_decided else [0, 0])


@pytest.mark.parametrize("disks_hold_it", [True, False])
async def test_the_state_file_of_an_older_live_snapshot(tmp_path: Path, disks_hold_it: bool) -> None:
    """It is useless without its disks, and stays as long as they are there."""
    file = written(tmp_path / "a.t.qsnap", Content("t.qsnap-2", str(tmp_path / "a"), 9, DATE, 7))
    held = whole("t.qsnap-2") if disks_hold_it else {"disk0": [], "disk1": []}
    attempt, _ = await attempt_of(held, saving=True, older_files=(str(file), str(tmp_path / "gone")))
    await attempt.undo(keeps_whole=True)
    assert file.exists() is disks_hold_it


async def test_a_state_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said; the rest is done."""
    file = written(tmp_path / "a.t.qsnap", Content("t", str(tmp_path / "a"), 9, DATE, 7))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr("qsnap.host.bulk_io.remove", refuse)
    attempt, _ = await attempt_of({"disk0": [], "disk1": []}, saving=True, older_files=(str(file),))
    removed, outcome = await attempt.undo(keeps_whole=True)
    assert (removed, file.exists()) == ((), True)
    assert outcome.startswith("nothing of it is left; unlink failed: ")
    assert outcome.endswith("cannot be removed: Operation not permitted")


def failed() -> JobFailed:
    return JobFailed("snapshot-save", "Input/output error")


@pytest.mark.parametrize("was_running", [True, False])
@pytest.mark.parametrize("make", [failed, lambda: MonitorLost("it is gone"), lambda: VerifyFailed("t", ["no"])])
async def test_how_things_stand_is_looked_for(make: Any, was_running: bool) -> None:
    """Over a new connection, if that was not made to resume the guest."""
    attempt, monitor = await attempt_of({"disk0": [], "disk1": []}, saving=True)
    failure = make()
    await attempt.clear_up(failure, was_running=was_running, hint="no room: make some")
    is_lost = isinstance(failure, MonitorLost)
    assert monitor.calls == [*(["reconnect"] if is_lost and not was_running else []), "settle"]
    assert failure.outcome == "nothing of it is left; the guest is running. no room: make some"


async def test_what_had_not_begun_is_not_undone() -> None:
    for failure, is_saving in (failed(), False), (GuestLeftStopped("it is stopped"), True):
        attempt, monitor = await attempt_of(OLD, saving=is_saving)
        await attempt.clear_up(failure, was_running=True)
        assert (monitor.calls, getattr(failure, "outcome", "")) == ([], "")
        assert monitor.rows == OLD


async def test_half_a_set_that_qemu_reports_an_error_of() -> None:
    """Whoever gets that knows that QEMU has left it."""
    attempt, monitor = await attempt_of({**NEW, "disk1": []}, saving=True)
    with pytest.raises(VerifyFailed, match="Input/output error") as found:
        await attempt.clear_up(failed(), was_running=True)
    assert "was removed from disk0; the guest is running" in found.value.outcome
    attempt, monitor = await attempt_of({**NEW, "disk1": []}, saving=True)
    lost = MonitorLost("it is gone")
    await attempt.clear_up(lost, was_running=True)
    assert lost.outcome == "what this save made was removed from disk0; the guest is running"
    assert not any(monitor.rows.values())


async def test_a_guest_without_room_for_its_own_writes() -> None:
    for state, was_running in (RunState.IO_ERROR, True), (RunState.IO_ERROR, False), (RunState.PAUSED, False):
        attempt, _ = await attempt_of({"disk0": [], "disk1": []}, saving=True, state=state)
        failure = failed()
        if was_running:
            with pytest.raises(GuestLeftStopped, match=r"the guest is io-error: its own writes fail") as stopped:
                await attempt.clear_up(failure, was_running=True)
            assert stopped.value.__cause__ is failure
        else:
            await attempt.clear_up(failure, was_running=False)
            assert failure.outcome == f"nothing of it is left; the guest is {state}"


async def test_an_outcome_is_told_with_whatever_has_happened() -> None:
    attempt, _ = await attempt_of({"disk0": [], "disk1": []}, saving=True)
    outcome = "nothing of it is left; the guest is running"
    interrupt = asyncio.CancelledError()
    await attempt.clear_up(interrupt, was_running=True)
    assert interrupt.__notes__ == [outcome]
    refused = CommandFailed("snapshot-save", "no")
    with pytest.raises(JobFailed) as told:
        await attempt.clear_up(refused, was_running=True)
    assert (told.value.reason, told.value.outcome, told.value.__cause__) == ("no", outcome, refused)


@pytest.mark.parametrize(
    ("held", "rows", "by_qemu", "was_running", "problem"),
    [
        (OLD, ROWS, True, True, "the older snapshot is still there, and no new one"),
        (OLD, ROWS, True, False, ""),  # two saves of a paused guest in one second look the same
        (OLD, ROWS, False, True, ""),  # the older one was deleted before
        (NEW, ROWS, True, True, ""),
        (NEW, None, True, True, ""),
        ({**OLD, "disk1": []}, ROWS, True, True, "disk1 holds it 0 times instead of once"),
    ],
)
async def test_what_is_read_back(
    held: dict[str, list[NodeSnapshot]], rows: Any, by_qemu: bool, was_running: bool, problem: str
) -> None:
    attempt, monitor = await attempt_of(held, rows=rows, qemu_replaces=by_qemu, saving=True)
    graph = await monitor.block_graph()
    if problem:
        with pytest.raises(VerifyFailed) as refused:
            await attempt.read_back(graph, was_running=was_running)
        assert refused.value.problems == (problem,)
    else:
        assert await attempt.read_back(graph, was_running=was_running) == held["disk0"][0]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("chooses", [True, False])
async def test_whose_the_deletion_of_the_older_one_is(chooses: bool, rows: int) -> None:
    """QEMU's savevm deletes one row of each disk, and is given only what that ends."""
    attempt, monitor = await attempt_of(
        {name: [*held] * (rows if name == "disk1" else 1) for name, held in OLD.items()}
    )
    monitor.chooses_devices = chooses
    by_qemu = attempt.begin_deletion(await monitor.block_graph())
    assert by_qemu is (not chooses and rows == 1)
    assert attempt.work.qemu_replaces is by_qemu
    assert attempt.work.rows == {**ROWS, "disk1": ROWS["disk1"] * rows}


async def test_the_result() -> None:
    """What is known of the new snapshot; of a dry run, and of a guest that stood still, what there is."""
    monitor = FakeMonitor(state=RunState.PAUSED)
    plan = await plan_save(Run(monitor), SaveRequest(tag="t"))
    saved = msgspec.structs.replace(row(size=9), vm_clock_ns=12)
    made = save_result(plan, "t", False, 0.0, row=saved)
    assert (made.kind, made.vmstate, made.vm_state_size, made.date, made.vm_clock_ns) == ("full", "disk0", 9, DATE, 12)
    assert (made.pause_ms, made.runstate, made.carried) == (0.0, "paused", ())
    pause = Pause(RunState.RUNNING, monitor.version)
    pause.resumed_by_qemu(None)
    paused = save_result(plan, "t", False, 0.0, row=saved, pause=pause)
    assert (paused.runstate, paused.pause_ms > 0) == ("running", True)
    file = StateFile(path="p", size=99, disk_tag="t", image="i", vm_state_size=10, date=DATE, vm_clock_ns=13)
    live = save_result(plan, "t", False, 0.0, file=file, is_live=True)
    assert (live.kind, live.vmstate, live.vm_state_size, live.vm_clock_ns) == ("live", None, 10, 13)
    dry = save_result(plan, "t", True, 0.0, dry_run=True)
    assert (dry.replaced, dry.vm_state_size, dry.vm_clock_ns, dry.pause_ms) == (True, 0, 0, 0.0)
    without = await plan_save(Run(monitor), SaveRequest(tag="t", exclude=("disk1",)))
    for is_live in True, False:
        partial = save_result(without, "t", False, 0.0, row=saved, is_live=is_live)
        assert (partial.kind, partial.excluded, partial.devices) == ("partial", ("disk1",), ("disk0",))
