"""Block graphs without a QEMU."""

from __future__ import annotations

from qsnap.model.qemu import BlockBackend, BlockGraph, BlockNode


def node(name: str, driver: str = "qcow2", **more: object) -> BlockNode:
    return BlockNode(node_name=name, driver=driver, **more)  # type: ignore[arg-type]


def graph(*nodes: BlockNode, has_edges: bool = True) -> BlockGraph:
    children = {child for n in nodes for _, child in n.children}
    tops = [n.node_name for n in nodes if n.node_name not in children]
    return BlockGraph(
        nodes={n.node_name: n for n in nodes},
        backends=tuple(BlockBackend(qdev=f"/machine/peripheral/{name}", root=name) for name in tops),
        with_parents=frozenset([*children, *tops]),
        has_edges=has_edges,
    )
