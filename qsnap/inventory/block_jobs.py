"""The block layer's jobs and bitmaps, and their meaning for a save and a load. Pure.

Block jobs copy a disk while the guest runs, and dirty bitmaps note what a backup has to copy next. A load takes the
disk back behind their backs: the copy, or the next backup, would then be of two moments. QEMU refuses to take back a
node that has dirty bitmaps (block/snapshot.c: bdrv_snapshot_goto), and that is all that it looks at. A mirror has its
bitmap on the image up to 7.2, on its filter since 10.0; a stream has none. And as qsnap names the image below the
filters to QEMU (:mod:`qsnap.inventory.devices`), it has to look itself. (Seen: contents lost with mirror, commit and
stream, on 7.2 to 11.1.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from qsnap.inventory.devices import BACKUP_FILTERS, at_or_below, displayed, path_to_image
from qsnap.model.checks import Device, Finding, Severity, Verdict
from qsnap.model.qemu import BlockGraph, BlockJob

#: What happens to a job of that type if a load puts the disk back.
_AFTER_A_LOAD = {
    "mirror": "its copy would not go back with it",
    "backup": "its copy would be of two moments",
    "commit": "what it has written to the backing file would not go back with it",
    "stream": "what is in the backing file would be lost when that is dropped",
}
#: A snapshot outlives a backup. At the end of any other job there may be nothing left to load.
_PATIENCE = {"backup": "wait for its end, or "}
#: What becomes of a snapshot that is made under a job of that type, when it ends; a backup does no harm to one.
_AFTER_A_SAVE = {
    "mirror": "if the guest is switched to its copy then, snapshots made by now stay behind in the old image",
    "commit": "if the guest is switched to the backing file then, snapshots made by now stay behind in the overlay",
    "stream": "the backing file is dropped then, and snapshots made by now are broken without it",
}


def load_findings(graph: BlockGraph, devices: Sequence[Device], going_back: Collection[str]) -> Iterator[Finding]:
    """Findings that prevent a load.

    :param devices: all devices of the guest.
    :param going_back: the images that the load puts back.
    """
    affected = [device for device in devices if device.image in going_back]
    for job, device in _jobs_on(graph, affected):
        yield _finding(
            "block-job",
            f"{_clause(job, device, devices)}: {_AFTER_A_LOAD[job.type]}",
            f"{_PATIENCE.get(job.type, 'end it first: ')}{_ending(job)}",
            device if job.nodes else None,
        )
    for device in affected:
        assert device.image
        name = _name(device, devices)
        if left := _left_filter(graph, device):
            yield _finding(
                "backup-filter",
                f"the filter {left} is above {name}, for a backup: its copy would be of two moments",
                _END_BACKUP,
                device,
            )
        if bitmaps := _bitmaps(graph, device):
            yield _finding(
                "dirty-bitmaps",
                f"{name} has dirty bitmaps ({', '.join(bitmaps)}): the next backup goes by them, so QEMU takes back no "
                "disk that has any",
                f"remove them, by QMP: block-dirty-bitmap-remove. {_FULL_BACKUP}",
                device,
            )
        elif "" in graph.nodes[device.image].dirty_bitmaps and not left and not list(_jobs_on(graph, [device])):
            yield _finding(
                "dirty-bitmaps",
                f"{name}: Device has active dirty bitmaps, and QEMU takes back no disk that has. They have no name, so "
                "something in QEMU is using them",
                "wait for its end",
                device,
            )


def save_findings(graph: BlockGraph, devices: Sequence[Device]) -> Iterator[Finding]:
    """Findings for a save.

    If QEMU takes all devices itself, it fails at the filter of a backup (seen on 5.2 to 11.1), and would make a
    snapshot in an unfinished copy.

    :param devices: all of the guest's.
    """
    yield from _of_all_devices(graph, devices, "savevm cannot save")
    saved = [device for device in devices if device.verdict is Verdict.SAVED]
    for job, device in _jobs_on(graph, saved) if graph.chooses_devices else ():
        if job.type in _AFTER_A_SAVE:
            yield _finding(
                "block-job",
                f"{_clause(job, device, devices)}: {_AFTER_A_SAVE[job.type]}",
                "save again when it has ended",
                device,
                Severity.WARN,
            )
    for device in saved:
        name = _name(device, devices)
        if bitmaps := _bitmaps(graph, device):
            yield _finding(
                "dirty-bitmaps",
                f"{name} has dirty bitmaps ({', '.join(bitmaps)}): no snapshot can be loaded while it has",
                f"to load one, remove them, by QMP: block-dirty-bitmap-remove. {_FULL_BACKUP}",
                device,
                Severity.WARN,
            )


def live_obstacle(graph: BlockGraph, devices: Sequence[Device]) -> str:
    """The job beside which no live save can be made, and what to do about it, as the rest of a sentence; "" if none.

    There QEMU makes no snapshot of a disk alone: blockdev-snapshot-internal-sync says "Need a root block node" beside a
    mirror, commit, backup or stream (seen on 7.2 and 11.1). Nor does it make one through the filter of a backup.

    :param devices: all of the guest's.
    """
    saved = [device for device in devices if device.verdict is Verdict.SAVED]
    for job, device in _jobs_on(graph, saved):
        return f"while {_clause(job, device, devices)}: wait for its end, or {_ending(job)}"
    for device in saved:
        if left := _left_filter(graph, device):
            return f"while the filter {left} is above {_name(device, devices)}: {_END_BACKUP}"
    return ""


def delete_findings(graph: BlockGraph, devices: Sequence[Device]) -> Iterator[Finding]:
    """Findings that prevent a deletion.

    If QEMU takes all devices itself, delvm fails at the filter of a backup (seen on 7.2 and 11.1), or passes that
    disk over and deletes from the others (5.2).

    :param devices: all of the guest's.
    """
    yield from _of_all_devices(graph, devices, "delvm cannot delete", beside="backup")


def _of_all_devices(graph: BlockGraph, devices: Sequence[Device], what: str, beside: str = "") -> Iterator[Finding]:
    """Refusals if QEMU takes all devices itself: a job, and a filter that a backup left above a disk.

    :param beside: the type of those jobs; "" means any type.
    """
    if graph.chooses_devices:
        return
    for job, device in _jobs_on(graph, devices):
        if beside in ("", job.type):
            clause, cure = _clause(job, device, devices), f"wait for its end, or {_ending(job)}"
            yield _finding("block-job", f"{clause}: QEMU's {what} beside it", cure)
    for device in devices:
        if device.verdict is Verdict.SAVED and (left := _left_filter(graph, device)):
            yield _finding(
                "backup-filter",
                f"the filter {left} is above {_name(device, devices)}, for a backup: QEMU's {what} through it",
                _END_BACKUP,
                device,
            )


_END_BACKUP = "end the backup, and take the filter out: by QMP, qom-set the device's drive back, then blockdev-del"
_FULL_BACKUP = "The next backup that goes by them must then be a full one"


def _jobs_on(graph: BlockGraph, devices: Iterable[Device]) -> Iterator[tuple[BlockJob, Device]]:
    """The jobs that work on any of *devices*, each with the first of them."""
    below = [(device, at_or_below(graph, device.node)) for device in devices if device.node]
    for job in graph.jobs:
        nodes = {node for _, node in job.nodes}
        # If QEMU does not report what a job works on, it may be any of them
        if found := next((device for device, reached in below if not nodes or nodes.intersection(reached)), None):
            yield job, found


def _left_filter(graph: BlockGraph, device: Device) -> str | None:
    """The backup filter above the image that belongs to no job."""
    if any(not job.nodes for job in graph.jobs):
        return None
    of_jobs = {node for job in graph.jobs for _, node in job.nodes}
    return next(
        (
            node.node_name
            for node in path_to_image(graph, device.node)
            if node.driver in BACKUP_FILTERS and node.node_name not in of_jobs
        ),
        None,
    )


def _bitmaps(graph: BlockGraph, device: Device) -> list[str]:
    """The names of the dirty bitmaps on the image and on what stands above it."""
    nodes = path_to_image(graph, device.node)
    return sorted({name for node in nodes for name in node.dirty_bitmaps if name})


def _clause(job: BlockJob, device: Device, devices: Sequence[Device]) -> str:
    """What a message says of a job on *device*."""
    what = f"block job {job.id!r}"
    if not job.nodes:
        return f"{what} ({job.type}) is under way{'' if job.status else ', or has ended and was not dismissed'}"
    if job.type == "backup":
        return f"a backup runs on {_name(device, devices)} ({what})"
    return f"{what} ({job.type}) works on {_name(device, devices)}"


def _ending(job: BlockJob) -> str:
    cancelling = f"block-job-cancel device={job.id} (by HMP: block_job_cancel {job.id})"
    if job.status:
        return cancelling
    # A job with auto-dismiss=false stays in the list after its end, and HMP shows no difference
    return f"{cancelling}; if it has ended: job-dismiss id={job.id}, by QMP"


def _name(device: Device, devices: Sequence[Device]) -> str:
    node = device.image or device.node
    assert node
    return displayed([node], devices)[0]


def _finding(
    code: str, message: str, cure: str, device: Device | None = None, severity: Severity = Severity.REFUSE
) -> Finding:
    return Finding(code=code, severity=severity, message=message, cure=cure, node=device.node if device else None)
