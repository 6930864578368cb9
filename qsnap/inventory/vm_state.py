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

import errno
import os
import struct
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from qsnap.inventory import descriptors, state_file
from qsnap.model.qemu import BlockGraph, NodeSnapshot
from qsnap.model.snapshots import Snapshot

_MAGIC = b"QFI\xfb"
#: magic, version, backing offset and size, cluster bits, size, encryption, L1 size and offset, refcount table and its
#: clusters, number of snapshots, their offset; and from version 3 on the incompatible features.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">Q")
#: Incompatible features that change nothing of where the state lies: dirty (1), and compression of another type (8).
_HARMLESS = 1 | 8
#: Entries of an L2 table have 16 bytes instead of 8.
_EXTENDED_L2 = 16
_ROW = struct.Struct(">QIHHIIQII")
#: Behind that from version 3 on: the size of the state, and that of the disk.
_ADDED = struct.Struct(">QQ")
#: Bytes of a table of snapshots, of all rows up to the one that is looked for.
_TABLE_BYTES = 16 << 20
#: Of an L1 table (block/qcow2.h: QCOW_MAX_L1_SIZE), and how many snapshots there may be (QCOW_MAX_SNAPSHOTS).
_L1_BYTES = 32 << 20
_MOST_ROWS = 65536
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
#: HMP tells a snapshot's clock in milliseconds.
_HMP_CLOCK_NS = 1_000_000
_ZERO = 1


class Elsewhere(ValueError):
    """The state cannot be read where it lies. The text is a clause that says why."""


class Extent(NamedTuple):
    """A stretch of the state, in bytes: where in the state it begins, where in the file, and how much it is."""

    begin: int
    offset: int
    size: int


class VmState:
    """The state of one snapshot.

    :ivar size: its bytes.
    """

    def __init__(self, file: int, size: int, extents: list[Extent]) -> None:
        self.size = size
        self._file = file
        self._extents = extents
        self._at = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def bytes(self, begin: int, size: int) -> bytes:
        """The *size* bytes of the state from *begin* on; less where it ends.

        :raise OSError: they cannot be read.
        """
        buffer = bytearray(max(0, min(size, self.size - begin)))
        self.read(memoryview(buffer), begin)
        return bytes(buffer)

    def read(self, buffer: memoryview, begin: int) -> int:
        """Read what of the state fits into *buffer*, from *begin* on; how many bytes that is.

        It is fast if each call goes on near the end of the one before.

        :raise OSError: it cannot be read; EIO where the file is shorter than it was.
        """
        wanted = min(len(buffer), self.size - begin)
        done = 0
        while done < wanted:
            extent = self._extent(begin + done)
            inside = begin + done - extent.begin
            room = buffer[done : min(wanted, done + extent.size - inside)]
            if not (got := os.preadv(self._file, [room], extent.offset + inside)):
                raise OSError(errno.EIO, "the file is shorter than it was")
            done += got
        return wanted

    def _extent(self, begin: int) -> Extent:
        while self._extents[self._at].begin > begin:
            self._at -= 1
        while self._extents[self._at].begin + self._extents[self._at].size <= begin:
            self._at += 1
        return self._extents[self._at]


class Place(NamedTuple):
    """The image of an ordinary snapshot's state, and its row in that image's table of snapshots."""

    image: Path
    row: NodeSnapshot


def place(pid: int | None, graph: BlockGraph, snapshot: Snapshot) -> Place | None:
    """Where the state of an ordinary snapshot is; None if that cannot be seen from here.

    :param pid: the QEMU process; None if it is not on this machine.
    """
    node = snapshot.vmstate
    if node is None or node not in graph.nodes:
        return None
    image = descriptors.way(pid, graph, node) or descriptors.block_device(pid, graph, node)
    rows = graph.nodes[node].tagged(snapshot.disk_tag)
    return Place(image, rows[0]) if image is not None and len(rows) == 1 else None


def of_snapshot(snapshot: Snapshot, state: Place | int | None) -> VmState:
    """The state of a snapshot, with a file of its own: :meth:`VmState.close` it.

    :param state: its place; or the open state file of a live snapshot.
    :raise Elsewhere: the state is not where it can be seen, or is encrypted.
    :raise OSError: the file cannot be read.
    """
    if state is None:
        raise Elsewhere("the image that holds the VM state cannot be seen from here")
    if isinstance(state, int):
        size = snapshot.vm_state_size
        return VmState(os.dup(state), size, [Extent(0, state_file.STREAM_OFFSET, size)])
    file = os.open(state.image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return of_image(file, state.row)
    except BaseException:
        os.close(file)
        raise


def of_image(file: int, row: NodeSnapshot) -> VmState:
    """The state of the snapshot of that *row* in an open qcow2 image.

    :raise Elsewhere: the state is not there, or is encrypted.
    :raise OSError: the file cannot be read.
    """
    try:
        return _of_image(file, row)
    except (struct.error, IndexError) as error:
        raise Elsewhere(f"the image's tables cannot be read: {error}") from error


class _Head(NamedTuple):
    """What the header of an image says; sizes in bytes, tables by their number of entries and offset."""

    cluster: int
    disk_size: int
    is_encrypted: bool
    l1_size: int
    l1_at: int
    rows: int
    rows_at: int
    features: int

    def first(self, per_l2: int, disk_size: int) -> tuple[int, int]:
        """The bytes that an L1 entry leads to, and the first entry that is not of the disk's contents."""
        of_l1 = self.cluster * per_l2
        return of_l1, -(-disk_size // of_l1)


def _head(file: int) -> _Head:
    data = os.pread(file, _HEADER.size + _FEATURES.size, 0)
    magic, version, _, _, bits, disk_size, encryption, l1_size, l1_at, _, _, rows, rows_at = _HEADER.unpack_from(data)
    if magic != _MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
        raise Elsewhere("the image is not qcow2")
    if 8 * l1_size > _L1_BYTES or rows > _MOST_ROWS:
        raise Elsewhere("the image's header is damaged")
    features = _FEATURES.unpack_from(data, _HEADER.size)[0] if version == 3 else 0
    return _Head(1 << bits, disk_size, bool(encryption), l1_size, l1_at, rows, rows_at, features)


def _of_image(file: int, row: NodeSnapshot) -> VmState:
    head = _head(file)
    if head.is_encrypted or head.features & ~_HARMLESS:
        why = "is encrypted" if head.is_encrypted else f"has the features {head.features:#x}"
        raise Elsewhere(f"the image {why}")
    found = next((one for one in _rows(file, head) if _is_of(one, row)), None)
    if found is None:
        raise Elsewhere("the image's table of snapshots does not have it")
    if found.size != row.vm_state_size or not found.size:
        raise Elsewhere("the image's table of snapshots tells of another state than QEMU does")
    return VmState(file, found.size, [*_extents(file, head, found)])


class Stretch(NamedTuple):
    """Bytes of the next VM state, from *begin* on, whose clusters QEMU would have to make first."""

    begin: int
    size: int
    is_shared: bool
    """QEMU would copy the clusters, because a loaded snapshot uses them too."""


def unprepared(file: int, size: int, going: Collection[NodeSnapshot] = ()) -> list[Stretch]:
    """The parts of the next VM state, of *size* bytes, without clusters of their own yet in an open qcow2 image.

    :param going: snapshots that will be deleted before it is written. Parts shared only with these are left out.
    :raise Elsewhere: that cannot be found out.
    :raise OSError: the file cannot be read.
    """
    try:
        return [*_unprepared(file, size, going)]
    except (struct.error, IndexError) as error:
        raise Elsewhere(f"the image's tables cannot be read: {error}") from error


def _unprepared(file: int, size: int, going: Collection[NodeSnapshot]) -> Iterator[Stretch]:
    head = _head(file)
    if head.features & ~(_HARMLESS | _EXTENDED_L2):
        raise Elsewhere(f"the image has the features {head.features:#x}")
    step = 2 if head.features & _EXTENDED_L2 else 1
    of_l1, first = head.first(head.cluster // 8 // step, head.disk_size)
    l1 = _entries(os.pread(file, 8 * max(0, head.l1_size - first), head.l1_at + 8 * first))
    # If a snapshot also uses an L2 table of the active L1 table, all clusters in it are shared
    staying = (
        [row for row in _rows(file, head) if not any(_is_of(row, one, _HMP_CLOCK_NS) for one in going)] if going else []
    )
    shared = {entry & _OFFSET for row in staying for entry in _entries(os.pread(file, 8 * row.l1_size, row.l1_at))}
    current = Stretch(0, 0, is_shared=False)
    for begin in range(0, size, head.cluster):
        number, inside = divmod(begin, of_l1)
        if not inside:
            entry = l1[number] if number < len(l1) else 0
            is_freed = bool(going) and not entry & _COPIED and entry & _OFFSET not in shared
            table = _entries(os.pread(file, head.cluster, entry & _OFFSET)) if entry & _OFFSET else None
        leaf = table[inside // head.cluster * step] if table is not None else 0
        if leaf & entry & _COPIED or (is_freed and leaf & _OFFSET):
            continue
        is_shared = bool(leaf & _OFFSET)
        length = min(head.cluster, size - begin)
        if (begin, is_shared) == (current.begin + current.size, current.is_shared):
            current = current._replace(size=current.size + length)
        else:
            if current.size:
                yield current
            current = Stretch(begin, length, is_shared)
    if current.size:
        yield current


class _Row(NamedTuple):
    """A row of the table of snapshots: its L1 table, the bytes of its state and of its disk, and what identifies it."""

    l1_at: int
    l1_size: int
    size: int
    disk_size: int
    name: tuple[str, str, int]
    vm_clock_ns: int


def _rows(file: int, head: _Head) -> Iterator[_Row]:
    table = os.pread(file, _TABLE_BYTES, head.rows_at)
    begin = 0
    for _ in range(head.rows):
        l1_at, l1_size, id_size, name_size, seconds, _, clock_ns, size, added_size = _ROW.unpack_from(table, begin)
        if 8 * l1_size > _L1_BYTES:
            raise Elsewhere("the image's table of snapshots is damaged")
        added_at = begin + _ROW.size
        id_at = added_at + added_size
        end = id_at + id_size + name_size
        disk_size = head.disk_size
        if added_size >= _ADDED.size:
            size, disk_size = _ADDED.unpack_from(table, added_at)
        identity = table[id_at : id_at + id_size].decode(errors="replace")
        tag = table[id_at + id_size : end].decode(errors="replace")
        yield _Row(l1_at, l1_size, size, disk_size, (identity, tag, seconds), clock_ns)
        begin = (end + 7) // 8 * 8


def _is_of(row: _Row, wanted: NodeSnapshot, unit_ns: int = 1) -> bool:
    """Whether they are the same snapshot, as far as a clock in units of so many nanoseconds tells."""
    is_named_so = row.name == (wanted.id, wanted.tag, int(wanted.date.timestamp()))
    return is_named_so and row.vm_clock_ns // unit_ns == wanted.vm_clock_ns // unit_ns


def _extents(file: int, head: _Head, row: _Row) -> Iterator[Extent]:
    """The stretches of the state, as long as the clusters of which they are follow each other."""
    cluster, size = head.cluster, row.size
    of_l1, first = head.first(cluster // 8, row.disk_size)
    last = first + -(-size // of_l1)
    if last > row.l1_size:
        raise Elsewhere("the state's tables are shorter than it is")
    file_size = os.fstat(file).st_size
    current = Extent(0, 0, 0)
    begin = 0
    for entry in _entries(os.pread(file, 8 * (last - first), row.l1_at + 8 * first)):
        if not entry & _OFFSET:
            raise Elsewhere("a part of the state is missing")
        for leaf in _entries(os.pread(file, cluster, entry & _OFFSET)):
            if begin >= size:
                break
            offset, length = leaf & _OFFSET, min(cluster, size - begin)
            if leaf & (_COMPRESSED | _ZERO) or not offset or offset + length > file_size:
                raise Elsewhere("a part of the state is compressed, or missing")
            if offset == current.offset + current.size:
                current = current._replace(size=current.size + length)
            else:
                if current.size:
                    yield current
                current = Extent(begin, offset, length)
            begin += length
    if begin < size:
        raise Elsewhere("a part of the state is missing")
    yield current


def _entries(table: bytes) -> array[int]:
    import sys

    entries = array("Q", table[: len(table) // 8 * 8])
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
