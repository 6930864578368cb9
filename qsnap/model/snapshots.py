"""What a tag names, over all devices, and the file that holds the state of a live save. No I/O."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec

from qsnap.model.checks import Labels
from qsnap.model.qemu import Struct


class Kind(StrEnum):
    """How much of the guest a tag holds."""

    FULL = "full"
    """RAM, and every device."""
    DISK_ONLY = "disk-only"
    """Devices, but no VM state."""
    PARTIAL = "partial"
    """Not on all devices."""
    LIVE = "live"
    """RAM in a state file, and every device: made while the guest ran."""
    STATE_ONLY = "state-only"
    """A state file whose disk snapshots are gone."""


class StateFile(Struct, frozen=True):
    """The file that holds the RAM and device state of a live save."""

    path: str
    size: int
    """Bytes of the file."""
    disk_tag: str
    """The tag under which the disks hold the snapshot that belongs to the file; the file names it too."""
    image: str
    """The absolute path of the image beside which the file belongs, as it was when the file was made."""
    vm_state_size: int
    date: datetime
    vm_clock_ns: int
    is_whole: bool = True
    """False: the file is cut short. If the data at its end are missing, size and clock are 0."""
    is_readable: bool = True
    """False: this user may not read the file. Only its name is known; size and clock are 0."""
    trouble: str = ""
    """What is wrong with it, a clause that "it" begins: it is a symbolic link, empty, cut short. "" if it is whole."""
    is_link: bool = False
    """The file is a symbolic link. qsnap does not follow it, because it could lead to anything."""
    holds: str = ""
    """The tag of the snapshot whose state it holds, if its name is that of another one."""

    @property
    def is_foreign(self) -> bool:
        """Whether it is not a state file of the snapshot that it is named after. It is neither loaded nor removed."""
        return self.is_link or bool(self.holds)


class InBacking(Struct, frozen=True):
    """A tag that no device holds, but a backing image of one: an overlay was made above it (blockdev-snapshot)."""

    tag: str
    image: str
    """The file name of that image."""
    device: str
    """The device, as people call it."""


class Together(Struct, frozen=True):
    """The group that a snapshot is part of: those of several VMs, saved at one moment."""

    id: str
    """All parts of the group have this id."""
    vms: tuple[str, ...]
    """The other VMs, as they were named when it was saved."""


class Origin(Struct, frozen=True):
    """What saved a snapshot, as qsnap has noted it; "" for what was not told."""

    qemu: str = ""
    """QEMU's version."""
    machine: str = ""
    """The machine type: "pc-q35-7.2"."""
    cpu: str = ""
    """The CPU model: "qemu64"."""
    accelerator: str = ""
    """"kvm" or "tcg"."""


class Snapshot(Struct, frozen=True):
    """All that one tag names, over all devices."""

    tag: str
    kind: Kind
    vm_state_size: int
    """Bytes of VM state (RAM and devices); 0 without one."""
    date: datetime
    vm_clock_ns: int
    vmstate: str | None
    """The node-name that holds the VM state."""
    devices: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """The node-names of writable devices that lack the snapshot."""
    problems: tuple[str, ...] = ()
    """Why it cannot be trusted, a sentence each: held twice by a node, or made at different moments."""
    labels: Labels = msgspec.field(default_factory=dict)
    file: StateFile | None = None
    """The file with the VM state, if that is not in the image of :attr:`vmstate`."""
    disk_tag: str = ""
    """The tag under which the devices hold it: :attr:`tag`, or its second name after a live save has replaced it."""
    protected: bool = False
    """qsnap refuses to replace, delete or prune it."""
    description: str = ""
    runstate: str = ""
    """The guest's run state at the save, if the guest could not go on from it; "" otherwise."""
    together: Together | None = None
    """The group that it is part of; None if it was saved by itself."""
    parent: str | None = None
    """The snapshot that the guest had come from when it was saved, or the nearest one before that which still exists;
    "" if there is none; None if that is not known."""
    here: bool = False
    """The guest has come from it last: it is the one that was loaded or saved last, or the nearest one before that."""

    origin: Origin | None = None
    """None if qsnap did not save it, or the note is lost."""

    @property
    def has_state(self) -> bool:
        """Whether it holds a VM state."""
        return self.vmstate is not None or (self.file is not None and bool(self.devices))


class Position(Struct, frozen=True):
    """Where the guest is: the snapshot that was loaded or saved last, by whomever."""

    tag: str | None = None
    """That snapshot, or the nearest one before it that still exists; None if there is none, or it is not known."""
    deleted: tuple[str, ...] = ()
    """Snapshots from which the guest has come since then, and which do not exist any more; the last one first."""
    unknown: str = ""
    """Why it is not known, a clause; "" if it is."""


class Tree(Struct, frozen=True):
    """All snapshots, each with its parent, and where the guest is."""

    snapshots: tuple[Snapshot, ...]
    position: Position
