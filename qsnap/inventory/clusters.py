"""The clusters of one snapshot in a qcow2 image: whether its tables are sound, and a checksum of what is stored.

What is looked at is the snapshot's own: its L1 table, its L2 tables, and the clusters of the disk and of the VM state.
None of it changes while the snapshot is there, so the image can be in use. Of the active tables only this is looked at:
whether they claim one of the snapshot's clusters for themselves (the flag "copied"), because QEMU would write into it.

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
        self._file_size = os.fstat(file).st_size

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
        refcounts = _Refcounts(self._file, head)
        for begin in _clusters_of(row.l1_at, 8 * row.l1_size, head.cluster):
            seen.add(begin)
            yield from self._unreferenced(refcounts, begin, "its L1 table")
        for number, (table_at, table) in enumerate(self._tables()):
            if table is None:
                yield f"L2 table {number} is not in the file"
                continue
            if not seen.add(table_at):
                yield f"L2 table {number} lies where another part of it does"
            yield from self._unreferenced(refcounts, table_at, f"L2 table {number}")
            active = self._claimed(number)
            for cluster in _leaves(head, number, table):
                if cluster.offset >= self._file_size or (not cluster.is_compressed and cluster.offset % head.cluster):
                    yield f"cluster {cluster.number} is not in the file"
                elif not cluster.is_compressed:
                    if not seen.add(cluster.offset):
                        yield f"cluster {cluster.number} lies where another part of it does"
                    yield from self._unreferenced(refcounts, cluster.offset, f"cluster {cluster.number}")
                    if cluster.offset in active:
                        yield f"cluster {cluster.number} is taken by the disk in use, which would write into it"

    def _unreferenced(self, refcounts: _Refcounts, offset: int, what: str) -> Iterator[str]:
        if not self._head.features & DIRTY and refcounts.of(offset) == 0:
            yield f"{what} counts as free, and would be written over"

    def _tables(self) -> Iterator[tuple[int, array[int] | None]]:
        """The L2 tables with their offsets; None for one that is not in the file. One that there is not is empty."""
        cluster = self._head.cluster
        for entry in qcow2.entries(self._file, self._row.l1_at, self._row.l1_size):
            at = entry & OFFSET
            if not at:
                yield 0, array("Q")
            elif at % cluster or at + cluster > self._file_size:
                yield at, None
            else:
                yield at, qcow2.entries(self._file, at, cluster // 8)

    def _claimed(self, number: int) -> set[int]:
        """The clusters that the active table says are its own, of the same part of the contents."""
        head = self._head
        if number >= head.l1_size:
            return set()
        (entry,) = qcow2.entries(self._file, head.l1_at + 8 * number, 1) or (0,)
        at = entry & OFFSET
        if not at or not entry & COPIED:
            return set()
        table = qcow2.entries(self._file, at, head.cluster // 8)
        return {leaf & OFFSET for leaf in table[:: head.step] if leaf & COPIED and not leaf & COMPRESSED}

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
        for number, (_, table) in enumerate(self._tables()):
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


def _clusters_of(offset: int, size: int, cluster: int) -> range:
    return range(offset, offset + size, cluster)


class _Marks:
    """Which clusters of a file have been seen."""

    def __init__(self, file_size: int, cluster: int) -> None:
        self._cluster = cluster
        self._seen = bytearray(-(-file_size // cluster))
        self.add(0)  # the header

    def add(self, offset: int) -> bool:
        """Mark a cluster; false if it was marked before."""
        number = offset // self._cluster
        was = self._seen[number]
        self._seen[number] = 1
        return not was


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
