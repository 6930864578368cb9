"""QEMU's load, once it has begun, and its end: it went well, was refused, failed midway, or is not known."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorError,
    MonitorLost,
    OperationTimeout,
    QsnapError,
    SnapshotNotFound,
)
from qsnap.model.runstates import is_live
from qsnap.monitor.names import HALF_RESTORED
from qsnap.operations.plan import LoadPlan
from qsnap.operations.translation import end_flush, leave_restore_vm
from qsnap.runs.pause import Pause, has_ended, reconnect
from qsnap.runs.record import LoadStage, LoadWork
from qsnap.runs.run import Run
from qsnap.runs.shield import shielded

#: What QEMU says before it has touched anything (migration/savevm.c and block/snapshot.c: load_snapshot), 5.2 to 11.1.
_UNTOUCHED = (
    "does not exist in one or more devices",
    "does not have the requested snapshot",
    "Snapshot can not be found",
    "This is a disk-only snapshot",
    "is writable but does not support snapshots",
    "No block device node",
)

#: What QEMU says of a disk that it does not take back, by its own name for it (block/snapshot.c: bdrv_snapshot_goto,
#: bdrv_all_goto_snapshot). It says so when that disk's turn has come.
_HAS_BITMAPS = re.compile(r"' on '([^']*)': Device has active dirty bitmaps")


class LoadAttempt:
    """A load of what was planned, by QEMU, for a guest that is stopped.

    :ivar was_running: the guest ran before.
    """

    def __init__(self, run: Run, plan: LoadPlan, pause: Pause) -> None:
        self._run = run
        self._monitor = run.monitor
        self._journal = run.journal
        self._plan = plan
        self._pause = pause
        self._is_touched = False
        self.was_running = pause.was_running

    async def load(self, vmstate: str, devices: Sequence[str], *, is_sure: bool = True) -> bool:
        """Have QEMU load *vmstate* into *devices*, and wait until it has; whether that was seen on this connection.

        :param is_sure: the guest may run if the load ends well. Else its guard leaves it stopped, until
            :meth:`be_sure`.
        :raise JobFailed: QEMU reported an error: see :meth:`fail`.
        :raise GuestLeftStopped: the outcome is unknown, or the load was interrupted and has failed.
        """
        stage = LoadStage.BEGUN if is_sure else LoadStage.UNSURE
        self._journal.note(work=LoadWork(was_running=self.was_running, stage=stage))
        self._is_touched = self._run.loads  # a delta load that was in doubt may have reverted the disks
        self._run.loads = True
        try:
            async with self._monitor.snapshot_load(self._plan.snapshot.disk_tag, vmstate, devices) as failure:
                self._note_end(failure, is_sure=is_sure)
        except MonitorLost as lost:
            if error := await self._awaited(self._outcome_after(lost)):
                await self.fail(error)
            return False
        except asyncio.CancelledError as cancelled:
            # It goes on inside QEMU; only its end tells whether the guest may run
            if error := await self._awaited(self._monitor.settle()):
                await self.fail(error)
            self._note_end(None, is_sure=is_sure)
            cancelled.add_note(f"the load of {self._plan.snapshot.tag!r} had begun and was completed")
            raise
        return True

    def doubt(self) -> None:
        """Leave the guest stopped, whatever ends the block, until :meth:`be_sure`."""
        self._pause.resume = False

    def be_sure(self) -> None:
        """What was loaded is certain: the guest may run."""
        self._note_loaded()
        self._pause.resume = self.was_running

    async def fail(self, failure: QsnapError) -> NoReturn:
        """End a load that has failed: the guest runs again if nothing was loaded, and is left stopped if something may
        have been."""
        if isinstance(failure, JobFailed) and self._has_touched_nothing(failure):
            self._run.loads = False
            await self.leave_paused(runs=self.was_running)
            raise await self._not_loaded(failure) from failure
        self._pause.resume = False
        await shielded(self._left_stopped(failure), self._journal.patience_s)

    async def end_flush(self) -> None:
        """After a flush of translated code that has failed: see :func:`qsnap.operations.translation.end_flush`."""
        await self._again_if_lost(lambda: end_flush(self._monitor, was_running=self.was_running))

    async def leave_paused(self, *, runs: bool) -> None:
        """Make sure that a guest that will not run is paused, and not left in "restore-vm"."""
        if not runs:
            await self._again_if_lost(lambda: leave_restore_vm(self._monitor))

    async def _again_if_lost(self, deed: Callable[[], Awaitable[None]]) -> None:
        try:
            await deed()
        except MonitorLost:
            await reconnect(self._monitor, self._journal)
            await deed()

    def _note_end(self, error: JobFailed | None, *, is_sure: bool) -> None:
        """Note the end of the load in the journal, while QEMU still keeps the job."""
        if error is None:
            if is_sure:
                self._note_loaded()
        elif self._has_touched_nothing(error):
            self._run.loads = False
            self._journal.done(work=None)
        else:
            self._journal.has_advanced(stage=LoadStage.FAILED)

    def _note_loaded(self) -> None:
        loaded = LoadWork(was_running=False, stage=LoadStage.LOADED)
        self._journal.done(work=None if self.was_running else loaded)

    async def _outcome_after(self, lost: MonitorLost) -> QsnapError | None:
        """The error of a load whose connection was lost, found over a new one; None if the load ended well."""
        try:
            await reconnect(self._monitor, self._journal)
            return await self._monitor.load_outcome(lost, was_running=self.was_running)
        except QsnapError as error:
            return error

    async def _awaited(self, ending: Coroutine[Any, Any, QsnapError | None]) -> QsnapError | None:
        """The outcome of the load, as soon as QEMU answers.

        :raise GuestLeftStopped: QEMU does not answer in time, so that the rest is left to the guard.
        """
        try:
            return await shielded(ending, self._journal.patience_s)
        except OperationTimeout as error:
            # Nobody may resume it before the end is known
            self._pause.resume = False
            cure = "look at its run state before you `cont` it"
            if self._journal.guard_pid is not None:
                work = self._journal.record.work
                is_sure = not isinstance(work, LoadWork) or work.stage is not LoadStage.UNSURE
                deed = "resumes it if the load goes well" if is_sure else "leaves it stopped: load again"
                cure = f"process {self._journal.guard_pid}, its guard, {deed}"
            raise GuestLeftStopped(f"the load has not ended: {error}. The guest is stopped; {cure}") from error

    def _has_touched_nothing(self, failure: JobFailed) -> bool:
        """Whether QEMU refused a load before it began: RAM and disks are as they were."""
        if self._is_touched:
            return False
        has_bitmaps = _HAS_BITMAPS.search(failure.reason)
        return bool(has_bitmaps and has_bitmaps[1] == self._plan.first) or any(
            sentence in failure.reason for sentence in _UNTOUCHED
        )

    def _cure_of_bitmaps(self, failure: QsnapError) -> str:
        """What to do about a disk that QEMU did not put back because of its dirty bitmaps; "" for any other failure.

        HMP shows only bitmaps that are already stored in the image (seen on 5.2 to 11.1), so the pre-checks do not
        always find them.
        """
        if not isinstance(failure, JobFailed) or not (found := _HAS_BITMAPS.search(failure.reason)):
            return ""
        return (
            f"Remove the dirty bitmaps of {found[1]} by QMP: query-named-block-nodes tells their names, "
            "block-dirty-bitmap-remove removes them, and the next backup must be a full one. Then load "
            f"{self._plan.snapshot.tag!r} again"
        )

    async def _not_loaded(self, failure: JobFailed) -> QsnapError:
        """The error of a load that QEMU refused, because another client has changed something meanwhile."""
        graph = await self._monitor.block_graph()
        tag, nodes = self._plan.snapshot.tag, [graph.nodes[name] for name in self._plan.devices if name in graph.nodes]
        if any(not node.tagged(self._plan.snapshot.disk_tag) for node in nodes):
            return SnapshotNotFound(tag, f"snapshot {tag!r} was deleted by another client just now; nothing was loaded")
        cure = self._cure_of_bitmaps(failure)
        failure.outcome = f"nothing was loaded: RAM and disks are as they were{'. ' if cure else ''}{cure}"
        return failure

    async def _left_stopped(self, failure: QsnapError) -> NoReturn:
        """After a load that failed midway: make sure that the guest stands still, and report its state.

        :raise GuestLeftStopped: if it was running before.
        :raise MonitorLost: there is no guest any more.
        :raise JobFailed: otherwise.
        """
        monitor, journal = self._monitor, self._journal
        if isinstance(failure, MonitorError) and await has_ended(journal):
            journal.done(stopped=False, work=None)
            # qcow2-snapshot.c: qcow2_snapshot_goto; seen in 1 of 120 loadvm that were killed
            raise MonitorLost(
                "QEMU has ended in the middle of the load; there is no guest any more. It may have left wrong "
                "reference counts in the images: before you start it again, `qemu-img check -r all IMAGE`, on every "
                "disk"
            ) from failure
        with suppress(QsnapError):
            await monitor.set_mark(HALF_RESTORED, "yes")
        with suppress(MonitorError):
            if is_live(await monitor.runstate()):
                # QEMU 6.0.0 resumes after a failed loadvm (fixed in 6.1: c53cd04e70).
                await monitor.stop()
        journal.done(stopped=False, work=None)
        tag = self._plan.snapshot.disk_tag
        bitmaps = self._cure_of_bitmaps(failure)
        good = "Load a good snapshot (`qsnap list`, `qsnap load TAG --running`)"
        cure = f"{bitmaps}, with --running" if bitmaps else good
        outcome = (
            f"RAM and disks may be half restored, so the guest is left stopped on purpose. {cure}, or end QEMU and go "
            f"back offline, disk by disk: `qemu-img snapshot -a {tag} IMAGE`. Do not `cont` it"
        )
        if self.was_running:
            raise GuestLeftStopped(f"{failure}; {outcome}") from failure
        if isinstance(failure, JobFailed):
            failure.outcome = outcome
        raise failure
