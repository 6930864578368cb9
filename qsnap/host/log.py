"""What a process writes to its standard error, where that is a file which this user may read.

QEMU says there why it refuses something; a monitor often gets a number alone. (proc(5), /proc/PID/fd.)
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

#: Bytes of it that are read, from its end.
_MOST_BYTES = 2000


class ErrorOutput:
    """The standard error of a process, from now on.

    :param pid: None: no process is known, and nothing is read.
    """

    def __init__(self, pid: int | None) -> None:
        self._path = Path(f"/proc/{pid}/fd/2")
        self._begin = self._size()

    def _size(self) -> int:
        """Bytes of the file; -1 if it is not a file, or cannot be seen."""
        with suppress(OSError):
            info = self._path.stat()
            if stat.S_ISREG(info.st_mode):
                return info.st_size
        return -1

    def added(self) -> str:
        """The lines that have come since, each once, joined by "; "; "" if none, or they may not be read."""
        size = self._size()
        if self._begin < 0 or size <= self._begin:
            return ""
        with suppress(OSError):
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                begin = max(self._begin, size - _MOST_BYTES)
                text = os.pread(file, size - begin, begin).decode(errors="replace")
            finally:
                os.close(file)
            return "; ".join(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
        return ""
