"""Compare memory of another process with bytes of our own, as fast as the machine copies.

Facts (Linux): process_vm_readv(2) copies memory of a process of the same user (or for root); it takes up to 1024
stretches, and stops at one that is not mapped.

Measured on an AMD EPYC: a copy to where in its page the source is, and 16 bytes further, takes twice as long as any
other. A large bytearray begins just there, so buffers are memory of their own and begin with a page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from itertools import compress, repeat

from qsnap.host import syscalls
from qsnap.host.syscalls import Iovec

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
#: The most pages that are compared at once.
AT_ONCE = 512
#: Where these differ, so many at a time are compared again, and then each. (A call costs about what half a page does.)
_GROUP = 8


def buffer(size: int) -> memoryview:
    """Bytes of our own for copies, all zeroes; they begin with a page."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Comparison:
    """Comparisons with the memory of one process, one after the other.

    :raise OSError: the C library lacks process_vm_readv.
    """

    def __init__(self, pid: int) -> None:
        self._readv = syscalls.process_vm_readv()
        self._memcmp = syscalls.memcmp()
        self._pid = pid
        self._zeroes = buffer(AT_ONCE * PAGE)
        theirs = buffer(AT_ONCE * 2 * PAGE)
        self._theirs = _address(theirs)
        self._words = theirs.cast("Q")
        self._source = Iovec()
        self._places: dict[int, ctypes.Array[Iovec]] = {}

    def differing(self, data: memoryview, begin: int, stride: int, address: int, pages: int) -> bytes:
        """Which *pages* from *address* on differ: a byte of each, 1 or 0.

        :param data: what they are compared with: a page at *begin*, and each next one *stride* bytes further, a
            multiple of 8, from one page to two. What is in between counts as equal.
        :param pages: up to :data:`AT_ONCE`.
        :raise OSError: the memory cannot be read.
        :raise ValueError: an argument is outside these limits, or *data* is too short.
        """
        if stride % 8 or not PAGE <= stride <= 2 * PAGE or not 0 < pages <= AT_ONCE:
            raise ValueError(f"cannot compare {pages} pages that are {stride} bytes apart")
        if begin + (pages - 1) * stride + PAGE > len(data):
            raise ValueError(f"data has only {len(data)} bytes")
        self._read(address, pages, stride)
        if stride > PAGE and pages > 1:
            # What is between the pages is put between theirs, so that all of it is one comparison
            size = (pages - 1) * stride
            between = data[begin : begin + size].cast("Q")
            for at in range(PAGE // 8, stride // 8):
                self._words[at : size // 8 : stride // 8] = between[at :: stride // 8]
        found, ours = bytearray(pages), _address(data) + begin
        if self._memcmp(ours, self._theirs, (pages - 1) * stride + PAGE):
            self._narrow(found, ours, stride)
        return bytes(found)

    def not_zero(self, address: int, pages: int) -> bytes:
        """Which *pages* from *address* on are not all zeroes: as :meth:`differing`."""
        return self.differing(self._zeroes, 0, PAGE, address, pages)

    def _read(self, address: int, pages: int, stride: int) -> None:
        """Read *pages* into the buffer, *stride* bytes from each other."""
        if stride not in self._places:
            self._places[stride] = (Iovec * AT_ONCE)(*(Iovec(self._theirs + n * stride, PAGE) for n in range(AT_ONCE)))
        self._source.base, self._source.size = address, pages * PAGE
        got = self._readv(self._pid, self._places[stride], pages, ctypes.byref(self._source), 1, 0)
        if got != pages * PAGE:
            error = ctypes.get_errno() if got < 0 else errno.EFAULT
            raise OSError(error, os.strerror(error))

    def _narrow(self, found: bytearray, ours: int, stride: int) -> None:
        """Find those that differ: groups of pages, and the pages of these."""
        pages = len(found)
        end = pages - pages % _GROUP
        firsts = range(0, end, _GROUP)
        for first in (*compress(firsts, self._unequal(ours, firsts, stride, (_GROUP - 1) * stride + PAGE)), end):
            each = range(first, min(first + _GROUP, pages))
            for page in compress(each, self._unequal(ours, each, stride, PAGE)):
                found[page] = 1

    def _unequal(self, ours: int, pages: range, stride: int, size: int) -> Iterator[int]:
        """Whether *size* bytes from each of these pages on differ."""
        begin, end, step = pages.start * stride, pages.stop * stride, pages.step * stride
        ours_at, theirs_at = (range(base + begin, base + end, step) for base in (ours, self._theirs))
        return map(self._memcmp, ours_at, theirs_at, repeat(size))


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
