"""Save: QEMU's do_savevm, decision by decision, with the state write left to QEMU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from datetime import datetime, timedelta

from qsnap import devices as rules
from qsnap import snapshots
from qsnap.delvm import delete_everywhere
from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorLost,
    PrecheckRefused,
    QsnapError,
    SnapshotExists,
    VerifyFailed,
)
from qsnap.model import (
    BlockGraph,
    CheckReport,
    Finding,
    Kind,
    NodeSnapshot,
    RunState,
    SaveResult,
    Severity,
    Verdict,
    automatic_tag,
)
from qsnap.monitor import Monitor
from qsnap.precheck import SavePlan, plan_save
from qsnap.progress import Watcher, watched
from qsnap.stopped import AFTERMATH_TIMEOUT_S, Pause, cure_of, reconnect, stopped
from qsnap.undisturbed import undisturbed


async def do_savevm(
    monitor: Monitor,
    tag: str | None = None,
    *,
    replace: bool = True,
    vmstate: str | None = None,
    exclude: Collection[str] = (),
    force: bool = False,
    dry_run: bool = False,
    watch: Watcher | None = None,
) -> SaveResult:
    """Save RAM, device state and every writable disk under one tag.

    The guest is stopped from the look-up to the read-back, and left as it was found: running again, or
    still paused.

    The order is that of the old do_savevm (seed of savevm.c). Newer QEMU deletes the old snapshot before it
    stops the guest; here the stop comes first, so that nothing can change between the look-up and the save,
    and no vCPU or vhost device is at work when QEMU starts to write.

    :param tag: 1 to 255 bytes. Default: vm-%Y%m%d%H%M%S in local time, as do_savevm names it.
    :param replace: delete an older snapshot of that tag first, as do_savevm does. It is gone if the save then
        fails. False refuses instead.
    :param vmstate: the device that holds the VM state. Default: QEMU's own choice, which loadvm expects.
    :param exclude: devices to leave out; the snapshot is not whole then.
    :param force: let a lack of room only warn.
    :param dry_run: decide everything and do nothing.
    :param watch: called every 0.1 s while QEMU writes.
    :return: the snapshot as read back from QEMU.
    :raise PrecheckRefused: before the guest is touched.
    :raise SnapshotExists: with ``replace=False``; nothing has changed.
    :raise NotSupported: HMP cannot honour *vmstate* or *exclude*; nothing has changed.
    :raise JobFailed: the guest is resumed, and no part of the new snapshot is left. What it was to replace is
        gone if the message says so.
    :raise VerifyFailed: the same, where QEMU had left a half-made set behind.
    :raise GuestLeftStopped: the guest could not be resumed; the first error is the context.
    """
    began = time.monotonic()

    # Verify that no writable device is unable to snapshot, and choose the one for the VM state
    plan = await plan_save(monitor, tag, vmstate=vmstate, exclude=exclude, force=force)
    plan.refuse_if_needed()
    report, state_node = plan.report, plan.report.vmstate
    assert state_node is not None  # or the plan had been refused
    name = tag if tag is not None else _free_automatic_tag(plan.graph)
    replaced = snapshots.holders(plan.graph, report.devices, name)
    if replaced and not replace:
        raise SnapshotExists(name, rules.spoken(replaced, report.devices))
    if dry_run:
        return _result(plan, name, bool(replaced), began, dry_run=True)

    attempt = _Attempt(monitor, name, report)
    try:
        # saved_vm_running = runstate_is_running(); vm_stop(RUN_STATE_SAVE_VM)
        async with stopped(monitor) as pause:
            graph = await _unchanged_graph(monitor, plan, vmstate, exclude)

            # Delete old snapshots of the same name, wherever they are
            replaced = snapshots.holders(graph, report.devices, name)
            if replaced and not replace:
                raise SnapshotExists(name, rules.spoken(replaced, report.devices))
            attempt.older = replaced
            if replaced and not attempt.leaves_deletion_to_qemu(graph):
                await delete_everywhere(monitor, report.devices, name)

            # Save the VM state, and create the snapshots
            attempt.saving = True
            async with watched(watch, plan.image, plan.estimate and plan.estimate.expected):
                await monitor.snapshot_save(name, state_node, report.saved)

            # An error on one device is not passed over: all of them are read back
            graph = await monitor.block_graph()
            if problems := snapshots.save_problems(graph, name, state_node, report.saved):
                raise VerifyFailed(name, problems)
            # Two saves of a paused guest in one second look the same in HMP's tables.
            if pause.was_running and not attempt.has_made_something(graph):
                raise VerifyFailed(name, ["the older snapshot is still there, and no new one"])
        # the_end: if (saved_vm_running) vm_start(): done by leaving the block
    except BaseException as failure:
        await undisturbed(attempt.clear_up(failure), AFTERMATH_TIMEOUT_S)
        raise
    (row,) = graph.nodes[state_node].tagged(name)
    return _result(plan, name, bool(replaced), began, row=row, pause=pause)


def _free_automatic_tag(graph: BlockGraph) -> str:
    """The automatic tag; that of a later second where it is taken, as nobody asked to replace anything."""
    taken = {row.tag for node in graph.nodes.values() for row in node.snapshots}
    now = datetime.now().astimezone()
    while (tag := automatic_tag(now)) in taken:
        now += timedelta(seconds=1)
    return tag


async def _unchanged_graph(
    monitor: Monitor, plan: SavePlan, vmstate: str | None, exclude: Collection[str]
) -> BlockGraph:
    """The block graph of the stopped guest, if it still asks for the same decisions as before the stop."""
    graph = await monitor.block_graph()
    survey = rules.survey(graph, exclude=exclude, vmstate=vmstate, chooses_devices=monitor.chooses_devices)
    if (survey.devices, survey.vmstate) != (plan.report.devices, plan.report.vmstate):
        change = Finding(
            code="devices-changed",
            severity=Severity.REFUSE,
            message="its block devices have changed between the check and the stop",
            cure="try again",
        )
        raise PrecheckRefused("nothing was saved, and the guest was resumed", [change])
    return graph


class _Attempt:
    """How far a save has come, and how it is undone.

    :ivar older: the node-names that held an older snapshot of the tag when its deletion began.
    :ivar older_rows: the same by node-name, where their deletion is left to QEMU: what is left of it is not ours.
    :ivar saving: QEMU may have been told to save; what else is there under the tag from then on is ours.
    """

    def __init__(self, monitor: Monitor, tag: str, report: CheckReport) -> None:
        self.monitor = monitor
        self.tag = tag
        self.report = report
        self.older: tuple[str, ...] = ()
        self.older_rows: dict[str, tuple[NodeSnapshot, ...]] = {}
        self.saving = False

    def leaves_deletion_to_qemu(self, graph: BlockGraph) -> bool:
        """Whether QEMU's own savevm is to replace the older snapshot.

        Where HMP saves, it does, and it looks for what blocks a save before it deletes: some QEMUs tell of
        that in no other way (before 6.0). It deletes one row a device, so no more than that may be there.
        """
        rows = {node: tuple(graph.nodes[node].tagged(self.tag)) for node in self.older}
        if self.monitor.chooses_devices or any(len(of_node) > 1 for of_node in rows.values()):
            return False
        self.older_rows = rows
        return True

    def has_made_something(self, graph: BlockGraph) -> bool:
        """Whether anything under the tag is not of the older snapshot."""
        held = snapshots.holders(graph, self.report.devices, self.tag)
        return any(
            row not in self.older_rows.get(node, ()) for node in held for row in graph.nodes[node].tagged(self.tag)
        )

    async def clear_up(self, failure: BaseException) -> None:
        """Remove what the save left half made, and say in *failure* how things stand.

        An interrupted save leaves nothing new, nor does one whose connection was lost. But where the old
        snapshot is gone already and the new one is whole, it is kept: removing it would leave nothing at all.

        :raise GuestLeftStopped: the guest runs no more, as it has no room for its own writes either.
        :raise VerifyFailed: QEMU reported an error (*failure*) and has left half a set behind; it is removed.
        """
        if not isinstance(failure, (JobFailed, VerifyFailed, MonitorLost, asyncio.CancelledError)):
            return
        if isinstance(failure, MonitorLost) and not (self.saving or self.older):
            return
        leftovers: tuple[str, ...] = ()
        try:
            if isinstance(failure, MonitorLost) and self.report.runstate is not RunState.RUNNING:
                await reconnect(self.monitor)  # where the guest was resumed, that has been done
            await self.monitor.settle()
            graph = await self.monitor.block_graph()
            held = snapshots.holders(graph, self.report.devices, self.tag)
            if not self.saving or (held and not self.has_made_something(graph)):
                outcome = self._older_outcome(held)
            elif self._is_worth_keeping(graph, failure):
                outcome = f"the new snapshot {self.tag!r} was complete and is kept: it replaced an older one"
            else:
                leftovers = held
                await delete_everywhere(self.monitor, self.report.devices, self.tag)
                removed = f"what this save made was removed from {', '.join(self._spoken(held))}" if held else ""
                outcome = f"{removed or 'nothing of it is left'}{self._older_outcome(())}"
            runstate = await self.monitor.runstate()
            outcome += f"; the guest is {runstate}"
        except QsnapError as trouble:
            outcome = f"clearing up after it failed: {trouble}"
            runstate = self.report.runstate
        outcome = outcome.removeprefix("; ")
        if self.report.runstate is RunState.RUNNING is not runstate:
            raise GuestLeftStopped(f"{failure}; {outcome}: {cure_of(runstate)}") from failure
        if isinstance(failure, asyncio.CancelledError):
            failure.add_note(outcome)
        elif isinstance(failure, MonitorLost):
            raise MonitorLost(f"{failure}; {outcome}") from failure
        elif isinstance(failure, JobFailed) and leftovers:
            raise VerifyFailed(self.tag, [str(failure)], outcome) from failure
        else:
            failure.outcome = outcome

    def _spoken(self, nodes: Collection[str]) -> list[str]:
        return rules.spoken(nodes, self.report.devices)

    def _is_worth_keeping(self, graph: BlockGraph, failure: BaseException) -> bool:
        if not self.older or not isinstance(failure, (MonitorLost, asyncio.CancelledError)):
            return False
        return not snapshots.save_problems(graph, self.tag, self.report.vmstate or "", self.report.saved)

    def _older_outcome(self, held: Collection[str]) -> str:
        """What has become of the older snapshot, if its deletion had begun; *held* by these nodes still."""
        if not self.older:
            return ""
        if not held:
            return f"; the older snapshot {self.tag!r} had been deleted by then"
        if held == self.older and self.saving:
            return f"; the older snapshot {self.tag!r} is as it was"
        was, now = ", ".join(self._spoken(self.older)), ", ".join(self._spoken(held))
        return f"; the older snapshot {self.tag!r} was to be deleted from {was}, and is on {now}"


def _result(
    plan: SavePlan,
    tag: str,
    replaced: bool,
    began: float,
    *,
    row: NodeSnapshot | None = None,
    pause: Pause | None = None,
    dry_run: bool = False,
) -> SaveResult:
    report = plan.report
    assert report.vmstate is not None
    return SaveResult(
        tag=tag,
        replaced=replaced,
        kind=Kind.PARTIAL if report.excluded else Kind.FULL,
        vmstate=report.vmstate,
        devices=report.saved,
        excluded=report.excluded,
        carried=tuple(d.node for d in report.devices if d.verdict is Verdict.CARRIED and d.node),
        vm_state_size=row.vm_state_size if row else 0,
        date=row.date if row else datetime.now().astimezone(),
        vm_clock_ns=row.vm_clock_ns if row else 0,
        pause_ms=round(pause.pause_ms, 3) if pause else 0.0,
        duration_ms=round((time.monotonic() - began) * 1000, 3),
        runstate=pause.runstate if pause else report.runstate,
        warnings=report.warnings,
        dry_run=dry_run,
        labels=rules.labels(report.devices),
    )
