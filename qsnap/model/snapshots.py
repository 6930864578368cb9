"""What a tag names, over all devices, and the file that has the state of a live save. No I/O."""

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
    """The tag under which the disks have the snapshot that belongs to it, and itself too."""
    image: str
    """The absolute path of the image beside which the state would be; as it was when it was made."""
    vm_state_size: int
    date: datetime
    vm_clock_ns: int
    is_whole: bool = True
    """False: it is cut short. Where even what stands at its end is gone, size and clock are 0."""
    is_readable: bool = True
    """False: this user may not read it. It is known by its name alone; size and clock are 0."""
    trouble: str = ""
    """What is wrong with it, a clause that "it" begins: it is a symbolic link, empty, cut short. "" if it is whole."""
    is_link: bool = False
    """It is a symbolic link. That is not followed: it could lead to anything."""


class InBacking(Struct, frozen=True):
    """A tag that no device holds, but an image that one stands on: an overlay was made above it (blockdev-snapshot)."""

    tag: str
    image: str
    """The file name of that image."""
    device: str
    """The device, as people call it."""


class Snapshot(Struct, frozen=True):
    """All that one tag names, over all devices."""

    tag: str
    kind: Kind
    vm_state_size: int
    """Bytes of VM state: RAM and devices; 0 without."""
    date: datetime
    vm_clock_ns: int
    vmstate: str | None
    """The node-name that holds the VM state."""
    devices: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """The node-names of writable devices without it."""
    problems: tuple[str, ...] = ()
    """Why it cannot be trusted, a sentence each: held twice by a node, or made at different moments."""
    labels: Labels = msgspec.field(default_factory=dict)
    file: StateFile | None = None
    """Where the VM state is, if it is not in the image of :attr:`vmstate`."""
    disk_tag: str = ""
    """The tag under which the devices hold it: :attr:`tag`, or its second name after a live save has replaced it."""
    protected: bool = False
    """It is neither replaced nor deleted nor pruned."""
    description: str = ""
    runstate: str = ""
    """The guest's run state at the save, where that was written down: one that it could not go on from."""

    @property
    def has_state(self) -> bool:
        """Whether there is a VM state in it."""
        return self.vmstate is not None or (self.file is not None and bool(self.devices))
