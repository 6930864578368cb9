"""A VM state that is read where it lies, in one or many stretches of a file.

(This module imports little: helpers that compare need it, and are to be up soon.)
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKED = struct.Struct("=QQQ")


class Extents:
    """A state in an open *file*.

    :param extents: its stretches, in bytes: where in the state each begins, where in the file, and how much it is.
    :ivar size: its bytes.
    :ivar file: the descriptor of the file.
    """

    def __init__(self, file: int, extents: Sequence[tuple[int, int, int]]) -> None:
        self.size = sum(size for _, _, size in extents)
        self.file = file
        self._extents = extents
        self._at = 0

    def packed(self) -> bytes:
        """Where it lies, for another process."""
        return b"".join(_PACKED.pack(*one) for one in self._extents)

    @classmethod
    def unpacked(cls, file: int, packed: bytes) -> Extents:
        """The same, of what is :meth:`packed`."""
        return Extents(file, [*_PACKED.iter_unpack(packed)])

    def read(self, buffer: memoryview, begin: int) -> int:
        """Read what of the state fits into *buffer*, from *begin* on; how many bytes that is.

        It is fast if each call goes on near the end of the one before.

        :raise OSError: it cannot be read; EIO where the file is shorter than it was.
        """
        wanted = min(len(buffer), self.size - begin)
        done = 0
        while done < wanted:
            first, offset, size = self._extent(begin + done)
            inside = begin + done - first
            room = buffer[done : min(wanted, done + size - inside)]
            if not (got := os.preadv(self.file, [room], offset + inside)):
                raise OSError(errno.EIO, "the file is shorter than it was")
            done += got
        return wanted

    def _extent(self, begin: int) -> tuple[int, int, int]:
        while self._extents[self._at][0] > begin:
            self._at -= 1
        while (one := self._extents[self._at])[0] + one[2] <= begin:
            self._at += 1
        return one
