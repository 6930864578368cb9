"""Save: QEMU's do_savevm, decision by decision, with the state write left to QEMU."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from qsnap.errors import (
    CommandFailed,
    GuestLeftStopped,
    JobFailed,
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
from qsnap.model.checks import Device, Finding, Verdict
from qsnap.model.qemu import BlockGraph, NodeSnapshot, RunState
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.results import SaveResult
from qsnap.model.runstates import cure_of, is_live, takes_stop
from qsnap.model.snapshots import Kind, StateFile
from qsnap.monitor import Monitor
from qsnap.operations.delete import delete_all, delete_everywhere, delete_replaced
from qsnap.operations.plan import SavePlan, plan_save
from qsnap.operations.prepare import prepare
from qsnap.operations.progress import Watcher, watched
from qsnap.operations.removal import refuse_removal
from qsnap.operations.together import note_group
from qsnap.runs.group import Point
from qsnap.runs.journal import Journal
from qsnap.runs.pause import Pause, reconnect, stopped
from qsnap.runs.record import SaveWork, row_keys
from qsnap.runs.run import Run
from qsnap.tags import free_automatic_tag

#: Findings of what QEMU reports as an error of input or output only, when the save fails by it.
_CAUSES = ("no-room", "little-room", "cannot-grow")


async def do_savevm(run: Run, request: SaveRequest, watch: Watcher | None = None) -> SaveResult:
    """Save RAM, device state and every writable disk under one tag.

    The guest is stopped from the second look until QEMU has written, and left as it was found: running again, or still
    paused. What was saved is read back after that.

    The order is that of the old do_savevm (seed of savevm.c). Newer QEMU deletes the old snapshot before it
    stops the guest; here the stop comes first, so that nothing can change between the look-up and the save,
    and no vCPU or vhost device is active when QEMU starts to write.

    In a group (:mod:`qsnap.runs.group`) all VMs are checked before one is stopped, and stand still at the same time.

    A safe replacement (:attr:`OnExists.SAFE`) is made beside the older snapshot, which is deleted when the new one is
    complete: the devices have every other one of a tag under its second name.

    :param watch: called every 0.1 s while QEMU writes.
    :return: the snapshot as read back from QEMU.
    :raise PrecheckRefused: a pre-check refused; the guest was not touched.
    :raise SnapshotExists: the tag exists, and the request refuses to replace it; nothing has changed.
    :raise NotSupported: HMP cannot honour the request; nothing has changed.
    :raise JobFailed: QEMU reported an error. The guest is resumed, and no part of the new snapshot is left. The older
        snapshot is gone if the message says so.
    :raise VerifyFailed: the same, if QEMU had left a half-made set behind.
    :raise GuestLeftStopped: the guest could not be resumed; the first error is the context.
    """
    began = time.monotonic()
    monitor, journal = run.monitor, run.journal

    # Verify that no writable device is unable to snapshot, and choose the one for the VM state
    plan = await plan_save(run, request)
    plan.refuse_if_needed()
    inventory, report = plan.inventory, plan.report

    # Its name: the one that was given, or vm-%Y%m%d%H%M%S
    tag = request.tag if request.tag is not None else free_automatic_tag(inventory.graph)
    held = inventory.holding(tag)
    if held.exists and request.on_exists is OnExists.REFUSE:
        raise SnapshotExists(tag, (*inventory.displayed(held.nodes), *held.files))
    await refuse_removal(run, inventory, (tag,), "saved")
    new = inventory.new_name(tag, keeps_older=request.on_exists is OnExists.SAFE)
    await journal.meet(Point.CHECKED)
    if request.dry_run:
        return save_result(plan, tag, held.exists, began, dry_run=True)

    journal.note(tags=(tag,), work=SaveWork(
        disk_tag=new.disk_tag, vmstate=plan.vmstate, devices=report.saved, older=new.older.tags, older_files=held.files
    ))  # fmt: skip
    attempt = SaveAttempt(monitor, journal, report.devices)
    was_running = takes_stop(report.runstate, monitor.version)

    # The VM state's area of the image is prepared while the guest runs
    await prepare(run, plan.preparation, watch)
    try:
        # saved_vm_running = runstate_is_running(); vm_stop(RUN_STATE_SAVE_VM)
        async with stopped(monitor, journal) as pause:
            inventory = await unchanged(run, request, plan)

            # Old snapshots of the same name, wherever they are
            replaced = inventory.holders(new.disk_tag)
            if replaced and (request.on_exists is OnExists.REFUSE or request.tag is None):
                raise SnapshotExists(tag, inventory.displayed(replaced))

            # Delete them
            if replaced:
                by_qemu = attempt.begin_deletion(inventory.graph)
                if not by_qemu:
                    await delete_everywhere(monitor, report.devices, new.disk_tag, inventory.graph.tables)

            # Save the VM state, and create the snapshots
            journal.advance(saving=True)
            async with watched(watch, monitor.pid, plan.image, plan.estimate.expected if plan.estimate else None):
                await monitor.snapshot_save(new.disk_tag, plan.vmstate, report.saved)
            await journal.meet(Point.WRITTEN)
        # the_end: if (saved_vm_running) vm_start(): done by leaving the block

        # An error on one device fails the save
        row = await attempt.read_back(inventory.graph, was_running=pause.was_running)
        noted = await note_group(run, tag, row)
        await journal.decide()
        left = await run.shielded(attempt.conclude())
    except BaseException as failure:
        known = (finding for finding in report.findings if isinstance(failure, JobFailed) and finding.code in _CAUSES)
        hint = next((f"{finding.message}: {finding.cure}" for finding in known), "")
        await run.shielded(attempt.clear_up(failure, was_running=was_running, hint=hint))
        raise
    return save_result(plan, tag, bool(replaced) or held.exists, began, row=row, pause=pause, left=(*noted, *left))


async def unchanged(run: Run, request: SaveRequest, plan: SavePlan) -> Inventory:
    """Look at the VM again, and make sure that the decisions from before the stop still hold.

    :raise PrecheckRefused: they do not.
    """
    inventory = await run.look(vmstate=request.vmstate, exclude=request.exclude)
    if (inventory.devices, inventory.vmstate) != (plan.report.devices, plan.report.vmstate):
        change = Finding.refusal(
            "devices-changed", "its block devices have changed between the check and the stop", "try again"
        )
        raise PrecheckRefused("nothing was saved", [change], "the guest is as it was before")
    return inventory


class SaveAttempt:
    """How far a save has come, and how it is undone or concluded: by itself, or by the process that recovers it.

    The record of its journal holds everything that this needs.
    """

    def __init__(self, monitor: Monitor, journal: Journal, devices: Sequence[Device]) -> None:
        self._monitor = monitor
        self._journal = journal
        self._devices = devices

    @property
    def work(self) -> SaveWork:
        """The journal's record of the save."""
        work = self._journal.record.work
        assert isinstance(work, SaveWork)
        return work

    @property
    def _tag(self) -> str:
        (tag,) = self._journal.record.tags
        return tag

    def begin_deletion(self, graph: BlockGraph) -> bool:
        """Note the rows under the name; return whether QEMU's own savevm is to delete them.

        With HMP it is: savevm checks what blocks a save before it deletes, and QEMU before 6.0 reports that in no other
        way. It deletes one row per device, so there may be no more than that.
        """
        rows = {node: row_keys(graph.nodes[node].tagged(self.work.disk_tag)) for node in self._holders(graph)}
        by_qemu = not self._monitor.chooses_devices and all(len(keys) == 1 for keys in rows.values())
        self._journal.advance(rows=rows, qemu_replaces=by_qemu)
        return by_qemu

    async def read_back(self, graph: BlockGraph, *, was_running: bool) -> NodeSnapshot:
        """The new snapshot as every device has it: the row of the one with the VM state.

        :param graph: the block nodes; their snapshot tables are read again.
        :param was_running: the guest was running, so that two saves are of two moments. Two saves of a paused guest in
            one second look the same in HMP's tables.
        :raise VerifyFailed: the snapshot is not as it should be.
        """
        graph = graph.with_tables(await self._monitor.snapshot_tables())
        problems = self._problems(graph)
        if not problems and was_running and not self._has_made_something(graph):
            problems = ["the older snapshot is still there, and no new one"]
        if problems:
            raise VerifyFailed(self._tag, problems)
        (row,) = graph.nodes[self.work.vmstate].tagged(self.work.disk_tag)
        return row

    async def conclude(self) -> tuple[Finding, ...]:
        """Delete the replaced snapshot, now that the new one is complete.

        :return: a warning for each part of the older snapshot that is left.
        """
        self._journal.has_advanced(is_complete=True)
        return await delete_replaced(self._monitor, self._devices, self.work.older, self.work.older_files)

    def _problems(self, graph: BlockGraph) -> list[str]:
        return snapshots.save_problems(graph, self.work.disk_tag, self.work.vmstate, self.work.devices)

    def _has_made_something(self, graph: BlockGraph) -> bool:
        """Whether anything under the name does not belong to the older snapshot."""
        older = (self.work.rows or {}) if self.work.qemu_replaces else {}
        return any(
            key not in older.get(node, ())
            for node in self._holders(graph)
            for key in row_keys(graph.nodes[node].tagged(self.work.disk_tag))
        )

    async def clear_up(self, failure: BaseException, *, was_running: bool, hint: str = "") -> None:
        """Remove the half-made parts of the save, and add the outcome to *failure*.

        :param hint: a known possible cause of the failure.
        :raise GuestLeftStopped: the guest has stopped, because it has no room for its own writes either.
        :raise VerifyFailed: QEMU reported an error (*failure*) and has left half a set behind; it is removed.
        """
        if not self.work.has_begun or isinstance(failure, GuestLeftStopped):
            return
        removed: tuple[str, ...] = ()
        runstate = RunState.RUNNING
        try:
            if isinstance(failure, MonitorLost) and not was_running:
                await reconnect(self._monitor, self._journal)  # where the guest was resumed, that has been done
            await self._monitor.settle()
            is_cut_short = not isinstance(failure, (JobFailed, VerifyFailed))
            removed, outcome = await self.undo(keeps_whole=is_cut_short)
            runstate = await self._monitor.runstate()
            outcome += f"; the guest is {runstate}" + (f". {hint}" if hint else "")
        except QsnapError as trouble:
            outcome = f"clearing up after it failed: {trouble}"
        if isinstance(failure, JobFailed) and removed:
            raise VerifyFailed(self._tag, [str(failure)], outcome) from failure
        explain(failure, outcome, runstate if was_running else None)

    async def undo(self, *, keeps_whole: bool) -> tuple[tuple[str, ...], str]:
        """Keep a whole snapshot of the tag if there is one, and leave nothing half made.

        The rows of an unfinished save are removed, unless the older snapshot is gone already: then the new one is kept
        if it is whole (*keeps_whole*). In a group, whether it is kept was decided by all.

        :return: the nodes from which a new row was removed, and the outcome in words.
        """
        graph = await self._monitor.block_graph()
        held = self._holders(graph)
        has_replaced = self.work.rows and self.work.saving and self._has_made_something(graph)
        is_kept = self._journal.is_decided
        if is_kept is None:
            is_kept = self.work.is_complete or bool(keeps_whole and has_replaced)
        if is_kept and not self._problems(graph):
            left = await self.conclude()
            why = ": it replaced an older one" if self.work.rows or self.work.older else ""
            why = ", as that of every other VM" if self._journal.is_decided else why
            kept = f"the new snapshot {self._tag!r} was complete and is kept{why}"
            return (), "; ".join((kept, *(finding.message for finding in left)))
        outcome = ""
        if self.work.saving and (not held or self._has_made_something(graph)):
            await delete_everywhere(self._monitor, self._devices, self.work.disk_tag, graph.tables)
            outcome = (
                f"what this save made was removed from {self._displayed(held)}" if held else "nothing of it is left"
            )
            graph = await self._monitor.block_graph()
        else:
            held = ()
        # If the older snapshot was a live one: a state file is useless without its disks
        files = ((path, read(Path(path))) for path in self.work.older_files)
        useless = [path for path, file in files if file and not self._holders(graph, file.disk_tag)]
        sentences = [outcome, self._older_outcome(graph)]
        try:
            await delete_all(self._monitor, self._devices, (), useless)
        except JobFailed as error:
            sentences.append(str(error))
        return held, "; ".join(filter(None, sentences))

    def _holders(self, graph: BlockGraph, tag: str | None = None) -> tuple[str, ...]:
        return snapshots.holders(graph, self._devices, tag or self.work.disk_tag)

    def _displayed(self, nodes: Collection[str]) -> str:
        """The names that messages use for these nodes."""
        return ", ".join(rules.displayed(nodes, self._devices))

    def _older_outcome(self, graph: BlockGraph) -> str:
        """The outcome for the older snapshot, in words."""
        rows, tag = self.work.rows, self._tag
        held = self._holders(graph)
        if self.work.older or (rows and held == tuple(rows) and self.work.saving):
            return f"the older snapshot {tag!r} is as it was"
        if not rows:
            return ""
        if not held:
            return f"the older snapshot {tag!r} had already been deleted"
        was, now = self._displayed(rows), self._displayed(held)
        return f"the older snapshot {tag!r} was to be deleted from {was}, and is on {now}"


def explain(failure: BaseException, outcome: str, runstate: RunState | None, *, undone: bool = False) -> None:
    """Add the outcome of the save to *failure*.

    :param runstate: the present run state of a guest that was running before; None for any other.
    :param undone: see :attr:`QsnapError.undone`.
    :raise GuestLeftStopped: the guest does not run any more, because it has no room for its own writes either.
    :raise JobFailed: QEMU refused a command in the middle of it.
    """
    if runstate is not None and not is_live(runstate):
        raise GuestLeftStopped(f"{failure}; {outcome}: {cure_of(runstate)}") from failure
    if not isinstance(failure, QsnapError):
        failure.add_note(outcome)
        return
    told = JobFailed(failure.command, failure.reason) if isinstance(failure, CommandFailed) else failure
    told.outcome, told.undone = outcome, undone
    if told is not failure:
        raise told from failure


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
    """The result of a save, or of a dry run.

    :param left: warnings that came up: see :func:`qsnap.operations.delete.delete_replaced`.
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
