"""A qsnap that is killed at a chosen command, and what must be left of it: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from qsnap.host.processes import is_alive
from qsnap.monitor.names import HERE, NOTED, PROTECTED
from qsnap.runs import mark
from support.guest import (
    Guest,
    assert_nothing_left,
    finish,
    start_cli,
    until,
)
from support.proxy import deed

CLAIM = "qsnap-claim"


def journals(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def guards(directory: Path) -> list[int]:
    """The guards of the runs of this test."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # no process, or none any more
            continue
        if b"qsnap-guard" in command and any(os.fsencode(directory) in word for word in command):
            found.append(int(path.name))
    return found


def marks(guest: Guest) -> list[str]:
    """The marks of runs of qsnap in QEMU, as another client sees them.

    Those of the notes stay: see qsnap.inventory.protection.
    """
    names = [item["name"] for item in guest.qmp("qom-list", path="/objects")]
    return [name for name in names if name.startswith("qsnap-") and not name.startswith((HERE, PROTECTED, NOTED))]


def wait_for_the_guard(directory: Path) -> None:
    """Until it has done its work and is gone."""
    until("the guard to be done", lambda: not journals(directory) and not guards(directory))


def assert_all_is_well(guest: Guest, directory: Path, expected: dict[Path, list[str]]) -> None:
    """The guest runs, the snapshots are those, and of the dead run nothing is left: file, process, job or mark."""
    wait_for_the_guard(directory)
    assert_nothing_left(guest, expected)
    assert marks(guest) == []


def kill_guard(directory: Path) -> None:
    """End the guard as well, as when a whole container is killed."""
    (pid,) = guards(directory)
    os.kill(pid, signal.SIGKILL)
    # Its command line is gone a moment before its lock on the journal
    until("the guard to be gone", lambda: not is_alive(pid))


class Killer:
    """Ends a qsnap with SIGKILL when it sends a command for the n-th time; the command itself still passes."""

    def __init__(self, command: str, nth: int = 1) -> None:
        self.command = command
        self.left = nth
        self.process: subprocess.Popen[str] | None = None
        self._started = threading.Event()

    def __call__(self, message: dict[str, Any]) -> None:
        if deed(message) == self.command:
            self.left -= 1
            if self.left == 0:
                assert self._started.wait(30)
                assert self.process is not None
                self.process.kill()
                self.process.wait(30)

    def run(self, *arguments: str, monitor: str) -> None:
        """Run qsnap until it is killed."""
        self.process = start_cli(*arguments, monitor=monitor)
        self._started.set()
        assert finish(self.process).code == -signal.SIGKILL


def set_claim(guest: Guest, holder: mark.Holder) -> None:
    guest.qmp("object-add", qom_type="authz-simple", id=CLAIM, identity=holder.encode())
