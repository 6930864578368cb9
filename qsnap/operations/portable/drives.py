"""What each drive of QEMU's command line held when the snapshot was made.

The command line says what QEMU was started with; since then media may have been changed, overlays made, devices plugged
in. So each drive is looked up in the block graph of now, by the name of its node or of its backend; and what is there
and not on the command line is refused by name.

QEMU makes up an id for a -drive without one (``virtio0``, ``ide2-cd0``; blockdev.c: drive_new) by rules that depend on
the machine. But the backends are in the order of their creation, and that of the command line.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from qsnap.inventory import descriptors, qcow2
from qsnap.inventory import devices as rules
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.qcow2 import Unreadable
from qsnap.model.checks import Device, Role, Verdict
from qsnap.model.qemu import BlockNode, NodeSnapshot
from qsnap.model.snapshots import Snapshot
from qsnap.operations.portable.images import Source
from qsnap.targets.portable import Drive, Portable

#: Drivers that lie on the disk, by QEMU's names for the formats. "raw" may as well be a filter.
_FORMATS = frozenset(("qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels", "bochs", "cloop", "dmg"))
#: Ids that QEMU makes up.
_MADE_UP = re.compile(r"(ide|scsi|virtio|xen|none|sd|mtd|floppy|pflash)\d+(-(hd|cd)\d+|-\d+)?|\w+-(hd|cd)\d+")
#: Roles of what is on the command line.
_OF_THE_GUEST = frozenset((Role.DISK, Role.CDROM, Role.FLOPPY, Role.PFLASH))


class Held(NamedTuple):
    """What a drive held.

    :ivar source: None for an empty drive.
    :ivar disk_size: bytes of the disk at the time of the snapshot; None if that is not known, or if it has none.
    """

    label: str
    source: Source | None
    is_read_only: bool = False
    disk_size: int | None = None


class Holdings(NamedTuple):
    """What all drives held, in the order of the command line; and what is in the way, a clause each."""

    drives: list[Held]
    refusals: list[str]
    warnings: list[str]


class _Unseen(Exception):
    """An image cannot be read from here; the text says why."""


def holdings(
    inventory: Inventory, snapshot: Snapshot, made: Portable, pid: int | None, *, keep_backing: bool
) -> Holdings:
    """What each drive held in *snapshot*.

    :param made: the command line.
    :param keep_backing: do not copy what is in backing images.
    """
    return _Search(inventory, snapshot, pid, keep_backing=keep_backing).search(made)


class _Search:
    def __init__(self, inventory: Inventory, snapshot: Snapshot, pid: int | None, *, keep_backing: bool) -> None:
        self._inventory = inventory
        self._graph = inventory.graph
        self._snapshot = snapshot
        self._pid = pid
        self._keep_backing = keep_backing
        self._found = Holdings([], [], [])

    def search(self, made: Portable) -> Holdings:
        seen: list[Device] = []
        for drive, device in zip(made.drives, self._devices(made.drives), strict=True):
            if device is not None:
                seen.append(device)
                self._found.drives.append(self._held(drive, device))
        for device in self._inventory.devices:
            if device.role in _OF_THE_GUEST and device.node and device not in seen:
                self._unexpected(device)
        self._found.refusals.extend(self._plugged(made))
        return self._found

    def _devices(self, drives: Sequence[Drive]) -> Iterator[Device | None]:
        """The device of each drive; None, and a refusal, if it cannot be told."""
        backends = {backend.name: backend for backend in self._graph.backends if backend.name}
        given = {drive.name for drive in drives if not drive.is_node}
        left = iter([name for name in backends if name not in given and _MADE_UP.fullmatch(name)])
        for drive in drives:
            if drive.is_node:
                yield self._of_node(drive)
                continue
            name = drive.name or next(left, "")
            interface = drive.interface if drive.interface not in ("", "none") else ""
            if name not in backends or not name.startswith(interface):
                self._found.refusals.append(f"{drive.text}: QEMU does not have that drive any more")
                yield None
                continue
            root = backends[name].root
            yield next(
                (one for one in self._inventory.devices if one.device == name or (root and one.node == root)),
                Device(node=None, device=name, driver="", role=Role.DISK, verdict=Verdict.IGNORED),
            )

    def _of_node(self, drive: Drive) -> Device | None:
        devices = self._inventory.devices
        found = next((one for one in devices if one.node == drive.name), None)
        found = found or rules.device_above(self._graph, devices, drive.name)
        if found is None:
            self._found.refusals.append(f"{drive.text}: no device of the guest uses that node any more")
        return found

    def _held(self, drive: Drive, device: Device) -> Held:
        label = drive.name or device.device or device.node or ""
        if device.node is None:
            return Held(label, None)
        image = device.image if device.image in self._snapshot.devices else None
        if device.verdict is Verdict.REFUSED:
            self._found.refusals.append(f"{label}: its contents are not in the snapshot; {device.why}")
            return Held(label, None)
        node = self._graph.nodes[image] if image else self._format(device.node)
        is_read_only = self._graph.nodes[device.node].read_only
        try:
            rows = node.tagged(self._snapshot.disk_tag) if image else ()
            if node.encrypted:
                raise _Unseen("it is encrypted")
            below = self._below(node)
            backing = None
            if below is not None and self._keep_backing:
                below = self._format(below.node_name)
                backing = (str(self._path(below)), below.driver)
            source = Source(self._options(node), rows[0].id if rows else "", backing)
        except _Unseen as reason:
            return self._unseen(device, label, str(reason))
        if is_read_only and device.role in (Role.CDROM, Role.FLOPPY):
            self._found.warnings.append(
                f"{label} gets the medium that is in it now: a snapshot does not tell which was in it"
            )
        return Held(label, source, is_read_only, self._disk_size(node, rows))

    def _disk_size(self, node: BlockNode, rows: Sequence[NodeSnapshot]) -> int | None:
        if not rows:
            return None
        with suppress(OSError, Unreadable):
            file = os.open(self._path(node), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                return qcow2.row_of(file, qcow2.header(file), rows[0]).disk_size
            finally:
                os.close(file)
        return None

    def _unseen(self, device: Device, label: str, why: str) -> Held:
        if device.role in (Role.CDROM, Role.FLOPPY):
            self._found.warnings.append(f"{label} is empty in the export: its medium cannot be read from here, {why}")
        else:
            self._found.refusals.append(f"{label}: its image cannot be read from here: {why}")
        return Held(label, None)

    def _unexpected(self, device: Device) -> None:
        (label,) = self._inventory.displayed([device.node or ""])
        if device.verdict is Verdict.IGNORED and device.role in (Role.CDROM, Role.FLOPPY):
            self._found.warnings.append(f"{label} is empty in the export: its medium is not on QEMU's command line")
        else:
            self._found.refusals.append(f"{label}: it is not on QEMU's command line, but was added later")

    def _plugged(self, made: Portable) -> Iterator[str]:
        """What was plugged in or out since QEMU was started."""
        now = Counter(one.device_id for one in self._graph.peripherals if one.device_id)
        then = Counter(one.device_id for one in made.devices if one.device_id)
        models = {one.device_id: one.model for one in self._graph.peripherals}
        for name in now - then:
            yield f"device {name!r} ({models[name]}) was plugged in after QEMU was started"
        for name in then - now:
            yield f"device {name!r} was unplugged after QEMU was started"
        nameless_now = [one.model for one in self._graph.peripherals if not one.device_id]
        nameless_then = [one.model for one in made.devices if not one.device_id]
        for model in list(nameless_then):
            match = next((one for one in nameless_now if one == model or one.startswith(f"{model}-")), None)
            if match is not None:
                nameless_now.remove(match)
                nameless_then.remove(model)
        # A -drive without an interface may be of virtio, by the machine's default
        spare = sum(not drive.is_node and not drive.interface for drive in made.drives)
        nameless_now = [one for one in nameless_now if not (one.startswith("virtio-blk") and spare)]
        # What is left on both sides goes by an alias
        for model in nameless_now[len(nameless_then) :]:
            yield f"a device {model} without an id was plugged in after QEMU was started"
        for model in nameless_then[len(nameless_now) :]:
            yield f"a device {model} without an id was unplugged after QEMU was started"

    def _format(self, root: str) -> BlockNode:
        """The node whose driver is the format of an image, below filters."""
        node = found = self._graph.nodes[root]
        while (below := next((c for edge, c in node.children if edge in ("file", "image")), None)) in self._graph.nodes:
            node = self._graph.nodes[below or ""]
            if node.driver in _FORMATS or (node.driver == "raw" and found.driver not in _FORMATS):
                found = node
        return found

    def _below(self, node: BlockNode) -> BlockNode | None:
        name = next((child for edge, child in node.children if edge == "backing"), None)
        return self._graph.nodes.get(name or "")

    def _options(self, node: BlockNode) -> Mapping[str, Any]:
        """An image and its backing images, as QEMU has them."""
        protocol = {"driver": "file", "filename": str(self._path(node))}
        if descriptors.block_device(self._pid, self._graph, node.node_name):
            protocol["driver"] = "host_device"
        if node.driver not in (*_FORMATS, "raw"):
            raise _Unseen(f"driver {node.driver}")
        options: dict[str, Any] = {"driver": node.driver, "file": protocol}
        if node.driver in ("qcow2", "qed", "qcow", "vmdk"):
            below = self._below(node)
            options["backing"] = self._options(self._format(below.node_name)) if below else None
        return options

    def _path(self, node: BlockNode) -> Path:
        """The file of an image.

        :raise _Unseen: it cannot be seen.
        """
        if device := descriptors.block_device(self._pid, self._graph, node.node_name):
            return device
        if path := self._inventory.store.image(self._graph, node.node_name):
            return path
        raise _Unseen(self._inventory.store.why_unseen(self._graph, node.node_name))
