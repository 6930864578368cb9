"""Where the VM state of a snapshot lies in its file, to be read while QEMU has that open.

In a state file it is one stretch (:mod:`qsnap.inventory.state_file`). In an image it is found as QEMU finds it: the
table of snapshots leads to the row, that to the snapshot's L1 table, whose entries behind those of the disk's contents
lead to L2 tables, and these to clusters. What a snapshot refers to is never written again while the snapshot is there,
and is in the file before its row is (qcow2-snapshot.c: qcow2_snapshot_create flushes what it has written).

Facts: docs/interop/qcow2.txt of QEMU; block/qcow2.h: qcow2_vm_state_offset and size_to_l1, where the state begins.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from qsnap.inventory import state_file
from qsnap.model.qemu import NodeSnapshot

_MAGIC = b"QFI\xfb"
#: magic, version, backing offset and size, cluster bits, size, encryption, L1 size and offset, refcount table and its
#: clusters, number of snapshots, their offset; and from version 3 on the incompatible features.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">Q")
#: Incompatible features that change nothing of where the state lies: dirty (1), and compression of another type (8).
_HARMLESS = 1 | 8
_ROW = struct.Struct(">QIHHIIQII")
#: Behind that from version 3 on: the size of the state, and that of the disk.
_ADDED = struct.Struct(">QQ")
#: Bytes of a table of snapshots, of all rows up to the one that is looked for.
_TABLE_BYTES = 16 << 20
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1


class Elsewhere(ValueError):
    """The state is not where it can be read. The text is a clause that says why."""


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

    def read(self, buffer: memoryview, begin: int) -> int:
        """Read what of the state fits into *buffer*, from *begin* on; how many bytes that is.

        It is quick where each call goes on near where the one before has ended.

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


def of_state_file(file: int, size: int) -> VmState:
    """The state in an open state file, of *size* bytes."""
    return VmState(file, size, [Extent(0, state_file.STREAM_OFFSET, size)])


def of_image(file: int, row: NodeSnapshot) -> VmState:
    """The state of the snapshot of that *row* in an open qcow2 image.

    :raise Elsewhere: it is not there, or not in the clear.
    :raise OSError: the file cannot be read.
    """
    try:
        return _of_image(file, row)
    except (struct.error, IndexError) as error:
        raise Elsewhere(f"the image's tables cannot be read: {error}") from error


def _of_image(file: int, row: NodeSnapshot) -> VmState:
    head = os.pread(file, _HEADER.size + _FEATURES.size, 0)
    magic, version, _, _, bits, disk_size, encryption, _, _, _, _, rows, rows_at = _HEADER.unpack_from(head)
    if magic != _MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
        raise Elsewhere("the image is not qcow2")
    features = _FEATURES.unpack_from(head, _HEADER.size)[0] if version == 3 else 0
    if encryption or features & ~_HARMLESS:
        raise Elsewhere("the image is encrypted" if encryption else f"the image has the features {features:#x}")
    l1_at, l1_size, size, disk_size = _found(file, rows, rows_at, row, disk_size)
    if size != row.vm_state_size or not size:
        raise Elsewhere("the image's table of snapshots tells of another state than QEMU does")
    extents = [*_extents(file, bits, l1_at, l1_size, disk_size, size)]
    return VmState(file, size, extents)


def _found(file: int, rows: int, at: int, wanted: NodeSnapshot, disk_size: int) -> tuple[int, int, int, int]:
    """Of the snapshot: its L1 table's offset and entries, the size of its state, and of its disk, in bytes."""
    table = os.pread(file, _TABLE_BYTES, at)
    begin = 0
    for _ in range(rows):
        l1_at, l1_size, id_size, name_size, seconds, _, clock_ns, size, added_size = _ROW.unpack_from(table, begin)
        added_at = begin + _ROW.size
        id_at = added_at + added_size
        end = id_at + id_size + name_size
        if added_size >= _ADDED.size:
            size, row_disk_size = _ADDED.unpack_from(table, added_at)
        else:
            row_disk_size = disk_size
        identity = table[id_at : id_at + id_size].decode(errors="replace")
        tag = table[id_at + id_size : end].decode(errors="replace")
        if (identity, tag, seconds, clock_ns) == (
            wanted.id, wanted.tag, int(wanted.date.timestamp()), wanted.vm_clock_ns
        ):  # fmt: skip
            return l1_at, l1_size, size, row_disk_size
        begin = (end + 7) // 8 * 8
    raise Elsewhere("the image's table of snapshots does not have it")


def _extents(file: int, bits: int, l1_at: int, l1_size: int, disk_size: int, size: int) -> Iterator[Extent]:
    """The stretches of the state, as long as the clusters of which they are follow each other."""
    cluster = 1 << bits
    of_l1 = cluster * (cluster // 8)
    first = -(-disk_size // of_l1)
    last = first + -(-size // of_l1)
    if last > l1_size:
        raise Elsewhere("the state's tables are shorter than it is")
    file_size = os.fstat(file).st_size
    current = Extent(0, 0, 0)
    begin = 0
    for entry in _entries(os.pread(file, 8 * (last - first), l1_at + 8 * first)):
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
