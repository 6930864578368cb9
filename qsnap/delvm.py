"""Delete: QEMU's do_delvm, looked up before and checked after, as QEMU calls a missing tag a success."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qsnap import devices as rules
from qsnap import snapshots
from qsnap.errors import PartialFailure, PrecheckRefused, QsnapError, SnapshotNotFound, VerifyFailed
from qsnap.journal import Journal
from qsnap.model import DeleteResult, Device, Labels
from qsnap.monitor import Monitor
from qsnap.precheck import refuse_untransportable, runstate_findings
from qsnap.undisturbed import undisturbed


async def do_delvm(
    monitor: Monitor, tags: Sequence[str], *, missing_ok: bool = False, journal: Journal | None = None
) -> DeleteResult:
    """Delete snapshots from every device that holds them, those that are on some devices only too.

    The guest keeps its run state; a running one stands still while QEMU deletes.

    :param tags: deleted one after another; an error with one does not keep the others from being deleted.
    :param missing_ok: a tag that no device holds is no error.
    :param journal: of the claim that this is done under; without one nobody sees it through if we are killed.
    :return: for each tag the node-names that held it.
    :raise NotSupported: the tag cannot go through a human monitor.
    :raise SnapshotNotFound: no device holds the tag (with several tags: any of them).
    :raise PrecheckRefused: in a run state with inactive images; QEMU 5.2 crashes there.
    :raise JobFailed: QEMU reported an error; the tag may be left on some devices.
    :raise VerifyFailed: QEMU reported success, and the tag is still there.
    :raise PartialFailure: some of several tags were deleted, and some not.
    """
    refusals = list(runstate_findings(await monitor.runstate()))
    if any(finding.refuses for finding in refusals):
        raise PrecheckRefused("nothing can be deleted now", refusals)
    deleted: dict[str, tuple[str, ...]] = {}
    labels: dict[str, str] = {}
    failed: dict[str, QsnapError] = {}
    for tag in dict.fromkeys(tags):
        try:
            deleted[tag], names = await _delete(monitor, tag, missing_ok, journal or Journal())
            labels.update(names)
        except QsnapError as error:
            failed[tag] = error
        except asyncio.CancelledError as cancelled:
            cancelled.add_note(f"deleted by then: {', '.join(deleted) or 'nothing'}")
            raise
    if not failed:
        return DeleteResult(deleted=deleted, labels=labels)
    if len(failed) == 1 and not deleted:
        raise next(iter(failed.values()))
    if not deleted and all(isinstance(error, SnapshotNotFound) for error in failed.values()):
        unknown = ", ".join(map(repr, failed))
        raise SnapshotNotFound(next(iter(failed)), f"no snapshot {unknown} on any device; nothing was deleted")
    raise PartialFailure(tuple(deleted), failed)


async def _delete(monitor: Monitor, tag: str, missing_ok: bool, journal: Journal) -> tuple[tuple[str, ...], Labels]:
    refuse_untransportable(monitor, tag)
    graph = await monitor.block_graph()
    devices = rules.survey(graph, chooses_devices=monitor.chooses_devices).devices
    held = snapshots.holders(graph, devices, tag)
    if not held and not missing_ok:
        raise SnapshotNotFound(tag)
    if held:
        await journal.armed()
        journal.note(tags=(tag,), devices=held)
        # What QEMU has begun it finishes; an interrupt takes effect between two tags.
        await undisturbed(delete_everywhere(monitor, devices, tag), journal.patience_s)
    return held, rules.labels(devices)


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
