"""What the pagemap tells of pages: only what is certainly unwritten counts as that."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from itertools import product
from pathlib import Path

import pytest

from qsnap.host import soft_dirty
from qsnap.host.soft_dirty import ABSENT, PAGE, UNWRITTEN, WRITTEN, Pagemap

pytestmark = pytest.mark.no_qemu

#: Bits of an entry (admin-guide/mm/pagemap.rst).
MARK, EXCLUSIVE, GUARDED, PROTECTED, OF_FILE, SWAPPED, PRESENT = (1 << bit for bit in (55, 56, 58, 57, 61, 62, 63))
BITS = (MARK, EXCLUSIVE, PROTECTED, GUARDED, OF_FILE, SWAPPED, PRESENT)
NUMBER = 0x12345  # root sees the numbers of pages


def pagemap(path: Path, *entries: int) -> Pagemap:
    path.write_bytes(struct.pack(f"<{len(entries)}Q", *entries))
    return Pagemap(path)


def test_each_entry(tmp_path: Path) -> None:
    """All combinations of bits: one alone is unwritten, and what has none of them is not there."""
    entries = [sum(bits) | NUMBER for bits in product(*((0, bit) for bit in BITS))]
    pages = pagemap(tmp_path / "pagemap", *entries)
    states = pages.states(0, len(entries) * PAGE)
    for entry, state in zip(entries, states, strict=True):
        bits = entry & ~NUMBER
        wanted = UNWRITTEN if bits == PRESENT | EXCLUSIVE else ABSENT if bits & ~MARK == 0 else WRITTEN
        assert state == wanted, hex(entry)
    assert pages.marks(0, len(entries) * PAGE) == bytes(entry >> 55 & 1 for entry in entries)
    assert pages.states(3 * PAGE, 5 * PAGE) == states[3:8]
    pages.close()


def test_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are read at once."""
    monkeypatch.setattr(soft_dirty, "_AT_ONCE", 4)
    pages = pagemap(tmp_path / "pagemap", *([PRESENT | EXCLUSIVE] * 5), PRESENT | EXCLUSIVE | MARK, *([0] * 3))
    assert pages.states(0, 9 * PAGE) == bytes([UNWRITTEN] * 5 + [WRITTEN] + [ABSENT] * 3)
    assert pages.marks(0, 9 * PAGE) == bytes([0] * 5 + [1] + [0] * 3)
    with pytest.raises(OSError, match="shorter"):
        pages.states(0, 10 * PAGE)


def test_maps_of_pages() -> None:
    states = bytes([UNWRITTEN, UNWRITTEN, WRITTEN, WRITTEN, ABSENT, ABSENT])
    both = soft_dirty.with_written(states, bytes([0, 1] * 3))
    assert both == bytes([UNWRITTEN, WRITTEN, WRITTEN, WRITTEN, ABSENT, ABSENT])
    assert soft_dirty.doubted(states) == bytes([WRITTEN] * 4 + [ABSENT] * 2)
    assert soft_dirty.not_unwritten(states) == bytes([0, 0, 1, 1, 1, 1])
    assert soft_dirty.written(states) == bytes([0, 0, 1, 1, 0, 0])


def test_this_kernel() -> None:
    """What never was is absent; what was dropped and read again, or is shared, is not unwritten on any kernel."""
    with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory, mmap.mmap(-1, PAGE) as shared:
        view, view_of_shared = ctypes.c_char.from_buffer(memory), ctypes.c_char.from_buffer(shared)
        where = ctypes.addressof(view)
        pages = Pagemap.of(os.getpid())
        memory[0] = memory[PAGE] = memory[2 * PAGE] = shared[0] = 1
        memory.madvise(mmap.MADV_DONTNEED, PAGE, 2 * PAGE)
        assert memory[PAGE] == 0
        first, *others = pages.states(where, 4 * PAGE)
        assert others == [WRITTEN, ABSENT, ABSENT]
        assert first == (WRITTEN if soft_dirty.is_kept() else UNWRITTEN)
        assert pages.states(ctypes.addressof(view_of_shared), PAGE) == bytes([WRITTEN])
        pages.close()
        del view, view_of_shared


def test_whether_marks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was written just now has a mark, or this kernel has none."""
    kernel = "6.12.95+deb12-amd64"
    assert not soft_dirty.is_kept(Path("/dev/zero"), kernel)
    assert not soft_dirty.is_kept(Path("/nonexistent"), kernel)
    assert not soft_dirty.is_kept(Path("/dev/null"), kernel)
    monkeypatch.setattr(Pagemap, "marks", lambda *_: b"\1")
    assert soft_dirty.is_kept(release=kernel)
    assert soft_dirty.is_kept(release="6.1.0-56-amd64")
    assert not soft_dirty.is_kept(release="5.10.0-32-amd64")


MAPS = """7f0000000000-7f0000002000 rw-p 00000000 00:00 0 
7f0000002000-7f0000004000 rw-p 00000000 00:00 0                          [anon:ram]
7f0000004000-7f0000005000 ---p 00000000 00:00 0 
7f0000006000-7f0000007000 rw-s 00000000 00:01 77                         /memfd:m0 (deleted)
7f0000007000-7f0000008000 rw-p 00000000 00:0f 78                         /dev/hugepages/a file (deleted)
"""  # noqa: W291 (as the kernel prints it)


@pytest.mark.parametrize(
    ("begin", "end", "is_private"),
    [
        (0, 4, True), (1, 3, True), (2, 4, True), (0, 5, False), (3, 5, False), (5, 6, False), (6, 7, False),
        (7, 8, False), (7, 9, False), (20, 21, False),
    ],
)  # fmt: skip
def test_private_memory(begin: int, end: int, is_private: bool) -> None:
    """Not what is of a file, shared, or not there."""
    base = 0x7F0000000000
    assert soft_dirty.is_private(MAPS, base + begin * PAGE, (end - begin) * PAGE) is is_private


def test_merging(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("0\n")
    (tmp_path / "full_scans").write_text("12\n")
    assert soft_dirty.merging(tmp_path) == {"run": "0\n", "full_scans": "12\n"}
    (tmp_path / "run").write_text("1\n")
    assert soft_dirty.merging(tmp_path) is None
    assert soft_dirty.merging(tmp_path / "none") == {}
    (tmp_path / "run").unlink()
    assert soft_dirty.merging(tmp_path) is None
