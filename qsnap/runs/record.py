"""What a journal says of a run: whose it is, what is half done, and how far it has come."""

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
    """What a save is about to make, and what that replaces."""

    disk_tag: str
    """The tag that the devices have the new snapshot under."""
    vmstate: str
    """The node that the VM state is on; of a live save, the one beside whose image its state file is."""
    devices: tuple[str, ...]
    """The nodes that a snapshot is taken of."""
    older: tuple[str, ...]
    """The other tags on the devices, and the state files, of what goes when the new snapshot is complete."""
    older_files: tuple[str, ...]


class SaveWork(NewSnapshot, frozen=True, tag="save"):
    """How far a save has come."""

    rows: dict[str, tuple[RowKey, ...]] | None = None
    """The rows that stood under the tag itself when their deletion began; None before."""
    qemu_replaces: bool = False
    """The deletion of those rows is QEMU's own (HMP's savevm)."""
    saving: bool = False
    """QEMU may have been told to save under the tag."""
    is_complete: bool = False
    """The new snapshot was read back, and is whole."""

    @property
    def has_begun(self) -> bool:
        """Whether anything was changed yet."""
        return self.rows is not None or self.saving


class LiveWork(NewSnapshot, frozen=True, tag="live"):
    """How far a live save has come."""

    path: str
    """Of the state file; and of what will be it, until it is complete."""
    part: str
    made: Identity | None = None
    """The file itself; None before it was made."""


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
    """QEMU may have been told to load."""
    FAILED = "failed"
    """QEMU reported an error after it had begun."""


class LoadWork(Struct, frozen=True, tag="load"):
    """How far a load has come."""

    was_running: bool
    """The guest ran before it."""
    stage: LoadStage = LoadStage.FLUSHING


class Record(Struct, frozen=True):
    """What a journal says: whose run it is, and how far it has come."""

    token: str = ""
    """What the mark of this run in QEMU holds too: a QEMU without it is another one."""
    operation: str = ""
    """"save", "load", "delete" (also of a prune) or "note"."""
    tags: tuple[str, ...] = ()
    began: str = ""
    """ISO 8601, with the time zone."""
    owner: Process | None = None
    user: int = -1
    address: tuple[str, ...] = ()
    """The kind of address, and what it is made of: see :attr:`where`."""
    place: tuple[str, ...] = ()
    """The monitor's socket, the same under all its names: see :func:`place`."""
    qemu: Process | None = None
    is_human: bool = False
    """The connection is to a human monitor."""

    is_done: bool = False
    """It has come to its end, and what it has made stays: nothing is left but the claim."""
    stopped: bool = False
    """The guest was running, and this run has it stopped or is about to stop it."""
    settings: Mapping[str, int] = {}
    """What a live save changes in QEMU, as it was before."""
    forgetting: bool = False
    """We may have begun a stream only to make QEMU forget a failed migration."""
    work: SaveWork | LiveWork | DeleteWork | LoadWork | None = None
    """What is half done, if anything is."""

    @property
    def where(self) -> Address:
        """The monitor's address, as it was given to the run."""
        kind, *parts = self.address
        return UnixAddress(parts[0]) if kind == "unix" else TcpAddress(parts[0], int(parts[1]))

    @property
    def deed(self) -> str:
        """What it is about, for people: ``save 'nightly'``."""
        return f"{self.operation} {', '.join(map(repr, self.tags))}".rstrip()


def row_keys(rows: tuple[NodeSnapshot, ...]) -> tuple[RowKey, ...]:
    """What tells the rows of a snapshot table apart, over every monitor: HMP shows no more of them."""
    return tuple((int(row.date.timestamp()), row.vm_clock_ns // 1_000_000) for row in rows)
