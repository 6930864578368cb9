"""Functions of the C library that Python lacks, by their own names. Each raises OSError, as those of ``os`` do.

A C library that lacks one counts as a kernel that does (ENOSYS). Whoever needs one seldom imports this module where it
is used: ctypes takes some milliseconds to load.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

#: linux/fs.h, linux/prctl.h, asm/unistd.h (the same on all but alpha), asm-generic/mman-common.h
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_RENAME_NOREPLACE = 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SYS_PROCESS_MADVISE = 440
_MADV_COLLAPSE = 25


class Iovec(ctypes.Structure):
    """A stretch of memory: struct iovec, as in readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def sync_file_range(file: int, offset: int, size: int) -> None:
    """Write back a part of a file, and wait for it: sync_file_range(2). It is not durable by that."""
    how = _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
    _checked(_function("sync_file_range")(file, ctypes.c_int64(offset), ctypes.c_int64(size), how))


def rename_exclusively(directory: int, old: str, new: str) -> None:
    """Rename in an open directory, and replace nothing: renameat2(2), since Linux 3.15.

    :raise FileExistsError: there is something of the new name.
    :raise OSError: EINVAL or EOPNOTSUPP where the file system cannot do it.
    """
    renamed = _function("renameat2")(directory, os.fsencode(old), directory, os.fsencode(new), _RENAME_NOREPLACE)
    _checked(renamed, new)


def become_subreaper() -> None:
    """Become the parent of what descendants leave behind: PR_SET_CHILD_SUBREAPER of prctl(2), since Linux 3.4."""
    _checked(_function("prctl")(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that has started it ends: PR_SET_PDEATHSIG of prctl(2)."""
    from signal import SIGKILL

    _checked(_function("prctl")(_PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))


def collapse(process: int, address: int, size: int) -> None:
    """Have memory of another process put into huge pages: MADV_COLLAPSE of process_madvise(2), since Linux 6.1.

    :param process: a descriptor of it, as from pidfd_open(2).
    """
    stretch = ctypes.byref(Iovec(address, size))
    call = _function("syscall", ctypes.c_long)
    numbers = map(ctypes.c_long, (_SYS_PROCESS_MADVISE, process))
    _checked(call(*numbers, stretch, *map(ctypes.c_long, (1, _MADV_COLLAPSE, 0))))


def process_vm_readv() -> Callable[..., int]:
    """The function of process_vm_readv(2), for whoever calls it often: -1, and :func:`ctypes.get_errno`, for an error.

    :raise OSError: the C library has none.
    """
    function, vectors = _function("process_vm_readv", ctypes.c_long), ctypes.POINTER(Iovec)
    function.argtypes = [ctypes.c_int, vectors, ctypes.c_ulong, vectors, ctypes.c_ulong, ctypes.c_ulong]
    return function


def memcmp() -> Callable[..., int]:
    """The function of memcmp(3), which takes addresses. (It keeps the interpreter's lock; to give that back and take it
    again takes longer than to compare some pages.)
    """
    function = ctypes.PyDLL(None)["memcmp"]
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


def _function(name: str, returns: type[ctypes.c_int | ctypes.c_long] = ctypes.c_int) -> ctypes._NamedFuncPointer:
    try:
        function = _libc[name]  # a new one each time: its types are the caller's
    except AttributeError:
        raise OSError(errno.ENOSYS, f"this system has no {name}") from None
    function.restype = returns
    return function


def _checked(result: int, name: str | None = None) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
