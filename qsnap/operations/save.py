"""Save: QEMU's do_savevm, decision by decision, with the state write left to QEMU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from qsnap.errors import (
    GuestLeftStopped,
    JobFailed,
    MonitorError,
    MonitorLost,
    PrecheckRefused,
    QsnapError,
    SnapshotExists,
    VerifyFailed,
)
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.state_store import read
from qsnap.model.qemu import (
    BlockGraph,
    Device,
    Finding,
    Kind,
    NodeSnapshot,
    RunState,
    SaveResult,
    StateFile,
    Verdict,
)
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.runstates import cure_of, is_live, takes_stop
from qsnap.monitor import Monitor
from qsnap.operations.delete import delete_all, delete_everywhere, delete_replaced
from qsnap.operations.naming import free_automatic_tag
from qsnap.operations.plan import SavePlan, plan_save
from qsnap.operations.progress import Watcher, watched
from qsnap.operations.removal import refuse_removal
from qsnap.runs.journal import Journal, Record, row_keys
from qsnap.runs.pause import Pause, reconnect, stopped
from qsnap.runs.run import Run


async def do_savevm(run: Run, request: SaveRequest, watch: Watcher | None = None) -> SaveResult:
    """Save RAM, device state and every writable disk under one tag.

    The guest is stopped from the look-up to the read-back, and left as it was found: running again, or
    still paused.

    The order is that of the old do_savevm (seed of savevm.c). Newer QEMU deletes the old snapshot before it
    stops the guest; here the stop comes first, so that nothing can change between the look-up and the save,
    and no vCPU or vhost device is at work when QEMU starts to write.

    A safe replacement (:attr:`OnExists.SAFE`) writes the new state under TAG.qsnap-stand-in first; then the older
    snapshot is deleted, the same state is written under TAG, and the stand-in deleted. The guest stands still for both
    writes.

    :param watch: called every 0.1 s while QEMU writes.
    :return: the snapshot as read back from QEMU.
    :raise PrecheckRefused: before the guest is touched.
    :raise SnapshotExists: it exists, and the request refuses that; nothing has changed.
    :raise NotSupported: HMP cannot honour the request; nothing has changed.
    :raise JobFailed: the guest is resumed, and no part of the new snapshot is left. What it was to replace is
        gone if the message says so.
    :raise VerifyFailed: the same, where QEMU had left a half-made set behind.
    :raise GuestLeftStopped: the guest could not be resumed; the first error is the context.
    """
    began = time.monotonic()
    monitor, journal = run.monitor, run.journal

    # Verify that no writable device is unable to snapshot, and choose the one for the VM state
    plan = await plan_save(run, request)
    plan.refuse_if_needed()
    inventory, report = plan.inventory, plan.report
    tag = request.tag if request.tag is not None else free_automatic_tag(inventory.graph)
    stand_in = snapshots.stand_in_of(tag) if request.on_exists is OnExists.SAFE else ""
    older = inventory.holding(tag)
    if older.exists and request.on_exists is OnExists.REFUSE:
        raise SnapshotExists(tag, (*inventory.displayed(older.nodes), *older.files))
    await refuse_removal(monitor, inventory, tag, "saved")
    if request.dry_run:
        return save_result(plan, tag, older.exists, began, dry_run=True)

    journal.note(tags=(tag,), vmstate=plan.vmstate, devices=report.saved, files=older.files)
    attempt = SaveAttempt(monitor, journal, report.devices)
    try:
        # saved_vm_running = runstate_is_running(); vm_stop(RUN_STATE_SAVE_VM)
        async with stopped(monitor, journal) as pause:
            inventory = await unchanged(run, request, plan)

            # Old snapshots of the same name, wherever they are: what is to be replaced gets a stand-in first
            replaced = inventory.holders(tag)
            if replaced and request.on_exists is OnExists.REFUSE:
                raise SnapshotExists(tag, inventory.displayed(replaced))
            if stand_in:
                await _stand_in(attempt, inventory.graph, stand_in)

            # Delete them
            if replaced and not attempt.begin_deletion(inventory.graph):
                await delete_everywhere(monitor, report.devices, tag)

            # Save the VM state, and create the snapshots; an error on one device is not passed over
            journal.note(saving=True)
            async with watched(watch, plan.image, plan.estimate and plan.estimate.expected):
                graph = await attempt.write(tag)
            # Two saves of a paused guest in one second look the same in HMP's tables.
            if pause.was_running and not attempt.has_made_something(graph):
                raise VerifyFailed(tag, ["the older snapshot is still there, and no new one"])
            if stand_in:
                await delete_everywhere(monitor, report.devices, stand_in)
        # the_end: if (saved_vm_running) vm_start(): done by leaving the block
    except BaseException as failure:
        was_running = takes_stop(report.runstate, monitor.version)
        hint = next((finding.message for finding in report.findings if finding.code == "cannot-grow"), "")
        await run.shielded(attempt.clear_up(failure, was_running=was_running, hint=hint))
        raise
    # What a live save of that tag had elsewhere
    elsewhere = [other for other in older.tags if other != tag]
    left = await run.shielded(delete_replaced(monitor, report.devices, elsewhere, older.files))
    (row,) = graph.nodes[plan.vmstate].tagged(tag)
    return save_result(plan, tag, bool(replaced) or older.exists, began, row=row, pause=pause, left=left)


async def _stand_in(attempt: SaveAttempt, graph: BlockGraph, stand_in: str) -> None:
    """See that a whole snapshot stands while the tag is replaced: the new state, or an older one, under *stand_in*.

    One that an earlier save has left behind protects as well as a new one, if the tag itself cannot be loaded. If it
    can, that one is of no more use.
    """
    older = snapshots.find(graph, attempt.devices, attempt.tag)
    left = snapshots.holders(graph, attempt.devices, stand_in)
    attempt.journal.note(stand_in=stand_in)
    if left and (not attempt.is_whole(graph, stand_in) or (older and snapshots.is_loadable(older))):
        await delete_everywhere(attempt.monitor, attempt.devices, stand_in)
        left = ()
    if older and not left:
        await attempt.write(stand_in)


async def unchanged(run: Run, request: SaveRequest, plan: SavePlan) -> Inventory:
    """A new look at the VM, if it still asks for the same decisions as before the guest was stopped.

    :raise PrecheckRefused: it does not.
    """
    inventory = await run.look(vmstate=request.vmstate, exclude=request.exclude)
    if (inventory.devices, inventory.vmstate) != (plan.report.devices, plan.report.vmstate):
        change = Finding.refusal(
            "devices-changed", "its block devices have changed between the check and the stop", "try again"
        )
        raise PrecheckRefused("nothing was saved", [change], "the guest is as it was before")
    return inventory


class SaveAttempt:
    """How far a save has come, and how it is undone: by itself, or by whoever clears up after it.

    All that this takes is in the record of its journal.
    """

    def __init__(self, monitor: Monitor, journal: Journal, devices: Sequence[Device]) -> None:
        self.monitor = monitor
        self.journal = journal
        self.devices = devices
        (self.tag,) = journal.record.tags

    @property
    def record(self) -> Record:
        """What the journal says."""
        return self.journal.record

    def begin_deletion(self, graph: BlockGraph) -> bool:
        """Write down what stands under the tag; whether its deletion is left to QEMU's own savevm.

        Where HMP saves, it is: savevm looks for what blocks a save before it deletes, and some QEMUs tell of that
        in no other way (before 6.0). It deletes one row a device, so no more than that may be there.
        """
        older = {node: row_keys(graph.nodes[node].tagged(self.tag)) for node in self._held(graph, self.tag)}
        by_qemu = not self.monitor.chooses_devices and all(len(rows) == 1 for rows in older.values())
        self.journal.note(older=older, qemu_replaces=by_qemu)
        return by_qemu

    async def write(self, tag: str) -> BlockGraph:
        """Have QEMU save under *tag*, and read it back from every device.

        :raise VerifyFailed: what is there is not what it should be.
        """
        vmstate, saved = self.record.vmstate, self.record.devices
        await self.monitor.snapshot_save(tag, vmstate, saved)
        graph = await self.monitor.block_graph()
        if problems := snapshots.save_problems(graph, tag, vmstate, saved):
            raise VerifyFailed(tag, problems)
        return graph

    def is_whole(self, graph: BlockGraph, tag: str) -> bool:
        """Whether *tag* is complete on all devices of this save."""
        return not snapshots.save_problems(graph, tag, self.record.vmstate, self.record.devices)

    def has_made_something(self, graph: BlockGraph) -> bool:
        """Whether anything under the tag is not of the older snapshot."""
        older = (self.record.older or {}) if self.record.qemu_replaces else {}
        return any(
            key not in older.get(node, ())
            for node in self._held(graph, self.tag)
            for key in row_keys(graph.nodes[node].tagged(self.tag))
        )

    async def clear_up(self, failure: BaseException, *, was_running: bool, hint: str = "") -> None:
        """Remove what the save left half made, and say in *failure* how things stand.

        :param hint: what was known beforehand that may have made it fail.
        :raise GuestLeftStopped: the guest runs no more, as it has no room for its own writes either.
        :raise VerifyFailed: QEMU reported an error (*failure*) and has left half a set behind; it is removed.
        """
        begun = self.record.older is not None or self.record.saving or self.record.stand_in
        if isinstance(failure, asyncio.CancelledError):
            pass
        elif not begun or not isinstance(failure, QsnapError) or isinstance(failure, GuestLeftStopped):
            return
        removed: tuple[str, ...] = ()
        runstate = RunState.RUNNING
        try:
            if isinstance(failure, MonitorLost) and not was_running:
                await reconnect(self.monitor, self.journal)  # where the guest was resumed, that has been done
            await self.monitor.settle()
            is_cut_short = not isinstance(failure, (JobFailed, VerifyFailed))
            removed, outcome = await self.undo(keeps_whole=is_cut_short)
            runstate = await self.monitor.runstate()
            outcome += f"; the guest is {runstate}" + (f". {hint}" if hint else "")
        except QsnapError as trouble:
            outcome = f"clearing up after it failed: {trouble}"
        if was_running and not is_live(runstate):
            raise GuestLeftStopped(f"{failure}; {outcome}: {cure_of(runstate)}") from failure
        if isinstance(failure, asyncio.CancelledError):
            failure.add_note(outcome)
        elif isinstance(failure, MonitorLost):
            raise MonitorLost(f"{failure}; {outcome}") from failure
        elif isinstance(failure, JobFailed) and removed:
            raise VerifyFailed(self.tag, [str(failure)], outcome) from failure
        elif isinstance(failure, (JobFailed, VerifyFailed)):
            failure.outcome = outcome
        else:
            kind = MonitorError if isinstance(failure, MonitorError) else QsnapError
            raise kind(f"{failure}; {outcome}") from failure

    async def undo(self, *, keeps_whole: bool) -> tuple[tuple[str, ...], str]:
        """Leave a whole snapshot of the tag if there is one to be had, and nothing half made.

        What an unfinished save has made goes, unless it was to replace an older one that is gone already: then it is
        kept if it is whole (*keeps_whole*), and else its stand-in is.

        :return: the nodes from which a new row of the tag was removed, and what has become of it all, in words.
        """
        graph = await self.monitor.block_graph()
        held, stand_in = self._held(graph, self.tag), self.record.stand_in
        removed: tuple[str, ...] = ()
        if not self.record.saving or (held and not self.has_made_something(graph)):
            outcome = self._older_outcome(graph)
        elif keeps_whole and self.record.older and self.is_whole(graph, self.tag):
            outcome = f"the new snapshot {self.tag!r} was complete and is kept: it replaced an older one"
        else:
            removed = held
            await delete_everywhere(self.monitor, self.devices, self.tag)
            done = f"what this save made was removed from {self._spoken(held)}" if held else "nothing of it is left"
            outcome = f"{done}; {self._older_outcome(await self.monitor.block_graph())}".removesuffix("; ")
        graph = await self.monitor.block_graph()
        # Of a live snapshot that was to be replaced: without its disks a state file is of no use
        useless = [path for path in self.record.files if (f := read(Path(path))) and not self._held(graph, f.disk_tag)]
        try:
            await delete_all(self.monitor, self.devices, (), useless)
        except JobFailed as error:
            outcome = f"{outcome}; {error}".removeprefix("; ")
        if stand_in and (sentence := await self._undo_stand_in(stand_in)):
            outcome = f"{outcome}; {sentence}".removeprefix("; ")
        return removed, outcome or "nothing of it is left"

    async def _undo_stand_in(self, stand_in: str) -> str:
        """Keep the stand-in while nothing else holds what the tag is to hold."""
        graph = await self.monitor.block_graph()
        held = self._held(graph, stand_in)
        if not held:
            return ""
        whole = snapshots.find(graph, self.devices, self.tag)
        if not self.is_whole(graph, stand_in) or (whole and snapshots.is_loadable(whole)):
            await delete_everywhere(self.monitor, self.devices, stand_in)
            return ""
        if self._held(graph, self.tag):
            await delete_everywhere(self.monitor, self.devices, self.tag)
        return f"the same state stands complete under {stand_in!r}, and can be loaded by that name"

    def _held(self, graph: BlockGraph, tag: str) -> tuple[str, ...]:
        return snapshots.holders(graph, self.devices, tag)

    def _spoken(self, nodes: Collection[str]) -> str:
        return ", ".join(rules.displayed(nodes, self.devices))

    def _older_outcome(self, graph: BlockGraph) -> str:
        """What has become of the older snapshot, if its deletion had begun."""
        older = self.record.older
        held = self._held(graph, self.tag)
        if older is None and held and self.record.stand_in:
            return f"the older snapshot {self.tag!r} is as it was"
        if not older:
            return ""
        if not held:
            return f"the older snapshot {self.tag!r} had been deleted by then"
        if held == tuple(older) and self.record.saving:
            return f"the older snapshot {self.tag!r} is as it was"
        was, now = self._spoken(older), self._spoken(held)
        return f"the older snapshot {self.tag!r} was to be deleted from {was}, and is on {now}"


def save_result(
    plan: SavePlan,
    tag: str,
    replaced: bool,
    began: float,
    *,
    row: NodeSnapshot | None = None,
    pause: Pause | None = None,
    dry_run: bool = False,
    is_live: bool = False,
    file: StateFile | None = None,
    left: Sequence[Finding] = (),
) -> SaveResult:
    """What was saved, or would be.

    :param left: see :func:`qsnap.operations.delete.delete_replaced`.
    """
    report = plan.report
    held = file or row
    return SaveResult(
        tag=tag,
        replaced=replaced,
        kind=Kind.PARTIAL if report.excluded else Kind.LIVE if is_live else Kind.FULL,
        vmstate=None if is_live else report.vmstate,
        devices=report.saved,
        excluded=report.excluded,
        carried=tuple(d.node for d in report.devices if d.verdict is Verdict.CARRIED and d.node),
        vm_state_size=held.vm_state_size if held else 0,
        date=held.date if held else datetime.now().astimezone(),
        vm_clock_ns=held.vm_clock_ns if held else 0,
        pause_ms=round(pause.pause_ms, 3) if pause else 0.0,
        duration_ms=round((time.monotonic() - began) * 1000, 3),
        runstate=pause.runstate if pause else report.runstate,
        warnings=(*report.warnings, *left),
        dry_run=dry_run,
        labels=rules.labels(report.devices),
        file=file,
    )
