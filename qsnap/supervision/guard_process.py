"""What the guard process does: nothing, until the run that it guards is gone; then what that run can do no more.

It is up before anything of weight is imported. A run that takes longer makes it import the rest beforehand: when the
time comes, the files may be gone, or memory short.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path

#: Milliseconds after which it expects the run to take long.
_LONG_MS = 1000


def main(text: str) -> None:
    """Guard the run that *text* describes: see :func:`qsnap.supervision.guard.start`."""
    given = json.loads(text)
    # What ends others of our machine, terminal or job must not end us; the run ends us itself.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    control = socket.socket(fileno=given["control"])
    with suppress(OSError):
        control.send(b"r")
    _wait(control, given["parent"])

    import asyncio

    from qsnap.runs import journal
    from qsnap.supervision import recovery

    record = journal.taken_over(given["journal"], Path(given["path"]))
    if record is not None:
        connection = socket.socket(fileno=given["monitor"]) if "monitor" in given else None
        asyncio.run(recovery.after_death(record, connection))


def _wait(control: socket.socket, parent: int) -> None:
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
