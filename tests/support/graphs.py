"""Block graphs without a QEMU."""

from __future__ import annotations

from typing import Any

from qsnap.model.qemu import BlockBackend, BlockGraph, BlockNode


def node(name: str, driver: str = "qcow2", **more: object) -> BlockNode:
    return BlockNode(node_name=name, driver=driver, **more)  # type: ignore[arg-type]


def over(name: str, driver: str, *below: str, edge: str = "file", **more: object) -> BlockNode:
    """A node that stands on others."""
    return node(name, driver, children=tuple((edge, child) for child in below), **more)


def used_by_devices(*names: str) -> dict[str, Any]:
    """The fields of a graph in which the guest's devices use these nodes and no others."""
    drives = tuple(BlockBackend(qdev=f"/machine/peripheral/{name}", root=name) for name in names)
    return {"backends": drives, "with_parents": frozenset(names)}


def graph(*nodes: BlockNode, **more: Any) -> BlockGraph:
    """A guest with a disk on each node that no other one stands on.

    :param more: fields of the graph that are to be others.
    """
    children = {child for n in nodes for _, child in n.children}
    tops = [n.node_name for n in nodes if n.node_name not in children]
    fields: dict[str, Any] = {
        "nodes": {n.node_name: n for n in nodes},
        "backends": tuple(BlockBackend(qdev=f"/machine/peripheral/{name}", root=name) for name in tops),
        "with_parents": frozenset([*children, *tops]),
    }
    return BlockGraph(**(fields | more))
