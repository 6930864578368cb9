"""The guard: a process that outlives a killed run, and then finishes what that run cannot.

It holds the other end of a socket, does nothing until that breaks, and then resumes the guest and clears up
(``guard_process``, ``recovery``). It has the run's locked journal, so that nobody else begins meanwhile, and the run's
own connection to QEMU: a monitor serves one client, and any client that waits would be served before a new connection.
It has a session of its own, so that the end of a process group or a terminal does not end it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

from qsnap.errors import QsnapError
from qsnap.host import interpreter
from qsnap.runs.journal import Journal

#: Seconds for the guard to report that it is ready; it takes some hundredths.
_READY_S = 20.0

_READY = b"r"

#: Guards that were handed over and may still be working: they are waited for when the next one is started.
_left: list[subprocess.Popen[bytes]] = []


class Guard:
    """A guard that is ready, or starting.

    :ivar pid: its process id.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._control = control
        self._is_ready = False

    async def ready(self) -> None:
        """Wait until the guard is ready: before that, nothing may be done that would need it.

        :raise QsnapError: it did not get ready.
        """
        if self._is_ready:
            return
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_READY_S):
                word = await loop.sock_recv(self._control, 1)
        except TimeoutError as error:
            raise self._failure("it says nothing") from error
        if word != _READY:
            raise self._failure(f"it ended with {self._process.poll()}")
        self._is_ready = True

    def _failure(self, reason: str) -> QsnapError:
        return QsnapError(
            f"the guard, a Python process that resumes the guest should this one be killed, did not start: {reason}; "
            f"nothing was done. Try: {sys.executable} -c pass"
        )

    def dismiss(self) -> None:
        """End the guard: nothing is left for it to do."""
        self._process.kill()
        with self._control:
            self._process.wait()

    def hand_over(self) -> None:
        """Let the guard go to work, as if this process had died."""
        self._control.close()
        _left.append(self._process)


def start(journal: Journal, connection: socket.socket | None) -> Guard:
    """Start a guard for the run of *journal*, and do not wait for it.

    :param connection: the run's connection to QEMU, with which the guard goes on.
    :raise QsnapError: no process can be started.
    """
    _left[:] = [process for process in _left if process.poll() is None]
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise QsnapError(f"no guard can be started: {error.strerror}; nothing was done") from error
    ours.setblocking(False)
    control, record = theirs.fileno(), journal.fileno()
    monitor = None if connection is None else connection.fileno()
    given = [str(control), str(os.getpid()), str(record), str(journal.path), "" if monitor is None else str(monitor)]
    files = [file for file in (control, record, monitor) if file is not None]
    try:
        process = interpreter.start(
            "qsnap-guard", "qsnap.supervision.guard_process.main", *given,
            files=files, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        ours.close()
        raise QsnapError(f"no guard can be started: {error.strerror}; nothing was done") from error
    finally:
        theirs.close()
    return Guard(process, ours)
