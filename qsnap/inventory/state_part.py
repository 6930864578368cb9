"""The state file of a live save while it is made: under a name that does not count, until all of it is on the disk.

It will hold the guest's memory, and lies in a directory that may belong to another user. So qsnap writes and empties it
through the descriptor from its creation; a process without that, like the guard, accepts only the very file that was
made.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qsnap.host import files
from qsnap.host.files import Identity


def remove_unused(part: Path) -> None:
    """Remove an incomplete state file, if there is one, unless a run is writing it.

    A run that writes it holds a lock on it (flock). QEMU does not: a dead run's file is removed even if QEMU still
    writes to it.

    :raise OSError: it cannot be removed.
    """
    try:
        file = files.opened(part, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.remove(part, files.identity(file))
    finally:
        os.close(file)


def create(part: Path, image: Path | None, reserved: int) -> int:
    """Create the file: mode 0600, locked, open to read and write.

    :param image: a file that root creates gets the owner of this image.
    :param reserved: bytes to reserve on the file system, more than none.
    :raise OSError: it cannot be made; nothing of it is left.
    """
    remove_unused(part)  # a dead run's file: the claim is ours now
    file = files.created(part)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.geteuid() == 0 and image is not None:
            owner = files.status(image)
            os.fchown(file, owner.st_uid, owner.st_gid)
        os.posix_fallocate(file, 0, reserved)
    except OSError:
        files.remove(part, files.identity(file))
        os.close(file)
        raise
    return file


def complete(file: int, part: Path, path: Path, size: int, envelope: Iterable[tuple[int, bytes]]) -> None:
    """Write the envelope around the stream, and give the file its name when all of it is on the disk.

    :param size: bytes of the whole file.
    :param envelope: (offset, bytes), what makes it a state file, at offset 0, last.
    :raise FileExistsError: another file appeared at *path* meanwhile; it is unchanged.
    :raise OSError: it cannot be written, or somebody has put another file in the place of *part*.
    """
    os.ftruncate(file, size)
    for offset, clusters in envelope:
        if offset == 0:
            os.fsync(file)  # the header comes last, when the rest is on the disk
        files.write(file, clusters, offset)
    os.fsync(file)
    files.rename(file, part, path)


def remove(part: Path, path: Path, made: Identity | None, *, file: int | None = None) -> None:
    """Remove the state file that is not complete, and give its room back at once: QEMU may have it open still.

    :param path: it may have this name already, where what belongs to it could not be completed.
    :param made: which file that is; None where nobody had come to note it: then nothing is emptied.
    :param file: the same, open, where we have it: then it is emptied wherever somebody has moved it.
    """
    with suppress(OSError):
        if file is not None:
            os.ftruncate(file, 0)
        elif made is not None:
            found = files.opened(part, os.O_WRONLY)
            try:
                if files.identity(found) == made:
                    os.ftruncate(found, 0)
            finally:
                os.close(found)
    for name in (part,) if made is None else (part, path):
        with suppress(OSError):
            files.remove(name, made)


def forget_name(part: Path, path: Path, made: Identity | None) -> None:
    """Remove the name that does not count, where the file has got the other one and its maker died between the two."""
    with suppress(OSError):
        if made is not None and files.identity_of(files.status(path)) == made:
            files.remove(part, made)
