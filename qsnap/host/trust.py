"""How far a QEMU may lead us to files: the process that answers at a monitor names the images of its disks.

That process may be anybody's: root's qsnap gets the socket of another user, who runs a server there that names an image
of root's. So what is beside an image (state files, notes) is used only if the QEMU may write the image itself:

* A QEMU of root's, or of the user who runs qsnap, may do all that qsnap may, and is believed.
* One of another user's is believed about the images that its process has open for writing, as the kernel tells. Where
  the kernel does not tell us, about the images that belong to that user.

The kernel tells whose a QEMU is: who listens at the socket, and whom the process belongs to now. One that root has
started and that has given up root's rights (``-runas``) is its new user's.

Facts: unix(7), SO_PEERCRED; proc(5), /proc/PID/status (Uid), /proc/PID/fdinfo (flags). Over TCP nothing of it is told:
no image is seen there, and so no file beside one is used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def user_of(pid: int, listener: int | None) -> int:
    """The user with whose rights a QEMU works.

    :param pid: the process at the other end of the monitor's socket.
    :param listener: the user who has made it listen; None where that was not told.
    :raise OSError: the process belongs to another user than the listener: its id may have been reused.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        if listener is None:
            raise
        return listener
    real, *others = next(map(int, line.split()[1:]) for line in status.splitlines() if line.startswith("Uid:"))
    if listener not in (None, 0) and {real, *others} != {listener}:
        raise PermissionError(errno.EPERM, f"process {pid} belongs to user {real}, and user {listener} listens there")
    return real


def is_believed(user: int | None) -> bool:
    """Whether a QEMU of that user may lead us to whatever it names; one that is not on this machine has no user."""
    return user is None or user in (0, os.geteuid())


def owners(user: int | None) -> set[int]:
    """To whom a file that is handed to a QEMU of that user may belong, beside the owners of its images."""
    ours = os.geteuid()
    if user is None or is_believed(user):
        return {0, ours}
    return {user, ours} - {0}


def image(user: int | None, filename: str, ways: Sequence[Path]) -> Path:
    """The real path of the image that a QEMU calls *filename*, where its descriptor leads us to that same file.

    :param user: whose the QEMU is.
    :param ways: by what we see it: :func:`qsnap.inventory.descriptors.ways`.
    :raise OSError: it cannot be seen from here (another machine or container, deleted), or it is not one that this QEMU
        may lead us to.
    """
    if not ways:
        raise FileNotFoundError(errno.ENOENT, "it cannot be seen from here", filename)
    if not (believed := [way for way in ways if is_believed(user) or _is_theirs(way, user)]):
        reason = f"the QEMU of user {user} has not opened it for writing"
        raise PermissionError(errno.EPERM, reason, filename)
    path = Path(os.path.realpath(believed[0]))
    if not path.samefile(believed[0]):
        raise FileNotFoundError(errno.ENOENT, "it cannot be seen from here", filename)
    return path


def _is_theirs(way: Path, user: int | None) -> bool:
    """Whether a file is open for writing, where *way* is a descriptor; or belongs to the user, where it is a path."""
    if way.parent.name != "fd":
        return way.stat().st_uid == user
    try:
        fields = (way.parent.parent / "fdinfo" / way.name).read_text().split()
    except OSError:
        return False
    return int(fields[fields.index("flags:") + 1], 8) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
