"""Delete: QEMU's do_delvm, with a look-up before and a check after, because QEMU reports success for a missing tag."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qsnap.errors import JobFailed, PartialFailure, PrecheckRefused, QsnapError, SnapshotNotFound, VerifyFailed
from qsnap.host import bulk_io
from qsnap.inventory import block_jobs, snapshots
from qsnap.inventory import devices as rules
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.snapshots import Holding
from qsnap.model.checks import Device, Finding
from qsnap.model.qemu import SnapshotTables
from qsnap.model.requests import DeleteRequest
from qsnap.model.results import DeleteResult
from qsnap.monitor import Monitor
from qsnap.operations.findings import refuse_untransportable, runstate_findings
from qsnap.operations.removal import refuse_removal
from qsnap.runs.group import Point
from qsnap.runs.record import DeleteWork
from qsnap.runs.run import Run

#: The name of the failed step if a state file cannot be removed.
_UNLINK = "unlink"


async def do_delvm(run: Run, request: DeleteRequest, inventory: Inventory | None = None) -> DeleteResult:
    """Delete snapshots from every device that holds them, including those on some devices only, and their state files.

    The guest keeps its run state; a running guest stands still while QEMU deletes.

    In a group, nothing is deleted unless everything can be, on all its VMs.

    :param inventory: the VM's inventory, taken in the same run; None takes it here. It is updated after each deletion.
    :return: for each tag the node-names that held it.
    :raise NotSupported: the tag cannot go through a human monitor.
    :raise SnapshotNotFound: no device holds the tag (with several tags: any of them).
    :raise PrecheckRefused: the tag is protected; or in a run state with inactive images: QEMU 5.2 crashes there;
        or, by HMP, a backup runs.
    :raise JobFailed: QEMU reported an error; the tag may be left on some devices.
    :raise VerifyFailed: QEMU reported success, and the tag is still there.
    :raise PartialFailure: some of several tags were deleted, and some not.
    """
    monitor = run.monitor
    inventory = inventory or await run.look()
    refusals = [
        *runstate_findings(await monitor.runstate()),
        *block_jobs.delete_findings(inventory.graph, inventory.devices),
    ]
    if any(finding.refuses for finding in refusals):
        raise PrecheckRefused("nothing can be deleted now", refusals)
    if run.journal.member is None:
        return await _delete_each(run, request, inventory)
    await _agree(run, request, inventory)
    return await run.shielded(_delete_each(run, request, inventory))


async def _delete_each(run: Run, request: DeleteRequest, inventory: Inventory) -> DeleteResult:
    deleted: dict[str, tuple[str, ...]] = {}
    files: dict[str, tuple[str, ...]] = {}
    failed: dict[str, QsnapError] = {}
    for tag in dict.fromkeys(request.tags):
        try:
            held = inventory.holding(tag)
            if run.journal.member is None:
                await _prepare(run, (tag,), request, inventory)
            if held.tags or held.files:
                # QEMU finishes what it has begun; an interrupt takes effect between two tags.
                await run.shielded(_deleted(run.monitor, held, inventory))
            deleted[tag] = held.nodes
            files |= {tag: held.files} if held.files else {}
        except QsnapError as error:
            failed[tag] = error
        except asyncio.CancelledError as cancelled:
            # The tag during which the interrupt came is deleted too, if QEMU had begun with it
            gone = [*deleted, *([] if any(inventory.holding(tag)) else [tag])]
            cancelled.add_note(f"deleted by then: {', '.join(gone) or 'nothing'}")
            raise
    if not failed:
        return DeleteResult(deleted=deleted, labels=rules.labels(inventory.devices), files=files)
    if len(failed) == 1 and not deleted:
        raise next(iter(failed.values()))
    if not deleted and all(isinstance(error, SnapshotNotFound) for error in failed.values()):
        unknown, near = ", ".join(map(repr, failed)), "".join(dict.fromkeys(map(inventory.near, failed)))
        raise SnapshotNotFound(next(iter(failed)), f"no snapshot {unknown} on any device; nothing was deleted{near}")
    raise PartialFailure(tuple(deleted), failed)


async def _prepare(run: Run, tags: Sequence[str], request: DeleteRequest, inventory: Inventory) -> None:
    """Check whether *tags* can be deleted, and write down that they will be."""
    held = [inventory.holding(tag) for tag in tags]
    for tag, there in zip(tags, held, strict=True):
        refuse_untransportable(run.monitor, tag)
        if not there.tags and not there.files and not request.missing_ok:
            hint = "" if run.journal.member is None else "; --missing-ok deletes it on the other VMs"
            raise inventory.not_found(tag, hint)
    await refuse_removal(run, inventory, tags, "deleted", alone=request.alone)
    if any(there.tags or there.files for there in held):
        await run.journal.armed()
        work = DeleteWork(
            devices=tuple(dict.fromkeys(node for there in held for node in there.nodes)),
            disk_tags=tuple(tag for there in held for tag in there.tags),
            files=tuple(file for there in held for file in there.files),
        )
        run.journal.note(tags=tuple(tags), work=work)


async def _agree(run: Run, request: DeleteRequest, inventory: Inventory) -> None:
    """With the other VMs of the group: check everything before anything is deleted, and decide that all is.

    From then on it is done to the end, if need be by the guards.
    """
    await _prepare(run, tuple(dict.fromkeys(request.tags)), request, inventory)
    await run.journal.meet(Point.CHECKED)
    await run.journal.decide()


async def _deleted(monitor: Monitor, held: Holding, inventory: Inventory) -> None:
    tables = inventory.graph.tables
    try:
        tables = await delete_all(monitor, inventory.devices, held.tags, held.files, tables)
    except JobFailed as failure:
        # Parts of it may be deleted
        inventory.without((), await monitor.snapshot_tables())
        if failure.command == _UNLINK:
            gone = "its disks' snapshots are gone; " if held.tags else ""
            failure.outcome = f"{gone}the guest is {await monitor.runstate()}. Remove the file by hand"
        raise
    inventory.without(held.files, tables)


async def delete_all(
    monitor: Monitor,
    devices: Sequence[Device],
    disk_tags: Sequence[str],
    files: Sequence[str],
    tables: SnapshotTables | None = None,
) -> SnapshotTables:
    """Delete tags from all devices, and then the state files that belong to them.

    :param tables: see :func:`delete_everywhere`.
    :return: the snapshot tables afterwards.
    :raise JobFailed: as :func:`delete_everywhere`, or a file cannot be deleted; the others were.
    """
    for tag in disk_tags:
        tables = await delete_everywhere(monitor, devices, tag, tables)
    if files:
        # QEMU may still have a file open, which keeps its room on the file system
        await monitor.tidy()
    stay: list[str] = []
    for file in files:
        try:
            with suppress(FileNotFoundError):
                await asyncio.to_thread(bulk_io.remove, Path(file))
        except OSError as error:
            stay.append(f"the state file {file} cannot be removed: {error.strerror}")
    if stay:
        raise JobFailed(_UNLINK, "; ".join(stay))
    return tables or {}


async def delete_replaced(
    monitor: Monitor, devices: Sequence[Device], disk_tags: Sequence[str], files: Sequence[str]
) -> tuple[Finding, ...]:
    """Delete the replaced snapshot, after the new one is complete; return a warning for each part that is left."""
    try:
        await delete_all(monitor, devices, disk_tags, files)
    except (JobFailed, VerifyFailed) as error:
        message = f"the new snapshot is whole, but something of the one that it has replaced is left: {error}"
        cure = "remove the file by hand" if isinstance(error, JobFailed) and error.command == _UNLINK else ""
        return (Finding.warning("replaced-left", message, cure or "`qsnap list` shows it; delete it"),)
    return ()


async def delete_everywhere(
    monitor: Monitor, devices: Sequence[Device], tag: str, tables: SnapshotTables | None = None
) -> SnapshotTables:
    """Delete *tag* until no device holds it; a node that holds it twice loses one at a time.

    :param tables: the snapshot tables, if they were just read. They are read again after each deletion.
    :return: the tables in which no device holds it.
    :raise JobFailed: QEMU reported an error.
    :raise VerifyFailed: QEMU reported success, and as many are left as before.
    """
    left = None
    while True:
        tables = tables if tables is not None and left is None else await monitor.snapshot_tables()
        rows = {
            name: len([row for row in tables.get(name, ()) if row.tag == tag])
            for name in snapshots.relevant_nodes(devices)
        }
        held = [name for name, count in rows.items() if count]
        if not held:
            return tables
        before, left = left, sum(rows.values())
        if before is not None and left >= before:
            raise VerifyFailed(tag, [f"{', '.join(held)} still holds it after QEMU deleted it"])
        await monitor.snapshot_delete(tag, held)
