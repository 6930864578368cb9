"""Rows of many snapshot tables, gathered into snapshots: what each tag holds, over all devices. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qsnap.devices import labels
from qsnap.errors import BadUsage
from qsnap.model import MAX_TAG_BYTES, BlockGraph, Device, Kind, Labels, NodeSnapshot, Role, Snapshot, Verdict

#: What the tag of a stand-in ends with.
STAND_IN_SUFFIX = ".qsnap-stand-in"


def relevant_nodes(devices: Iterable[Device]) -> tuple[str, ...]:
    """The node-names that a whole snapshot must be on: writable, and not carried inside the VM state."""
    counted = (d for d in devices if d.verdict not in (Verdict.IGNORED, Verdict.CARRIED))
    return tuple(dict.fromkeys(name for d in counted if (name := d.image or d.node) is not None))


def holders(graph: BlockGraph, devices: Iterable[Device], tag: str) -> tuple[str, ...]:
    """The node-names that hold *tag*, QEMU's first device first."""
    nodes = ((name, graph.nodes.get(name)) for name in relevant_nodes(devices))
    return tuple(name for name, node in nodes if node is not None and node.tagged(tag))


def snapshots(graph: BlockGraph, devices: Sequence[Device]) -> tuple[Snapshot, ...]:
    """All snapshots, oldest first.

    QEMU gives all rows of one save the same date and VM clock, and a node that holds a tag twice is read
    from its first row alone (bdrv_snapshot_find); both are looked at here.
    """
    nodes = relevant_nodes(devices)
    # What nobody uses cannot change either, and QEMU 10.0's savevm leaves it out.
    required = relevant_nodes(device for device in devices if device.role is not Role.NODE)
    names = labels(devices)
    rows: dict[str, dict[str, list[NodeSnapshot]]] = {}
    for node in nodes:
        for row in graph.nodes[node].snapshots:
            rows.setdefault(row.tag, {}).setdefault(node, []).append(row)
    found = (_gathered(tag, held, required, names) for tag, held in rows.items())
    return tuple(sorted(found, key=lambda snapshot: (snapshot.date, snapshot.tag)))


def _gathered(tag: str, held: dict[str, list[NodeSnapshot]], required: Sequence[str], names: Labels) -> Snapshot:
    missing = tuple(node for node in required if node not in held)
    first = {node: rows[0] for node, rows in held.items()}
    vmstate = next((node for node, row in first.items() if row.vm_state_size > 0), None)
    main = first[vmstate] if vmstate else next(iter(first.values()))
    problems = [f"{node} holds it {len(rows)} times" for node, rows in held.items() if len(rows) > 1]
    if others := sorted(node for node, row in first.items() if _moment(row) != _moment(main)):
        problems.append(f"{', '.join(others)}: made at another moment than the rest")
    kind = Kind.PARTIAL if missing else Kind.FULL if vmstate else Kind.DISK_ONLY
    return Snapshot(
        tag=tag,
        kind=kind,
        vm_state_size=main.vm_state_size,
        date=main.date,
        vm_clock_ns=main.vm_clock_ns,
        vmstate=vmstate,
        devices=tuple(held),
        missing=missing,
        problems=tuple(problems),
        labels=names,
    )


def _moment(row: NodeSnapshot) -> object:
    return row.date, row.vm_clock_ns


def find(graph: BlockGraph, devices: Sequence[Device], tag: str) -> Snapshot | None:
    """The snapshot *tag*, or None."""
    return next((found for found in snapshots(graph, devices) if found.tag == tag), None)


def save_problems(graph: BlockGraph, tag: str, vmstate: str, devices: Sequence[str]) -> list[str]:
    """What is wrong with a snapshot just saved: nothing, if it is once on each device, its state on *vmstate*."""
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
    """Whether there is a VM state in it, on no device twice and of one moment, and no device lacks it."""
    return snapshot.kind is Kind.FULL and not snapshot.problems


def stand_in_of(tag: str) -> str:
    """The tag under which a safe replacement keeps the new state while it replaces *tag*.

    :raise BadUsage: it would be too long.
    """
    name = f"{tag}{STAND_IN_SUFFIX}"
    if len(name.encode(errors="surrogateescape")) > MAX_TAG_BYTES:
        raise BadUsage(
            f"the tag {tag!r} is too long to be replaced safely: with the {len(STAND_IN_SUFFIX)} bytes of "
            f"{STAND_IN_SUFFIX!r} behind it, it has more than {MAX_TAG_BYTES}"
        )
    return name
