"""Small qcow2 images, table by table, for what QEMU would not write."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from pathlib import Path

from qsnap.inventory.qcow2 import COPIED
from qsnap.model.qemu import NodeSnapshot

#: Bytes of the smallest cluster; entries of an L2 table; and bytes that an entry of an L1 table is for.
CLUSTER = 512
ENTRIES = CLUSTER // 8
OF_L1 = ENTRIES * CLUSTER


def at(cluster: int, flags: int = COPIED) -> int:
    """An entry that leads to that cluster of the file."""
    return cluster * CLUSTER | flags


class Image:
    """An image of a disk of one L1 entry.

    :ivar features: its incompatible features.
    :ivar encryption: the kind of that.
    """

    def __init__(self) -> None:
        self.features = 0
        self.encryption = 0
        self._clusters: dict[int, bytes] = {}
        self._rows: list[bytes] = []
        self._active = (0, 0)

    def put(self, number: int, *entries: int) -> int:
        """A table, or the beginning of one, as that cluster of the file; its number."""
        self._clusters[number] = struct.pack(f">{len(entries)}Q", *entries)
        return number

    def fill(self, number: int, byte: int) -> int:
        """A cluster of that byte."""
        self._clusters[number] = bytes([byte]) * CLUSTER
        return number

    def activate(self, number: int, *entries: int) -> None:
        """The active L1 table."""
        self._active = self.put(number, *entries) * CLUSTER, len(entries)

    def snapshot(self, tag: str, number: int, *entries: int, size: int = 0) -> NodeSnapshot:
        """A snapshot with a state of *size* bytes, and its L1 table."""
        row_id, date = str(len(self._rows) + 1), datetime(2026, 1, 1, tzinfo=UTC)
        l1 = self.put(number, *entries) * CLUSTER, len(entries)
        row = struct.pack(">QIHHIIQII", *l1, len(row_id), len(tag), int(date.timestamp()), 0, 1, 0, 16)
        row += struct.pack(">QQ", size, OF_L1) + row_id.encode() + tag.encode()
        self._rows.append(row.ljust(-(-len(row) // 8) * 8, b"\0"))
        return NodeSnapshot(tag=tag, id=row_id, vm_state_size=size, date=date, vm_clock_ns=1)

    def write(self, path: Path, cut: int = 0) -> Path:
        """Write it; *cut* bytes at its end are missing."""
        l1_at, l1_size = self._active
        numbers = (l1_size, l1_at, 0, 0, len(self._rows), CLUSTER)
        head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 9, OF_L1, self.encryption, *numbers)
        clusters = {0: head + struct.pack(">Q16xI", self.features, 4), 1: b"".join(self._rows)} | self._clusters
        data = b"".join(clusters.get(number, b"").ljust(CLUSTER, b"\0") for number in range(max(clusters) + 1))
        path.write_bytes(data[: len(data) - cut])
        return path
