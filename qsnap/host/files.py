"""How qsnap opens, writes, replaces and removes every file of its own: beside images, in its directories, for metrics.

The directory may belong to somebody whom the user who runs qsnap does not trust: root saves the guest of another user,
beside an image of that user's. So qsnap never trusts where a path leads:

* A directory is reached without following a link, and held open while something is done in it. Only on the way to a
  directory that the user has named (:func:`resolved`) links of root's and of the user's own are followed.
* A file is opened in that directory, never through a link, and looked at when it is open: it is a regular file.
* A new file is made where nothing is. It has the mode that it needs, whatever the umask.
* A name is given to a file where nothing has that name; what is at a name is removed, and not what it may lead to.
* What is written is written whole, and is on the disk before a name tells so; then the directory is.

Errors are OSError, with a reason in ``strerror`` that goes into a sentence after a colon.

Facts (Linux): open(2) for O_NOFOLLOW and O_PATH; rename(2) for RENAME_NOREPLACE, which NFS does not have (EINVAL), and
some C libraries neither; path_resolution(7).
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_ALWAYS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_A_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
#: Links on the way to a directory, as many as the kernel follows.
_MOST_LINKS = 40
#: FS_IOC_GETFLAGS, as most machines number it, and the flags of what is not removed (linux/fs.h).
_GET_FLAGS = 0x80086601
_KEEPING = {0x10: "immutable", 0x20: "append-only"}
#: A file system or a C library that cannot rename without replacing.
_NO_EXCLUSIVE_RENAME = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class Identity(NamedTuple):
    """The identity of a file, whatever its name."""

    device: int
    inode: int


def identity(file: int) -> Identity:
    """The identity of an open file."""
    return identity_of(os.fstat(file))


def identity_of(info: os.stat_result) -> Identity:
    """The identity of the file that *info* describes."""
    return Identity(info.st_dev, info.st_ino)


@contextmanager
def in_memory(name: str) -> Iterator[int]:
    """A file in memory, without a name in any directory, for the duration of a block.

    At its end the memory is given back, even if another process still has the file open. If this process dies before,
    the memory is given back when the others have closed the file.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        yield file
    finally:
        os.ftruncate(file, 0)
        os.close(file)


def resolved(path: Path) -> Path:
    """The real path of a directory that the user has named.

    :raise OSError: the directory does not exist, or another user's link is on the way to it.
    """
    directory = _reached(path.absolute(), follows=True)
    try:
        return Path(f"/proc/self/fd/{directory}").readlink()
    finally:
        os.close(directory)


def resolved_file(path: Path) -> Path:
    """The real path of a file that the user has named, whether it is there or not: by the same links.

    :raise OSError: its directory does not exist, or another user's link is on the way.
    """
    for _ in range(_MOST_LINKS):
        parent = resolved(path.parent)
        try:
            with directory(parent) as where:
                step = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
        except FileNotFoundError:
            return parent / path.name
        try:
            if not stat.S_ISLNK(os.fstat(step).st_mode):
                return parent / path.name
            path = parent / _target(step, path)
        finally:
            os.close(step)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _target(link: int, path: Path) -> Path:
    """The target of an open link.

    :raise OSError: the link belongs neither to root nor to this user.
    """
    owner = os.fstat(link).st_uid
    if owner not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, f"a symbolic link of user {owner} is on the way; name what it leads to", str(path))
    return Path(os.readlink("", dir_fd=link))


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """The directory at a real path, open for the duration of a block, to do something in it (O_PATH).

    :raise OSError: it is not there, or a link is on the way to it.
    """
    found = _reached(path, follows=False)
    try:
        yield found
    finally:
        os.close(found)


def _reached(path: Path, *, follows: bool) -> int:
    """The directory at an absolute path, open.

    :param follows: also follow links that belong to root or to this user.
    """
    left = [*reversed(path.parts)]
    links = 0
    reached = os.open("/", _A_DIRECTORY)
    try:
        while left:
            name = left.pop()
            step = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=reached)
            info = os.fstat(step)
            if not stat.S_ISLNK(info.st_mode):
                os.close(reached)
                reached = step
                continue
            try:
                links += 1
                if not follows or links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, f"{name!r} in {path} is a symbolic link", str(path))
                left += reversed(_target(step, path).parts)
            finally:
                os.close(step)
        if not stat.S_ISDIR(os.fstat(reached).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except BaseException:
        os.close(reached)
        raise
    return reached


def opened(path: Path, flags: int = os.O_RDONLY, *, or_disk: bool = False) -> int:
    """The regular file at a real path, open.

    :param or_disk: or a block device.
    :raise OSError: it cannot be opened, or is something else.
    """
    with directory(path.parent) as where:
        return opened_in(where, path.name, flags, or_disk=or_disk)


def opened_in(where: int, name: str, flags: int = os.O_RDONLY, *, or_disk: bool = False) -> int:
    """The regular file *name* in an open directory, open: as :func:`opened`."""
    try:
        file = os.open(name, flags | _ALWAYS, dir_fd=where)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", name) from None
        raise
    mode = os.fstat(file).st_mode
    if not (stat.S_ISREG(mode) or (or_disk and stat.S_ISBLK(mode))):
        os.close(file)
        raise PermissionError(errno.EPERM, "it is not a regular file", name)
    return file


def status(path: Path) -> os.stat_result:
    """The status of whatever is at a real path, also of a link.

    :raise OSError: nothing is there.
    """
    with directory(path.parent) as where:
        return os.stat(path.name, dir_fd=where, follow_symlinks=False)


def read(path: Path) -> bytes:
    """The contents of the regular file at a real path.

    :raise OSError: it cannot be read, or is not a regular file.
    """
    with open(opened(path), "rb") as file:
        return file.read()


def created(path: Path, mode: int = 0o600) -> int:
    """Create a file at a real path, open to read and write.

    :param mode: reduced by the umask; its owner may always read and write it.
    :raise OSError: it cannot be created, or something is there.
    """
    with directory(path.parent) as where:
        return _created_in(where, path.name, mode)


def _created_in(where: int, name: str, mode: int) -> int:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _ALWAYS, mode, dir_fd=where)
    left = stat.S_IMODE(os.fstat(file).st_mode)
    if left & 0o600 != 0o600:  # the umask
        os.fchmod(file, left | 0o600)
    return file


def write(file: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of *data*: at *offset*, or at the file's position.

    :raise OSError: it cannot be written in full; a part may be written.
    """
    rest = memoryview(data)
    while rest:
        done = os.write(file, rest) if offset is None else os.pwrite(file, rest, offset)
        if not done:
            raise OSError(errno.EIO, "nothing of it was written")
        rest = rest[done:]
        offset = None if offset is None else offset + done


def replace(path: Path, contents: bytes, *, mode: int | None = None, owner: int | None = None) -> None:
    """Replace the file at a real path by one with *contents*: a reader finds the old or the new contents, always whole.

    The new file has the owner and the mode of the file that it replaces.

    :param mode: its mode. Default: that of the one that it replaces; of none, what the umask leaves of 0666.
    :param owner: the owner of a new file that replaces none, if we may give it away.
    :raise OSError: it cannot be written; the old file is unchanged.
    """
    with directory(path.parent) as where:
        before = _regular(where, path.name)
        new = f".qsnap-{os.urandom(8).hex()}.new"
        file = _created_in(where, new, 0o666 if before is None and mode is None else 0o600)
        try:
            with suppress(OSError):  # only root may keep the owner of another user's file
                if before is not None:
                    os.fchown(file, before.st_uid, before.st_gid)
                elif owner is not None:
                    os.fchown(file, owner, -1)
            if before is not None and mode is None:
                mode = before.st_mode & 0o777
            if mode is not None:
                os.fchmod(file, mode)
            write(file, contents)
            os.fsync(file)
            os.rename(new, path.name, src_dir_fd=where, dst_dir_fd=where)
        except BaseException:
            with suppress(OSError):
                os.unlink(new, dir_fd=where)
            raise
        finally:
            os.close(file)
        sync(where)


def _regular(where: int, name: str) -> os.stat_result | None:
    """What stands under a name in a directory, if that is a regular file; None where nothing does.

    :raise OSError: it is something else.
    """
    try:
        info = os.stat(name, dir_fd=where, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(info.st_mode):
        raise OSError(errno.ELOOP, "it is a symbolic link", name)
    if not stat.S_ISREG(info.st_mode):
        raise PermissionError(errno.EPERM, "it is not a regular file", name)
    return info


def remove(path: Path, only: Identity | None = None) -> bool:
    """Remove the name of a file at a real path; the target of a link there stays.

    :param only: remove the name only if it belongs to that file.
    :return: whether the name existed.
    :raise OSError: it cannot be removed.
    """
    with directory(path.parent) as where, suppress(FileNotFoundError):
        if only is None or identity_of(os.stat(path.name, dir_fd=where, follow_symlinks=False)) == only:
            os.unlink(path.name, dir_fd=where)
            return True
    return False


def obstacle_to_removal(path: Path) -> str:
    """Why this user cannot remove the name of a file at a real path; "" if that can be done, as far as can be told.

    A kernel module for security may refuse it all the same. Sources: path_resolution(7), inode(7), ioctl_iflags(2).
    """
    try:
        with directory(path.parent) as where:
            info, place = os.stat(path.name, dir_fd=where, follow_symlinks=False), os.fstat(where)
            for name, spoken in ((path.name, "it"), (".", str(path.parent))):
                if flag := _flag(where, name):
                    return f"{spoken} has the attribute {flag} (chattr)"
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=where, effective_ids=True):
                return f"{path.parent} cannot be written by this user"
            if place.st_mode & stat.S_ISVTX and os.geteuid() not in (0, info.st_uid, place.st_uid):
                return f"in {path.parent}, which is sticky, only user {info.st_uid}, whom it belongs to, may do that"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return str(error.strerror)
    return ""


def _flag(where: int, name: str) -> str:
    """The attribute for which something in an open directory cannot be removed; "" if none is seen."""
    import fcntl

    with suppress(OSError):
        file = os.open(name, os.O_RDONLY | _ALWAYS, dir_fd=where)
        try:
            flags = int.from_bytes(fcntl.ioctl(file, _GET_FLAGS, bytes(8))[:4], sys.byteorder)
        finally:
            os.close(file)
        return next((word for bit, word in _KEEPING.items() if flags & bit), "")
    return ""


def rename(file: int, old: Path, new: Path) -> None:
    """Give an open file the name *new* instead of *old*, in the same directory, and see that the disk knows.

    :raise FileExistsError: something has that name.
    :raise OSError: that cannot be done, or another file has the name *old*.
    """
    with directory(new.parent) as where:
        if identity_of(os.stat(old.name, dir_fd=where, follow_symlinks=False)) != identity(file):
            raise PermissionError(errno.EPERM, f"{old.name} is another file now", str(old))
        if not _renamed(where, old.name, new.name):
            os.link(f"/proc/self/fd/{file}", new.name, dst_dir_fd=where, follow_symlinks=True)
            os.unlink(old.name, dir_fd=where)
        # Between the look and the renaming somebody may have exchanged it
        if identity_of(os.stat(new.name, dir_fd=where, follow_symlinks=False)) != identity(file):
            raise PermissionError(errno.EPERM, f"{new.name} is another file now", str(new))
        sync(where)


def rename_directory(old: Path, new: Path) -> None:
    """Give a directory the name *new*, beside its old one, and see that the disk knows.

    :raise FileExistsError: something has that name.
    :raise OSError: that cannot be done.
    """
    with directory(new.parent) as where:
        from qsnap.host import syscalls

        try:
            syscalls.rename_exclusively(where, old.name, new.name)
        except OSError as error:
            if error.errno not in _NO_EXCLUSIVE_RENAME:
                raise
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
            os.rename(old.name, new.name, src_dir_fd=where, dst_dir_fd=where)
        sync(where)


def _renamed(where: int, old: str, new: str) -> bool:
    """Rename at once and replace nothing; False where the file system or the C library cannot do that.

    :raise OSError: as :func:`rename`.
    """
    from qsnap.host import syscalls

    try:
        syscalls.rename_exclusively(where, old, new)
    except OSError as error:
        if error.errno in _NO_EXCLUSIVE_RENAME:
            return False
        raise
    return True


def sync(where: int) -> None:
    """Write the names in an open directory to the disk."""
    try:
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=where)
    except PermissionError:  # we may write it, and not read it
        os.sync()
        return
    try:
        os.fsync(readable)
    finally:
        os.close(readable)
