"""The mark of a claim: who is using a VM, written into QEMU itself, where it is visible to every qsnap.

Whichever monitor it comes by, from whichever user, container or machine: the VM is the same. The mark alone does not
tell whether that qsnap lives; on the same machine its process does, elsewhere nothing.
"""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import msgspec

from qsnap.host.processes import Process, this_process
from qsnap.model import typed
from qsnap.model.qemu import Struct
from qsnap.monitor import Monitor
from qsnap.runs.record import Record

#: Characters of a tag that a mark keeps: HMP takes a line of about a thousand.
_TAG_CHARS = 40


class Holder(Struct, frozen=True):
    """The run that holds a VM, and its operation."""

    token: str
    operation: str
    tag: str
    began: str
    host: str
    user: int
    owner: Process
    guard: Process | None
    machine: str
    """Where process ids mean the same: this boot of the machine, and the process-id namespace."""
    was_running: bool
    """The guest was running when the claim was made."""

    def encode(self) -> str:
        """The text of a mark for this holder."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @property
    def is_here(self) -> bool:
        """Whether its process ids are valid in our process-id namespace."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether the run or its guard is alive. Valid only if :attr:`is_here`."""
        return self.owner.is_alive or (self.guard is not None and self.guard.is_alive)

    def __str__(self) -> str:
        where = "" if self.is_here else f" on {self.host}"
        return f"process {self.owner.pid}{where} (user {self.user}), {self.operation} {self.tag!r} since {self.began}"


def holder(record: Record, guard: Process | None, *, was_running: bool) -> Holder:
    """The holder that stands for the run of *record*."""
    assert record.owner is not None
    return Holder(
        token=record.token,
        operation=record.operation,
        tag=", ".join(record.tags)[:_TAG_CHARS],
        began=record.began,
        host=socket.gethostname()[:64],
        user=record.user,
        owner=record.owner,
        guard=guard,
        machine=_machine(),
        was_running=was_running,
    )


def of_this_process(operation: str, tag: str) -> Holder:
    """The holder that stands for this process, without a journal and a guard."""
    record = Record(token=os.urandom(8).hex(), operation=operation, tags=(tag,), owner=this_process())
    return holder(record, None, was_running=False)


def decode(text: str) -> Holder | None:
    """The holder in a mark's *text*; None if it cannot be read, as from another version of qsnap."""
    try:
        return typed.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), Holder)
    except (ValueError, msgspec.DecodeError):
        return None


async def is_of(monitor: Monitor, name: str, token: str) -> bool:
    """Whether the mark *name* exists and belongs to *token*."""
    found = decode(await monitor.mark(name) or "")
    return found is not None and found.token == token


async def give_up(monitor: Monitor, name: str, token: str) -> None:
    """Remove a mark, but only if it belongs to *token*."""
    if await is_of(monitor, name, token):
        await monitor.clear_mark(name)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (a link that is no path)
    except OSError:
        return socket.gethostname()
