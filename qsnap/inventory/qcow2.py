"""The header and the tables of a qcow2 image, read while QEMU has the image open.

What a snapshot refers to is never written again while the snapshot is there, and is in the file before its row is
(qcow2-snapshot.c: qcow2_snapshot_create flushes what it has written). The active tables may be older in the file than
in QEMU's memory.

Facts: docs/interop/qcow2.txt of QEMU. All numbers are big-endian.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from qsnap.model.qemu import NodeSnapshot

_MAGIC = b"QFI\xfb"
#: magic, version, backing offset and size, cluster bits, size, encryption, L1 size and offset, refcount table and its
#: clusters, number of snapshots, their offset; and from version 3 on the incompatible features, and the refcount order.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_ADDED_HEADER = struct.Struct(">Q16xI")
#: The order of a refcount's bits in version 2: 16 bits.
_ORDER_2 = 4
_ROW = struct.Struct(">QIHHIIQII")
#: Nanoseconds.
_MS = 1_000_000
#: Behind that from version 3 on: the size of the state, and that of the disk.
_ADDED = struct.Struct(">QQ")
#: Bytes of a table of snapshots, of all rows up to the one that is looked for.
_TABLE_BYTES = 16 << 20
#: Of an L1 table (block/qcow2.h: QCOW_MAX_L1_SIZE), and how many snapshots there may be (QCOW_MAX_SNAPSHOTS).
_L1_BYTES = 32 << 20
_MOST_ROWS = 65536
#: Of a file, in bytes.
_MOST_OFFSET = (1 << 63) - 1
#: Incompatible features: the refcounts may be wrong; the image is damaged; its data are in another file; compression of
#: another type; the entries of an L2 table have 16 bytes instead of 8.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
#: Parts of an entry: where it leads; it is of the active table alone; its cluster is compressed; it reads as zeroes.
OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1


class Unreadable(ValueError):
    """The image cannot be read in this way. The text is a clause that says why."""


class Damaged(Unreadable):
    """A table of the image is damaged."""


class NotThere(Unreadable):
    """The image's table of snapshots does not have it."""


class Header(msgspec.Struct, frozen=True):
    """What the header of an image says; sizes in bytes, tables by their number of entries and offset."""

    cluster: int
    disk_size: int
    is_encrypted: bool
    l1_size: int
    l1_at: int
    refcounts_at: int
    refcount_clusters: int
    refcount_bits: int
    rows: int
    rows_at: int
    features: int

    @property
    def step(self) -> int:
        """Numbers of 64 bits in an entry of an L2 table."""
        return 2 if self.features & EXTENDED_L2 else 1

    @property
    def of_l1(self) -> int:
        """Bytes of contents that an entry of an L1 table leads to."""
        return self.cluster * (self.cluster // 8 // self.step)

    def first_of_state(self, disk_size: int) -> int:
        """The first entry of an L1 table that is not of the disk's contents (block/qcow2.h: size_to_l1)."""
        return -(-disk_size // self.of_l1)


class Row(NamedTuple):
    """A row of the table of snapshots: its L1 table, the bytes of its state and of its disk, and what identifies it.

    :ivar name: ID, tag, and date in seconds since 1970.
    :ivar date_ns: nanoseconds of the date behind these seconds.
    """

    l1_at: int
    l1_size: int
    size: int
    disk_size: int
    name: tuple[str, str, int]
    vm_clock_ns: int
    date_ns: int

    def is_of(self, wanted: NodeSnapshot) -> bool:
        """Whether they are the same snapshot, as far as QEMU tells. HMP tells the clock in ms, and no time zone."""
        if self.name[:2] != (wanted.id, wanted.tag):
            return False
        if is_rough(wanted):
            return self.vm_clock_ns // _MS == wanted.vm_clock_ns // _MS
        return (self.name[2], self.vm_clock_ns) == (int(wanted.date.timestamp()), wanted.vm_clock_ns)


def is_rough(wanted: NodeSnapshot) -> bool:
    """Whether HMP may have told of it: the clock in ms, the size in three digits."""
    return wanted.vm_clock_ns % _MS == 0


def header(file: int) -> Header:
    """The header of an open image.

    :raise Unreadable: this is not a qcow2 image.
    :raise Damaged: the header is damaged.
    :raise OSError: it cannot be read.
    """
    data = os.pread(file, _HEADER.size + _ADDED_HEADER.size, 0)
    if len(data) < _HEADER.size:
        raise Unreadable("the image is not qcow2")
    fields = _HEADER.unpack_from(data)
    magic, version, _, _, bits, disk_size, encryption, l1_size, l1_at, refs_at, refs_size, rows_, rows_at = fields
    if magic != _MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
        raise Unreadable("the image is not qcow2")
    features, order = _ADDED_HEADER.unpack_from(data, _HEADER.size) if version == 3 else (0, _ORDER_2)
    if 8 * l1_size > _L1_BYTES or rows_ > _MOST_ROWS or order > 6:
        raise Damaged("the image's header is damaged")
    return Header(
        1 << bits, disk_size, bool(encryption), l1_size, l1_at, refs_at, refs_size, 1 << order, rows_, rows_at, features
    )  # fmt: skip


def rows(file: int, head: Header) -> Iterator[Row]:
    """The table of snapshots.

    :raise Damaged: it is damaged.
    :raise OSError: it cannot be read.
    """
    table = read(file, _TABLE_BYTES, head.rows_at)
    begin = 0
    for _ in range(head.rows):
        try:
            fields = _ROW.unpack_from(table, begin)
        except struct.error:
            raise Damaged("the image's table of snapshots is cut short") from None
        l1_at, l1_size, id_size, name_size, seconds, date_ns, clock_ns, size, added_size = fields
        added_at = begin + _ROW.size
        id_at = added_at + added_size
        end = id_at + id_size + name_size
        if 8 * l1_size > _L1_BYTES or end > len(table):
            raise Damaged("the image's table of snapshots is damaged")
        disk_size = head.disk_size
        if added_size >= _ADDED.size:
            size, disk_size = _ADDED.unpack_from(table, added_at)
        identity = table[id_at : id_at + id_size].decode(errors="replace")
        tag = table[id_at + id_size : end].decode(errors="replace")
        yield Row(l1_at, l1_size, size, disk_size, (identity, tag, seconds), clock_ns, date_ns)
        begin = (end + 7) // 8 * 8


def row_of(file: int, head: Header, wanted: NodeSnapshot) -> Row:
    """The row of a snapshot that QEMU tells of.

    :raise Unreadable: it is not there, or tells of another state.
    """
    found = next((row for row in rows(file, head) if row.is_of(wanted)), None)
    if found is None:
        raise NotThere("the image's table of snapshots does not have it")
    if found.size != wanted.vm_state_size and not is_rough(wanted):
        raise Unreadable("the image's table of snapshots tells of another state than QEMU does")
    return found


def read(file: int, size: int, offset: int) -> bytes:
    """The bytes at *offset*, as many as there are: none if a damaged table leads there.

    :raise OSError: they cannot be read.
    """
    return os.pread(file, size, offset) if offset <= _MOST_OFFSET else b""


def size_of(file: int) -> int:
    """Bytes of an open image; of a block device, those of the device."""
    return os.lseek(file, 0, os.SEEK_END)


def entries(file: int, offset: int, number: int) -> array[int]:
    """A table of *number* entries of 64 bits at *offset*; shorter where the file ends."""
    import sys

    table = read(file, 8 * number, offset)
    found = array("Q", table[: len(table) // 8 * 8])
    if sys.byteorder == "little":
        found.byteswap()
    return found


class L1Table(NamedTuple):
    """An L1 table: the offsets of its L2 tables, those of the disk's contents and those of VM states."""

    disk: tuple[int, ...]
    state: tuple[int, ...]


class L1Tables:
    """The L1 tables of an open image: the active one, and those of its snapshots.

    :ivar active: the active one.
    :raise Unreadable: the image has features that change where its tables are.
    :raise OSError: the file cannot be read.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._head = header(file)
        if self._head.features & ~(DIRTY | DATA_FILE | COMPRESSION | EXTENDED_L2):
            raise Unreadable(f"the image has the features {self._head.features:#x}")
        # HMP tells a snapshot's clock in milliseconds
        self._rows = {(row.name[1], row.vm_clock_ns // 1_000_000): row for row in rows(file, self._head)}
        self.active = self._table(self._head.l1_at, self._head.l1_size, self._head.disk_size)

    def of(self, tag: str, clock_ms: int) -> L1Table | None:
        """The table of a snapshot; None if the image does not hold it."""
        row = self._rows.get((tag, clock_ms))
        return self._table(row.l1_at, row.l1_size, row.disk_size) if row else None

    def leads_from(self, mine: L1Table, other: L1Table) -> bool:
        """Whether the active table goes on from *mine*, and not from *other*.

        It does if it uses anything of the disk that *mine* uses and *other* does not: no new cluster gets that place
        while a snapshot uses it. False: nothing shows it.
        """
        for active, own, others in zip(self.active.disk, mine.disk, (*other.disk, *[0] * len(mine.disk)), strict=False):
            if own == others or not own:
                continue
            if active == own:
                return True
            tables = [self._clusters(table) for table in (active, own, others)]
            if any(one and one == its and one != another for one, its, another in zip(*tables, strict=False)):
                return True
        return False

    def _clusters(self, table: int) -> list[int]:
        number = self._head.cluster // 8
        found = entries(self._file, table, number) if table else [0] * number
        return [entry & OFFSET for entry in found[:: self._head.step]]

    def _table(self, at: int, size: int, disk_size: int) -> L1Table:
        first = self._head.first_of_state(disk_size)
        found = [entry & OFFSET for entry in entries(self._file, at, size)]
        while len(found) > first and not found[-1]:
            found.pop()
        return L1Table(tuple(found[:first]), tuple(found[first:]))
