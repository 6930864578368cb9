"""Start a Python process of qsnap's own, ready within some ten milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

#: The standard library comes first in its path, so that what it imports cannot be something else of that name. ``site``
#: takes too long.
_CODE = (
    "import sys; function, count, *given = sys.argv[2:]; count = int(count); sys.path += given[count:]; "
    "module, _, name = function.rpartition('.'); "
    "getattr(__import__(module, fromlist=[name]), name)(*given[:count])"
)
#: What it needs of our environment, and may keep for hours: how names are spelt, what time a human monitor tells, where
#: the interpreter's libraries are, and where journals are. No secrets of whoever has started us.
_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PATH", "QSNAP_RUNTIME_DIR")


def start(
    name: str, function: str, *given: str, files: Collection[int], stdin: int, stdout: int
) -> subprocess.Popen[bytes]:
    """Start a process that calls a function.

    It has a session of its own, so that what ends our process group, or our terminal, does not end it.

    :param name: what it is called in a list of processes.
    :param function: its full name, as ``package.module.function``; it gets what is *given*.
    :param files: descriptors that it has under the same numbers.
    :param stdin: as for :class:`subprocess.Popen`; *stdout* too. It has no standard error.
    :raise OSError: no process can be started.
    """
    path = [str(Path(__file__).absolute().parents[2]), *map(os.path.abspath, filter(None, sys.path))]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _CODE, name, function, str(len(given)), *given, *path],
        stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, bufsize=0,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        pass_fds=files, start_new_session=True,
    )  # fmt: skip
