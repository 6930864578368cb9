"""Compare memory of another process with bytes of our own, as fast as the machine copies.

Facts (Linux): process_vm_readv(2) copies memory of a process of the same user (or for root); it takes up to 1024
stretches, and stops at one that is not mapped. It and memcmp of many pages are called without the interpreter's lock,
so that several threads compare at once; memcmp of few keeps it. cgroup v2: what a file without a disk
(memfd_create(2)) takes counts as memory.

Measured on an AMD EPYC: a copy to where in its page the source is, and 16 bytes further, takes twice as long as any
other. A large bytearray begins just there, so buffers are memory of their own and begin with a page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import compress
from pathlib import Path

from qsnap.host import syscalls
from qsnap.host.syscalls import Iovec

PAGE = 4096
#: Pages that are compared with one call.
_AT_ONCE = 512
#: Where these differ, so many at a time are compared again. Each call costs about what half a page does.
_STEPS = (32, 4, 1)


def buffer(size: int) -> memoryview:
    """Bytes of our own for copies, all zeroes; they begin with a page."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Comparison:
    """Comparisons with the memory of one process, one after the other. Each thread has its own.

    :raise OSError: this system has no process_vm_readv.
    """

    def __init__(self, pid: int) -> None:
        self._readv = syscalls.process_vm_readv()
        self._memcmp = syscalls.memcmp()
        self._memcmp_few = syscalls.memcmp(keeps_lock=True)
        self._pid = pid
        self._theirs = Iovec()
        self._nothing = buffer(_AT_ONCE * PAGE)
        self._zeroes = _address(self._nothing)
        self._buffer = buffer(_AT_ONCE * 2 * PAGE)
        self._base = _address(self._buffer)
        self._ours: dict[int, ctypes.Array[Iovec]] = {}

    def differing(
        self, data: memoryview, begin: int, stride: int, address: int, count: int
    ) -> Iterator[tuple[int, int]]:
        """Which of the *count* pages from *address* on differ: (first, how many), in order.

        :param data: what they are compared with: a page at *begin*, and each next one *stride* bytes further, a
            multiple of 8. What is in between counts as equal.
        :raise OSError: the memory cannot be read.
        :raise ValueError: *stride* is not a multiple of 8.
        """
        if stride % 8:
            raise ValueError(f"pages cannot be {stride} bytes from each other")
        ours = _address(data) + begin
        words = self._buffer.cast("Q")
        for first in range(0, count, _AT_ONCE):
            pages = min(_AT_ONCE, count - first)
            self._read(address + first * PAGE, pages, stride)
            if stride > PAGE and pages > 1:
                # What is between the pages is put between ours, so that all of it is one comparison
                there, size = begin + first * stride, (pages - 1) * stride
                between = data[there : there + size].cast("Q")
                for at in range(PAGE // 8, stride // 8):
                    words[at : size // 8 : stride // 8] = between[at :: stride // 8]
            yield from self._narrowed(ours + first * stride, stride, first, pages)

    def not_zero(self, address: int, count: int) -> Iterator[tuple[int, int]]:
        """Which of the *count* pages from *address* on are not all zeroes: (first, how many), in order.

        :raise OSError: the memory cannot be read.
        """
        for first in range(0, count, _AT_ONCE):
            pages = min(_AT_ONCE, count - first)
            self._read(address + first * PAGE, pages, PAGE)
            yield from self._narrowed(self._zeroes, PAGE, first, pages)

    def _read(self, address: int, pages: int, stride: int) -> None:
        """Read *pages* into the buffer, *stride* bytes from each other."""
        if stride not in self._ours:
            base = self._base
            self._ours[stride] = (Iovec * _AT_ONCE)(*(Iovec(base + n * stride, PAGE) for n in range(_AT_ONCE)))
        self._theirs.base, self._theirs.size = address, pages * PAGE
        got = self._readv(self._pid, self._ours[stride], pages, ctypes.byref(self._theirs), 1, 0)
        if got != pages * PAGE:
            error = ctypes.get_errno() if got < 0 else errno.EFAULT
            raise OSError(error, os.strerror(error))

    def _narrowed(self, ours: int, stride: int, offset: int, pages: int) -> Iterator[tuple[int, int]]:
        """Which of the pages that are read differ from *ours*: found by ever smaller steps, see :data:`_STEPS`."""
        if not self._memcmp(ours, self._base, (pages - 1) * stride + PAGE):
            return
        length, differing = pages, [0]
        for step in _STEPS:
            firsts = [one for first in differing for one in range(first, min(first + length, pages), step)]
            places = [first * stride for first in firsts]
            sizes = [(min(step, pages - first) - 1) * stride + PAGE for first in firsts]
            differs = map(self._memcmp_few, map(ours.__add__, places), map(self._base.__add__, places), sizes)
            differing, length = list(compress(firsts, differs)), step
        for first in differing:
            yield offset + first, 1


def joined(pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first, how many), with those that follow each other made one."""
    current: tuple[int, int] | None = None
    for first, count in pieces:
        if current is not None and first == current[0] + current[1]:
            current = (current[0], current[1] + count)
        else:
            if current is not None:
                yield current
            current = (first, count)
    if current is not None:
        yield current


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def available_bytes() -> int:
    """Bytes of memory that are free, or could be made so at once: of the machine, and of the groups that we are in."""
    rooms = [sum(_number(line) for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")) * 1024]
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            group = Path("/sys/fs/cgroup") / line[3:].strip().lstrip("/")
            for level in (group, *group.parents):
                with suppress(OSError, ValueError):
                    most = int((level / "memory.max").read_text())
                    used = int((level / "memory.current").read_text())
                    rooms.append(most - used + sum(map(_number, filter(_is_cache, _lines(level / "memory.stat")))))
    return max(0, min(rooms))


def _is_cache(line: str) -> bool:
    return line.startswith(("inactive_file ", "active_file "))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(line: str) -> int:
    return int(line.split()[1])
