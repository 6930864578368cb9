"""The one place that stops a guest and makes sure that it runs again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

from qsnap.errors import CommandFailed, GuestLeftStopped, MonitorBusy, MonitorError, MonitorLost, QsnapError
from qsnap.model.qemu import QemuVersion, RunState
from qsnap.model.runstates import HAS_ENDED, cure_of, happened, is_live, takes_stop
from qsnap.monitor import Monitor
from qsnap.monitor.connection import AnotherAnswers
from qsnap.monitor.names import CLAIM
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.mark import is_of
from qsnap.runs.record import LiveWork
from qsnap.runs.shield import shielded

#: Seconds for a new connection after the old one was lost: QEMU greets nobody while it writes.
RECONNECT_TIMEOUT_S = 120.0
#: Attempts to make a new connection, with a little time between them: what cut one may cut the next.
RECONNECT_ATTEMPTS = 4


class Pause:
    """A stop of the guest.

    :ivar was_running: whether the guest was running before, or slept (S3) if QEMU resumes it to that.
    :ivar resume: whether the guest will run afterwards; the sequence may change this.
    :ivar runstate: the guest's run state: before the block, and after it when the block is left.
    :ivar deed: a clause for a message: what was done to the guest so far.
    """

    def __init__(self, runstate: RunState, version: QemuVersion, *, by_qemu: bool = False) -> None:
        self.runstate = runstate
        self._by_qemu = by_qemu
        self.was_running = takes_stop(runstate, version)
        self.resume = self.was_running
        self.deed = ""
        self._began: tuple[float | None, float] = (None, 0.0)
        self._ended: tuple[float | None, float] = (None, 0.0)

    @property
    def pause_ms(self) -> float:
        """Milliseconds that the guest stood still, once it runs again: by QEMU's STOP and RESUME time stamps,
        by our own clock where they did not come; 0.0 if it was not stopped or does not run."""
        (qemu_began, began), (qemu_ended, ended) = self._began, self._ended
        if not ended:
            return 0.0
        if qemu_began is not None and qemu_ended is not None:
            return (qemu_ended - qemu_began) * 1000
        return (ended - began) * 1000

    def resumed_by_qemu(self, stamp: float | None) -> None:
        """QEMU has resumed the guest by itself.

        :param stamp: QEMU's time stamp of it.
        """
        self._by_qemu = True
        self._ended = (stamp, time.monotonic())

    async def _stop(self, monitor: Monitor) -> None:
        began = time.monotonic()
        self._began = (await monitor.stop(), began)

    async def _resume(self, monitor: Monitor) -> None:
        if not self._by_qemu or not is_live(await monitor.runstate()):
            self._ended = (await monitor.cont(), time.monotonic())
        self.runstate = await monitor.runstate()

    def runs_no_more(self, runstate: RunState) -> QsnapError:
        """The error for a guest that was to run, and came into *runstate* by itself."""
        kind, was = (GuestLeftStopped, "was running") if self.was_running else (QsnapError, "was to run")
        if self.deed:
            why = f" ({words})" if (words := happened(runstate)) else ""
            return kind(f"{self.deed}; since then the guest is {runstate}{why}: {cure_of(runstate)}")
        return kind(f"the guest {was} and is {runstate}: {cure_of(runstate)}")


@asynccontextmanager
async def stopped(monitor: Monitor, journal: Journal, *, by_qemu: bool = False) -> AsyncIterator[Pause]:
    """Keep the guest stopped for the duration of a block.

    However the block is left (by an error, a cancellation, several of them), a guest that was running runs again, and
    one that was paused stays paused, unless the block set ``pause.resume`` otherwise. If this process is killed in the
    block, the guard of *journal* resumes the guest; it is ready before the guest is stopped. A block that wants it to
    stay stopped notes that in *journal*, too.

    The guests of a group are stopped as close together as can be, and none runs on before all are stopped.

    :param by_qemu: leave the stop to the command in the block, and see that the guest runs afterwards.
    :raise Abandoned: the run on another VM of the group has failed.
    :raise GuestLeftStopped: the guest was running and could not be resumed; what happened first is the context.
    :raise QsnapError: a guest that was not running before, and was to run, could not be resumed.
    """
    pause = Pause(await monitor.runstate(), monitor.version, by_qemu=by_qemu)
    await journal.armed()
    await journal.meet(Point.READY)
    try:
        if pause.was_running and not by_qemu:
            journal.note(stopped=True)
            await pause._stop(monitor)
            if journal.member is not None:
                journal.member.stopped = pause._began
        await journal.meet(Point.STOPPED)
        yield pause
        if not pause.resume:
            pause.runstate = await monitor.runstate()
    finally:
        if pause.resume:
            try:
                await shielded(_resume(monitor, pause, journal), journal.patience_s)
            except QsnapError as error:
                await _explain_failed_resume(monitor, pause, journal, error)
            if journal.member is not None and pause.pause_ms:
                journal.member.resumed = pause._ended
            if not is_live(pause.runstate):
                raise pause.runs_no_more(pause.runstate)  # QEMU resumed it, and it has stopped by itself


async def _resume(monitor: Monitor, pause: Pause, journal: Journal) -> None:
    """Resume the guest; over a new connection, if the one that stopped it is lost."""
    try:
        await pause._resume(monitor)
    except MonitorLost:
        await reconnect(monitor, journal)
        await pause._resume(monitor)
    if pause.runstate is RunState.PAUSED and isinstance(journal.record.work, LiveWork):
        # QEMU puts the "paused" of before back when its stream has begun, which may be after our `cont` (from 9.0 on,
        # migration.c: bg_migration_vm_start_bh; seen on 11.1 after a live save that failed)
        await pause._resume(monitor)
    journal.done(stopped=False)


async def reconnect(monitor: Monitor, journal: Journal) -> None:
    """Make a new connection to the same QEMU: the one that has the mark of the run of *journal*.

    Over TCP we see no process, behind a proxy only the proxy's, and process ids are reused: only the mark tells. What
    answers without it is left as it is, and :func:`has_ended` knows of that.

    :raise AnotherAnswers: it is another QEMU.
    :raise MonitorError: none of several tries came through.
    """
    for attempt in range(1, 1 + RECONNECT_ATTEMPTS):
        try:
            await monitor.reconnect(RECONNECT_TIMEOUT_S)
            if journal.record.token and not await is_of(monitor, CLAIM, journal.record.token):
                await monitor.aclose()
                raise AnotherAnswers(journal.record.where)
        except MonitorBusy:
            raise
        except AnotherAnswers:
            journal.another_answers = True
            raise
        except MonitorError:
            if attempt == RECONNECT_ATTEMPTS:
                raise
            await asyncio.sleep(0.2 * attempt)
        else:
            return


async def _explain_failed_resume(monitor: Monitor, pause: Pause, journal: Journal, error: Exception) -> NoReturn:
    if isinstance(error, MonitorError) and await has_ended(journal):
        journal.done(stopped=False)
        more = f", and {error}" if isinstance(error, AnotherAnswers) else ""
        raise MonitorLost(f"QEMU has ended; there is no guest any more{more}") from error
    if isinstance(error, CommandFailed) and (runstate := await monitor.runstate()) in HAS_ENDED:
        journal.done(stopped=False)
        raise pause.runs_no_more(runstate) from error
    state = "was running and is stopped now" if pause.was_running else "is still stopped"
    cure = "Connect again and send `cont`" if isinstance(error, MonitorError) else "Try `cont` in its monitor"
    if pause.was_running and journal.guard_pid is not None:
        cure = f"Process {journal.guard_pid}, its guard, goes on trying. If that is in vain: {cure}"
    failure = GuestLeftStopped if pause.was_running else QsnapError
    raise failure(f"the guest {state}, and resuming it failed: {str(error).rstrip('.')}. {cure}") from error


async def has_ended(journal: Journal) -> bool:
    """Whether the QEMU of a run ends within a second: its sockets close a little before its process ends.

    If its own process cannot be seen, it has ended when another QEMU has taken its place.
    """
    qemu = journal.record.qemu
    if qemu is not None:
        for _ in range(20):
            if not qemu.is_alive:
                return True
            await asyncio.sleep(0.05)
    if not journal.another_answers:
        return False
    from qsnap.targets.running import is_qemu

    return qemu is None or not is_qemu(qemu.pid)
