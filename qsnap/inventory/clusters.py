"""The clusters of one snapshot in a qcow2 image: whether its tables are sound, and a checksum of what is stored.

What is looked at is the snapshot's own: its L1 table, its L2 tables, and the clusters of the disk and of the VM state.
None of it changes while the snapshot is there, so the image can be in use. Of the tables of the disk in use it is
looked at whether they lead astray: into a cluster of the snapshot, or out of the file.

Facts: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qsnap.inventory import qcow2
from qsnap.inventory.qcow2 import COMPRESSED, COPIED, DATA_FILE, DIRTY, OFFSET, ZERO, Damaged, Header, Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable

    from qsnap.model.qemu import NodeSnapshot

#: Bytes that are read at once for a checksum.
_PIECE = 4 << 20  # a multiple of any cluster
#: Bytes behind the end of the file that QEMU may have allocated, and not written yet.
_AHEAD = 1 << 30


class Cluster(NamedTuple):
    """What an entry of an L2 table leads to.

    :ivar number: which cluster of the contents it is; the VM state's come behind the disk's.
    :ivar offset: where it is in the file; compressed data have an offset that is not a multiple of a cluster.
    :ivar size: bytes in the file.
    """

    number: int
    offset: int
    size: int
    is_compressed: bool


class StoredSnapshot:
    """A snapshot in an open image.

    :raise Unreadable: the image does not have it, or is not one that this can read.
    :raise OSError: the image cannot be read.
    """

    def __init__(self, file: int, wanted: NodeSnapshot) -> None:
        self._file = file
        self._head = qcow2.header(file)
        if self._head.features & DATA_FILE:
            raise Unreadable("its data are in a file of their own")
        self._row = qcow2.row_of(file, self._head, wanted)
        self._file_size = qcow2.size_of(file)
        self._refcounts = _Refcounts(file, self._head)

    def flaws(self) -> Iterator[str]:
        """What is wrong with its tables, a clause each.

        :raise OSError: the image cannot be read.
        """
        head, row = self._head, self._row
        if head.features & qcow2.CORRUPT:
            yield "QEMU has marked the image as corrupt"
        if row.l1_at % head.cluster or not row.l1_at or row.l1_at + 8 * row.l1_size > self._file_size:
            yield "its L1 table is not in the file"
            return
        if head.first_of_state(row.disk_size) > row.l1_size:
            yield f"its disk has {row.disk_size:,} bytes, and its L1 table is too short for that"
        seen = _Marks(self._file_size, head.cluster)
        for begin, size in ((0, 1), (head.refcounts_at, head.refcount_clusters * head.cluster), (head.rows_at, 1)):
            seen.add(begin, size)
        seen.add(row.l1_at, 8 * row.l1_size)
        yield from self._freed(row.l1_at, "its L1 table")
        for number, (table_at, table) in enumerate(self._tables(row.l1_at, row.l1_size)):
            if table is None:
                yield f"L2 table {number} is not in the file"
                continue
            if table_at and not seen.add(table_at):
                yield f"L2 table {number} lies where another part of it does"
            yield from self._freed(table_at, f"L2 table {number}")
            for cluster in _leaves(head, number, table):
                if cluster.offset >= self._file_size or (not cluster.is_compressed and cluster.offset % head.cluster):
                    yield f"cluster {cluster.number} is not in the file"
                elif not cluster.is_compressed:
                    if not seen.add(cluster.offset):
                        yield f"cluster {cluster.number} lies where another part of it does"
                    yield from self._freed(cluster.offset, f"cluster {cluster.number}")
        yield from self._flaws_of_active(seen)

    def _flaws_of_active(self, seen: _Marks) -> Iterator[str]:
        """What is wrong with the tables of the disk in use: a load frees what they lead to.

        They may be older than in QEMU's memory, but they never lead astray: QEMU writes a refcount before a table that
        needs it, and a table before one that leads to it.
        """
        head, row = self._head, self._row
        disk = "of the disk in use, which any load gives up,"
        for number, (table_at, table) in enumerate(self._tables(head.l1_at, head.l1_size)):
            if table is None:
                yield f"L2 table {number} {disk} is not in the file"
                continue
            own = qcow2.entries(self._file, row.l1_at + 8 * number, 1) if number < row.l1_size else array("Q", [0])
            own_at = own[0] & OFFSET if own else 0
            if table_at in (0, own_at):
                continue
            own_table = qcow2.entries(self._file, own_at, head.cluster // 8) if own_at else array("Q")
            if not seen.is_free(table_at):
                yield f"L2 table {number} {disk} lies where a part of the snapshot does"
            for cluster in _leaves(head, number, table):
                place = cluster.number % (head.of_l1 // head.cluster) * head.step
                is_shared = place < len(own_table) and own_table[place] & OFFSET == cluster.offset
                if is_shared and not table[place] & COPIED:
                    continue
                if cluster.is_compressed:
                    continue
                if cluster.offset % head.cluster or cluster.offset > self._file_size + _AHEAD:
                    yield f"cluster {cluster.number} {disk} is not in the file"
                elif not seen.is_free(cluster.offset):
                    yield f"cluster {cluster.number} {disk} lies where a part of the snapshot does"
                else:
                    yield from self._freed(cluster.offset, f"cluster {cluster.number} {disk}")

    def _freed(self, offset: int, what: str) -> Iterator[str]:
        if offset and not self._head.features & DIRTY and self._refcounts.of(offset) == 0:
            yield f"{what} counts as free, and would be written over"

    def _tables(self, l1_at: int, l1_size: int) -> Iterator[tuple[int, array[int] | None]]:
        """The L2 tables with their offsets; None for one that is not in the file. One that there is not is empty."""
        cluster = self._head.cluster
        for entry in qcow2.entries(self._file, l1_at, l1_size):
            at = entry & OFFSET
            if not at:
                yield 0, array("Q")
            elif at % cluster or at + cluster > self._file_size:
                yield at, None
            else:
                yield at, qcow2.entries(self._file, at, cluster // 8)

    def checksum(self, ended: Callable[[], bool]) -> str:
        """SHA-256 of the disk's size and of all that is stored for it, cluster by cluster, each with its number.

        :param ended: is asked between two reads whether to end.
        :raise Unreadable: it was to end.
        :raise OSError: a part cannot be read.
        """
        import hashlib

        sum_ = hashlib.sha256(b"%d " % self._row.disk_size)
        buffer = memoryview(bytearray(_PIECE))
        for first, offset, size, cluster in self._stretches():
            for begin in range(0, size, _PIECE):
                if ended():
                    raise Unreadable("it was not read to its end")
                piece = buffer[: min(_PIECE, size - begin)]
                got = os.preadv(self._file, [piece], offset + begin)
                piece[got:] = bytes(len(piece) - got)  # the last cluster may be longer than the file
                for at in range(0, len(piece), cluster):
                    sum_.update(b"%d " % (first + (begin + at) // cluster))
                    sum_.update(piece[at : at + cluster])
        return sum_.hexdigest()

    def _stretches(self) -> Iterator[tuple[int, int, int, int]]:
        """Clusters that follow each other: the first one's number, their offset, all bytes, and the bytes of each."""
        first = begin = size = 0
        for number, (_, table) in enumerate(self._tables(self._row.l1_at, self._row.l1_size)):
            if table is None:
                raise Damaged(f"L2 table {number} is not in the file")
            for cluster in _leaves(self._head, number, table):
                if cluster.is_compressed:
                    yield cluster.number, cluster.offset, cluster.size, cluster.size
                elif size and (cluster.offset, cluster.number) == (begin + size, first + size // cluster.size):
                    size += cluster.size
                else:
                    if size:
                        yield first, begin, size, cluster.size
                    first, begin, size = cluster.number, cluster.offset, cluster.size
        if size:
            yield first, begin, size, self._head.cluster


def _leaves(head: Header, number: int, table: array[int]) -> Iterator[Cluster]:
    """What an L2 table leads to. Clusters that read as zeroes are left out."""
    per_table = head.of_l1 // head.cluster
    bits = head.cluster.bit_length() - 1
    shift = 62 - (bits - 8)
    for place, leaf in enumerate(table[:: head.step]):
        index = number * per_table + place
        if leaf & COMPRESSED:
            offset = leaf & ((1 << shift) - 1)
            sectors = (leaf >> shift) & ((1 << (bits - 8)) - 1)
            yield Cluster(index, offset, (sectors + 1) * 512 - offset % 512, is_compressed=True)
        elif leaf & OFFSET and not (leaf & ZERO and head.step == 1):
            yield Cluster(index, leaf & OFFSET, head.cluster, is_compressed=False)


class _Marks:
    """Which clusters of a file the snapshot, or the image itself, uses."""

    def __init__(self, file_size: int, cluster: int) -> None:
        self._cluster = cluster
        self._seen = bytearray(-(-file_size // cluster))

    def is_free(self, offset: int) -> bool:
        """Whether a cluster is not marked."""
        number = offset // self._cluster
        return number >= len(self._seen) or not self._seen[number]

    def add(self, offset: int, size: int = 1) -> bool:
        """Mark the clusters of so many bytes; false if the first one was marked before."""
        was_free = self.is_free(offset)
        for number in range(offset // self._cluster, min(len(self._seen), -(-(offset + size) // self._cluster))):
            self._seen[number] = 1
        return was_free


class _Refcounts:
    """The reference counts of an image, block by block as they are needed."""

    def __init__(self, file: int, head: Header) -> None:
        self._file = file
        self._bits = head.refcount_bits
        self._cluster = head.cluster
        self._table = qcow2.entries(file, head.refcounts_at, head.refcount_clusters * head.cluster // 8)
        self._per_block = head.cluster * 8 // self._bits
        self._number = -1
        self._block = b""

    def of(self, offset: int) -> int:
        """How many uses of the cluster at *offset* are counted."""
        number, place = divmod(offset // self._cluster, self._per_block)
        if number != self._number:
            at = self._table[number] & ~(self._cluster - 1) if number < len(self._table) else 0
            self._number, self._block = number, qcow2.read(self._file, self._cluster, at) if at else b""
        if self._bits < 8:
            in_byte = 8 // self._bits
            byte = self._block[place // in_byte] if place // in_byte < len(self._block) else 0
            return (byte >> (place % in_byte * self._bits)) & ((1 << self._bits) - 1)
        size = self._bits // 8
        return int.from_bytes(self._block[place * size : (place + 1) * size])
