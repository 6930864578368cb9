"""What is done when a run has died: resume the guest that it had stopped, and clear up what it had under way.

Its guard does that at once. If the guard died too, the next qsnap on the VM does it, from the journal. If that cannot
be read (another user's, another machine's), the mark in QEMU says whose run it was, and only the guest is resumed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from qsnap.errors import (
    CommandFailed,
    ConnectError,
    GuestLeftStopped,
    JobFailed,
    MonitorBusy,
    MonitorError,
    MonitorLost,
    QsnapError,
)
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph, RunState
from qsnap.model.results import Recovered
from qsnap.model.runstates import HAS_ENDED, cure_of, is_live
from qsnap.monitor import Monitor, adopt_monitor, open_monitor
from qsnap.monitor.names import CLAIM, HALF_RESTORED, RECOVERY
from qsnap.operations.delete import delete_all
from qsnap.operations.live.save import LiveSaveAttempt
from qsnap.operations.save import SaveAttempt
from qsnap.operations.translation import end_flush
from qsnap.runs import mark
from qsnap.runs.journal import Journal
from qsnap.runs.mark import decode
from qsnap.runs.record import DeleteWork, LiveWork, LoadStage, LoadWork, SaveWork

#: Seconds between two tries to reach QEMU, or to have it resume the guest.
_RETRY_S = 0.2
#: Tries with a QEMU that answers what cannot be understood.
_ANSWER_TRIES = 20
#: Tries at a `cont` that QEMU refuses, as it does while it writes a dump.
_CONT_TRIES = 300
#: Seconds for QEMU's greeting; it sends none while it writes.
_GREETING_S = 120.0
#: Seconds for which nobody may listen at the monitor's address before the guard gives up; the journal stays.
_UNREACHABLE_S = 10.0


async def after_death(journal: Journal, connection: socket.socket | None) -> None:
    """The guard's work: see the dead run's affairs through, however long QEMU takes to answer.

    :param connection: the dead run's connection; if it is broken, the guard makes new ones as long as that QEMU runs.
    """
    monitor = await _inherited(journal, connection) if connection else None
    tries_left = _ANSWER_TRIES
    while monitor := monitor or await _reached(journal):
        try:
            done = await recover(monitor, journal)
        except (MonitorLost, MonitorBusy, ConnectError):
            pass
        except QsnapError as error:
            tries_left = tries_left - 1 if isinstance(error, MonitorError) else 0
            if not tries_left:
                deed = journal.record.deed
                _report(f"the guest of a qsnap that died ({deed}) could not be cleaned up after: {error}")
                return  # the journal stays, and so does the mark: the next qsnap reports them
        else:
            deeds = "; ".join(done.actions) or "nothing to do"
            _report(f"cleaned up after a qsnap that died ({journal.record.deed}): {deeds}")
            return
        finally:
            await monitor.aclose()  # a monitor serves one client: the next connection would wait for this one
        monitor = None
        await asyncio.sleep(_RETRY_S)
    journal.close(remove=not _may_live(journal))


async def recover(monitor: Monitor, journal: Journal) -> Recovered:
    """Finish the run that *journal* belongs to, and remove the journal and the run's mark.

    The guest comes first. Half-made results of the run are removed, as after an interrupt.

    :raise GuestLeftStopped: QEMU does not resume it.
    """
    record = journal.record
    assert record.owner is not None
    actions: list[str] = []
    # Without the run's mark this is another QEMU, or the run had not begun, or was at its very end
    if await mark.is_of(monitor, CLAIM, record.token):
        await monitor.take_over(record.owner.pid)
        if isinstance(record.work, LoadWork):
            actions += await _end_load(monitor, journal, record.work)
        if journal.record.stopped:
            actions += await _resume(monitor)
            journal.done(stopped=False)
        await monitor.settle()
        actions += await _clear_up(monitor, journal)
        await mark.give_up(monitor, CLAIM, record.token)
    journal.close(remove=True)
    return Recovered(
        operation=record.operation, tags=record.tags, pid=record.owner.pid, began=record.began, actions=tuple(actions)
    )


async def recover_by_mark(monitor: Monitor, text: str, *, force: bool = False) -> Recovered | None:
    """Resume the guest of a dead run of which there is no journal, and remove its mark.

    What a save has half made is not known; it shows in the list of snapshots. A mark that cannot be read does not tell
    whether its run stopped the guest, so the guest stays as it is.

    :param text: the text of the run's mark.
    :param force: also if another process that recovers the run may still live.
    :return: None if another process recovers the run, or has done so.
    """
    holder = decode(text)
    ours = mark.of_this_process("recover", holder.tag if holder else "")
    if not await monitor.set_mark(RECOVERY, ours.encode()):
        other = decode(await monitor.mark(RECOVERY) or "")
        if not other.is_alive if other and other.is_here else force:
            await monitor.clear_mark(RECOVERY)  # the next look at the claim tries again
        return None
    try:
        if await monitor.mark(CLAIM) != text:
            return None
        actions: tuple[str, ...] = ()
        if holder is None:
            runstate = await monitor.runstate()
            cure = "" if is_live(runstate) else ": nothing tells what stopped it. If that was a save, `cont` it"
            actions = (f"the claim was taken away, and the guest was left as it is, {runstate}{cure}",)
        # No guest that a load has stopped is resumed blindly
        elif holder.was_running and holder.operation == "save":
            actions = tuple(await _resume(monitor))
        await monitor.clear_mark(CLAIM)
    finally:
        await mark.give_up(monitor, RECOVERY, ours.token)
    if holder is None:
        return Recovered(operation="", tags=(), pid=0, began="", actions=actions)
    return Recovered(
        operation=holder.operation, tags=(holder.tag,), pid=holder.owner.pid, began=holder.began, actions=actions
    )


async def _end_load(monitor: Monitor, journal: Journal, work: LoadWork) -> list[str]:
    """How the load of the dead run ended: the guest may run on only if that was well."""
    record = journal.record
    failure: QsnapError | None
    if work.stage in (LoadStage.FLUSHING, LoadStage.LOADED):
        await end_flush(monitor, was_running=work.was_running)
        journal.done(work=None)
        return []
    if work.stage is LoadStage.FAILED:
        failure = QsnapError("QEMU reported an error")
    elif work.stage is LoadStage.UNSURE:
        failure = QsnapError("nobody has compared what it made")
    else:
        unseen = QsnapError("nobody has seen how the load ended")
        failure = await monitor.load_outcome(unseen, was_running=work.was_running)
    journal.done(work=None, stopped=record.stopped and failure is None)
    if failure is None:
        return []
    await monitor.set_mark(HALF_RESTORED, "yes")
    return [
        f"the load of {', '.join(record.tags)} has failed midway ({failure}): RAM and disks may be half restored, and "
        "the guest is left stopped on purpose; load a good snapshot"
    ]


async def _resume(monitor: Monitor) -> list[str]:
    """Resume the guest, if it is still stopped.

    :raise GuestLeftStopped: QEMU will not.
    """
    for attempt in range(_CONT_TRIES):
        if is_live(runstate := await monitor.runstate()):
            return []
        try:
            await monitor.cont()
        except CommandFailed as error:
            if runstate in HAS_ENDED:
                return [f"the guest is {runstate}: {cure_of(runstate)}"]
            refusal = error
            await asyncio.sleep(_RETRY_S)
            continue
        if is_live(runstate := await monitor.runstate()):
            return ["the guest was resumed"]
        if runstate is RunState.PAUSED and attempt == 0:
            continue  # as in qsnap.runs.pause: a live save's stream has just begun
        return [f"the guest was resumed, and is {runstate}: {cure_of(runstate)}"]
    raise GuestLeftStopped(f"the guest is stopped, and QEMU does not resume it: {refusal.reason}")


async def _clear_up(monitor: Monitor, journal: Journal) -> list[str]:
    """Undo or complete the half-done work of the dead run; return what was done, in words."""
    record, work = journal.record, journal.record.work
    if record.is_done:
        return []
    graph = await monitor.block_graph()
    devices = rules.survey(graph).devices
    if isinstance(work, LiveWork):
        return [await LiveSaveAttempt(monitor, journal, devices).undo()]
    if record.forgetting:
        await monitor.live.end_stream()
    if record.settings:
        await monitor.live.put_back(record.settings)
    if record.operation == "load":
        await monitor.tidy()
    if isinstance(work, SaveWork) and work.has_begun:
        _, sentence = await SaveAttempt(monitor, journal, devices).undo(keeps_whole=True)
        return [sentence]
    return await _completed(monitor, graph, devices, journal) if isinstance(work, DeleteWork) else []


async def _completed(monitor: Monitor, graph: BlockGraph, devices: Sequence[Device], journal: Journal) -> list[str]:
    """Complete a deletion, if it has begun; that of a group, if it was decided."""
    record, work = journal.record, journal.record.work
    assert isinstance(work, DeleteWork)
    held = [snapshots.holders(graph, devices, tag) for tag in work.disk_tags]
    files = [file for file in work.files if os.path.lexists(file)]  # noqa: ASYNC240 (no waiting)
    has_begun = journal.is_decided
    if has_begun is None:
        has_begun = any(nodes != work.devices for nodes in held) or len(files) < len(work.files)
    if not has_begun or not (any(held) or files):
        return []
    deletion = f"the deletion of {', '.join(map(repr, record.tags))}"
    try:
        await delete_all(monitor, devices, work.disk_tags, files)
    except JobFailed as error:  # it shows in the list, and may be tried again
        return [f"{deletion} could not be completed: {error}"]
    return [f"{deletion} was completed"]


async def _inherited(journal: Journal, connection: socket.socket) -> Monitor | None:
    try:
        return await adopt_monitor(connection, journal.record.where, journal.record.transport)
    except MonitorError:
        connection.close()
        return None


async def _reached(journal: Journal) -> Monitor | None:
    """A new connection to the same QEMU; None if that has ended, or nobody listens there any more."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + _UNREACHABLE_S
    while _may_live(journal):
        try:
            return await open_monitor(journal.record.where, timeout_s=_GREETING_S)
        except ConnectError:
            if clock() > deadline:
                return None
        except MonitorError:
            deadline = clock() + _UNREACHABLE_S  # it is there, and busy
        await asyncio.sleep(_RETRY_S)
    return None


def _may_live(journal: Journal) -> bool:
    qemu = journal.record.qemu
    return qemu is None or qemu.is_alive


def _report(sentence: str) -> None:
    """Write to the system's log, because nobody waits for a guard."""
    import syslog

    with suppress(OSError):
        syslog.openlog("qsnap", syslog.LOG_PID, syslog.LOG_USER)
        syslog.syslog(syslog.LOG_WARNING, sentence.encode("unicode_escape").decode())
