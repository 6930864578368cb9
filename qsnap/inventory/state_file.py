"""The state file: a qcow2 image whose one snapshot holds a VM state, written around a stream that is there already.

Pure: bytes in, bytes out. The facts are those of docs/interop/qcow2.txt in QEMU's source, version 3:

* All numbers are big-endian. An image is a row of clusters, here of 64 KiB, and begins with the header.
* A table of two levels maps guest offsets to clusters: an L1 entry leads to an L2 table of 8192 entries, so it covers
  512 MiB. The top bits of an entry are flags; without "copied" (bit 63) QEMU copies a cluster before it changes it.
* A snapshot has an L1 table of its own. The VM state lies behind the disk's contents, in the guest offsets from the
  first L1 entry on that describes nothing of the disk: with a disk of one cluster, from 512 MiB on.
* Each cluster has a reference count of 16 bits in a refcount block of 32768; the refcount table lists those blocks.
* Header extensions of unknown types are kept by QEMU and do nothing.

So the stream lies in the clusters behind the header, and everything else behind the stream::

    header | stream … | active L1 | snapshot L1 | L2 tables | snapshot table | refcount table | refcount blocks

The header is written last: until then this is not an image, whatever happens.

QEMU writes to an image when it goes back to a snapshot of it (qcow2-snapshot.c: qcow2_snapshot_goto). The first load
makes the active L1 table as long as the snapshot's, at the end of the file, frees the old one, and counts two uses of
the L2 tables and the stream; later loads change nothing (seen byte by byte on 7.2, 10.0 and 11.1). So what may stand
around a stream is known in full, and :func:`flaw` compares it.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from typing import Any

import msgspec

CLUSTER = 1 << 16
#: Where the stream begins in the file.
STREAM_OFFSET = CLUSTER

#: How a VM state begins (migration/savevm.c: QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION).
_STREAM_HEAD = b"QEVM\0\0\0\3"
#: How it ends: with a description in JSON; or, of a machine with suppress-vmdesc, with QEMU_VM_EOF.
_STREAM_ENDS = (b"}", b"\0")
_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
#: Of one snapshot, up to its strings: the fixed part, and 24 bytes of extra data.
_ROW = struct.Struct(">QIHHIIQIIQQQ")
_ROW_EXTRA_BYTES = 24
_EXTENSION = struct.Struct(">II")
#: The type of our header extension: "qsnp".
_OURS = 0x71736E70
_ENTRIES = CLUSTER // 8
_COUNTS = CLUSTER // 2
_NO_ICOUNT = (1 << 64) - 1
_U32_MAX = (1 << 32) - 1


class Content(msgspec.Struct, frozen=True):
    """The contents of a state file.

    :ivar tag: the tag under which the disks hold the snapshot.
    :ivar image: the absolute path of its image, as it was when the file was made.
    :ivar vm_state_size: bytes of the stream.
    :ivar date: to the microsecond, in UTC.
    :ivar vm_clock_ns: the guest's clock at that moment.
    """

    tag: str
    image: str
    vm_state_size: int
    date: datetime
    vm_clock_ns: int


class _Layout(msgspec.Struct, frozen=True):
    """The number of clusters of each part, and where the parts begin."""

    stream: int
    l1: int
    l2: int
    table: int
    blocks: int

    @property
    def active_l1_at(self) -> int:
        return (1 + self.stream) * CLUSTER

    @property
    def l1_at(self) -> int:
        return self.active_l1_at + CLUSTER

    @property
    def l2_at(self) -> int:
        return self.l1_at + self.l1 * CLUSTER

    @property
    def rows_at(self) -> int:
        return self.l2_at + self.l2 * CLUSTER

    @property
    def table_at(self) -> int:
        return self.rows_at + CLUSTER

    @property
    def blocks_at(self) -> int:
        return self.table_at + self.table * CLUSTER

    @property
    def clusters(self) -> int:
        return self.blocks_at // CLUSTER + self.blocks

    @property
    def end(self) -> int:
        return self.clusters * CLUSTER

    @property
    def needs_block(self) -> bool:
        """Whether an L1 table at the end takes one more refcount block, which comes behind it."""
        return self.clusters + self.l1 > self.blocks * _COUNTS


class _Use(msgspec.Struct, frozen=True):
    """QEMU's changes to a state file.

    :ivar is_grown: QEMU put a longer active L1 table at the end.
    :ivar is_active: that table leads to the stream, as after a load. A QEMU that was killed in the middle of a load may
        leave one change without the other.
    """

    is_grown: bool = False
    is_active: bool = False


#: No QEMU has loaded it.
_UNUSED = _Use()


def _layout(vm_state_size: int) -> _Layout:
    stream = -(-vm_state_size // CLUSTER)
    l2 = -(-stream // _ENTRIES)
    l1 = -(-(1 + l2) // _ENTRIES)
    layout = _Layout(stream, l1, l2, table=1, blocks=1)
    # Refcount blocks count themselves too
    while (blocks := -(-layout.clusters // _COUNTS)) > layout.blocks:
        layout = msgspec.structs.replace(layout, blocks=blocks, table=-(-blocks // _ENTRIES))
    return layout


def file_size(vm_state_size: int) -> int:
    """Bytes of a state file around a stream of that many bytes."""
    return _layout(vm_state_size).end


def envelope(content: Content) -> Iterator[tuple[int, bytes]]:
    """All parts of a state file around its stream: (offset, whole clusters), the header last, on its own."""
    for _, offset, data in _parts(content, _UNUSED):
        yield offset, data + bytes(-len(data) % CLUSTER)


def _parts(content: Content, use: _Use) -> Iterator[tuple[str, int, bytes]]:
    """For each part its name, its offset and its contents, followed by zeroes up to the next cluster."""
    layout = _layout(content.vm_state_size)
    l1 = _numbers(chain([0], range(layout.l2_at, layout.rows_at, CLUSTER)))
    # The active L1 table: one entry that leads nowhere
    yield "active L1 table", layout.active_l1_at, bytes(CLUSTER)
    yield "L1 table", layout.l1_at, l1
    stream_end = layout.active_l1_at
    for number in range(layout.l2):
        begin = STREAM_OFFSET + number * _ENTRIES * CLUSTER
        end = min(begin + _ENTRIES * CLUSTER, stream_end)
        yield "L2 table", layout.l2_at + number * CLUSTER, _numbers(range(begin, end, CLUSTER))
    yield "snapshot table", layout.rows_at, _row(content, layout)
    blocks = [*range(layout.blocks_at, layout.end, CLUSTER)]
    if use.is_grown:
        yield "active L1 table", layout.end, l1 if use.is_active else bytes(layout.l1 * CLUSTER)
        blocks += [layout.end + layout.l1 * CLUSTER] if layout.needs_block else []
    yield "refcount table", layout.table_at, _numbers(iter(blocks))
    counts = _counts(layout, use)
    for number, block in enumerate(blocks):
        yield "refcount block", block, _packed(counts[number * _COUNTS : (number + 1) * _COUNTS])
    yield "header", 0, _header(content, layout, use)


def _counts(layout: _Layout, use: _Use) -> array[int]:
    """The reference count of each cluster."""
    counts = array("H", [1]) * layout.clusters
    if use.is_grown:
        counts[layout.active_l1_at // CLUSTER] = 0
        counts += array("H", [1]) * (layout.l1 + layout.needs_block)
    if use.is_active:
        for begin, count in ((STREAM_OFFSET, layout.stream), (layout.l2_at, layout.l2)):
            counts[begin // CLUSTER : begin // CLUSTER + count] = array("H", [2]) * count
    return counts


def _numbers(numbers: Iterator[int] | range | chain[int]) -> bytes:
    return _packed(array("Q", numbers))


def _packed(numbers: array[int]) -> bytes:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _row(content: Content, layout: _Layout) -> bytes:
    seconds, microseconds = divmod((content.date - _EPOCH) // timedelta(microseconds=1), 1_000_000)
    identity, name = b"1", content.tag.encode(errors="surrogateescape")
    row = _ROW.pack(
        layout.l1_at, 1 + layout.l2, len(identity), len(name), seconds, microseconds * 1000, content.vm_clock_ns,
        min(content.vm_state_size, _U32_MAX), _ROW_EXTRA_BYTES, content.vm_state_size, CLUSTER, _NO_ICOUNT,
    )  # fmt: skip
    return row + identity + name


def _header(content: Content, layout: _Layout, use: _Use) -> bytes:
    l1_size, l1_at = (1 + layout.l2, layout.end) if use.is_grown else (1, layout.active_l1_at)
    header = _HEADER.pack(
        _MAGIC, 3, 0, 0, 16, CLUSTER, 0, l1_size, l1_at, layout.table_at, layout.table, 1, layout.rows_at,
        0, 0, 0, 4, _HEADER.size,
    )  # fmt: skip
    ours = json.dumps({"image": content.image}).encode()
    padded = ours + bytes(-len(ours) % 8)
    return header + _EXTENSION.pack(_OURS, len(ours)) + padded + _EXTENSION.pack(0, 0)


_EPOCH = datetime.fromtimestamp(0, UTC)


def image_of(pread: Callable[[int, int], bytes]) -> str | None:
    """The image that a state file names at its beginning; None if this is not a state file."""
    try:
        fields, ours = _read_header(pread)
        return str(json.loads(ours)["image"]) if fields[0] == _MAGIC else None
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_header(pread: Callable[[int, int], bytes]) -> tuple[tuple[Any, ...], bytes]:
    """The fields of a header, and our extension; b"" where there is none."""
    head = pread(CLUSTER, 0)
    fields = _HEADER.unpack_from(head)
    return fields, dict(_extensions(head, fields[-1])).get(_OURS, b"")


def content_of(pread: Callable[[int, int], bytes]) -> Content | None:
    """The contents that a state file declares; None if it is not a state file of qsnap.

    :param pread: (bytes, offset) to those bytes of the file.
    """
    try:
        fields, ours = _read_header(pread)
        if (fields[0], fields[1], fields[11]) != (_MAGIC, 3, 1):
            return None
        # A name may have 255 bytes, and so may the id
        row = pread(_ROW.size + 2 * 256, fields[12])
        _, _, id_size, name_size, seconds, nanoseconds, clock, _, extra_size, size, _, _ = _ROW.unpack_from(row)
        name = row[40 + extra_size + id_size :][:name_size]
        said: Any = json.loads(ours)
        return Content(
            tag=name.decode(errors="surrogateescape"),
            image=str(said["image"]),
            vm_state_size=size,
            date=_EPOCH + timedelta(seconds=seconds, microseconds=min(nanoseconds // 1000, 999_999)),
            vm_clock_ns=clock,
        )
    except (struct.error, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def flaw(pread: Callable[[int, int], bytes], size: int) -> str:
    """The part of a state file that differs from what qsnap wrote and from what a load leaves; "" if none does.

    Everything around the stream is compared. Of the stream itself, the first bytes and the last one are.

    :param pread: (bytes, offset) to those bytes of the file.
    :param size: bytes of the file.
    """
    content = content_of(pread)
    if content is None:
        return "it is not a state file"
    layout = _layout(content.vm_state_size)
    if size < layout.end:
        return "it is cut short"
    is_grown = _read_header(pread)[0][8] == layout.end
    use = _Use(is_grown, is_active=is_grown and any(pread(layout.l1 * CLUSTER, layout.end)))
    for name, offset, data in _parts(content, use):
        room = len(data) + -len(data) % CLUSTER
        # The file may end in the middle of its last cluster
        if pread(room, offset).ljust(room, b"\0") != data.ljust(room, b"\0"):
            return f"its {name} differs"
    if pread(len(_STREAM_HEAD), STREAM_OFFSET) != _STREAM_HEAD:
        return "what it holds does not begin as a VM state does"
    if pread(1, STREAM_OFFSET + content.vm_state_size - 1) not in _STREAM_ENDS:
        return "what it holds does not end as a VM state does"
    return ""


def _extensions(head: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    # A header is a cluster at most, and an extension 8 bytes at least
    for _ in repeat(None, CLUSTER // 8):
        kind, size = _EXTENSION.unpack_from(head, offset)
        if not kind:
            return
        yield kind, head[offset + 8 : offset + 8 + size]
        offset += 8 + size + -size % 8
