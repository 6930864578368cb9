"""Load: QEMU's do_loadvm, looked up on every device before the guest is touched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress

from qsnap.errors import GuestLeftStopped, JobFailed, MonitorError, MonitorLost, PrecheckRefused, QsnapError
from qsnap.model import Finding, LoadResult, RunState, Severity
from qsnap.monitor import Monitor
from qsnap.precheck import LoadPlan, plan_load
from qsnap.stopped import AFTERMATH_TIMEOUT_S, Pause, has_ended, reconnect, stopped
from qsnap.undisturbed import undisturbed


async def do_loadvm(
    monitor: Monitor,
    tag: str,
    *,
    running: bool | None = None,
    exclude: Collection[str] = (),
) -> LoadResult:
    """Put RAM, device state and disks back to what *tag* holds.

    The guest is left in the run state that it had before: QEMU goes by that too, not by the state in which
    it was saved.

    QEMU reverts the disks before it knows whether the state can be loaded, and a load cannot be undone. So a
    load that fails midway leaves the guest stopped on purpose: it must not run on disks and RAM of different
    moments.

    :param running: True to run the guest afterwards, False to leave it paused. Default: as it was.
    :param exclude: devices that keep the contents they have now, as they did when the tag was saved.
    :return: what was loaded.
    :raise SnapshotNotFound: no device holds the tag, or one lacks it; the guest was not touched.
    :raise PrecheckRefused: it would fail, or mix moments; the guest was not touched.
    :raise NotSupported: HMP cannot do it; the guest was not touched.
    :raise GuestLeftStopped: QEMU failed midway and the guest was running; QEMU's error is the cause.
    :raise JobFailed: the same where the guest was not running.
    """
    began = time.monotonic()
    plan = await plan_load(monitor, tag, exclude=exclude)
    async with stopped(monitor) as pause:
        # Nothing can change from here on, so look once more
        if await plan_load(monitor, tag, exclude=exclude) != plan:
            change = Finding(
                code="snapshots-changed",
                severity=Severity.REFUSE,
                message=f"snapshot {tag!r} or the block devices have changed between the check and the stop",
                cure="try again",
            )
            raise PrecheckRefused("nothing was loaded, and the guest was resumed", [change])
        try:
            await monitor.snapshot_load(tag, plan.vmstate, plan.devices)
        except JobFailed as failure:
            await _leave_stopped(monitor, pause, plan, failure)
        except MonitorLost as lost:
            if error := await undisturbed(_outcome_after(lost, monitor), AFTERMATH_TIMEOUT_S):
                await undisturbed(_leave_stopped(monitor, pause, plan, error), AFTERMATH_TIMEOUT_S)
        except asyncio.CancelledError as cancelled:
            # It goes on inside QEMU; only its end tells whether the guest may run
            if error := await undisturbed(monitor.settle(), AFTERMATH_TIMEOUT_S):
                await undisturbed(_leave_stopped(monitor, pause, plan, error), AFTERMATH_TIMEOUT_S)
            cancelled.add_note(f"the load of {tag!r} had begun and was completed")
            raise
        with suppress(QsnapError):
            await monitor.mark_half_restored(False)
        if running is not None:
            pause.resume = running
    snapshot = plan.snapshot
    return LoadResult(
        tag=tag,
        vmstate=plan.vmstate,
        devices=plan.devices,
        excluded=plan.excluded,
        vm_state_size=snapshot.vm_state_size,
        date=snapshot.date,
        vm_clock_ns=snapshot.vm_clock_ns,
        duration_ms=round((time.monotonic() - began) * 1000, 3),
        runstate=pause.runstate,
        labels=snapshot.labels,
    )


async def _outcome_after(lost: MonitorLost, monitor: Monitor) -> QsnapError | None:
    """How a load ended whose connection was lost, as a new one tells; None if it is seen to have ended well."""
    try:
        await reconnect(monitor)
        # HMP has no job that could be asked.
        return await monitor.settle() if monitor.chooses_devices else lost
    except QsnapError as error:
        return error


async def _leave_stopped(monitor: Monitor, pause: Pause, plan: LoadPlan, failure: QsnapError) -> None:
    """After a load that failed midway: see that the guest stands still, and say how things are.

    :raise GuestLeftStopped: if it was running before.
    :raise MonitorLost: there is no guest any more.
    :raise JobFailed: otherwise.
    """
    pause.resume = False
    if isinstance(failure, MonitorError) and await has_ended(monitor):
        raise MonitorLost("QEMU has ended; there is no guest any more") from failure
    with suppress(QsnapError):
        await monitor.mark_half_restored(True)
    with suppress(MonitorError):
        if await monitor.runstate() is RunState.RUNNING:
            # QEMU 6.0.0 resumes after a failed loadvm (fixed in 6.1: c53cd04e70).
            await monitor.stop()
    tag = plan.snapshot.tag
    outcome = (
        f"RAM and disks may be half restored, so the guest is left stopped on purpose. Load a good snapshot "
        f"(`qsnap list`, `qsnap load TAG --running`), or end QEMU and go back offline, disk by disk: "
        f"`qemu-img snapshot -a {tag} IMAGE`. Do not `cont` it"
    )
    if pause.was_running:
        raise GuestLeftStopped(f"{failure}; {outcome}") from failure
    if isinstance(failure, JobFailed):
        failure.outcome = outcome
    raise failure
