"""What a user asks for, whole: it goes from the command line to the sequence as it is."""

from __future__ import annotations

from enum import StrEnum

from qsnap.model.qemu import Struct


class OnExists(StrEnum):
    """What a save does if a snapshot of its tag exists."""

    REPLACE = "replace"
    """Delete it first, as do_savevm does. It is gone if the save then fails."""
    REFUSE = "refuse"
    """Save nothing."""
    SAFE = "safe"
    """Replace it so that a whole snapshot exists at every moment."""


class LoadRequest(Struct, frozen=True):
    """A load that is asked for."""

    tag: str
    running: bool | None = None
    """True to run the guest afterwards, False to leave it paused. Default: paused if it was paused."""
    exclude: tuple[str, ...] = ()
    """Devices that keep the contents they have now, as they did when the tag was saved."""
    force: bool = False
    """Load also where a disk stands on other images than when the tag was saved."""
    may_sleep: bool = False
    """With *running*, it is not an error if the guest was saved in S3."""
    full: bool = False
    """Have QEMU load all of RAM."""
    verify: bool = False
    """Compare all of RAM with the snapshot after the load, before the guest runs. If it differs after a delta load, all
    is loaded; if it differs then, too, QEMU's devices have written it as they were loaded."""


class SaveRequest(Struct, frozen=True):
    """A save that is asked for."""

    tag: str | None = None
    """1 to 255 bytes, 247 for a live save. Default: vm-%Y%m%d%H%M%S in local time, as do_savevm names it."""
    on_exists: OnExists = OnExists.REPLACE
    vmstate: str | None = None
    """The device that holds the VM state. Default: QEMU's own choice, which loadvm expects. Of a live save: the one
    beside whose image the state file goes."""
    exclude: tuple[str, ...] = ()
    """Devices to leave out; the snapshot is not whole then."""
    force: bool = False
    """Let a lack of room only warn."""
    alive: bool = False
    """Refuse a guest that could not go on from the snapshot, because it has panicked or shut down. Default: warn."""
    prepare: bool | None = None
    """Prepare the VM state's area of the image while the guest runs, so that the pause is shorter; False: never.
    Default: where it pays, see :mod:`qsnap.operations.prepare`."""
    dry_run: bool = False
    """Decide everything and do nothing."""
