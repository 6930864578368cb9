"""Where VM states lie in an image, read while QEMU has that open: that of a snapshot, and the one that comes next.

In a state file it is one stretch (:mod:`qsnap.inventory.state_file`). In an image it is found as QEMU finds it: the
table of snapshots leads to the row, that to the snapshot's L1 table, whose entries behind those of the disk's contents
lead to L2 tables, and these to clusters. What a snapshot refers to is never written again while the snapshot is there,
and is in the file before its row is (qcow2-snapshot.c: qcow2_snapshot_create flushes what it has written).

QEMU writes the next state through the active table, into the same place behind the disk's contents. After a save there
is nothing (qcow2-snapshot.c: qcow2_snapshot_create discards it). After a load the active table shares the clusters of
the state that was loaded (qcow2_snapshot_goto), so that each one is copied before it is written. An entry with the flag
"copied" is of the active table alone.

Facts: docs/interop/qcow2.txt of QEMU; block/qcow2.h: qcow2_vm_state_offset and size_to_l1, where the state begins.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import sub
from pathlib import Path
from typing import NamedTuple

from qsnap.host import files
from qsnap.inventory import descriptors, qcow2, state_file
from qsnap.inventory.extents import Extents
from qsnap.inventory.qcow2 import COPIED, OFFSET, Damaged, Header, Row, Unreadable
from qsnap.model.qemu import BlockGraph, NodeSnapshot
from qsnap.model.snapshots import Snapshot

#: Incompatible features that change nothing of where the state lies.
_HARMLESS = qcow2.DIRTY | qcow2.COMPRESSION


class VmState(Extents):
    """The state of one snapshot.

    :ivar identity: tells it from all other states, also from a later one of the same tag.
    """

    def __init__(self, file: int, extents: Sequence[tuple[int, int, int]], identity: str) -> None:
        super().__init__(file, extents)
        self.identity = identity

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def bytes(self, begin: int, size: int) -> bytes:
        """The *size* bytes of the state from *begin* on; less where it ends.

        :raise OSError: they cannot be read.
        """
        buffer = bytearray(max(0, min(size, self.size - begin)))
        self.read(memoryview(buffer), begin)
        return bytes(buffer)


class Place(NamedTuple):
    """The image of an ordinary snapshot's state, and its row in that image's table of snapshots."""

    image: Path
    row: NodeSnapshot


def place(pid: int | None, graph: BlockGraph, snapshot: Snapshot) -> Place | None:
    """Where the state of an ordinary snapshot is; None if that cannot be seen from here.

    :param pid: the QEMU process; None if it is not on this machine.
    """
    node = graph.nodes.get(snapshot.vmstate) if snapshot.vmstate else None
    if node is None:
        return None
    image = descriptors.way(pid, graph, node.node_name) or descriptors.block_device(pid, graph, node.node_name)
    rows = node.tagged(snapshot.disk_tag)
    return Place(image, rows[0]) if image is not None and len(rows) == 1 else None


def of_snapshot(snapshot: Snapshot, state: Place | int | None) -> VmState:
    """The state of a snapshot, with a file of its own: :meth:`VmState.close` it.

    :param state: its place; or the open state file of a live snapshot.
    :raise Unreadable: the state is not where it can be seen, or is encrypted.
    :raise OSError: the file cannot be read.
    """
    if state is None:
        raise Unreadable("the image that holds the VM state cannot be seen from here")
    if isinstance(state, int):
        size = snapshot.vm_state_size
        identity = _identity(state, snapshot.disk_tag, snapshot.date.timestamp(), snapshot.vm_clock_ns, size)
        return VmState(os.dup(state), [(0, state_file.STREAM_OFFSET, size)], identity)
    file = os.open(state.image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return of_image(file, state.row)
    except BaseException:
        os.close(file)
        raise


def of_image(file: int, row: NodeSnapshot) -> VmState:
    """The state of the snapshot of that *row* in an open qcow2 image.

    :raise Unreadable: the state is not there, or is encrypted.
    :raise Damaged: a part of it is missing.
    :raise OSError: the file cannot be read.
    """
    try:
        return _of_image(file, row)
    except (struct.error, IndexError) as error:
        raise Unreadable(f"the image's tables cannot be read: {error}") from error


def _of_image(file: int, row: NodeSnapshot) -> VmState:
    head = qcow2.header(file)
    if head.is_encrypted or head.features & ~_HARMLESS:
        why = "is encrypted" if head.is_encrypted else f"has the features {head.features:#x}"
        raise Unreadable(f"the image {why}")
    found = qcow2.row_of(file, head, row)
    if not found.size:
        raise Unreadable("the image's table of snapshots tells of no state")
    return VmState(file, [*_extents(file, head, found)], _identity(file, *found))


def _identity(file: int, *facts: object) -> str:
    return repr((files.identity(file), *facts))


class Stretch(NamedTuple):
    """Bytes of the next VM state, from *begin* on, whose clusters QEMU would have to make first."""

    begin: int
    size: int
    is_shared: bool
    """QEMU would copy the clusters, because a loaded snapshot uses them too."""


def unprepared(file: int, size: int, going: Collection[NodeSnapshot] = ()) -> list[Stretch]:
    """The parts of the next VM state, of *size* bytes, without clusters of their own yet in an open qcow2 image.

    :param going: snapshots that will be deleted before it is written. Parts shared only with these are left out.
    :raise Unreadable: that cannot be found out.
    :raise Damaged: a table is cut short.
    :raise OSError: the file cannot be read.
    """
    try:
        return [*_unprepared(file, size, going)]
    except struct.error as error:
        raise Unreadable(f"the image's tables cannot be read: {error}") from error


def _unprepared(file: int, size: int, going: Collection[NodeSnapshot]) -> Iterator[Stretch]:
    head = qcow2.header(file)
    if head.features & ~(_HARMLESS | qcow2.EXTENDED_L2):
        raise Unreadable(f"the image has the features {head.features:#x}")
    first = head.first_of_state(head.disk_size)
    l1 = qcow2.entries(file, head.l1_at + 8 * first, max(0, head.l1_size - first))
    # If a snapshot also uses an L2 table of the active L1 table, all clusters in it are shared
    staying = [row for row in qcow2.rows(file, head) if not any(row.is_of(one) for one in going)] if going else []
    shared = {entry & OFFSET for row in staying for entry in qcow2.entries(file, row.l1_at, row.l1_size)}
    current = Stretch(0, 0, is_shared=False)
    for begin, length, is_shared in _not_own(file, head, l1, size, shared if going else None):
        if (begin, is_shared) == (current.begin + current.size, current.is_shared):
            current = current._replace(size=current.size + length)
        else:
            if current.size:
                yield current
            current = Stretch(begin, length, is_shared)
    if current.size:
        yield current


def _not_own(
    file: int, head: Header, l1: Sequence[int], size: int, staying: Collection[int] | None
) -> Iterator[tuple[int, int, bool]]:
    """The parts of a VM state without clusters of their own: where each begins, its bytes, and whether it is shared.

    :param staying: the L2 tables that snapshots use which stay; None if no snapshot goes.
    """
    for number, begin in enumerate(range(0, size, head.of_l1)):
        end = min(begin + head.of_l1, size)
        entry = l1[number] if number < len(l1) else 0
        if not entry & OFFSET:
            yield begin, end - begin, False
            continue
        is_freed = staying is not None and entry & OFFSET not in staying
        own = COPIED if entry & COPIED else OFFSET if is_freed else 0
        clusters = range(begin, end, head.cluster)
        leaves = qcow2.entries(file, entry & OFFSET, head.cluster // 8)[:: head.step]
        if len(leaves) < len(clusters):
            raise Damaged("a table of the next state is cut short")
        at = begin
        for is_shared, alike in groupby(islice(leaves, len(clusters)), partial(_is_shared, own)):
            length = min(head.cluster * len(list(alike)), end - at)
            if is_shared is not None:
                yield at, length, is_shared
            at += length


def _is_shared(own: int, leaf: int) -> bool | None:
    """Whether a snapshot uses the cluster; None for one of the active table alone, as the flags *own* say."""
    return None if leaf & own else bool(leaf & OFFSET)


def _extents(file: int, head: Header, row: Row) -> Iterator[tuple[int, int, int]]:
    """The stretches of the state, as for :class:`Extents`: clusters that follow each other, with the same flags."""
    cluster, size = head.cluster, row.size
    first = head.first_of_state(row.disk_size)
    last = first + -(-size // head.of_l1)
    if last > row.l1_size:
        raise Damaged("the state's tables are shorter than it is")
    file_size = qcow2.size_of(file)
    l1 = qcow2.entries(file, row.l1_at + 8 * first, last - first)
    begin = 0
    # Clusters that follow each other in the file are as far from each other as they are in the state
    for distance, clusters in groupby(map(sub, _leaves(file, l1, cluster), range(0, size, cluster))):
        leaf, length = distance + begin, min(cluster * len(list(clusters)), size - begin)
        offset = leaf & OFFSET
        if leaf & (qcow2.COMPRESSED | qcow2.ZERO) or not offset or offset + length > file_size:
            raise Damaged("a part of the state is compressed, or missing")
        yield begin, offset, length
        begin += length
    if begin < size:
        raise Damaged("a part of the state is missing")


def _leaves(file: int, l1: Sequence[int], cluster: int) -> Iterator[int]:
    for entry in l1:
        if not entry & OFFSET:
            raise Damaged("a part of the state is missing")
        yield from qcow2.entries(file, entry & OFFSET, cluster // 8)
