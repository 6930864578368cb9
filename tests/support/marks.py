"""A stand-in for a kernel that keeps soft-dirty bits, on one that may not: for real QEMUs, in this process.

The pagemap is the real one, with the marks of all that was seen to differ from a copy of the memory, which is taken at
the clearing and at each look. The firmware, which a load writes with what it had, is changed at the clearing, so that
the load shows. Other pages that are written with what they had stay without a mark: that makes no difference.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qsnap.host import soft_dirty
from qsnap.host.soft_dirty import PAGE, Pagemap

MARK = 1 << 55
#: What is smaller is the firmware.
FIRMWARE = 1 << 20


class Marks:
    """The marks of one process.

    :ivar clearings: how often they were cleared.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clearings = 0
        self._copies: dict[tuple[int, int], bytes] = {}
        self._marked: dict[tuple[int, int], bytearray] = {}
        self._pid = 0
        entries, of = Pagemap._entries, Pagemap.of

        def opened(pid: int) -> Pagemap:
            self._pid = pid
            return of(pid)

        def marked(pages: Pagemap, address: int, size: int) -> list[bytes]:
            real = b"".join(entries(pages, address, size))
            if (address, size) not in self._copies:
                self._copy(address, size)
                self._marked[address, size] = bytearray([not self.clearings]) * (size // PAGE)
            self._look()
            marks = self._marked[address, size]
            found = [
                entry & ~MARK | MARK * mark
                for (entry,), mark in zip(struct.iter_unpack("<Q", real), marks, strict=True)
            ]
            return [struct.pack(f"<{len(found)}Q", *found)]

        monkeypatch.setattr(Pagemap, "of", opened)
        monkeypatch.setattr(Pagemap, "_entries", marked)
        monkeypatch.setattr(soft_dirty, "is_kept", lambda: True)
        monkeypatch.setattr(soft_dirty, "clear", self.clear)

    def clear(self, _: int) -> None:
        """Take the marks away."""
        self.clearings += 1
        for address, size in self._copies:
            self._copy(address, size)
            self._marked[address, size] = bytearray(size // PAGE)

    def _look(self) -> None:
        for (address, size), then in self._copies.items():
            now = self._read(address, size)
            if now != then:
                for page, at in enumerate(range(0, size, PAGE)):
                    if now[at : at + PAGE] != then[at : at + PAGE]:
                        self._marked[address, size][page] = 1
                self._copies[address, size] = now

    def _copy(self, address: int, size: int) -> None:
        if size < FIRMWARE:
            with Path(f"/proc/{self._pid}/mem").open("r+b", buffering=0) as memory:
                for at in range(address, address + size, PAGE):
                    memory.seek(at + 9)
                    memory.write(b"\xa5")
        self._copies[address, size] = self._read(address, size)

    def _read(self, address: int, size: int) -> bytes:
        with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)
