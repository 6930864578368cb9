"""Large files written back and deleted little by little, so that the guest's own writes need not wait for all of it.

Its images often lie on the same disk. The kernel hands a disk all that is to be written of a file at once, some hundred
MiB, and a flush of the guest's stands in line behind it; and what a file system gives back when a large file goes, it
tells the disk in one go (ext4 with ``discard``), while flushes wait. Both were seen to take half a second.

Facts (Linux: fs/sync.c, fs/locks.c; sync_file_range(2), fcntl(2)):

* sync_file_range writes back a part of a file, and waits for it. It makes nothing durable: that takes an fsync yet.
* A write lease is given only on a file that nobody else has open.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from qsnap.host import files

#: Bytes that are written back at once: ten milliseconds of a slow disk.
_WRITTEN_AT_ONCE = 4 << 20
#: Bytes that are given back at once.
_DELETED_AT_ONCE = 64 << 20
#: Seconds after which the rest of a file is given back in one go.
_PATIENCE_S = 30.0


def write_back(file: int, begin: int, end: int, time_s: float) -> int:
    """Have the kernel write what *file* holds from *begin* to *end*, for as long as *time_s*.

    :return: how far it has come.
    :raise OSError: it cannot be written.
    """
    from qsnap.host import syscalls

    deadline = time.monotonic() + time_s
    while begin < end and time.monotonic() < deadline:
        size = min(_WRITTEN_AT_ONCE, end - begin)
        syscalls.sync_file_range(file, begin, size)
        begin += size
    return begin


def remove(path: Path) -> None:
    """Remove what has that name at a real path, and give its room back step by step, unless somebody else has it still.

    :raise OSError: it cannot be removed.
    """
    file = -1
    try:
        with files.directory(path.parent) as where:
            with suppress(OSError):  # to remove it takes no right to it, and it may be a link
                file = files.opened_in(where, path.name, os.O_WRONLY)
            os.unlink(path.name, dir_fd=where)
        if file >= 0:
            with suppress(OSError):
                _give_back(file)
    finally:
        if file >= 0:
            os.close(file)


def _give_back(file: int) -> None:
    """Shorten a file to nothing that has no name and that nobody else has open."""
    size = os.fstat(file).st_size
    if os.fstat(file).st_nlink or _is_open_elsewhere(file):
        return
    deadline = time.monotonic() + _PATIENCE_S
    while size > 0 and time.monotonic() < deadline:
        size = max(0, size - _DELETED_AT_ONCE)
        os.ftruncate(file, size)
        os.fsync(file)


def _is_open_elsewhere(file: int) -> bool:
    """Whether the kernel refuses a lease; it is given back at once.

    Who opens the file meanwhile has the kernel send a signal to us: by default SIGIO, which would end us.
    """
    try:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    return False
