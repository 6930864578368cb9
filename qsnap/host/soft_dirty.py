"""Which pages of another process's memory were written since its marks were cleared: the kernel's soft-dirty bits.

A page counts as unwritten only if the process alone has it, in its private memory, without a mark. Whatever else the
kernel shows counts as written.

Facts (Linux: admin-guide/mm/soft-dirty.rst and pagemap.rst; fs/proc/task_mmu.c; seen on 6.1 and 6.12):

* Writing 4 to /proc/PID/clear_refs takes the marks of all memory of the process away. A write to it sets that of the
  page, or of all pages of a huge one (bit 55 of /proc/PID/pagemap). Memory that is mapped later is marked whole.
* A kernel without CONFIG_MEM_SOFT_DIRTY takes the 4 as well, and never shows a mark.
* A page that was dropped (madvise(2): MADV_DONTNEED) has no mark when it is read again. It is the kernel's page of
  zeroes then, which no process has alone (bit 56 is clear). So is one that the kernel has replaced by that page, where
  6.12 may lose the mark. What is dropped and not read is not there (bits 63 and 62), and so all zeroes.
* The mark of a page that is merged with equal ones (KSM) is lost. While that is off, its counters stand still.
* Shared memory may lose marks when it is swapped out, and that of hugetlbfs has none (from the source).
* Reading the pagemap takes 2 ms of processor time per GiB in huge pages, and 17 ms in small ones. PAGEMAP_SCAN (6.7)
  would take less, but does not tell whether a process has a page alone.
* Linux 5.6 to 5.10 may miss a write after a clearing (fixed by "mm: proc: Invalidate TLB after clearing soft-dirty page
  state"). Before 6.1 nothing was tried.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path

#: A page's state: unwritten since the clearing; maybe written; not there, and so all zeroes.
UNWRITTEN, WRITTEN, ABSENT = 0, 1, 2

PAGE = 4096
_SINCE = (6, 1)
_ENTRY = 8
#: Entries that are read at once.
_AT_ONCE = 1 << 17
#: The highest byte of an entry of the pagemap: present, swapped, of a file, two for userfaultfd and guards, exclusive.
_PRESENT, _EXCLUSIVE = 0x80, 0x01
_STATES = bytes(UNWRITTEN if byte == _PRESENT | _EXCLUSIVE else ABSENT if byte == 0 else WRITTEN for byte in range(256))
#: The next byte: the mark, and bits of the page's number.
_MARK = bytes(byte >> 7 for byte in range(256))
#: Both together: what is not there has no mark that counts.
_BOTH = bytes([UNWRITTEN, WRITTEN, ABSENT, ABSENT]) + bytes(252)
_DOUBTED = bytes([WRITTEN, WRITTEN, ABSENT]) + bytes(253)
_NOT_UNWRITTEN = bytes([0, 1, 1]) + bytes(253)
_WRITTEN = bytes([0, 1, 0]) + bytes(253)


class Pagemap:
    """The pages of one process.

    :raise OSError: they may not be seen.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @classmethod
    def of(cls, pid: int) -> Pagemap:
        """The pages of process *pid*."""
        return cls(Path(f"/proc/{pid}/pagemap"))

    def close(self) -> None:
        """Close it."""
        os.close(self._file)

    def states(self, address: int, size: int) -> bytes:
        """The states of the pages of private memory, a byte each.

        :raise OSError: they cannot be read.
        """
        return b"".join(map(_states, self._entries(address, size)))

    def marks(self, address: int, size: int) -> bytes:
        """Which pages have a mark: a byte each, 0 or 1.

        :raise OSError: they cannot be read.
        """
        return b"".join(entries[6::_ENTRY].translate(_MARK) for entries in self._entries(address, size))

    def _entries(self, address: int, size: int) -> list[bytes]:
        first, end = address // PAGE * _ENTRY, (address + size) // PAGE * _ENTRY
        found = [
            os.pread(self._file, min(_AT_ONCE * _ENTRY, end - begin), begin)
            for begin in range(first, end, _AT_ONCE * _ENTRY)
        ]
        if sum(map(len, found)) != end - first:
            raise OSError("the pagemap is shorter than the memory")
        return found


def _states(entries: bytes) -> bytes:
    return with_written(entries[7::_ENTRY].translate(_STATES), entries[6::_ENTRY].translate(_MARK))


def with_written(states: bytes, pages: bytes) -> bytes:
    """States where those *pages* of which there is 1 are not unwritten."""
    both = int.from_bytes(states, "little") | int.from_bytes(pages, "little")
    return both.to_bytes(len(states), "little").translate(_BOTH)


def doubted(states: bytes) -> bytes:
    """States where no page is unwritten."""
    return states.translate(_DOUBTED)


def not_unwritten(states: bytes) -> bytes:
    """Of each page 1 if it is not unwritten, or 0."""
    return states.translate(_NOT_UNWRITTEN)


def written(states: bytes) -> bytes:
    """Of each page 1 if it is (maybe) written, and not absent, or 0."""
    return states.translate(_WRITTEN)


def clear(pid: int) -> None:
    """Take the marks of all memory of the process away.

    :raise OSError: that is not allowed.
    """
    file = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, b"4")
    finally:
        os.close(file)


def is_kept(pagemap: Path = Path("/proc/self/pagemap"), release: str = os.uname().release) -> bool:
    """Whether this kernel keeps marks: it shows one on a page that was written just now.

    It is tried on memory of this process, and nothing is cleared. Who clears marks has to see that they are gone.
    """
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < _SINCE:
        return False
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        from ctypes import addressof, c_char

        try:
            pages = Pagemap(pagemap)
        except OSError:
            return False
        view = c_char.from_buffer(page)
        try:
            return pages.marks(addressof(view), PAGE) == b"\1"
        except OSError:
            return False
        finally:
            del view  # or the page cannot be unmapped
            pages.close()


def is_private(maps: str, address: int, size: int) -> bool:
    """Whether all of a stretch of memory is of the process alone, and of no file.

    :param maps: as in /proc/PID/maps.
    """
    end = address + size
    for line in maps.splitlines():
        stretch, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(number, 16) for number in stretch.split("-"))
        if first <= address < min(last, end):
            if permissions != "rw-p" or inode != "0":
                return False
            address = last
    return address >= end


def merging(place: Path = Path("/sys/kernel/mm/ksm")) -> Mapping[str, str] | None:
    """The counters of the merging of equal pages; None while it is on, or if that cannot be seen."""
    try:
        found = {path.name: path.read_text() for path in place.iterdir()}
    except FileNotFoundError:
        return {}  # this kernel has none
    except OSError:
        return None
    return found if found.get("run") == "0\n" else None
