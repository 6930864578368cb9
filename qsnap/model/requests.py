"""A user's whole request: it passes from the command line to the sequence unchanged."""

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


class DeleteRequest(Struct, frozen=True):
    """Deletions that are asked for."""

    tags: tuple[str, ...]
    """Deleted one after another; an error with one does not keep the others from being deleted."""
    missing_ok: bool = False
    """A tag that no device holds is not an error."""
    alone: bool = False
    """Delete parts of groups too, and leave the parts of other VMs."""


class LoadRequest(Struct, frozen=True):
    """The request for a load."""

    tag: str
    running: bool | None = None
    """True to run the guest afterwards, False to leave it paused. Default: paused if it was paused."""
    exclude: tuple[str, ...] = ()
    """Devices that keep the contents they have now, as they did when the tag was saved."""
    force: bool = False
    """Load even if a disk has other backing images than when the tag was saved, or the machine is another one."""
    may_sleep: bool = False
    """With *running*, it is not an error if the guest was saved in S3."""
    full: bool = False
    """Have QEMU load all of RAM."""
    verify: bool = False
    """Compare all of RAM with the snapshot after the load, before the guest runs. If it differs after a delta load, all
    is loaded; if it still differs then, QEMU's devices have written it as they were loaded."""


class SaveRequest(Struct, frozen=True):
    """The request for a save."""

    tag: str | None = None
    """1 to 255 bytes, 247 for a live save. Default: vm-%Y%m%d%H%M%S in local time, as do_savevm names it."""
    on_exists: OnExists = OnExists.REPLACE
    vmstate: str | None = None
    """The device that holds the VM state. Default: QEMU's own choice, which loadvm expects. For a live save: the
    device beside whose image the state file goes."""
    exclude: tuple[str, ...] = ()
    """Devices to leave out; the snapshot is then not whole."""
    force: bool = False
    """Only warn if room is short."""
    alive: bool = False
    """Refuse a guest that could not go on from the snapshot, because it has panicked or shut down. Default: warn."""
    prepare: bool | None = None
    """Prepare the VM state's area of the image while the guest runs, so that the pause is shorter; False: never.
    Default: where it pays, see :mod:`qsnap.operations.prepare`."""
    dry_run: bool = False
    """Decide everything and do nothing."""


class ExportRequest(Struct, frozen=True):
    """The request for an export."""

    tag: str
    directory: str
    """The directory that is made; its parent exists."""
    keep_backing: bool = False
    """Do not copy what is in backing images; the disks of the export stand on them."""
    force: bool = False
    """Export even if a disk has other backing images than when the tag was saved, or room seems to be short."""


class BootRequest(Struct, frozen=True):
    """The request to start a guest from an export."""

    directory: str
    work: str | None = None
    """Its working directory, which is made. Default: a temporary one, which goes when QEMU ends."""
    qemu: str | None = None
    """The QEMU to run. Default: the one that the export names, or else one of that name on PATH."""
    options: tuple[str, ...] = ()
    """Further arguments for QEMU. One of ``-accel`` or ``-cpu`` is instead of the export's."""
    paused: bool = False
    """Load the state and leave the guest paused."""
    network: bool = False
    """Connect each network card to QEMU's user network."""
    checks_sums: bool = True
    """Compare the checksums of all files first; else only their sizes."""
    within_s: float = 600.0
    """Seconds for QEMU to load the state."""
