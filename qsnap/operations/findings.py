"""The findings of the pre-checks: each says what is wrong, and how to cure it.

Those of devices are in :mod:`qsnap.inventory.devices`, and those of block jobs in :mod:`qsnap.inventory.block_jobs`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from qsnap.errors import CommandFailed, NotSupported, QsnapError
from qsnap.host import processes
from qsnap.inventory import devices as rules
from qsnap.inventory import snapshots
from qsnap.inventory.inventory import Inventory
from qsnap.model.checks import Device, Finding, Role, Verdict
from qsnap.model.qemu import MIGRATION_IDLE, BlockGraph, Job, Migration, QemuVersion, RunState
from qsnap.model.requests import OnExists, SaveRequest
from qsnap.model.runstates import trouble_of
from qsnap.model.snapshots import Kind, Snapshot, StateFile
from qsnap.monitor import Monitor
from qsnap.tags import RESERVED_SUFFIXES, looks_like_id, tag_problem

#: Run states in which QEMU refuses a save, or crashes in it (before 9.0: an assertion on inactive images).
_RUNSTATES_REFUSED = {
    RunState.INMIGRATE: ("it waits for an incoming migration", "wait for its end"),
    RunState.POSTMIGRATE: ("it has been migrated away, and its images are inactive", "`cont` takes it back"),
    RunState.FINISH_MIGRATE: ("a migration is about to end", "wait for its end, or `migrate_cancel`"),
    RunState.PRECONFIG: ("its machine is not built yet (-preconfig)", "`x-exit-preconfig` builds it"),
    RunState.COLO: ("it is one half of a COLO pair", "end that first"),
    RunState.SAVE_VM: ("another save is under way", "wait for its end"),
}

#: What QEMU answers to most commands under -preconfig (qapi/qmp-dispatch.c), where query-status says "prelaunch";
#: before 6.0 the other sentence, and query-status says "preconfig".
_NO_MACHINE = ("permitted only after machine initialization", "isn't permitted in 'preconfig' state")

#: Capabilities with which savevm fails or crashes QEMU, or makes what cannot be loaded.
#: multifd: seen to crash 7.2, refused since 10.2. mapped-ram: since 10.2 savevm can write it, but only a QEMU with it
#: set loads that, and a restarted QEMU does not have it set; a live snapshot with it is never loaded (seen in 11.1).
#: block: "Block migration and snapshots are incompatible"; it went in 9.1.
_CAPABILITIES_REFUSED = ("multifd", "mapped-ram", "block")

#: From here on nvme can be saved; and QEMU crashes in it where a controller has no drive of its own (seen in 11.1).
_NVME_IS_SAVED = QemuVersion(11, 0, 0)

#: Protocol drivers whose images cannot grow (block/*.c: those without bdrv_co_truncate that makes it larger).
_FIXED_SIZE = frozenset({"nbd", "host_device", "iscsi", "nvme", "nvme-io_uring", "virtio-blk-vhost-vdpa"})

#: Findings about the image that is to hold the VM state; they do not matter if the state goes elsewhere.
OF_THE_VMSTATE_IMAGE = frozenset({"vmstate-encrypted", "vmstate-not-encrypted", "vmstate-removable"})


def device_findings_for_load(survey: rules.Survey, exclude_all: str) -> Iterator[Finding]:
    for finding in survey.findings:
        if finding.code == "device-cannot-snapshot":
            yield Finding.refusal(
                finding.code,
                f"{finding.message}: it would keep the contents that it has now, while the rest goes back",
                f"if you want that: {exclude_all}" if exclude_all else "if the snapshot was made without it: unplug it",
                finding.node,
            )
        elif finding.code == "exclude-unknown":
            yield finding


def refuse_untransportable(monitor: Monitor, tag: str) -> None:
    """Refuse a tag that this monitor would change.

    :raise NotSupported: the monitor would change it; nothing was done.
    """
    if tag_problem(tag) is None and (obstacle := monitor.tag_obstacle(tag)):
        raise NotSupported(f"{monitor.who} cannot be given the tag {tag!r}: {obstacle}. By QMP it can")


def refuse_exclusion(monitor: Monitor, graph: BlockGraph, exclude: Collection[str], takes: str) -> None:
    """Refuse to leave devices out if QEMU itself takes all.

    :param takes: what QEMU does with the devices: "saves", "loads".
    :raise NotSupported: QEMU takes all; nothing was done.
    """
    if not rules.can_exclude(graph, exclude):
        raise NotSupported(f"{monitor.who} {takes} all devices or none: --exclude is beyond it")


def refuse_hmp_choices(monitor: Monitor, graph: BlockGraph, vmstate: str | None, exclude: Collection[str]) -> None:
    refuse_exclusion(monitor, graph, exclude, "saves")
    if not graph.chooses_devices:
        default = rules.survey(graph).vmstate
        if rules.survey(graph, vmstate=vmstate).vmstate != default:
            raise NotSupported(
                f"{monitor.who} chooses the vmstate device itself ({default}): --vmstate {vmstate} is beyond it"
            )


def tag_findings(tag: str | None) -> Iterator[Finding]:
    if tag is None:
        return
    if problem := tag_problem(tag):
        yield Finding.refusal("bad-tag", problem, "choose a tag of 1 to 255 bytes, without control characters")
    elif looks_like_id(tag):
        yield Finding.refusal(
            "bad-tag",
            f"the tag {tag!r} is a number: a load looks it up among the IDs that QEMU gives snapshots first, and would "
            "bring back another one",
            f"choose a tag with a letter: v{tag}",
        )
    elif suffix := next((end for end in RESERVED_SUFFIXES if tag.endswith(end)), ""):
        yield Finding.refusal("bad-tag", f"tags that end with {suffix!r} are qsnap's own", "choose another tag")


def runstate_findings(runstate: RunState) -> Iterator[Finding]:
    """Findings about a run state that affects any change of snapshots."""
    if runstate in _RUNSTATES_REFUSED:
        reason, cure = _RUNSTATES_REFUSED[runstate]
        yield Finding.refusal("runstate", f"the guest is in run state {runstate}: {reason}", cure)
    elif runstate is RunState.RESTORE_VM:
        yield Finding.warning(
            "restore-vm",
            "the guest is in run state restore-vm: a load has failed, and RAM and disks may be half restored",
            "load a good snapshot first, or `cont` if you know that nothing was changed",
        )


def trouble_findings(runstate: RunState, version: QemuVersion, *, alive: bool) -> Iterator[Finding]:
    """A finding if the guest stopped by itself: after a load of such a snapshot, the guest does not go on."""
    if trouble := trouble_of(runstate, version):
        make = Finding.refusal if alive else Finding.warning
        cure = "to go on, load an older snapshot" if runstate is not RunState.SUSPENDED else "`system_wakeup` wakes it"
        yield make("not-alive", trouble, cure)


def no_machine(error: CommandFailed) -> Finding:
    """The finding for an *error* under -preconfig, where QEMU refuses most commands.

    :raise CommandFailed: *error*, if it has another cause.
    """
    if not any(sentence in error.reason for sentence in _NO_MACHINE):
        raise error
    return next(runstate_findings(RunState.PRECONFIG))


def aftermath_findings(runstate: RunState, half_restored: bool, leftovers: Sequence[Job]) -> Iterator[Finding]:
    """Findings about what earlier runs of qsnap left behind in QEMU."""
    if half_restored:
        yield Finding.refusal(
            "half-restored",
            "a load has failed midway: RAM and disks may be of different moments, and a save would keep that",
            "load a good snapshot first: qsnap load TAG --running; or restart QEMU",
        )
    if leftovers and runstate is RunState.PAUSED:
        yield Finding.warning(
            "killed-qsnap",
            "an earlier qsnap was killed before it could resume the guest, which may be paused only for that",
            "if nobody else has paused it: `cont` in its monitor",
        )


def migration_findings(migration: Migration, graph: BlockGraph, devices: Sequence[Device]) -> Iterator[Finding]:
    if migration.status not in MIGRATION_IDLE:
        yield Finding.refusal(
            "migration-running",
            f"There's a migration process in progress (status {migration.status})",
            "wait for its end, or `migrate_cancel`",
        )
    for reason in migration.blocked_reasons:
        yield Finding.refusal("migration-blocker", *_blocker(reason, graph, devices))
    for capability in _CAPABILITIES_REFUSED:
        if capability in migration.capabilities:
            yield Finding.refusal(
                "migration-capability",
                f"the migration capability {capability} is set: with it a save fails, QEMU crashes, or the snapshot "
                "cannot be loaded",
                f"switch it off: migrate_set_capability {capability} off",
            )
    if "x-ignore-shared" in migration.capabilities:
        yield Finding.warning(
            "migration-capability",
            "the migration capability x-ignore-shared is set: RAM in shared memory will not be in the snapshot, and it "
            "will be loaded only while that is set",
            "switch it off: migrate_set_capability x-ignore-shared off",
        )


def _blocker(reason: str, graph: BlockGraph, devices: Sequence[Device]) -> tuple[str, str]:
    """What QEMU says of a device whose state it cannot save, of that device's name; and what to do about it.

    :param reason: QEMU's own words (5.2 to 11.1).
    """
    if "'peer mode'" in reason:  # hw/misc/ivshmem.c
        return reason, "start the guest with master=on for that ivshmem device: its memory is then part of the VM state"
    where = re.search(r"used by node '(.*)'", reason)
    if where is None:
        return reason, "unplug that device, or start the guest without it: its state cannot be saved"
    node = where[1]
    device = rules.device_above(graph, devices, node)
    if device is None:
        return reason, rules.cure_of(graph, node)
    if device.device and node.startswith("#"):
        reason = reason.replace(node, device.device)
    return reason, rules.cure_of(graph, device.node)


def spoiled_finding(migration: Migration, runstate: RunState) -> Finding:
    """The refusal of a load if :meth:`qsnap.model.qemu.Migration.spoils_loads`, and QEMU cannot be made to forget it.

    In "restore-vm" QEMU aborts if any migration begins ("invalid runstate transition"; seen on 7.2, 10.0 and 11.1).
    """
    cure = "a save of any kind that goes well clears it: qsnap save TAG, under a tag that is free"
    if runstate is RunState.RESTORE_VM:
        cure = "the guest must leave run state restore-vm first: `cont` and at once `stop` in its monitor, then load"
    if migration.error is None:
        what = "was cancelled, and may have failed by that (this monitor does not tell)"
    else:
        what = f"has failed ({migration.error})"
    return Finding.refusal(
        "migration-failed",
        f"the last migration, or live save, {what}: QEMU would fail in the middle of any load after that",
        cure,
    )


def background_findings(migration: Migration) -> Iterator[Finding]:
    if "background-snapshot" in migration.capabilities:
        yield Finding.refusal(
            "migration-capability",
            "the migration capability background-snapshot is set: with it QEMU loads no snapshot",
            "switch it off: migrate_set_capability background-snapshot off",
        )


def nvme_findings(graph: BlockGraph, version: QemuVersion) -> Iterator[Finding]:
    """What crashes QEMU's savevm of NVMe. Older versions name the device as one that blocks a migration."""
    if version < _NVME_IS_SAVED:
        return
    with_drive = {user.qdev for user in graph.backends}
    for peripheral in graph.peripherals:
        if peripheral.model == "nvme" and with_drive.isdisjoint({peripheral.path, peripheral.device_id}):
            name = peripheral.path.rpartition("/")[2]
            yield Finding.refusal(
                "nvme-without-drive",
                f"the nvme controller {name} has no drive of its own, and QEMU crashes in a save of it",
                "start the guest with drive= on the controller (-device nvme,serial=…,drive=ID), or without it",
            )


def room_findings(
    graph: BlockGraph,
    survey: rules.Survey,
    request: SaveRequest,
    image: Path | None,
    estimate: processes.StateEstimate | None,
) -> Iterator[Finding]:
    vmstate = survey.vmstate
    if vmstate is None or image is None or estimate is None:
        return
    try:
        for_users, with_reserve = processes.free_bytes(image)
    except OSError:
        return
    (name,) = rules.displayed([vmstate], survey.devices)
    # What is deleted before the save can be taken again.
    first = request.tag if request.on_exists is OnExists.REPLACE else None
    freed = sum(row.vm_state_size for row in graph.nodes[vmstate].tagged(first)) if first else 0
    cure = "make room, or delete snapshots"
    if graph.chooses_devices:
        cure += ", or put the VM state on another disk: --vmstate NODE"
    if with_reserve + freed < estimate.at_least:
        message = (
            f"{name}: no room: the VM state takes at least {estimate.at_least:,} bytes, about "
            f"{estimate.expected:,}, and {with_reserve + freed:,} are free"
        )
        if request.force:
            yield Finding.warning("no-room", message, cure, vmstate)
        else:
            yield Finding.refusal("no-room", message, f"{cure}; --force tries all the same", vmstate)
    elif for_users + freed < estimate.at_most:
        yield Finding.warning(
            "little-room",
            f"{name}: little room: the VM state may take {estimate.at_most:,} bytes, about "
            f"{estimate.expected:,}, and {for_users + freed:,} are free",
            cure,
            vmstate,
        )


def fixed_size_findings(
    graph: BlockGraph,
    survey: rules.Survey,
    request: SaveRequest,
    estimate: processes.StateEstimate | None,
    ram_bytes: int,
) -> Iterator[Finding]:
    """Findings if the vmstate image cannot grow. A save that reaches its end fails with EIO.

    How much of it is in use QEMU does not tell. So it warns where a disk that is written all over would leave no room.
    """
    if survey.vmstate is None:
        return
    file = rules.protocol(graph, survey.vmstate)
    if file is None or file.driver not in _FIXED_SIZE:
        return
    image = graph.nodes[survey.vmstate]
    estimate = estimate or processes.StateEstimate(0, ram_bytes, ram_bytes + processes.OVERHEAD_BYTES)
    in_states = sum(row.vm_state_size for row in image.snapshots)
    if file.virtual_size >= image.virtual_size + in_states + estimate.at_most:
        return
    (name,) = rules.displayed([survey.vmstate], survey.devices)
    size = f"{file.virtual_size:,} bytes" if file.virtual_size else "what it has"
    message = (
        f"{name} is stored by driver {file.driver}, where it cannot grow: {size} must hold its contents, its snapshots "
        f"and the VM state, of about {estimate.expected:,} bytes. Without room a save ends with an input/output error"
    )
    cure = "save with --live, put the VM state on another disk (--vmstate NODE), or make the export or device larger"
    if 0 < file.virtual_size < estimate.at_least and not request.force:
        yield Finding.refusal("no-room", message, f"{cure}; --force tries all the same", survey.vmstate)
    else:
        yield Finding.warning("cannot-grow", message, cure, survey.vmstate)


def chain_findings(inventory: Inventory, snapshot: Snapshot, devices: Collection[str]) -> Iterator[Finding]:
    """What has become of the images that the disks stood on when *snapshot* was saved, where that is written down."""
    try:
        changes = inventory.notes.changes_below(snapshot)
    except QsnapError:
        return
    for change in changes:
        if change.node not in devices:
            continue
        (label,) = inventory.displayed([change.node])
        yield Finding.refusal(
            "backing-changed",
            f"{change.clause(label)}: what {snapshot.tag!r} reads from there would be lost, or be other data",
            "with the guest off, put the old one back below: qemu-img rebase -u -F FORMAT -b FILE IMAGE; or, if what "
            "is below it now holds the same (a renamed image, one that block-commit has merged): --force",
            change.node,
        )


def elsewhere_findings(inventory: Inventory, snapshot: Snapshot) -> Iterator[Finding]:
    """Where the part of a device is that lacks *snapshot*: to leave it as it is now would mix two moments."""
    strays = snapshots.unattached(inventory.devices, snapshot.devices)
    for node in snapshot.missing:
        (name,) = inventory.displayed([node])
        below = [one for one in inventory.in_backing if one.device == name and one.tag == snapshot.disk_tag]
        if below:
            yield Finding.refusal(
                "in-backing",
                f"the part of {name} is in its backing image {below[0].image}: an overlay was made above it",
                "commit the overlay first (block-commit), if no other image has that one below it",
                node,
            )
        elif strays:
            yield Finding.refusal(
                "left-its-image",
                f"{name} lacks it, and {', '.join(inventory.displayed(strays))} holds it, which no device of the guest "
                f"uses any more: a block job may have switched {name} from there",
                f"start the guest with that image again. If {name} is a disk that was added later: --force --exclude "
                f"{rules.for_shell(node, snapshot.labels.get(node, ''))}",
                node,
            )


def no_device_findings(inventory: Inventory, snapshot: Snapshot, devices: Collection[str]) -> Iterator[Finding]:
    """That RAM alone would go back."""
    has_disks = any(device.role is not Role.NODE and device.image for device in inventory.devices)
    if has_disks and snapshot.devices and len(snapshots.unattached(inventory.devices, devices)) == len(devices):
        names = ", ".join(inventory.displayed(snapshot.devices))
        yield Finding.refusal(
            "no-device",
            f"no device of the guest would go back: {snapshot.tag!r} is on {names}",
            "load it without --exclude, or start the guest with that image",
        )


def unattached_findings(inventory: Inventory, snapshot: Snapshot) -> Iterator[Finding]:
    """What QEMU's own loadvm stumbles over, before 10.0: nodes that no device uses, and that lack the snapshot."""
    for device in inventory.devices:
        if device.role is Role.NODE and device.verdict is Verdict.SAVED and device.image not in snapshot.devices:
            yield Finding.refusal(
                "unattached-node",
                f"node {device.node}, which no device uses, lacks {snapshot.tag!r}, and QEMU before 10.0 looks for it "
                "there, too",
                f"take it out, by QMP: blockdev-del node-name={device.node}",
                device.node,
            )


def damaged_finding(reason: Exception) -> Finding:
    """What refuses to load a VM state that QEMU would fail over."""
    return Finding.refusal(
        "vm-state-damaged",
        f"its VM state is damaged: {reason}",
        "load another snapshot: `qsnap verify` tells which are whole",
    )


def unreadable_finding(tag: str, file: StateFile) -> Finding:
    """What refuses to do anything with a live snapshot whose state file this user may not read."""
    return Finding.refusal(
        "state-file-unreadable",
        f"{tag!r} is a live snapshot, and its state file {file.path} may not be read by this user",
        "run qsnap as the user that the file belongs to, or as root",
    )


def foreign_finding(tag: str, file: StateFile) -> Finding:
    """What refuses to do anything with a live snapshot whose state file is a link, or that of another snapshot."""
    if file.holds:
        return Finding.refusal(
            "state-file-mixed-up",
            f"{tag!r} is a live snapshot, and its state file {file.path} holds the state of {file.holds!r}",
            "give the state files their own names again",
        )
    return Finding.refusal(
        "state-file-link",
        f"{tag!r} is a live snapshot, and its state file {file.path} is a symbolic link, which qsnap does not follow",
        "put the file itself there; or choose its directory: --state-dir DIR",
    )


def unseen_state_finding(inventory: Inventory, snapshot: Snapshot, cure: str) -> Finding:
    """What refuses where the RAM of what looks like disks alone may be in a file that cannot be seen from here."""
    return Finding.refusal(
        "unseen-state-file",
        f"snapshot {snapshot.tag!r} may be a live one: it cannot be seen from here whether its state file lies at "
        f"{', '.join(inventory.unseen)}",
        cure,
    )


def left_behind_finding(inventory: Inventory, snapshot: Snapshot) -> Finding | None:
    """What refuses to do anything with a live snapshot whose state file was not renamed with its image."""
    if snapshot.has_state or (left := inventory.left_behind(snapshot.disk_tag)) is None:
        return None
    message = f"{snapshot.tag!r} is a live snapshot, and its state file {left.clause}"
    return Finding.refusal("state-file-left", message, left.cure)


def load_findings(inventory: Inventory, snapshot: Snapshot, devices: Collection[str]) -> Iterator[Finding]:
    if snapshot.kind is Kind.STATE_ONLY:
        yield Finding.refusal(
            "state-only",
            f"{snapshot.tag!r} is a state file without its disks: their snapshots of it are gone",
            f"it cannot be loaded, only deleted: qsnap delete {snapshot.tag}",
        )
        return
    if left := left_behind_finding(inventory, snapshot):
        yield left
    elif not snapshot.has_state and not inventory.store.ignores_unseen and inventory.unseen:
        yield unseen_state_finding(
            inventory,
            snapshot,
            "load it where that can be seen; if there is no such file, it is of disks alone (--ignore-unseen says so)",
        )
    elif not snapshot.has_state:
        yield Finding.refusal(
            "disk-only",
            f"{snapshot.tag!r} is a disk-only snapshot: there is no RAM in it to go on from",
            "with the guest off: qemu-img snapshot -a TAG IMAGE, on every disk",
        )
    elif snapshot.vmstate is not None and snapshot.vmstate not in devices:
        (vmstate,) = inventory.displayed([snapshot.vmstate])
        yield Finding.refusal(
            "vmstate-excluded",
            f"{vmstate} holds the VM state and cannot be excluded",
            "",
            snapshot.vmstate,
        )
    if snapshot.file is not None and not snapshot.file.is_readable:
        yield unreadable_finding(snapshot.tag, snapshot.file)
        return
    if snapshot.file is not None and snapshot.file.is_foreign:
        yield foreign_finding(snapshot.tag, snapshot.file)
        return
    if snapshot.file is not None and not snapshot.file.is_whole:
        yield Finding.refusal(
            "state-file",
            f"{snapshot.tag!r}: its state file {snapshot.file.path}{snapshot.file.trouble.removeprefix('it')}",
            "restore it from a copy, or delete the snapshot",
        )
        return
    for problem in snapshot.problems:
        yield Finding.refusal(
            "mixed-snapshot",
            f"{snapshot.tag!r}: {problem}: loading it would mix different moments",
            "delete the tag, or sort it out with the guest off: qemu-img snapshot -l IMAGE",
        )
    for name, label in zip(devices, inventory.displayed(devices), strict=True):
        # qcow2-snapshot.c: find_snapshot_by_id_or_name
        if other := next(
            (r for r in inventory.graph.nodes[name].snapshots if r.id == snapshot.disk_tag != r.tag), None
        ):
            yield Finding.refusal(
                "tag-is-an-id",
                f"{label}: {snapshot.disk_tag!r} is the ID of snapshot {other.tag!r}, and QEMU looks for IDs first: "
                "it would bring back the disk of that one",
                f"if you can do without {other.tag!r}, delete it: qsnap delete {shlex.quote(other.tag)}",
                name,
            )
