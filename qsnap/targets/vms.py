"""A running QEMU and its monitors, the choice of a monitor, and which VM a word means. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Literal

from qsnap.model.qemu import Struct
from qsnap.monitor.address import Address

DEFAULT_MEMORY = 128 << 20
"""Bytes of RAM without ``-m``: QEMU's default for most machines (hw/core/machine.c)."""


class MonitorState(StrEnum):
    """Whether a monitor would serve a client now."""

    FREE = "free"
    BUSY = "busy"
    """A client is connected, or waits for the connection."""
    GONE = "gone"
    """The socket file does not exist, or QEMU does not listen on it."""
    FORBIDDEN = "forbidden"
    """This user may not write to the socket file."""
    UNKNOWN = "unknown"
    """The state is not visible without a connection: TCP, or another user's process."""
    UNUSABLE = "unusable"
    """qsnap cannot connect to it; ``reason`` says why."""


class Holder(Struct, frozen=True):
    """A process that holds a connection to a monitor."""

    pid: int
    command: str
    """Its command line, quoted for a shell."""


class MonitorPoint(Struct, frozen=True):
    """One monitor of a QEMU."""

    protocol: Literal["qmp", "hmp"]
    address: Address | None = None
    """The address where it listens; None if that is not a socket."""
    state: MonitorState = MonitorState.UNKNOWN
    reason: str = ""
    """Why it is unusable, as the rest of a sentence about the monitor; "" for all other states."""
    holder: Holder | None = None
    """The process that holds a busy monitor, if visible."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "address": str(self.address) if self.address else None}


class RunningVM(Struct, frozen=True):
    """A QEMU process, as its command line describes it."""

    pid: int
    uid: int
    """The effective user id."""
    user: str
    """That user's name; the number if the user has no name."""
    name: str | None = None
    """``-name``."""
    uuid: str | None = None
    """``-uuid``, as it was written."""
    memory: int = DEFAULT_MEMORY
    """Bytes of RAM at the start."""
    disks: tuple[str, ...] = ()
    """The file of each disk as it was written; for a disk without a file its node-name, id or driver."""
    monitors: tuple[MonitorPoint, ...] = ()
    managed_by: str | None = None
    """"libvirt", or None: the monitor that libvirt made for itself is then unusable for others."""

    @property
    def is_ours(self) -> bool:
        """Whether it runs as the present user."""
        return self.uid == os.geteuid()

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "monitors": [monitor.to_json() for monitor in self.monitors]}


def usable(vm: RunningVM) -> MonitorPoint | None:
    """The best monitor to connect to: a free one before one whose state is unknown, and then QMP before HMP."""
    order = [(state, protocol) for state in (MonitorState.FREE, MonitorState.UNKNOWN) for protocol in ("qmp", "hmp")]
    good = [monitor for monitor in vm.monitors if monitor.address and (monitor.state, monitor.protocol) in order]
    return min(good, key=lambda monitor: order.index((monitor.state, monitor.protocol)), default=None)


def find(vms: Iterable[RunningVM], wanted: str) -> tuple[RunningVM, ...]:
    """The VMs that *wanted* means: by exact name, or else by pid, or else by UUID in upper or lower case.

    :return: all matches, because several VMs may have the same name; empty if none matches.
    """
    candidates = tuple(vms)
    for matches in (
        lambda vm: vm.name == wanted,
        lambda vm: str(vm.pid) == wanted,
        lambda vm: vm.uuid is not None and vm.uuid.lower() == wanted.lower(),
    ):
        if found := tuple(vm for vm in candidates if matches(vm)):
            return found
    return ()
