"""Delete: QEMU's do_delvm, looked up before and checked after, as QEMU calls a missing tag a success."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qsnap.errors import JobFailed, PartialFailure, PrecheckRefused, QsnapError, SnapshotNotFound, VerifyFailed
from qsnap.host import bulk_io
from qsnap.inventory import block_jobs, snapshots
from qsnap.inventory import devices as rules
from qsnap.inventory.snapshots import Holding
from qsnap.inventory.state_store import NO_STORE, StateStore
from qsnap.model.qemu import DeleteResult, Device, SnapshotTables
from qsnap.monitor import Monitor
from qsnap.operations.plan import refuse_untransportable, runstate_findings
from qsnap.operations.removal import Look
from qsnap.runs.journal import Journal
from qsnap.runs.shield import shielded


async def do_delvm(
    monitor: Monitor,
    tags: Sequence[str],
    *,
    store: StateStore = NO_STORE,
    missing_ok: bool = False,
    journal: Journal | None = None,
    look: Look | None = None,
) -> DeleteResult:
    """Delete snapshots from every device that holds them, those that are on some devices only too, and state files.

    The guest keeps its run state; a running one stands still while QEMU deletes.

    :param store: where the state files of live saves lie.
    :param tags: deleted one after another; an error with one does not keep the others from being deleted.
    :param missing_ok: a tag that no device holds is no error.
    :param journal: of the claim that this is done under; without one nobody sees it through if we are killed.
    :param look: at the VM, taken under the same claim; without one it is taken here. What is read back after each
        deletion is the look for the next.
    :return: for each tag the node-names that held it.
    :raise NotSupported: the tag cannot go through a human monitor.
    :raise SnapshotNotFound: no device holds the tag (with several tags: any of them).
    :raise PrecheckRefused: the tag is protected; or in a run state with inactive images: QEMU 5.2 crashes there;
        or, by HMP, a backup runs.
    :raise JobFailed: QEMU reported an error; the tag may be left on some devices.
    :raise VerifyFailed: QEMU reported success, and the tag is still there.
    :raise PartialFailure: some of several tags were deleted, and some not.
    """
    look = look or Look(monitor, store, await monitor.block_graph())
    refusals = [
        *runstate_findings(await monitor.runstate()),
        *block_jobs.delete_findings(look.graph, look.devices, chooses_devices=monitor.chooses_devices),
    ]
    if any(finding.refuses for finding in refusals):
        raise PrecheckRefused("nothing can be deleted now", refusals)
    deleted: dict[str, tuple[str, ...]] = {}
    files: dict[str, tuple[str, ...]] = {}
    failed: dict[str, QsnapError] = {}
    for tag in dict.fromkeys(tags):
        try:
            held = await _delete(monitor, tag, look, missing_ok, journal or Journal())
            deleted[tag] = held.nodes
            files |= {tag: held.files} if held.files else {}
        except QsnapError as error:
            failed[tag] = error
        except asyncio.CancelledError as cancelled:
            # The tag at which it came is gone too, if QEMU had begun with it
            gone = [*deleted, *([] if any(look.holding(tag)) else [tag])]
            cancelled.add_note(f"deleted by then: {', '.join(gone) or 'nothing'}")
            raise
    if not failed:
        return DeleteResult(deleted=deleted, labels=rules.labels(look.devices), files=files)
    if len(failed) == 1 and not deleted:
        raise next(iter(failed.values()))
    if not deleted and all(isinstance(error, SnapshotNotFound) for error in failed.values()):
        unknown = ", ".join(map(repr, failed))
        raise SnapshotNotFound(next(iter(failed)), f"no snapshot {unknown} on any device; nothing was deleted")
    raise PartialFailure(tuple(deleted), failed)


async def _delete(monitor: Monitor, tag: str, look: Look, missing_ok: bool, journal: Journal) -> Holding:
    refuse_untransportable(monitor, tag)
    held = look.holding(tag)
    if not held.tags and not held.files and not missing_ok:
        raise snapshots.not_found(look.graph, look.devices, tag)
    await look.refuse_removal(tag, "deleted")
    if held.tags or held.files:
        await journal.armed()
        journal.note(tags=(tag,), devices=held.nodes, disk_tags=held.tags, files=held.files)
        # What QEMU has begun it finishes; an interrupt takes effect between two tags.
        await shielded(_deleted(monitor, held, look), journal.patience_s)
    return held


async def _deleted(monitor: Monitor, held: Holding, look: Look) -> None:
    tables: SnapshotTables = {name: node.snapshots for name, node in look.graph.nodes.items()}
    try:
        tables = await delete_all(monitor, look.devices, held.tags, held.files, tables)
    except JobFailed:
        # Some of it may be gone
        look.without((), await monitor.snapshot_tables())
        raise
    look.without(held.files, tables)


async def delete_all(
    monitor: Monitor,
    devices: Sequence[Device],
    disk_tags: Sequence[str],
    files: Sequence[str],
    tables: SnapshotTables | None = None,
) -> SnapshotTables:
    """Delete tags from all devices, and then the state files that went with them.

    :param tables: see :func:`delete_everywhere`.
    :return: the snapshot tables afterwards.
    :raise JobFailed: as :func:`delete_everywhere`, or a file cannot be deleted.
    """
    for tag in disk_tags:
        tables = await delete_everywhere(monitor, devices, tag, tables)
    if files and monitor.background is not None:
        # QEMU may have one open still, and with it its room on the file system
        await monitor.background.tidy()
    for file in files:
        try:
            with suppress(FileNotFoundError):
                await asyncio.to_thread(bulk_io.remove, Path(file))
        except OSError as error:
            raise JobFailed("unlink", f"{file}: {error.strerror}") from error
    return tables or {}


async def delete_everywhere(
    monitor: Monitor, devices: Sequence[Device], tag: str, tables: SnapshotTables | None = None
) -> SnapshotTables:
    """Delete *tag* until no device holds it; a node that holds it twice loses one at a time.

    :param tables: the snapshot tables, where they were read a moment ago. They are read again after each deletion.
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
