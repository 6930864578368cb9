"""Snapshots, gathered from the rows of many snapshot tables: what each tag holds, over all devices. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from qsnap.errors import SnapshotNotFound
from qsnap.inventory.devices import SNAPSHOT_DRIVERS, displayed, labels
from qsnap.model.checks import Device, Labels, Role, Verdict
from qsnap.model.qemu import BlockGraph, BlockNode, NodeSnapshot
from qsnap.model.snapshots import InBacking, Kind, Snapshot, StateFile
from qsnap.tags import RESERVED_SUFFIXES, SECOND_SUFFIX, second_name


def relevant_nodes(devices: Iterable[Device]) -> tuple[str, ...]:
    """The node-names that a whole snapshot must be on: writable, and not carried inside the VM state."""
    counted = (d for d in devices if d.verdict not in (Verdict.IGNORED, Verdict.CARRIED))
    return tuple(dict.fromkeys(name for d in counted if (name := d.image or d.node) is not None))


def holders(graph: BlockGraph, devices: Iterable[Device], tag: str) -> tuple[str, ...]:
    """The node-names that hold *tag*, QEMU's first device first."""
    nodes = ((name, graph.nodes.get(name)) for name in relevant_nodes(devices))
    return tuple(name for name, node in nodes if node is not None and node.tagged(tag))


def snapshots(graph: BlockGraph, devices: Sequence[Device], files: Sequence[StateFile] = ()) -> tuple[Snapshot, ...]:
    """All snapshots, oldest first.

    QEMU gives all rows of one save the same date and VM clock, and reads a node that holds a tag twice from its first
    row alone (bdrv_snapshot_find); qsnap checks for both.

    :param files: the state files of this VM: those of live saves.
    """
    nodes = [node for node in relevant_nodes(devices) if node in graph.nodes]
    # A node that nobody uses cannot change either, and QEMU 10.0's savevm leaves it out.
    required = relevant_nodes(device for device in devices if device.role is not Role.NODE)
    names = labels(devices)
    rows: dict[str, dict[str, list[NodeSnapshot]]] = {}
    for node in nodes:
        for row in graph.nodes[node].snapshots:
            rows.setdefault(row.tag, {}).setdefault(node, []).append(row)
    found = []
    unpaired = list(files)
    for tag, held in rows.items():
        file = _file_of(tag, held, unpaired)
        if file is not None:
            unpaired.remove(file)
        found.append(_gathered(tag, held, required, names, file))
    found += (_without_disks(file, names) for file in unpaired)
    return tuple(sorted(_named(found), key=lambda snapshot: (snapshot.date, snapshot.tag)))


def _named(found: Iterable[Snapshot]) -> Iterator[Snapshot]:
    """Give the snapshots the tags that users know, because the devices may hold them under a second name.

    The tag belongs to the snapshot that can be loaded. If both can be loaded, to the newer. Leftovers of an interrupted
    replacement get the second name, whatever the devices call them.
    """
    groups: dict[str, list[Snapshot]] = {}
    for snapshot in found:
        groups.setdefault(owner(snapshot), []).append(snapshot)
    for tag, members in groups.items():
        main = max(members, key=lambda snapshot: (is_loadable(snapshot), snapshot.date))
        if is_loadable(main) or (len(members) == 1 and main.has_state):
            yield msgspec.structs.replace(main, tag=tag)
            others = (snapshot for snapshot in members if snapshot is not main)
            yield from (msgspec.structs.replace(other, tag=f"{tag}{SECOND_SUFFIX}") for other in others)
        else:
            yield from members


def owner(snapshot: Snapshot) -> str:
    """The user's tag to which a snapshot belongs, or belonged."""
    suffix = next((ending for ending in RESERVED_SUFFIXES if snapshot.disk_tag.endswith(ending)), "")
    return snapshot.disk_tag.removesuffix(suffix)


def _file_of(tag: str, held: dict[str, list[NodeSnapshot]], files: Iterable[StateFile]) -> StateFile | None:
    """The state file of what the devices hold; None if the state is in an image, or nowhere.

    Over HMP the clock has milliseconds. A file with an unreadable clock is matched by tag alone.
    """
    first = [rows[0] for rows in held.values()]
    if any(row.vm_state_size for row in first):
        return None
    clocks = {row.vm_clock_ns for row in first}
    exact = any(clock % 1_000_000 for clock in clocks)
    tagged = [file for file in files if file.disk_tag == tag]
    for file in tagged:
        if (file.vm_clock_ns if exact else file.vm_clock_ns // 1_000_000 * 1_000_000) in clocks:
            return file
    return next((file for file in tagged if not file.vm_clock_ns), None)


def _gathered(
    tag: str, held: dict[str, list[NodeSnapshot]], required: Sequence[str], names: Labels, file: StateFile | None
) -> Snapshot:
    missing = tuple(node for node in required if node not in held)
    first = {node: rows[0] for node, rows in held.items()}
    vmstate = next((node for node, row in first.items() if row.vm_state_size > 0), None)
    main = first[vmstate] if vmstate else next(iter(first.values()))
    problems = [f"{node} holds it {len(rows)} times" for node, rows in held.items() if len(rows) > 1]
    # If QEMU makes snapshots without a state, each has a date of its own; the guest's clock stands still
    moment = _moment if vmstate else _clock
    if others := sorted(node for node, row in first.items() if moment(row) != moment(main)):
        problems.append(f"{', '.join(others)}: made at another moment than the rest")
    if file and (problem := _file_problem(file)):
        problems.append(problem)
    kind = Kind.FULL if vmstate else Kind.LIVE if file else Kind.DISK_ONLY
    return Snapshot(
        tag=tag,
        kind=Kind.PARTIAL if missing else kind,
        vm_state_size=file.vm_state_size if file else main.vm_state_size,
        date=main.date,
        vm_clock_ns=main.vm_clock_ns,
        vmstate=vmstate,
        devices=tuple(held),
        missing=missing,
        problems=tuple(problems),
        labels=names,
        file=file,
        disk_tag=tag,
    )


def _without_disks(file: StateFile, names: Labels) -> Snapshot:
    return Snapshot(
        tag=file.disk_tag,
        kind=Kind.STATE_ONLY,
        vm_state_size=file.vm_state_size,
        date=file.date,
        vm_clock_ns=file.vm_clock_ns,
        vmstate=None,
        devices=(),
        problems=(_file_problem(file) or "the disks' snapshots that belong to its state file are gone",),
        labels=names,
        file=file,
        disk_tag=file.disk_tag,
    )


def _file_problem(file: StateFile) -> str:
    return f"its state file {file.path}{file.trouble.removeprefix('it')}" if file.trouble else ""


def _moment(row: NodeSnapshot) -> object:
    return row.date, row.vm_clock_ns


def _clock(row: NodeSnapshot) -> object:
    return row.vm_clock_ns


def named(found: Iterable[Snapshot], tag: str) -> Snapshot | None:
    """The snapshot with that tag, or None. One on the devices goes before a state file whose disks are gone."""
    candidates = [one for one in found if one.tag == tag]
    return next((one for one in candidates if one.devices), candidates[0] if candidates else None)


def in_backing(graph: BlockGraph, devices: Sequence[Device]) -> tuple[InBacking, ...]:
    """The tags that a device does not hold, but one of its backing images. A block-commit brings them back."""
    images = tuple(dict.fromkeys(device.image for device in devices if device.image))
    return tuple(
        InBacking(tag=tag, image=_file_name(node), device=label)
        for name, label in zip(images, displayed(images, devices), strict=True)
        for node in _chain_below(graph, name)
        for tag in dict.fromkeys(row.tag for row in node.snapshots)
        if not graph.nodes[name].tagged(tag)
    )


def unattached(devices: Iterable[Device], nodes: Iterable[str]) -> tuple[str, ...]:
    """The *nodes* that no device of the guest uses: a block job may have switched a device away from them."""
    used = {device.image for device in devices if device.role is not Role.NODE}
    return tuple(node for node in nodes if node not in used)


def chains(graph: BlockGraph, images: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each image its file name, and those of its backing chain, the nearest first; empty if no image has a chain.

    A snapshot of an overlay holds only what is in the overlay; it reads the rest from the chain.

    :param images: node-names.
    """
    found = dict(chain_of(graph, image) for image in images if image in graph.nodes)
    return found if any(found.values()) else {}


def chain_of(graph: BlockGraph, image: str) -> tuple[str, tuple[str, ...]]:
    """The file name of *image*, and those of its backing chain, the nearest first."""
    below = map(_file_name, _chain_below(graph, image))
    return _file_name(graph.nodes[image]), tuple(dict.fromkeys(name for name in below if name))


def _file_name(node: BlockNode) -> str:
    """The name without the directory, because images are moved together."""
    return Path(node.filename).name


def _chain_below(graph: BlockGraph, image: str) -> Iterator[BlockNode]:
    """The backing chain of *image*, the nearest node first; no node twice."""
    seen = {image}
    node: BlockNode | None = graph.nodes[image]
    while node is not None:
        # Down from an image by its backing file, and through a filter by whichever edge it has
        edges = ("backing",) if node.driver in SNAPSHOT_DRIVERS else ("backing", "file")
        below = next((child for edge in edges for name, child in node.children if name == edge), "")
        node = None if below in seen else graph.nodes.get(below)
        if node is not None:
            seen.add(node.node_name)
            yield node


def not_found(graph: BlockGraph, devices: Sequence[Device], tag: str, hint: str = "") -> SnapshotNotFound:
    """The error that no device holds *tag*; it says so if a backing image does.

    :param hint: text to add.
    """
    below = next((one for one in in_backing(graph, devices) if one.tag in (tag, f"{tag}{SECOND_SUFFIX}")), None)
    if below is not None:
        hint += (
            f". It is in the backing image {below.image} of {below.device}: commit the overlay first (block-commit), "
            "if no other image has that one below it"
        )
    return SnapshotNotFound(tag, f"no snapshot {tag!r} on any device{hint}")


class Holding(NamedTuple):
    """Everything that exists under a tag.

    :ivar tags: the tags under which devices hold it: itself, and its second name.
    :ivar nodes: the node-names that hold any of these, QEMU's first device first.
    :ivar files: the paths of its state files.
    """

    tags: tuple[str, ...]
    nodes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def exists(self) -> bool:
        """Whether anything exists."""
        return bool(self.tags or self.files)


def under(found: Iterable[Snapshot], tag: str) -> tuple[Snapshot, ...]:
    """The snapshots under *tag*, whole or not: they are deleted when it is deleted or replaced."""
    return tuple(one for one in found if tag in (one.tag, owner(one)))


def holding(found: Iterable[Snapshot], devices: Sequence[Device], tag: str) -> Holding:
    """Everything under *tag*, whole or not: it is deleted when the tag is deleted or replaced.

    For ``TAG.qsnap-2``, the snapshot listed under that name, not TAG.
    """
    of_it = under(found, tag)
    held = {one.disk_tag: one.devices for one in of_it if one.devices}
    return Holding(
        tags=tuple(sorted(held)),
        nodes=tuple(node for node in relevant_nodes(devices) if any(node in nodes for nodes in held.values())),
        files=tuple(one.file.path for one in of_it if one.file is not None),
    )


class NewName(msgspec.Struct, frozen=True):
    """The name under which the devices hold a new snapshot, and what it replaces.

    :ivar disk_tag: that name.
    :ivar spare: what has that name already; it is deleted before the new snapshot is made.
    :ivar older: the rest under the tag; it is deleted when the new snapshot is complete.
    """

    disk_tag: str
    spare: Holding
    older: Holding


def new_name(found: Iterable[Snapshot], devices: Sequence[Device], tag: str, *, keeps_older: bool) -> NewName:
    """The name of a new snapshot of *tag*.

    :param keeps_older: keep a loadable snapshot of the tag until the new one is complete. If an
        interrupted replacement left both names, the one not listed as TAG is deleted.
    :raise BadUsage: the tag is too long to have a second name.
    """
    found = tuple(found)
    held, counts = holding(found, devices, tag), named(found, tag)
    names = (tag, second_name(tag)) if keeps_older and tag in held.tags else (tag,)
    unused = [name for name in names if name not in held.tags]
    useless = [name for name in reversed(names) if counts is None or counts.disk_tag != name]
    disk_tag = next(iter((*unused, *useless, tag)))
    files = {one.file.path: one.file.disk_tag for one in found if one.file is not None}
    is_taken = disk_tag in held.tags
    spare = Holding(
        tags=tuple(other for other in held.tags if other == disk_tag),
        nodes=held.nodes if is_taken else (),
        files=tuple(path for path in held.files if is_taken and files[path] == disk_tag),
    )
    older = Holding(
        tags=tuple(other for other in held.tags if other != disk_tag),
        nodes=held.nodes,
        files=tuple(path for path in held.files if path not in spare.files),
    )
    return NewName(disk_tag, spare, older)


def save_problems(graph: BlockGraph, tag: str, vmstate: str, devices: Sequence[str]) -> list[str]:
    """What is wrong with a new snapshot; empty if each device holds it once, with the state on *vmstate*."""
    problems = []
    for name in devices:
        node = graph.nodes.get(name)
        rows = node.tagged(tag) if node else ()
        if len(rows) != 1:
            problems.append(f"{name} holds it {len(rows)} times instead of once")
        elif name == vmstate and rows[0].vm_state_size == 0:
            problems.append(f"{name} holds no VM state")
        elif name != vmstate and rows[0].vm_state_size != 0:
            problems.append(f"{name} holds a VM state that belongs on {vmstate}")
    return problems


def is_loadable(snapshot: Snapshot) -> bool:
    """Whether it has a VM state, all its rows are of one moment, and each device holds it exactly once."""
    return snapshot.kind in (Kind.FULL, Kind.LIVE) and not snapshot.problems
