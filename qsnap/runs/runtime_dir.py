"""The runtime directory: where the journals of runs are, and the decisions of groups. It belongs to this user alone.

Its files outlive a run that was killed. They hold names, tags and process ids, and nothing secret.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from qsnap.errors import BadUsage, QsnapError
from qsnap.host import files

_CURE = "set QSNAP_RUNTIME_DIR to a directory of your own"
#: The suffix of a journal's name: see :mod:`qsnap.runs.journal`.
JOURNAL = ".journal"
#: The suffix of a decision's name, after the token of the group.
_DECISION = ".decided"


def decide(group: str) -> None:
    """Write down that what the runs of a group have made is to stay: see :mod:`qsnap.runs.group`.

    :raise QsnapError: that cannot be written; then it is not so.
    """
    path = directory() / f"{group}{_DECISION}"
    try:
        os.close(files.created(path))
    except OSError as error:
        raise QsnapError(f"the decision {path} cannot be written: {error.strerror}") from error


def is_decided(group: str) -> bool:
    """Whether that is written down.

    :raise QsnapError: other users may write to the runtime directory, so that its contents cannot be trusted.
    """
    place = existing()
    return place is not None and os.path.lexists(place / f"{group}{_DECISION}")


def decisions() -> set[str]:
    """The groups that have decided.

    :raise QsnapError: as :func:`is_decided`.
    """
    place = existing()
    return {path.stem for path in place.glob(f"*{_DECISION}")} if place else set()


def forget_decision(group: str) -> None:
    """Remove it: nothing of the group is left to do."""
    with suppress(OSError, QsnapError):
        if (place := existing()) is not None:
            (place / f"{group}{_DECISION}").unlink()


def _location() -> Path:
    """The runtime directory: the same for a person, for cron and for a service of one user.

    So it does not depend on the environment, except on ``QSNAP_RUNTIME_DIR``.
    """
    if given := os.environ.get("QSNAP_RUNTIME_DIR"):
        if not given.startswith("/"):
            raise BadUsage(f"QSNAP_RUNTIME_DIR must be an absolute path, not {given!r}")
        return Path(given)
    uid = os.geteuid()
    parent = Path("/run") if uid == 0 else Path(f"/run/user/{uid}")
    return parent / "qsnap" if os.access(parent, os.W_OK) else Path(f"/tmp/qsnap-{uid}")  # noqa: S108 (checked below)


def existing() -> Path | None:
    """The real path of the runtime directory, owned by this user and closed to all others; None if there is none.

    :raise QsnapError: another user owns it or may open it, or it is not a directory.
    """
    path = _location()
    try:
        path = files.resolved(path.parent) / path.name
        info = files.status(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise QsnapError(f"the runtime directory {path} cannot be used: {error.strerror}; {_CURE}") from error
    problem, cure = "", _CURE
    if info.st_uid != os.geteuid():
        problem = f"it was made by user {info.st_uid}, who could keep qsnap from work, or have it do the wrong"
    elif not stat.S_ISDIR(info.st_mode):
        problem = "it is not a directory"
    elif info.st_mode & 0o077:
        problem = f"it is open to other users (mode {stat.S_IMODE(info.st_mode):03o})"
        cure = f"chmod 700 it, or {_CURE}"
    if problem:
        raise QsnapError(f"the runtime directory {path} cannot be used: {problem}; {cure}")
    return path


def problem() -> str:
    """Why the contents of the runtime directory cannot be trusted; "" if they can, or if there is no such directory.

    :raise BadUsage: the path of the directory is not absolute.
    """
    try:
        existing()
    except BadUsage:
        raise
    except QsnapError as error:
        return str(error)
    return ""


def has_journals() -> bool:
    """Whether there are any journals of this user's runs, on whatever VM.

    :raise QsnapError: as :func:`is_decided`.
    """
    place = existing()
    return place is not None and any(path.suffix == JOURNAL for path in place.iterdir())


def directory() -> Path:
    """The runtime directory, created if needed: owned by this user, and closed to all others.

    :raise QsnapError: it is not, or cannot be created.
    """
    path = _location()
    try:
        with suppress(FileExistsError), files.directory(files.resolved(path.parent)) as where:
            os.mkdir(path.name, 0o700, dir_fd=where)
            made = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
            try:
                os.chmod(f"/proc/self/fd/{made}", 0o700)  # noqa: PTH101 (whatever the umask)
            finally:
                os.close(made)
    except OSError as error:
        raise QsnapError(f"the runtime directory {path} cannot be made: {error.strerror}; {_CURE}") from error
    if (found := existing()) is None:
        raise QsnapError(f"the runtime directory {path} has gone; {_CURE}")
    return found
