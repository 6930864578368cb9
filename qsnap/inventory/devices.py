"""Which devices a save must hold, which holds the VM state, and which stand in the way. Pure.

Devices that keep the guest's data outside the block layer (:mod:`qsnap.model.outside`) stand in the way like any other
disk that cannot be snapshotted.

The rules are QEMU's own, recomputed from what its monitor tells (block/snapshot.c, block/block-backend.c;
each was held against HMP savevm on real QEMU):

* Counted is the root node of every user of a node (guest devices, exports, block jobs), in the order of
  their creation, and then every node that nobody uses. Inserted and writable ones must snapshot.
* qcow2 and rbd can snapshot. A driver that cannot hands over to its child if it has just one besides a
  backing file (raw, throttle, copy-on-read, …); one over several images (quorum, blkverify) cannot.
* The target of a block job does not count as a device: what a mirror or a commit writes to is not whole before the job
  ends, so it gets no snapshot. (HMP savevm makes one there.)
* Only qcow2 can hold the VM state. Without a name for it, QEMU takes the first counted device.
* QEMU crashes when it writes the VM state into an encrypted qcow2 (qcow2_co_encdec: its writes are not aligned; seen
  on 5.2 to 11.1): another one is taken where QEMU can be told which.

What QEMU is then told to snapshot is not the device's top node but the image below its filters. QEMU would
find that itself, and save well; but a load through a filter hangs the guest's disk or crashes QEMU (seen
with raw, copy-on-read, throttle, preallocate and blkdebug on 5.2 and 7.2, and with the second and third on
10.0 and 11.1 too), and one of the image itself works on all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from qsnap.model import outside
from qsnap.model.checks import Device, Finding, Labels, Role, Verdict
from qsnap.model.qemu import BlockBackend, BlockGraph, BlockNode, Peripheral

#: Drivers with internal snapshots of their own. rbd keeps them on the server, and holds no VM state.
SNAPSHOT_DRIVERS = frozenset({"qcow2", "rbd", "sheepdog"})
#: ... and with a place for the VM state.
VMSTATE_DRIVERS = frozenset({"qcow2", "sheepdog"})
#: Filters of block jobs with children besides the one that they stand on, and what that is called (block/mirror.c,
#: commit.c, copy-before-write.c; that was backup-top.c before 6.2).
_FILTERED_CHILD = {
    "mirror_top": "backing",
    "commit_top": "backing",
    "backup-top": "backing",
    "copy-before-write": "file",
}
#: The filters of backups, which one may have left in place, or is used with no job at all.
BACKUP_FILTERS = frozenset({"copy-before-write", "backup-top"})
#: Drivers without a primary child, however many they have.
_NO_PRIMARY_CHILD = frozenset({"quorum", "blkverify"})

#: What the names of nodes begin with that the user has not chosen: made up by QEMU, or a path in the object tree.
_NOT_THE_USER_S = ("#", "/")

#: A raw one of this model keeps its contents in guest RAM, writes them back to its file when a loaded state
#: starts to run (hw/block/pflash_cfi01.c: postload_update_cb), and needs no snapshot. cfi.pflash02 does not.
_CARRIED_MODEL = "cfi.pflash01"

#: What a stick is to the guest.
_USB_STORAGE = frozenset({"usb-storage", "usb-bot", "usb-uas"})

_LEFT_OUT = "left out as asked: a load will leave its contents as they are then"


class Survey(msgspec.Struct, frozen=True):
    """All devices with their verdicts, the vmstate node if there is one, and what is in the way."""

    devices: tuple[Device, ...]
    vmstate: str | None
    findings: tuple[Finding, ...]


def labels(devices: Iterable[Device]) -> Labels:
    """The names to show instead of node-names that QEMU made up, and that change at every start; and of paths."""
    nodes = ((name, d.device) for d in devices for name in (d.node, d.image) if name and d.device)
    return {name: device for name, device in nodes if name.startswith(_NOT_THE_USER_S)}


def displayed(nodes: Iterable[str], devices: Iterable[Device]) -> list[str]:
    """Node-names as a message says them and an option takes them: the device's name for a made-up one."""
    names = labels(devices)
    return [names.get(node, node) for node in nodes]


def for_shell(node: str, device: str = "") -> str:
    """A device's name for a command line: ``#block123`` would begin a comment there."""
    return shlex.quote(device if node.startswith(_NOT_THE_USER_S) and device else node)


def snapshot_image(graph: BlockGraph, node_name: str | None) -> BlockNode | None:
    """The node at or below *node_name* whose driver makes the snapshot; None where there is none."""
    path = path_to_image(graph, node_name)
    return path[-1] if path else None


def path_to_image(graph: BlockGraph, node_name: str | None) -> tuple[BlockNode, ...]:
    """The nodes from *node_name* down to the one whose driver makes the snapshot; none where there is none."""
    node = graph.nodes.get(node_name) if node_name else None
    if node is None or node.read_only or not node.active:
        return ()
    if node.driver in SNAPSHOT_DRIVERS:
        return (node,)
    below = path_to_image(graph, _primary_child(node))
    return (node, *below) if below else ()


def _primary_child(node: BlockNode) -> str | None:
    if edge := _FILTERED_CHILD.get(node.driver):
        return next((child for name, child in node.children if name == edge), None)
    if node.driver in _NO_PRIMARY_CHILD:
        return None
    others = [child for name, child in node.children if name != "backing"]
    return others[0] if len(others) == 1 else None


def device_above(graph: BlockGraph, devices: Iterable[Device], node: str) -> Device | None:
    """The device that a node is a part of."""
    return next((device for device in devices if node in at_or_below(graph, device.node)), None)


def at_or_below(graph: BlockGraph, node_name: str | None) -> list[str]:
    """The names of a node and of all that it stands on, each once; none of an empty drive."""
    reached = [node_name] if node_name else []
    for name in reached:  # it grows on the way
        children = graph.nodes[name].children if name in graph.nodes else ()
        reached += dict.fromkeys(child for _, child in children if child not in reached)
    return reached


def protocol(graph: BlockGraph, image: str) -> BlockNode | None:
    """The protocol node that stores the image node *image*; None where QEMU does not tell what lies below it."""
    node = graph.nodes.get(image)
    while node is not None and (child := next((c for edge, c in node.children if edge in ("file", "image")), None)):
        node = graph.nodes.get(child)
    return None if node is None or node.node_name == image else node


def image_file(graph: BlockGraph, image: str) -> BlockNode | None:
    """The protocol node of the image node *image*, if that is a plain file; None if the image is stored otherwise."""
    node = protocol(graph, image)
    return node if node is not None and node.driver == "file" else None


def survey(
    graph: BlockGraph,
    *,
    exclude: Collection[str] = (),
    vmstate: str | None = None,
) -> Survey:
    """Decide for each device what a save does with it, and where the VM state goes.

    :param exclude: devices to leave out, each by node-name, -drive id, device id or path.
    :param vmstate: the device for the VM state, by one of the same names. Default: QEMU's own choice.
    """
    blocks: list[Device] = []
    findings: list[Finding] = []
    matched: set[str] = set()
    for node_name, backend in _counted(graph):
        image = snapshot_image(graph, node_name)
        excluded = _names(backend, node_name, image.node_name if image else None).intersection(exclude)
        matched |= excluded
        device = _judge(graph, node_name, backend, image, bool(excluded))
        blocks.append(device)
        if device.verdict is Verdict.CARRIED and excluded:
            findings.append(
                Finding.warning(
                    "exclude-carried",
                    f"--exclude {device.device or node_name} changes nothing: {device.why}",
                    node=node_name,
                )
            )
    others = [_judge_outside(peripheral, exclude) for peripheral in _outside(graph)]
    matched |= _names_outside(graph)
    devices = (*blocks, *others)
    for device in devices:
        if device.verdict is Verdict.REFUSED:
            findings.append(Finding.refusal("device-cannot-snapshot", device.why, device.cure, device.node))
        findings.extend(_warnings(graph, device))
    findings.extend(_passed_on(graph))
    findings.extend(
        Finding.refusal(
            "exclude-unknown",
            f"--exclude {name}: the guest has no such block device",
            f"its devices: {_choices(devices, Verdict.SAVED, Verdict.REFUSED)}",
        )
        for name in sorted(set(exclude) - matched)
    )
    chosen, problem = _vmstate(graph, blocks, vmstate)
    if chosen is not None and vmstate is None:
        findings.extend(_removable(graph, blocks, chosen))
    return Survey(devices, chosen, (*findings, *problem))


def _counted(graph: BlockGraph) -> Iterator[tuple[str | None, BlockBackend]]:
    """The devices in QEMU's order (bdrv_next), each node once; None for an empty drive."""
    seen: set[str] = set()
    for backend in graph.backends:
        if backend.root is None:
            if backend.name or backend.qdev:
                yield None, backend
        elif backend.root not in seen:
            seen.add(backend.root)
            yield backend.root, backend
    for node_name in graph.nodes:
        if graph.has_edges and node_name not in seen and node_name not in graph.with_parents:
            yield node_name, BlockBackend(root=node_name)


def _outside(graph: BlockGraph) -> Iterator[Peripheral]:
    return (peripheral for peripheral in graph.peripherals if outside.why_not_saved(peripheral.model))


def can_exclude(graph: BlockGraph, names: Iterable[str]) -> bool:
    """Whether devices of these names can be left out. What is outside the block layer QEMU leaves out by itself."""
    return graph.chooses_devices or _names_outside(graph).issuperset(names)


def _names_outside(graph: BlockGraph) -> set[str]:
    return {name for peripheral in _outside(graph) for name in (peripheral.path, peripheral.label)}


def _judge_outside(peripheral: Peripheral, exclude: Collection[str]) -> Device:
    label, model = peripheral.label, peripheral.model
    refused = Device(
        node=peripheral.path,
        device=peripheral.device_id,
        driver=model,
        role=Role.OUTSIDE,
        verdict=Verdict.REFUSED,
        why=f"Device {label!r} ({model}) cannot be in a snapshot: {outside.why_not_saved(model)}",
        cure=f"unplug it, or leave it out knowingly: --exclude {shlex.quote(label)}",
    )
    if {label, peripheral.path}.isdisjoint(exclude):
        return refused
    return msgspec.structs.replace(refused, verdict=Verdict.EXCLUDED, why=_LEFT_OUT, cure="")


def _passed_on(graph: BlockGraph) -> Iterator[Finding]:
    """Warnings of what may be a disk of the host's."""
    for peripheral in graph.peripherals:
        if outside.is_passed_on(peripheral.model):
            yield Finding.warning(
                "device-passed-on",
                (
                    f"Device {peripheral.label!r} ({peripheral.model}) is the host's: if it is a disk, its "
                    "contents are not in the snapshot, and a load leaves them as they are then"
                ),
                "if it is one, give it to the guest as a qcow2 image instead",
                peripheral.path,
            )


def _names(backend: BlockBackend, *nodes: str | None) -> set[str]:
    return {name for name in (*nodes, backend.name, backend.qdev, backend.device_id) if name}


def _role(graph: BlockGraph, backend: BlockBackend) -> Role:
    model = backend.qdev_type
    if model.startswith("cfi.pflash"):
        return Role.PFLASH
    if model.endswith("-cd"):
        return Role.CDROM
    if model == "floppy":
        return Role.FLOPPY
    if backend.qdev:
        return Role.DISK
    used = backend.root in graph.with_parents and not backend.name
    return Role.EXPORT if used else Role.NODE


def _judge(
    graph: BlockGraph, node_name: str | None, backend: BlockBackend, image: BlockNode | None, excluded: bool
) -> Device:
    def device(verdict: Verdict, why: str = "", cure: str = "") -> Device:
        return Device(
            node=node_name,
            device=backend.label,
            driver=node.driver if node else "",
            role=_role(graph, backend),
            verdict=verdict,
            why=why,
            cure=cure,
            image=image.node_name if image else None,
        )

    node = graph.nodes.get(node_name) if node_name else None
    if node is None:
        return device(Verdict.IGNORED, "empty")
    if node.read_only:
        return device(Verdict.IGNORED, "read-only")
    if why := _why_copy(graph, node, backend):
        return device(Verdict.IGNORED, why)
    if image is None and backend.qdev_type == _CARRIED_MODEL and graph.chooses_devices:
        return device(Verdict.CARRIED, "its contents travel inside the VM state and are written back on load")
    if excluded:
        return device(Verdict.EXCLUDED, _LEFT_OUT)

    name = for_shell(node.node_name, backend.label)
    label = backend.label if node.node_name.startswith(_NOT_THE_USER_S) and backend.label else node.node_name

    def refused(why: str, cure: str) -> Device:
        leave_out = f"; or leave it out knowingly: --exclude {name}" if graph.chooses_devices else ""
        return device(Verdict.REFUSED, why, cure + leave_out)

    if image is None:
        shown = backend.label or node.node_name
        return refused(
            f"Device {shown!r} is writable but does not support snapshots ({_why_not(graph, node)})",
            cure_of(graph, node.node_name),
        )
    convert = "with the guest off: qemu-img convert -O qcow2 IMAGE NEW.qcow2, and use that"
    too_late = "cannot be snapshotted, and QEMU notices only after it has written the whole VM state"
    if image.external_data_file:
        return refused(
            f"{label}: a qcow2 image with an external data file {too_late}",
            convert,
        )
    if image.refcount_bits == 1:
        return refused(
            f"{label}: a qcow2 image with refcount_bits=1 {too_late}",
            convert,
        )
    return device(Verdict.SAVED, "" if image is node else f"in its image {image.node_name}")


def _why_copy(graph: BlockGraph, node: BlockNode, backend: BlockBackend) -> str:
    """Why a node is not a device's but a copy that is being made; "" where it is none.

    HMP does not tell what jobs and filters write to: there it may be any that no device uses.
    """
    if backend.name or backend.qdev:
        return ""
    for job in graph.jobs:
        if node.node_name in job.targets:
            return f"the copy that block job {job.id!r} ({job.type}) makes"
    hides_targets = any(not job.nodes for job in graph.jobs) or any(
        one.driver in BACKUP_FILTERS and not any(edge == "target" for edge, _ in one.children)
        for one in graph.nodes.values()
    )
    return "the copy that a block job or a backup makes, or a spare" if hides_targets else ""


def _why_not(graph: BlockGraph, node: BlockNode) -> str:
    if not node.active:
        return "the image is inactive: a migration has handed it over"
    if not graph.has_edges:
        return f"driver {node.driver}; this QEMU does not tell what lies below it"
    below = [graph.nodes[child].driver for name, child in node.children if child in graph.nodes]
    return f"driver {node.driver}" + (f" over {', '.join(sorted(set(below)))}" if below else "")


def cure_of(graph: BlockGraph, node_name: str | None) -> str:
    """What to do about a node that cannot snapshot, or be saved."""
    node = graph.nodes.get(node_name) if node_name else None
    if node is None:
        return "with the guest off: qemu-img convert -O qcow2 IMAGE NEW.qcow2, and use that"
    if node.driver in _NO_PRIMARY_CHILD:
        return "QEMU cannot snapshot several images as one"
    if not node.active:
        return "resume the guest (`cont`); QEMU has its images then"
    if any(graph.nodes[name].driver == "vvfat" for name in at_or_below(graph, node_name) if name in graph.nodes):
        return "give the guest that directory read-only (without rw), or its files in a qcow2 image"
    path = shlex.quote(node.filename or "IMAGE")
    return f"with the guest off: qemu-img convert -O qcow2 {path} NEW.qcow2, and use that"


def _warnings(graph: BlockGraph, device: Device) -> Iterator[Finding]:
    if device.verdict is not Verdict.SAVED:
        return
    assert device.image is not None
    assert device.node is not None
    if graph.nodes[device.image].is_temporary:
        (name,) = displayed([device.node], [device])
        yield Finding.warning(
            "temporary-overlay",
            f"{name} was opened with snapshot=on: its snapshots vanish when QEMU ends",
            "start QEMU without -snapshot and snapshot=on to keep them",
            device.node,
        )


def _choices(devices: Sequence[Device], *verdicts: Verdict) -> str:
    return ", ".join(for_shell(d.node, d.device) for d in devices if d.node and d.verdict in verdicts) or "none"


def _able(graph: BlockGraph, devices: Sequence[Device]) -> list[str]:
    """The images that can hold the VM state, in QEMU's order."""
    return [
        d.image
        for d in devices
        if d.verdict is Verdict.SAVED and d.image and graph.nodes[d.image].driver in VMSTATE_DRIVERS
    ]


def _vmstate(
    graph: BlockGraph, devices: Sequence[Device], wanted: str | None
) -> tuple[str | None, tuple[Finding, ...]]:
    able = _able(graph, devices)
    clear = [image for image in able if not graph.nodes[image].encrypted]
    if wanted is None and able:
        chosen = clear[0] if clear and graph.chooses_devices else able[0]
        return chosen, tuple(_encrypted(graph, devices, able[0], chosen, clear))
    if wanted is None:
        return None, (
            Finding.refusal(
                "no-vmstate-device",
                "no block device can store vmstate for snapshot",
                "the VM state needs a writable qcow2 image: give the guest one, of any size",
            ),
        )
    names = {
        name: device.image
        for device, (node, backend) in zip(devices, _counted(graph), strict=True)
        for name in _names(backend, node, device.image)
    }
    if (node := names.get(wanted)) in able:
        return node, tuple(_encrypted(graph, devices, node, node, clear))
    known = wanted in names or wanted in graph.nodes
    return None, (
        Finding.refusal(
            "vmstate-unable" if known else "vmstate-unknown",
            (
                f"--vmstate {wanted}: "
                + (
                    "this device cannot hold the VM state"
                    if known
                    else f"vmstate block device {wanted!r} does not exist"
                )
            ),
            f"devices that can: {', '.join(displayed(able, devices)) or 'none'}",
            node,
        ),
    )


def _removable(graph: BlockGraph, devices: Sequence[Device], chosen: str) -> Iterator[Finding]:
    """A warning where the VM state goes into a medium that may be taken out, and nobody said so."""
    removable = {
        device.image
        for device, (_, backend) in zip(devices, _counted(graph), strict=True)
        if backend.removable or _is_on_usb(graph, backend)
    }
    if chosen not in removable:
        return
    name, *others = displayed([chosen, *_able(graph, devices)], devices)
    fixed = [other for other, node in zip(others, _able(graph, devices), strict=True) if node not in removable]
    choice = f"--vmstate {' or '.join(map(shlex.quote, fixed))}"
    if not fixed:
        choice = "give the guest a qcow2 disk (of any size), and name it with --vmstate"
    yield Finding.warning(
        "vmstate-removable",
        (
            f"QEMU's choice for the VM state is {name}, a removable medium: once that is ejected or unplugged, the "
            "snapshot is of disks alone"
        ),
        choice if graph.chooses_devices else f"over QMP: {choice}",
        chosen,
    )


def _is_on_usb(graph: BlockGraph, backend: BlockBackend) -> bool:
    """Whether a disk is a stick: its own device is one that a USB device has made below itself."""
    path = f"{backend.qdev}/"
    return any(
        path.startswith(f"{one.path}/") or backend.device_id == one.device_id != ""
        for one in graph.peripherals
        if one.model in _USB_STORAGE
    )


def _encrypted(
    graph: BlockGraph, devices: Sequence[Device], wanted: str, chosen: str, clear: Sequence[str]
) -> Iterator[Finding]:
    """What is to be said where the image that was to hold the VM state is encrypted.

    :param wanted: by the user, or by QEMU itself.
    :param clear: the images that could hold it and are not encrypted.
    """
    if not graph.nodes[wanted].encrypted:
        return
    name, there = displayed([wanted, chosen], devices)
    if chosen != wanted:
        yield Finding.warning(
            "vmstate-not-encrypted",
            (
                f"{name}, QEMU's choice for the state, is encrypted, and QEMU crashes in that: the state goes to "
                f"{there}, where the guest's RAM is in the clear; `loadvm` in a human monitor will not look there"
            ),
            f"--vmstate {shlex.quote(there)} confirms that you want this",
            chosen,
        )
        return
    elsewhere = f"--vmstate {' or '.join(map(shlex.quote, displayed(clear, devices)))}"
    if not clear:
        elsewhere = "give the guest a qcow2 image that is not encrypted (of any size), and name it with --vmstate"
    yield Finding.refusal(
        "vmstate-encrypted",
        f"{name} is encrypted, and QEMU crashes when it writes the VM state into an encrypted image",
        ("" if graph.chooses_devices else "over QMP: ")
        + f"{elsewhere}; or save with --live. The guest's RAM is then in the clear in that image, or in the state file",
        wanted,
    )
