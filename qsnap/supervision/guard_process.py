"""What the guard process does: nothing, until the run that it guards is gone; then what that run can do no more.

It is up before anything of weight is imported. A run that takes longer makes it import the rest beforehand: when the
time comes, the files may be gone, or memory short.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # built in; ``signal`` itself takes a third of our start
import os
import select

#: Milliseconds after which it expects the run to take long.
_LONG_MS = 1000


def main(control: str, parent: str, record: str, path: str, monitor: str) -> None:
    """Guard a run: see :func:`qsnap.supervision.guard.start`.

    :param control: the number of our end of the socket.
    :param parent: the process id of the run.
    :param record: the number of the file that its journal is.
    :param path: that file's path.
    :param monitor: the number of the connection to QEMU; "" without one.
    """
    # What ends others of our machine, terminal or job must not end us; the run ends us itself.
    for signum in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGPIPE):
        _signal.signal(signum, _signal.SIG_IGN)
    try:  # noqa: SIM105 (contextlib takes time to load)
        os.write(int(control), b"r")
    except OSError:
        pass  # the run is gone already
    _wait(int(control), int(parent))

    import asyncio
    import socket
    from pathlib import Path

    from qsnap.runs import journal
    from qsnap.supervision import recovery

    taken = journal.taken_over(int(record), Path(path))
    if taken is not None:
        connection = socket.socket(fileno=int(monitor)) if monitor else None
        asyncio.run(recovery.after_death(taken, connection))


def _wait(control: int, parent: int) -> None:
    """Return when the run is gone: its end of the socket is closed, or its process has ended.

    (A process that it has forked holds that end too.)
    """
    poll = select.poll()
    poll.register(control, select.POLLIN)
    try:
        poll.register(os.pidfd_open(parent), select.POLLIN)
    except ProcessLookupError:
        return
    except OSError:
        pass  # not on this kernel; the socket will do
    if not poll.poll(_LONG_MS):
        import asyncio  # noqa: F401

        from qsnap.monitor.hmp import monitor as hmp  # noqa: F401
        from qsnap.monitor.qmp import monitor as qmp  # noqa: F401
        from qsnap.supervision import recovery  # noqa: F401

        poll.poll()
