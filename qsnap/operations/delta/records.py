"""Compare records of a VM state with a process's memory: one row of pages after the other, in whatever process.

(This module imports little: a helper is to be up soon. See :mod:`qsnap.operations.delta.comparers`.)
"""

from __future__ import annotations

import os
import struct

from qsnap.host.comparison import AT_ONCE, Comparison, buffer
from qsnap.inventory.extents import Extents
from qsnap.inventory.rows import HEADER, PAGE, going_on

_REQUEST = struct.Struct("=qQQQ")
_COUNT = struct.Struct("=H")
_RECORD = HEADER + PAGE
#: What a helper says when it is up.
READY = b"r"


class Records:
    """Comparisons of records of a state with the memory of a process.

    :raise OSError: the C library lacks process_vm_readv.
    """

    def __init__(self, state: Extents, pid: int) -> None:
        self._state = state
        self._buffer = buffer(AT_ONCE * _RECORD)
        self.comparison = Comparison(pid)

    def compare(self, begin: int, page: int, address: int, pages: int) -> bytes:
        """Which pages of a row differ: a byte of each, 1 or 0. It is shorter where the records do not go on.

        :param begin: where in the state the record of the first one begins. -1: they are compared with zeroes.
        :param page: that page's number in its block of RAM.
        :param address: where it is in the memory of the process.
        :param pages: up to :data:`AT_ONCE`.
        :raise OSError: the state, or the memory, cannot be read.
        """
        if begin < 0:
            return self.comparison.not_zero(address, pages)
        read = self._state.read(self._buffer[: pages * _RECORD], begin)
        count = going_on(self._buffer, 0, PAGE, page * PAGE, (page + read // _RECORD) * PAGE)
        return self.comparison.differing(self._buffer, HEADER, _RECORD, address, count) if count else b""


def serve(pid: str, state: str, extents: str) -> None:
    """Answer requests: what a helper does, as long as somebody can ask it.

    Requests come by standard input, and answers go to standard output. (Neither is ever divided: a write of up to
    PIPE_BUF bytes, 4096, to a pipe.)

    :param state: the number of the file that the state lies in.
    :param extents: that of a file that tells where.
    """
    where = os.pread(int(extents), os.fstat(int(extents)).st_size, 0)
    records = Records(Extents.unpacked(int(state), where), int(pid))
    os.write(1, READY)
    while data := os.read(0, _REQUEST.size):
        found = records.compare(*_REQUEST.unpack(data))
        os.write(1, _COUNT.pack(len(found)) + found)


def asked(begin: int, page: int, address: int, pages: int) -> bytes:
    """A request as a helper gets it: as :meth:`Records.compare`."""
    return _REQUEST.pack(begin, page, address, pages)


def answered(data: bytearray) -> bytes | None:
    """The first answer among what a helper has written, which is taken out of it; None if that is not whole yet."""
    if len(data) < _COUNT.size:
        return None
    end = _COUNT.size + _COUNT.unpack_from(data)[0]
    if len(data) < end:
        return None
    found = bytes(data[_COUNT.size : end])
    del data[:end]
    return found
