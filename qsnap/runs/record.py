"""The contents of a journal: whose run it is, what is half done, and how far the run has come."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from qsnap.host.files import Identity
from qsnap.host.processes import Process
from qsnap.model.qemu import NodeSnapshot, Struct
from qsnap.monitor.address import Address, TcpAddress, UnixAddress

#: Seconds since 1970 and milliseconds of the VM's clock: a snapshot table's row, the same over every monitor.
RowKey = tuple[int, int]


class NewSnapshot(Struct, frozen=True):
    """The snapshot that a save is about to make, and what it replaces."""

    disk_tag: str
    """The tag under which the devices hold the new snapshot."""
    vmstate: str
    """The node that holds the VM state; for a live save, the node beside whose image the state file lies."""
    devices: tuple[str, ...]
    """The nodes that get a snapshot."""
    older: tuple[str, ...]
    """The other tags on the devices, and the state files, that are deleted when the new snapshot is complete."""
    older_files: tuple[str, ...]


class SaveWork(NewSnapshot, frozen=True, tag="save"):
    """How far a save has come."""

    rows: dict[str, tuple[RowKey, ...]] | None = None
    """The rows under the tag itself when their deletion began; None before."""
    qemu_replaces: bool = False
    """QEMU itself deletes those rows (HMP's savevm)."""
    saving: bool = False
    """QEMU may have got the command to save under the tag."""
    is_complete: bool = False
    """The new snapshot was read back, and is whole."""

    @property
    def has_begun(self) -> bool:
        """Whether anything was changed yet."""
        return self.rows is not None or self.saving


class LiveWork(NewSnapshot, frozen=True, tag="live"):
    """How far a live save has come."""

    path: str
    """The path of the state file; and, in :attr:`part`, its path until it is complete."""
    part: str
    made: Identity | None = None
    """The identity of the file; None before it was made."""


class DeleteWork(Struct, frozen=True, tag="delete"):
    """What a delete is about to remove."""

    devices: tuple[str, ...]
    """The nodes that hold any of the tags."""
    disk_tags: tuple[str, ...]
    files: tuple[str, ...]


class LoadStage(StrEnum):
    """How far a load has come."""

    FLUSHING = "flushing"
    """Translated code is being dropped; nothing is loaded yet."""
    BEGUN = "begun"
    """QEMU may have got the command to load."""
    UNSURE = "unsure"
    """As BEGUN, and also when it has ended well the guest must not run before RAM was compared."""
    LOADED = "loaded"
    """The load has ended well. A guest that was not running is to be left paused yet."""
    FAILED = "failed"
    """QEMU reported an error after the load had begun."""


class LoadWork(Struct, frozen=True, tag="load"):
    """How far a load has come."""

    was_running: bool
    """The guest ran before the load."""
    stage: LoadStage = LoadStage.FLUSHING


class Record(Struct, frozen=True):
    """The contents of a journal: whose run it is, and how far the run has come."""

    token: str = ""
    """The run's mark in QEMU holds it too: a QEMU without that mark is another one."""
    operation: str = ""
    """"save", "load", "delete" (also of a prune), "note", "export", "pause" or "resume"."""
    tags: tuple[str, ...] = ()
    began: str = ""
    """ISO 8601, with the time zone."""
    owner: Process | None = None
    user: int = -1
    address: tuple[str, ...] = ()
    """The kind of address, and its parts: see :attr:`where`."""
    socket: tuple[str, ...] = ()
    """The monitor's socket, the same under all its names: see :func:`qsnap.runs.journal.socket_identity`."""
    qemu: Process | None = None
    transport: str = ""
    """What is spoken on the connection: see :attr:`qsnap.monitor.Monitor.transport`."""

    is_done: bool = False
    """The run has ended, and its results stay: only the claim is left."""
    stopped: bool = False
    """The guest was running, and this run stopped it or is about to stop it."""
    settings: Mapping[str, int] = {}
    """The settings of QEMU that a live save changes, as they were before."""
    forgetting: bool = False
    """We may have begun a stream only to make QEMU forget a failed migration."""
    work: SaveWork | LiveWork | DeleteWork | LoadWork | None = None
    """The work that is half done, if any."""
    group: str = ""
    """The token of the group that the run is part of: see :mod:`qsnap.runs.group`; "" if it is of this VM alone."""

    @property
    def where(self) -> Address:
        """The monitor's address, as the run got it."""
        kind, *parts = self.address
        return UnixAddress(parts[0]) if kind == "unix" else TcpAddress(parts[0], int(parts[1]))

    @property
    def deed(self) -> str:
        """A description of the run for people: ``save 'nightly'``."""
        return f"{self.operation} {', '.join(map(repr, self.tags))}".rstrip()


def row_keys(rows: tuple[NodeSnapshot, ...]) -> tuple[RowKey, ...]:
    """The keys that distinguish the rows of a snapshot table over every monitor: HMP shows no more."""
    return tuple((int(row.date.timestamp()), row.vm_clock_ns // 1_000_000) for row in rows)
