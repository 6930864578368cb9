"""Load: QEMU's do_loadvm, looked up on every device before the guest is touched."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from qsnap.errors import (
    UNTOUCHED,
    GuestLeftStopped,
    JobFailed,
    PrecheckRefused,
    QsnapError,
)
from qsnap.host.log import ErrorOutput
from qsnap.model.checks import Finding
from qsnap.model.qemu import RunState
from qsnap.model.requests import LoadRequest
from qsnap.model.results import LoadResult
from qsnap.model.runstates import cure_of, needs_reset, runs_after_load
from qsnap.model.snapshots import Origin, Snapshot
from qsnap.monitor import Monitor
from qsnap.monitor.names import HALF_RESTORED, state_node
from qsnap.operations.delta.load import Load, Source, refuse_flawed, refuse_incomparable
from qsnap.operations.findings import spoiled_finding
from qsnap.operations.load_attempt import LoadAttempt
from qsnap.operations.plan import LoadPlan, plan_load
from qsnap.operations.position import leave_position, origin_of
from qsnap.operations.reset import RESET_CURE, reboots, reset
from qsnap.operations.same_machine import refuse_other_devices, refuse_other_machine
from qsnap.operations.translation import flush_translations
from qsnap.runs.group import Point
from qsnap.runs.journal import AFTERMATH_TIMEOUT_S
from qsnap.runs.pause import stopped
from qsnap.runs.record import LoadStage, LoadWork
from qsnap.runs.run import Run
from qsnap.runs.shield import shielded


async def do_loadvm(run: Run, request: LoadRequest) -> LoadResult:
    """Put RAM, device state and disks back to what the snapshot holds.

    The guest is left running, or paused if its user has paused it: QEMU goes by the state before the load too, not by
    the one in which it was saved. A guest that had stopped by itself (it has panicked, shut down, ...) runs. One that a
    load alone would not bring back is reset first: see :mod:`qsnap.operations.reset`. A guest that was saved in S3 is
    in S3 again.

    QEMU reverts the disks before it knows whether the state can be loaded, and a load cannot be undone. So a
    load that fails midway leaves the guest stopped on purpose: it must not run on disks and RAM of different
    moments.

    Where that is certainly the same, QEMU is given no more of RAM than what differs from the snapshot: see
    :mod:`qsnap.operations.delta`. A delta load that ends in doubt is followed by a full one, before the guest runs.

    The state file of a live snapshot becomes a node for the time of the load. QEMU writes to it: it counts the uses of
    its clusters, as in any image that it goes back to a snapshot of.

    :return: what was loaded.
    :raise SnapshotNotFound: no device holds the tag, or one lacks it; the guest was not touched.
    :raise PrecheckRefused: it would fail, or mix moments; the guest was not touched.
    :raise NotSupported: HMP cannot do it, or RAM cannot be compared and the request asks for that; nothing was loaded.
    :raise VerifyFailed: the snapshot is loaded, and the comparison that the request asks for could not be made.
    :raise QsnapError: the guest was to run, and was saved in S3; it is loaded.
    :raise GuestLeftStopped: QEMU failed midway and the guest was running; QEMU's error is the cause.
    :raise JobFailed: the same where the guest was not running.
    """
    began = time.monotonic()
    monitor, journal = run.monitor, run.journal
    tag, running = request.tag, request.running

    # Verify that every device has the snapshot, and one of them the VM state
    plan = await plan_load(run, tag, exclude=request.exclude, force=request.force)
    if plan.spoiled:
        await _forget_failure(run, tag)
        plan = plan._replace(spoiled=False)
    # HMP has no job that tells how a load ended. But a guest that loadvm itself has stopped tells by its run state.
    by_qemu = not monitor.chooses_devices and running is not False and journal.member is None
    was_reset = needs_reset(plan.runstate, monitor.version)
    runs = runs_after_load(plan.runstate) if running is None else running
    await leave_position(run)
    if not monitor.live_obstacle:  # an earlier load may have left the guest paused, and files in QEMU
        await monitor.live.close_lingering_files()
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(_source(run, plan))
        if request.verify:
            await refuse_incomparable(run, plan, source)
        contents = None if request.force else await refuse_other_machine(monitor, plan.snapshot, source.state)
        if not request.full:
            from qsnap.operations.delta import delta  # noqa: F401 (loaded here, and not in the pause)
        await journal.meet(Point.CHECKED)
        if was_reset:
            await reset(monitor)

        # saved_vm_running = runstate_is_running(); vm_stop(RUN_STATE_RESTORE_VM)
        after_resume = await stack.enter_async_context(AsyncExitStack())
        pause = await stack.enter_async_context(stopped(monitor, journal, by_qemu=by_qemu))
        standing = _standing(was_reset=was_reset, was_stopped=pause.was_running and not by_qemu)
        plan = await _seen_again(run, request, plan, standing)
        attempt = LoadAttempt(run, plan, pause)
        if not (by_qemu and pause.was_running):
            if contents is not None:
                await refuse_other_devices(monitor, tag, contents, standing)
            await _flush(run, attempt, runs=runs)

        # Go back to the snapshot on all disks, reset, and load the VM state; of RAM what differs, if that is enough
        load = Load(run, plan, source, attempt, verify=request.verify, force=request.force)
        await after_resume.enter_async_context(load.compared("it was asked for" if request.full else "", standing))
        await journal.decide()  # from here on nothing can be undone
        with _explained(monitor, origin_of(run, plan.snapshot)):
            await load.load()
        with suppress(QsnapError):
            await monitor.clear_mark(HALF_RESTORED)
        if not runs:  # its guard does not resume it either, whatever ends the rest
            journal.done(stopped=False, work=LoadWork(was_running=False, stage=LoadStage.LOADED))

        # if (saved_vm_running) vm_start(): done by leaving the block
        pause.deed = f"{tag!r} was loaded"
        pause.resume = runs
        try:
            await load.verify()
        finally:
            await run.shielded(attempt.leave_paused(runs=runs))
            journal.done(work=None)
        await journal.meet(Point.WRITTEN)
    if running and not request.may_sleep and pause.runstate is RunState.SUSPENDED:
        raise QsnapError(f"{tag!r} was loaded, but the guest does not run: as it was saved, {cure_of(pause.runstate)}")
    return _load_result(plan, load, began, pause.runstate)


async def _seen_again(run: Run, request: LoadRequest, plan: LoadPlan, standing: str) -> LoadPlan:
    """Look at the VM again, and make sure that the decisions from before the stop still hold.

    :param standing: the guest's state, for the message of a refusal.
    :return: the plan, with the devices that the guest has now.
    :raise PrecheckRefused: they do not.
    """
    again = await plan_load(run, request.tag, exclude=request.exclude, force=request.force, standing=standing)
    plan = plan._replace(peripherals=again.peripherals)
    if again._replace(runstate=plan.runstate) != plan:
        change = Finding.refusal(
            "snapshots-changed",
            f"snapshot {request.tag!r} or the block devices have changed between the check and the stop",
            "try again",
        )
        raise PrecheckRefused("nothing was loaded", [change], standing)
    return plan


def _load_result(plan: LoadPlan, load: Load, began: float, runstate: RunState) -> LoadResult:
    snapshot = plan.snapshot
    return LoadResult(
        tag=snapshot.tag,
        vmstate=plan.vmstate,
        devices=plan.devices,
        excluded=plan.excluded,
        vm_state_size=snapshot.vm_state_size,
        date=snapshot.date,
        vm_clock_ns=snapshot.vm_clock_ns,
        duration_ms=round((time.monotonic() - began) * 1000, 3),
        runstate=runstate,
        labels=snapshot.labels,
        file=snapshot.file,
        method="full" if load.why_full else "delta",
        why_full=load.why_full,
        ram_bytes=load.ram_bytes,
        found_by=load.found_by,
        differing_pages=load.differing_pages,
    )


@contextmanager
def _explained(monitor: Monitor, origin: Origin | None) -> Iterator[None]:
    """Add to an error of a block what QEMU has written to its own log meanwhile, and which QEMU saved the snapshot."""
    log = ErrorOutput(monitor.pid)
    try:
        yield
    except (GuestLeftStopped, JobFailed) as failure:
        said = f"QEMU's log says: {said}" if (said := log.added()) else ""
        saved_by = ""
        if origin and origin.qemu != str(monitor.version):
            saved_by = f"it was saved by QEMU {origin.qemu}, and this is QEMU {monitor.version}"
        failure.outcome = "; ".join(filter(None, (failure.outcome, saved_by, said)))
        raise


async def check_load(run: Run, tag: str, exclude: Collection[str] = ()) -> Snapshot:
    """Run only the pre-checks of a load. The guest is not touched.

    :return: the snapshot that a load would put back.
    :raise SnapshotNotFound: see :func:`qsnap.operations.plan.plan_load`.
    :raise PrecheckRefused: it would fail, or mix disks of different moments.
    """
    plan = await plan_load(run, tag, exclude=exclude)
    if plan.snapshot.file is None:
        await refuse_other_machine(run.monitor, plan.snapshot, plan.state)
        return plan.snapshot
    with _state_file(run, plan.snapshot) as file:
        await refuse_other_machine(run.monitor, plan.snapshot, file)
    return plan.snapshot


def _standing(*, was_reset: bool, was_stopped: bool) -> str:
    """The guest's state, for the message of a refusal at the second look."""
    if was_reset:
        return "nothing was loaded; the guest was reset, and is paused"
    return "the guest was stopped for a moment, and resumed" if was_stopped else UNTOUCHED


async def _flush(run: Run, attempt: LoadAttempt, *, runs: bool) -> None:
    """Have QEMU drop its translated code: see :func:`flush_translations`. A guest that will not run is paused from now
    on, whatever stopped it."""
    monitor, journal = run.monitor, run.journal
    journal.note(work=LoadWork(was_running=attempt.was_running))
    try:
        await run.shielded(_flushed(monitor, runs=runs))
    except BaseException:
        await run.shielded(attempt.end_flush())
        journal.done(work=None)
        raise


async def _flushed(monitor: Monitor, *, runs: bool) -> None:
    """Have QEMU drop its translated code; if the guest stops by itself too soon for that, reset it first.

    :raise JobFailed: QEMU keeps the code, and would end at a reset, or may end.
    """
    try:
        await flush_translations(monitor, runs=runs)
    except JobFailed as failure:
        if not reboots(monitor.pid):
            failure.outcome += f". Reset the guest first: {RESET_CURE}"
            raise
        await reset(monitor)
        await flush_translations(monitor, runs=runs)


async def _forget_failure(run: Run, tag: str) -> None:
    """Have QEMU forget that a migration has failed, because it would otherwise fail in the middle of the load.

    :raise PrecheckRefused: QEMU does not forget it; the guest was not touched.
    """
    monitor, journal, background = run.monitor, run.journal, run.monitor.live
    await journal.armed()
    journal.note(settings=await background.settings(), forgetting=True)
    try:
        await background.forget_failure()
    except JobFailed as error:
        finding = spoiled_finding(await monitor.migration(), await monitor.runstate())
        raise PrecheckRefused(f"snapshot {tag!r} cannot be loaded now", [finding]) from error
    finally:
        await run.shielded(background.put_back(journal.record.settings))
        journal.done(forgetting=False)


@asynccontextmanager
async def _source(run: Run, plan: LoadPlan) -> AsyncIterator[Source]:
    """The source of the VM state for QEMU, for the duration of a block.

    :raise PrecheckRefused: the state file is damaged, or must not be opened for this QEMU; the guest was not touched.
    :raise JobFailed: QEMU cannot use the state file; the guest was not touched.
    """
    snapshot = plan.snapshot
    if snapshot.file is None:
        assert plan.vmstate is not None
        yield Source(plan.vmstate, plan.devices, plan.state)
        return
    node = state_node()
    with _state_file(run, snapshot) as file:
        try:
            await asyncio.to_thread(refuse_flawed, file, snapshot)
            await run.monitor.live.add_state_node(file, node)
            yield Source(node, (*plan.devices, node), file)
        finally:
            with suppress(QsnapError):
                await shielded(run.monitor.tidy(), AFTERMATH_TIMEOUT_S)


@contextmanager
def _state_file(run: Run, snapshot: Snapshot) -> Iterator[int]:
    """The open state file of a live snapshot, for the duration of a block.

    :raise PrecheckRefused: it must not be opened for this QEMU; the guest was not touched.
    :raise JobFailed: it cannot be opened; the guest was not touched.
    """
    assert snapshot.file is not None
    try:
        file = run.store.opened(snapshot.file)
    except PermissionError as error:
        finding = Finding.refusal(
            "state-file-closed",
            f"the state file {snapshot.file.path} is not handed to QEMU: {error.strerror}",
            "if the file is that VM's: chown it to the image's owner; or load another snapshot",
        )
        raise PrecheckRefused(f"snapshot {snapshot.tag!r} cannot be loaded", [finding]) from error
    except OSError as error:
        raise JobFailed("open", f"{snapshot.file.path}: {error.strerror}", UNTOUCHED) from error
    try:
        yield file
    finally:
        os.close(file)
