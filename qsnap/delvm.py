"""Delete: QEMU's do_delvm, looked up before and checked after, as QEMU calls a missing tag a success."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qsnap import devices as rules
from qsnap import gentle, snapshots
from qsnap.errors import JobFailed, PartialFailure, PrecheckRefused, QsnapError, SnapshotNotFound, VerifyFailed
from qsnap.journal import Journal
from qsnap.model import DeleteResult, Device, Labels
from qsnap.monitor import Monitor
from qsnap.precheck import refuse_untransportable, runstate_findings
from qsnap.removal import refuse_removal
from qsnap.snapshots import Holding
from qsnap.statefile.shelf import NO_SHELF, Shelf
from qsnap.undisturbed import undisturbed


async def do_delvm(
    monitor: Monitor,
    tags: Sequence[str],
    *,
    shelf: Shelf = NO_SHELF,
    missing_ok: bool = False,
    journal: Journal | None = None,
) -> DeleteResult:
    """Delete snapshots from every device that holds them, those that are on some devices only too, and state files.

    The guest keeps its run state; a running one stands still while QEMU deletes.

    :param shelf: where the state files of live saves lie.
    :param tags: deleted one after another; an error with one does not keep the others from being deleted.
    :param missing_ok: a tag that no device holds is no error.
    :param journal: of the claim that this is done under; without one nobody sees it through if we are killed.
    :return: for each tag the node-names that held it.
    :raise NotSupported: the tag cannot go through a human monitor.
    :raise SnapshotNotFound: no device holds the tag (with several tags: any of them).
    :raise PrecheckRefused: the tag is protected; or in a run state with inactive images: QEMU 5.2 crashes there.
    :raise JobFailed: QEMU reported an error; the tag may be left on some devices.
    :raise VerifyFailed: QEMU reported success, and the tag is still there.
    :raise PartialFailure: some of several tags were deleted, and some not.
    """
    refusals = list(runstate_findings(await monitor.runstate()))
    if any(finding.refuses for finding in refusals):
        raise PrecheckRefused("nothing can be deleted now", refusals)
    deleted: dict[str, tuple[str, ...]] = {}
    files: dict[str, tuple[str, ...]] = {}
    labels: dict[str, str] = {}
    failed: dict[str, QsnapError] = {}
    for tag in dict.fromkeys(tags):
        try:
            held, names = await _delete(monitor, tag, shelf, missing_ok, journal or Journal())
            deleted[tag] = held.nodes
            files |= {tag: held.files} if held.files else {}
            labels.update(names)
        except QsnapError as error:
            failed[tag] = error
        except asyncio.CancelledError as cancelled:
            cancelled.add_note(f"deleted by then: {', '.join(deleted) or 'nothing'}")
            raise
    if not failed:
        return DeleteResult(deleted=deleted, labels=labels, files=files)
    if len(failed) == 1 and not deleted:
        raise next(iter(failed.values()))
    if not deleted and all(isinstance(error, SnapshotNotFound) for error in failed.values()):
        unknown = ", ".join(map(repr, failed))
        raise SnapshotNotFound(next(iter(failed)), f"no snapshot {unknown} on any device; nothing was deleted")
    raise PartialFailure(tuple(deleted), failed)


async def _delete(
    monitor: Monitor, tag: str, shelf: Shelf, missing_ok: bool, journal: Journal
) -> tuple[Holding, Labels]:
    refuse_untransportable(monitor, tag)
    graph = await monitor.block_graph()
    devices = rules.survey(graph, chooses_devices=monitor.chooses_devices).devices
    held = snapshots.holding(graph, devices, tag, shelf.files(graph, devices))
    if not held.tags and not held.files and not missing_ok:
        raise snapshots.not_found(graph, devices, tag)
    await refuse_removal(monitor, shelf, graph, devices, tag, "deleted")
    if held.tags or held.files:
        await journal.armed()
        journal.note(tags=(tag,), devices=held.nodes, disk_tags=held.tags, files=held.files)
        # What QEMU has begun it finishes; an interrupt takes effect between two tags.
        await undisturbed(delete_all(monitor, devices, held.tags, held.files), journal.patience_s)
    return held, rules.labels(devices)


async def delete_all(
    monitor: Monitor, devices: Sequence[Device], disk_tags: Sequence[str], files: Sequence[str]
) -> None:
    """Delete tags from all devices, and then the state files that went with them.

    :raise JobFailed: as :func:`delete_everywhere`, or a file cannot be deleted.
    """
    for tag in disk_tags:
        await delete_everywhere(monitor, devices, tag)
    if files and monitor.background is not None:
        # QEMU may have one open still, and with it its room on the file system
        await monitor.background.tidy()
    for file in files:
        try:
            with suppress(FileNotFoundError):
                await asyncio.to_thread(gentle.remove, Path(file))
        except OSError as error:
            raise JobFailed("unlink", f"{file}: {error.strerror}") from error


async def delete_everywhere(monitor: Monitor, devices: Sequence[Device], tag: str) -> None:
    """Delete *tag* until no device holds it; a node that holds it twice loses one at a time.

    :raise JobFailed: QEMU reported an error.
    :raise VerifyFailed: QEMU reported success, and as many are left as before.
    """
    left = None
    while True:
        graph = await monitor.block_graph()
        held = snapshots.holders(graph, devices, tag)
        if not held:
            return
        before, left = left, sum(len(graph.nodes[name].tagged(tag)) for name in held)
        if before is not None and left >= before:
            raise VerifyFailed(tag, [f"{', '.join(held)} still holds it after QEMU deleted it"])
        await monitor.snapshot_delete(tag, held)
