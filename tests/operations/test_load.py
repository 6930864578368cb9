"""What a load does step by step, with a monitor in memory: above all how it ends if QEMU does not do as it should."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorLost,
    NotSupported,
    PrecheckRefused,
    QsnapError,
    SnapshotNotFound,
)
from qsnap.inventory.lineage import Lineage, key_of
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import StateStore
from qsnap.model.qemu import BlockGraph, Migration, RunState
from qsnap.model.requests import LoadRequest
from qsnap.model.results import LoadResult
from qsnap.model.snapshots import Origin, Position, StateFile
from qsnap.monitor.names import HALF_RESTORED, HERE
from qsnap.operations.delta import NoDelta, delta
from qsnap.operations.load import _forget_failure, check_load, do_loadvm
from qsnap.operations.load_attempt import LoadAttempt
from qsnap.operations.plan import plan_load
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import Pause
from qsnap.runs.record import LoadStage, LoadWork
from qsnap.runs.run import Run
from support.fake_monitor import FakeMonitor
from support.guest import DEADLINE_S, open_files
from support.state_files import DATE, written

pytestmark = pytest.mark.no_qemu

REASON = "Error -22 while loading VM state"
BITMAPS = "Could not load snapshot 't' on '{}': Device has active dirty bitmaps"


# What is raised is changed on its way, so that each test has its own.


def a_failure() -> JobFailed:
    return JobFailed("snapshot-load", REASON)


def a_refusal() -> JobFailed:
    return JobFailed("snapshot-load", "No block device node 'disk1'")


def a_loss() -> MonitorLost:
    return MonitorLost("the connection broke")


@dataclass
class Qemu(FakeMonitor):
    """A guest with the snapshot "t". A load leaves it in "restore-vm", as QEMU does with one that was stopped.

    :ivar failure: what the load ends with.
    :ivar after: the run state in which the load leaves the guest.
    :ivar before_load: is done by somebody else just before QEMU begins.
    :ivar on_look: is done by somebody else before the second look at the VM.
    :ivar translates: it translates code, as TCG does.
    :ivar stops: the run state in which it stops as soon as it runs to have its code dropped.
    :ivar outcome: of the load, as it is found over a new connection or after an interrupt.
    :ivar settles: it ends.
    :ivar answers: QEMU answers while it is waited for after an interrupt.
    :ivar lost_once: the connection breaks when the run state is asked for.
    :ivar works: what is written down as under way at each step.
    """

    failure: QsnapError | None = None
    after: RunState = RunState.RESTORE_VM
    before_load: Callable[[], object] = lambda: None
    on_look: Callable[[], object] = lambda: None
    translates: bool = False
    stops: RunState | None = None
    outcome: QsnapError | None = None
    settles: bool = True
    answers: bool = True
    lost_once: bool = False
    journal: Journal = field(default_factory=Journal)
    works: list[tuple[str, object]] = field(default_factory=list)
    looks: int = 0
    loading: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, what: str) -> None:
        self.calls.append(what)
        work = self.journal.record.work
        self.works.append((what, work.stage if isinstance(work, LoadWork) else work))

    async def block_graph(self) -> BlockGraph:
        self.looks += 1
        if self.looks == 2:
            self.on_look()
        return await super().block_graph()

    async def runstate(self) -> RunState:
        if self.lost_once:
            self.lost_once = False
            raise MonitorLost("the connection broke")
        return self.state

    async def reconnect(self, timeout_s: float) -> None:
        self.note("reconnect")

    async def human_answer(self, line: str) -> str:
        word = line.split()[0]
        if line == "info kvm":
            return "kvm support: disabled" if self.translates else "kvm support: enabled"
        if word in ("cont", "stop", "loadvm"):
            self.note(f"`{word}`")
        if word == "cont":
            self.state = self.stops or RunState.RUNNING
        elif word in ("stop", "loadvm") and self.state is RunState.RUNNING:
            self.state = RunState.PAUSED if word == "stop" else RunState.RESTORE_VM
        return ""

    @asynccontextmanager
    async def snapshot_load(self, tag: str, vmstate: str, devices: Sequence[str]) -> AsyncIterator[JobFailed | None]:
        self.note("load")
        self.before_load()
        self.state = self.after
        self.loading.set()
        if isinstance(self.failure, MonitorLost):
            raise self.failure
        if not self.settles:
            await asyncio.Event().wait()
        failure = self.failure if isinstance(self.failure, JobFailed) else None
        yield failure
        if failure:
            raise failure

    async def load_outcome(self, doubt: QsnapError, *, was_running: bool) -> QsnapError | None:
        self.note("outcome")
        return self.outcome

    async def settle(self) -> QsnapError | None:
        self.note("settle")
        if not self.answers:
            await asyncio.Event().wait()
        return self.outcome


@pytest.fixture
async def qemu() -> Qemu:
    monitor = Qemu()
    await monitor.snapshot_save("t", "disk0", ["disk0", "disk1"])
    monitor.calls.clear()
    return monitor


async def load(qemu: Qemu, running: bool | None = None) -> LoadResult:
    return await do_loadvm(Run(qemu, journal=qemu.journal), LoadRequest(tag="t", running=running))


async def attempt_of(qemu: Qemu) -> tuple[Run, LoadAttempt]:
    run = Run(qemu, journal=qemu.journal)
    return run, LoadAttempt(run, await plan_load(run, "t"), Pause(qemu.state, qemu.version))


FLUSHED, PAUSED = ["`cont`", "`loadvm`"], ["`cont`", "`stop`"]


@pytest.mark.parametrize(
    ("state", "running", "calls", "ends"),
    [
        (RunState.RUNNING, None, ["stop", "load", "cont"], "running"),
        (RunState.RUNNING, True, ["stop", "load", "cont"], "running"),
        (RunState.RUNNING, False, ["stop", "load", *PAUSED], "paused"),
        (RunState.PAUSED, None, ["load", *PAUSED], "paused"),
        (RunState.PAUSED, True, ["load", "cont"], "running"),
        (RunState.GUEST_PANICKED, None, ["load", "cont"], "running"),
        (RunState.GUEST_PANICKED, False, [*PAUSED, "load", *PAUSED], "paused"),
        (RunState.SHUTDOWN, None, ["reset", "load", "cont"], "running"),
    ],
)
async def test_who_stops_and_resumes_the_guest(
    qemu: Qemu, state: RunState, running: bool | None, calls: list[str], ends: str
) -> None:
    qemu.state = state
    qemu.texts[HALF_RESTORED] = "yes"
    result = await load(qemu, running)
    assert (qemu.calls, result.runstate, qemu.state) == (calls, ends, ends)
    assert (result.method, result.vmstate, result.devices) == ("full", "disk0", ("disk0", "disk1"))
    assert HALF_RESTORED not in qemu.texts
    assert dict(qemu.works)["load"] == LoadStage.BEGUN
    assert qemu.journal.record.work is None


@pytest.mark.parametrize(
    ("state", "running", "after", "calls"),
    [
        (RunState.RUNNING, None, RunState.RUNNING, ["load"]),
        (RunState.RUNNING, False, RunState.RESTORE_VM, ["stop", *FLUSHED, *PAUSED, "load", *PAUSED]),
        (RunState.PAUSED, None, RunState.PAUSED, [*FLUSHED, *PAUSED, "load"]),
        (RunState.PAUSED, True, RunState.PAUSED, [*FLUSHED, "load", "cont"]),
    ],
)
async def test_a_human_monitor_stops_it_by_itself(
    qemu: Qemu, state: RunState, running: bool | None, after: RunState, calls: list[str]
) -> None:
    """A guest that runs, and is to run on. Of any other the translated code has to go first."""
    qemu.chooses_devices = False
    qemu.state, qemu.after, qemu.translates = state, after, True
    await load(qemu, running)
    assert qemu.calls == calls


class Others:
    """The other runs of a group, which are always there first."""

    stopped = resumed = (None, 0.0)

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu

    async def meet(self, point: Point) -> None:
        self.qemu.note(point.name)

    async def decide(self) -> None:
        self.qemu.note("decided")


@pytest.mark.parametrize("chooses_devices", [True, False])
async def test_the_points_at_which_a_group_meets(qemu: Qemu, chooses_devices: bool) -> None:
    """All its guests stand still before the first is loaded, whatever their monitors; and all are before one runs."""
    qemu.chooses_devices = chooses_devices
    qemu.journal.member = Others(qemu)  # type: ignore[assignment]
    await load(qemu)
    before, after = ["CHECKED", "READY", "stop", "STOPPED", "decided"], ["WRITTEN", "cont"]
    assert qemu.calls == [*before, "load", *after]


@pytest.mark.parametrize(
    ("state", "chooses_devices", "calls", "standing"),
    [
        (RunState.RUNNING, True, ["stop", "cont"], "the guest was stopped for a moment, and resumed"),
        (RunState.RUNNING, False, [], "the guest was not touched"),
        (RunState.PAUSED, True, [], "the guest was not touched"),
        (RunState.SHUTDOWN, True, ["reset"], "nothing was loaded; the guest was reset, and is paused"),
    ],
)
async def test_what_has_changed_since_the_check(
    qemu: Qemu, state: RunState, chooses_devices: bool, calls: list[str], standing: str
) -> None:
    """It was decided on what is not so any more: nothing is loaded, and it is said how the guest stands."""
    qemu.state, qemu.chooses_devices = state, chooses_devices

    def save_again() -> None:
        for rows in qemu.rows.values():
            rows[:] = [msgspec.structs.replace(row, vm_clock_ns=2) for row in rows]

    qemu.on_look = save_again
    with pytest.raises(PrecheckRefused) as refused:
        await load(qemu)
    assert [finding.code for finding in refused.value.findings] == ["snapshots-changed"]
    assert standing in str(refused.value)
    assert qemu.calls[: len(calls)] == calls
    assert "load" not in qemu.calls


# QEMU refuses, or fails


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.PAUSED])
async def test_deleted_at_the_last_moment(qemu: Qemu, state: RunState) -> None:
    """Nothing was loaded, so the guest goes on, or is paused again."""
    qemu.state = state
    qemu.before_load = qemu.rows["disk1"].clear
    qemu.failure = JobFailed("snapshot-load", "Snapshot 't' does not exist in one or more devices")
    with pytest.raises(SnapshotNotFound, match="'t' was deleted by another client just now; nothing was loaded"):
        await load(qemu)
    assert qemu.calls == (["stop", "load", "cont"] if state is RunState.RUNNING else ["load", *PAUSED])
    assert qemu.state is state
    assert HALF_RESTORED not in qemu.texts
    assert qemu.journal.record.work is None


@pytest.mark.parametrize(
    "reason", ["Device 'disk2' is writable but does not support snapshots", BITMAPS.format("disk0")]
)
async def test_refused_before_anything_was_touched(qemu: Qemu, reason: str) -> None:
    """Also where the first of the disks has bitmaps; and what to do about those is said."""
    qemu.failure = JobFailed("snapshot-load", reason)
    with pytest.raises(JobFailed) as refused:
        await load(qemu)
    outcome = "nothing was loaded: RAM and disks are as they were"
    if "bitmaps" in reason:
        assert refused.value.outcome.startswith(f"{outcome}. Remove the dirty bitmaps of disk0 by QMP")
        assert refused.value.outcome.endswith("Then load 't' again")
    else:
        assert refused.value.outcome == outcome
    assert qemu.calls == ["stop", "load", "cont"]
    assert (qemu.state, qemu.journal.record.stopped) == ("running", False)


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.PAUSED])
@pytest.mark.parametrize("after", [RunState.RESTORE_VM, RunState.RUNNING])
@pytest.mark.parametrize("reason", [REASON, BITMAPS.format("disk1")])
async def test_failed_in_the_middle(qemu: Qemu, state: RunState, after: RunState, reason: str) -> None:
    """The guest stands still, also where QEMU has resumed it (6.0.0), and whoever comes next is told why."""
    qemu.state, qemu.after = state, after
    qemu.failure = JobFailed("snapshot-load", reason)
    kind: type[QsnapError] = GuestLeftStopped if state is RunState.RUNNING else JobFailed
    with pytest.raises(kind) as failed:
        await load(qemu)
    assert type(failed.value) is kind
    assert reason in str(failed.value)
    cure = "Load a good snapshot" if reason == REASON else "Remove the dirty bitmaps of disk1 by QMP"
    assert f"RAM and disks may be half restored, so the guest is left stopped on purpose. {cure}" in str(failed.value)
    assert qemu.texts[HALF_RESTORED] == "yes"
    assert "cont" not in qemu.calls
    assert qemu.state is (RunState.PAUSED if after is RunState.RUNNING else after)
    assert (qemu.journal.record.work, qemu.journal.record.stopped) == (None, False)


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (Origin(qemu="7.2.0"), "; it was saved by QEMU 7.2.0, and this is QEMU 11.1.0"),
        (Origin(qemu="11.1.0"), ""),
        (None, ""),
    ],
)
async def test_which_qemu_has_saved_what_fails(qemu: Qemu, origin: Origin | None, words: str) -> None:
    qemu.failure, qemu.state = a_failure(), RunState.PAUSED
    run = Run(qemu)
    inventory = await run.look()
    known = {key_of(one): origin for one in inventory.snapshots if origin}
    run.first = (inventory, Lineage(Position(), origins=known))
    with pytest.raises(JobFailed) as failed:
        await do_loadvm(run, LoadRequest(tag="t"))
    assert failed.value.outcome.endswith(f"Do not `cont` it{words}")


async def test_what_is_written_down_of_the_end(qemu: Qemu) -> None:
    """As soon as it is known: whoever completes the work of a run that is killed goes by that."""
    run, attempt = await attempt_of(qemu)
    assert not run.loads
    assert await attempt.load("disk0", ["disk0", "disk1"]) is True
    assert run.loads
    assert qemu.journal.record.work is None
    for failure, work in (
        (a_refusal(), None),
        (a_failure(), LoadWork(was_running=True, stage=LoadStage.FAILED)),
    ):
        qemu.failure, qemu.state = failure, RunState.RUNNING
        _, attempt = await attempt_of(qemu)
        with pytest.raises(JobFailed):
            await attempt.load("disk0", ["disk0", "disk1"])
        assert qemu.journal.record.work == work


async def test_whether_qemu_may_have_loaded(qemu: Qemu) -> None:
    """Not if it has refused that, nor if it was not asked because that could not be written down."""
    run, attempt = await attempt_of(qemu)
    qemu.failure = failure = JobFailed("snapshot-load", "Snapshot 't' does not exist in one or more devices")
    with pytest.raises(JobFailed):
        await attempt.load("disk0", ["disk0", "disk1"])
    qemu.rows["disk1"].clear()
    with pytest.raises(SnapshotNotFound):
        await attempt.fail(failure)
    assert not run.loads

    class Full(Journal):
        def note(self, **_: object) -> None:
            raise QsnapError("the journal cannot be written")

    qemu.rows["disk1"] += qemu.rows["disk0"]
    qemu.journal = Full()
    run, attempt = await attempt_of(qemu)
    with pytest.raises(QsnapError, match="the journal cannot be written"):
        await attempt.load("disk0", ["disk0", "disk1"])
    assert not run.loads


@pytest.mark.parametrize("first", [a_failure, None, a_loss, a_refusal])
async def test_refused_after_another_attempt(qemu: Qemu, first: Callable[[], QsnapError] | None) -> None:
    """A full load after a delta load in doubt. What that may have done to the disks is not undone by a refusal."""
    run, attempt = await attempt_of(qemu)
    qemu.failure = first and first()
    with suppress(JobFailed):
        await attempt.load("disk0", ["disk0", "disk1"])
    qemu.failure = a_refusal()
    with pytest.raises(JobFailed):
        await attempt.load("disk0", ["disk0", "disk1"])
    with pytest.raises(JobFailed if first is a_refusal else GuestLeftStopped) as failed:
        await attempt.fail(a_refusal())
    assert ("RAM and disks are as they were" in str(failed.value)) is (first is a_refusal)
    assert run.loads is (first is not a_refusal)
    assert (HALF_RESTORED in qemu.texts) is (first is not a_refusal)


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("is_lost", [True, False])
async def test_qemu_ends_in_the_middle(qemu: Qemu, is_gone: bool, is_lost: bool) -> None:
    """Then there is no guest. What QEMU itself has told of the load it has told while it was there."""
    qemu.journal.another_answers = is_gone
    qemu.failure = MonitorLost("it is gone") if is_lost else a_failure()
    qemu.outcome = qemu.failure
    with pytest.raises(QsnapError) as failed:
        await load(qemu)
    is_told = "QEMU has ended in the middle of the load; there is no guest any more" in str(failed.value)
    assert is_told is (is_gone and is_lost)
    assert isinstance(failed.value, MonitorLost if is_told else GuestLeftStopped)
    assert (HALF_RESTORED in qemu.texts) is not is_told
    assert (qemu.journal.record.work, qemu.journal.record.stopped) == (None, False)


# The connection, and interrupts


async def test_the_connection_is_lost_and_the_load_ends_well(qemu: Qemu) -> None:
    qemu.failure = a_loss()
    result = await load(qemu)
    assert qemu.calls == ["stop", "load", "reconnect", "outcome", "cont"]
    assert result.runstate == "running"
    assert qemu.journal.record.work is None
    _, attempt = await attempt_of(qemu)
    assert await attempt.load("disk0", ["disk0", "disk1"]) is False, "it was not seen"


async def test_the_connection_is_lost_and_the_load_fails(qemu: Qemu) -> None:
    qemu.failure, qemu.outcome = a_loss(), a_failure()
    with pytest.raises(GuestLeftStopped, match="Error -22"):
        await load(qemu)
    assert qemu.calls == ["stop", "load", "reconnect", "outcome"]


async def test_the_connection_is_lost_when_the_guest_is_to_be_paused(qemu: Qemu) -> None:
    _, attempt = await attempt_of(qemu)
    qemu.state, qemu.lost_once = RunState.RESTORE_VM, True
    await attempt.leave_paused(runs=False)
    assert qemu.calls == ["reconnect", *PAUSED]
    assert qemu.state is RunState.PAUSED


@pytest.mark.parametrize("fails", [False, True])
async def test_an_interrupt_waits_for_the_end_of_the_load(qemu: Qemu, fails: bool) -> None:
    """It goes on inside QEMU. Only if it went well does the guest run on."""
    qemu.settles, qemu.outcome = False, a_failure() if fails else None
    task = asyncio.create_task(load(qemu))
    async with asyncio.timeout(DEADLINE_S):
        await qemu.loading.wait()
        task.cancel()
        with pytest.raises(GuestLeftStopped if fails else asyncio.CancelledError) as interrupted:
            await task
    assert qemu.calls == ["stop", "load", "settle", *([] if fails else ["cont"])]
    if not fails:
        assert "the load of 't' had begun and was completed" in interrupted.value.__notes__
    assert (qemu.journal.record.work, qemu.journal.record.stopped) == (None, False)


class Watcher:
    """A guard that is there."""

    pid = 7

    async def ready(self) -> None:
        pass


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (Watcher(), "The guest is stopped; process 7, its guard, resumes it if the load goes well"),
        (None, "The guest is stopped; look at its run state before you `cont` it"),
    ],
)
async def test_qemu_does_not_answer_after_an_interrupt(qemu: Qemu, guard: Watcher | None, words: str) -> None:
    """Nobody but the guard may resume the guest before the end is known."""
    qemu.settles = qemu.answers = False
    qemu.journal.guard = guard
    qemu.journal.patience_s = 0.01
    task = asyncio.create_task(load(qemu))
    async with asyncio.timeout(DEADLINE_S):
        await qemu.loading.wait()
        task.cancel()
        with pytest.raises(GuestLeftStopped) as left:
            await task
    assert words in str(left.value)
    assert "cont" not in qemu.calls
    assert qemu.journal.record.work == LoadWork(was_running=True, stage=LoadStage.BEGUN)


async def test_a_guard_that_is_not_ready(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is, QEMU is not told to forget a failure, because the guard might have to put settings back."""

    class Absent(Watcher):
        async def ready(self) -> None:
            raise QsnapError("the guard did not start")

    monkeypatch.setattr(Qemu, "live", object())
    qemu.journal.guard = Absent()
    with pytest.raises(QsnapError, match="the guard did not start"):
        await _forget_failure(Run(qemu, journal=qemu.journal), "t")


# Translated code


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.PAUSED])
async def test_translated_code_that_stays(qemu: Qemu, state: RunState) -> None:
    """Of a guest that stops before QEMU can drop it. Nothing is loaded, a guest that ran is resumed, and the way out is
    told: whether a reset ends QEMU is not seen."""
    qemu.state, qemu.translates, qemu.stops = state, True, RunState.GUEST_PANICKED
    with pytest.raises(JobFailed, match="QEMU keeps code that it has translated") as kept:
        await load(qemu)
    assert "RAM and disks are as they were. Reset the guest first: by QMP" in kept.value.outcome
    assert qemu.state is (RunState.GUEST_PANICKED if state is RunState.PAUSED else state)
    assert "load" not in qemu.calls
    assert "reset" not in qemu.calls
    assert {work for what, work in qemu.works if what[0] == "`"} == {LoadStage.FLUSHING}
    assert qemu.journal.record.work is None


async def test_the_monitor_is_lost_while_translated_code_is_dropped(qemu: Qemu) -> None:
    """Over the new connection QEMU is told to translate as ever, and the guest is paused as before."""
    qemu.state, qemu.translates = RunState.PAUSED, True
    answer, lines, is_lost = qemu.human_answer, list[str](), False

    async def human_answer(line: str) -> str:
        nonlocal is_lost
        if is_lost and "reconnect" not in qemu.calls:
            raise a_loss()
        lines.append(line)
        is_lost = is_lost or line.startswith("loadvm")
        return await answer(line)

    qemu.human_answer = human_answer  # type: ignore[method-assign]
    with pytest.raises(MonitorLost):
        await load(qemu)
    assert lines[-3:] == ["one-insn-per-tb off", "cont", "stop"]
    assert (qemu.state, qemu.journal.record.work) == (RunState.PAUSED, None)


async def test_translated_code_that_a_reset_ends(qemu: Qemu) -> None:
    """Where a reset does not end QEMU, as its command line tells."""
    qemu.pid = os.getpid()
    qemu.state, qemu.translates, qemu.stops = RunState.GUEST_PANICKED, True, RunState.GUEST_PANICKED

    async def reset() -> None:
        qemu.note("reset")
        qemu.state, qemu.stops = RunState.PRELAUNCH, None

    qemu.reset = reset  # type: ignore[method-assign]
    result = await load(qemu)
    assert result.runstate == "running"
    assert qemu.calls[-5:] == ["reset", "`cont`", "`loadvm`", "load", "cont"]


# The state file of a live snapshot


@pytest.fixture
def live(tmp_path: Path) -> Run:
    """A guest whose snapshot "l" has its state in a file."""

    class Store(StateStore):
        error: OSError | None = None

        def opened(self, file: StateFile) -> int:
            if self.error:
                raise self.error
            return super().opened(file)

    monitor = Qemu(live_obstacle="")
    store = Store(None, tmp_path)
    asyncio.run(monitor.snapshot_save("l", "", ["disk0", "disk1"]))
    graph = asyncio.run(monitor.block_graph())
    path = store.path_for(graph, "disk0", "l")
    written(path, Content("l", str(store.identity(graph, "disk0")), 9, DATE, 1))
    return Run(monitor, store)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (None, None, ""),
        (OSError(errno.EIO, "Input/output error"), JobFailed, "open failed: .*: Input/output error; .* not touched"),
        (PermissionError(errno.EPERM, "it is somebody's"), PrecheckRefused, "is not handed to QEMU: it is somebody's"),
    ],
)
def test_a_state_file_that_cannot_be_opened(
    live: Run, error: OSError | None, kind: type[QsnapError] | None, words: str
) -> None:
    live.store.error = error  # type: ignore[attr-defined]
    before = open_files()
    if kind is None:
        assert asyncio.run(check_load(live, "l")).kind == "live"
    else:
        with pytest.raises(kind, match=words):
            asyncio.run(check_load(live, "l"))
    assert open_files() == before


class Nodes:
    """The node of the state file."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu

    async def close_lingering_files(self) -> None:
        pass

    async def add_state_node(self, file: int, node: str) -> None:
        assert os.fstat(file).st_size
        self.qemu.note("node")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_state_file_is_handed_to_qemu_if_it_is_whole(
    live: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """And it is taken away again."""
    qemu = live.monitor
    assert isinstance(qemu, Qemu)

    async def tidy() -> None:
        qemu.note("tidied")

    qemu.tidy = tidy  # type: ignore[method-assign]
    qemu.calls.clear()
    monkeypatch.setattr(Qemu, "live", Nodes(qemu))
    if damaged:
        (path,) = tmp_path.glob("*.qsnap")
        with path.open("r+b") as file:  # where its active L1 table begins
            at = int.from_bytes(os.pread(file.fileno(), 8, 40), "big")
            os.pwrite(file.fileno(), b"\1", at + 8)
        with pytest.raises(PrecheckRefused, match="is damaged: ") as refused:
            asyncio.run(do_loadvm(live, LoadRequest(tag="l")))
        assert "the guest was not touched" in str(refused.value)
        assert qemu.calls == ["tidied"]
    else:
        result = asyncio.run(do_loadvm(live, LoadRequest(tag="l")))
        assert (result.vmstate, result.file is not None) == (None, True)
        assert qemu.calls == ["node", "stop", "load", "cont", "tidied"]


# The comparison of RAM with the snapshot


class Compared:
    """A comparison, which finds no difference."""

    was_resumed = False

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu

    async def differing(self) -> int:
        self.qemu.note(f"compared, {'stopped' if self.qemu.journal.record.stopped else 'to stay so'}")
        return 0


@pytest.mark.parametrize(("fails", "running"), [(None, None), (None, False), (1, None), (2, None)])
async def test_a_comparison_before_the_load_and_after_it(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch, fails: int | None, running: bool | None
) -> None:
    """That RAM cannot be compared is found out before the guest is touched, or at least before anything is loaded.

    A guest that is to be paused is not resumed by its guard, whatever ends the last comparison. If a moment has to pass
    before it is, it is compared before that.
    """
    begun = 0

    @asynccontextmanager
    async def comparison(*_: object, only_checks: bool = False) -> AsyncIterator[Compared]:
        nonlocal begun
        begun += 1
        assert only_checks is (begun == 1)
        if begun == fails:
            raise NoDelta("this user may not read QEMU's memory")
        yield Compared(qemu)

    monkeypatch.setattr(delta, "comparison", comparison)
    qemu.journal.member = Others(qemu)  # type: ignore[assignment]
    loading = do_loadvm(Run(qemu, journal=qemu.journal), LoadRequest(tag="t", full=True, verify=True, running=running))
    before = ["CHECKED", "READY", "stop", "STOPPED"]
    if fails:
        with pytest.raises(NotSupported, match="this user may not read QEMU's memory"):
            await loading
        assert qemu.calls == ([] if fails == 1 else [*before, "cont"])
        return
    result = await loading
    after = (
        ["compared, stopped", "WRITTEN", "cont"] if running is None else ["compared, to stay so", *PAUSED, "WRITTEN"]
    )
    assert qemu.calls == [*before, "decided", "load", *after]
    assert (result.why_full, result.differing_pages) == ("it was asked for", 0)


@pytest.mark.parametrize(
    ("running", "may_sleep", "asleep"),
    [(True, False, True), (True, True, True), (None, False, True), (True, False, False)],
)
async def test_a_guest_that_was_saved_asleep(qemu: Qemu, running: bool | None, may_sleep: bool, asleep: bool) -> None:
    """It is loaded, and sleeps: only for who wants it to run is that an error."""

    async def cont() -> float | None:
        qemu.state = RunState.SUSPENDED if asleep else RunState.RUNNING
        return None

    qemu.cont = cont  # type: ignore[method-assign]
    loading = do_loadvm(Run(qemu), LoadRequest(tag="t", running=running, may_sleep=may_sleep))
    if running and asleep and not may_sleep:
        with pytest.raises(QsnapError, match=r"'t' was loaded, but the guest does not run: .* it sleeps \(S3\)"):
            await loading
    else:
        assert (await loading).runstate == ("suspended" if asleep else "running")


async def test_where_the_guest_was_does_not_count_any_more(qemu: Qemu) -> None:
    run = Run(qemu)
    run.remember()
    await do_loadvm(run, LoadRequest(tag="t"))
    assert run.token
    assert f"{HERE}{run.token}" in qemu.texts


async def test_a_guest_that_stops_again_at_once(qemu: Qemu) -> None:
    """It is told what was done to it."""

    async def cont() -> float | None:
        qemu.state = RunState.IO_ERROR
        return None

    qemu.cont = cont  # type: ignore[method-assign]
    with pytest.raises(GuestLeftStopped, match="'t' was loaded; since then the guest is io-error"):
        await load(qemu)


# A migration that has failed


class Migrations:
    """What QEMU keeps of a migration that has failed."""

    def __init__(self, qemu: Qemu, *, stays: bool) -> None:
        self.qemu = qemu
        self.error = "Unable to write to socket"
        self.stays = stays

    def note(self, what: str) -> None:
        record = self.qemu.journal.record
        self.qemu.calls.append(f"{what}, {record.settings}, {record.forgetting}")

    async def settings(self) -> dict[str, str]:
        return {"a": "b"}

    async def forget_failure(self) -> None:
        self.note("forgotten")
        if self.stays:
            raise JobFailed("migrate", "it is kept")
        self.error = ""

    async def put_back(self, _: object) -> None:
        self.note("put back")

    async def close_lingering_files(self) -> None:
        self.qemu.note("files of earlier loads closed")


@pytest.mark.parametrize("stays", [True, False])
async def test_a_failure_that_would_spoil_the_load(qemu: Qemu, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    """It is forgotten before anything is touched; and what that takes is put back, whatever comes of it."""
    migrations = Migrations(qemu, stays=stays)
    monkeypatch.setattr(Qemu, "live", migrations)
    qemu.live_obstacle = ""

    async def migration() -> Migration:
        return Migration(status="failed", error=migrations.error)

    qemu.migration = migration  # type: ignore[method-assign]
    calls = ["forgotten, {'a': 'b'}, True", "put back, {'a': 'b'}, True"]
    if stays:
        with pytest.raises(PrecheckRefused, match="'t' cannot be loaded now"):
            await load(qemu)
    else:
        await load(qemu)
        calls += ["files of earlier loads closed", "stop", "load", "cont"]
    assert qemu.calls == calls
    assert not qemu.journal.record.forgetting
