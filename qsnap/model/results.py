"""The result of each command: results for scripts (``--json``) and for the library. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from qsnap.model.checks import Device, Finding, Labels
from qsnap.model.qemu import Job, RunState, Struct
from qsnap.model.snapshots import InBacking, Kind, StateFile


class PruneDecision(Struct, frozen=True):
    """Whether a prune keeps a snapshot of a series."""

    tag: str
    kind: Kind
    date: datetime
    vm_state_size: int
    reasons: tuple[str, ...]
    """Why it is kept; empty: it is removed."""


class PruneResult(Struct, frozen=True):
    """What a prune kept and removed, each the newest first. ``dry_run``: what it would keep and remove."""

    prefix: str
    keep: tuple[PruneDecision, ...]
    remove: tuple[PruneDecision, ...]
    dry_run: bool = False
    other_series: tuple[str, ...] = ()
    """The prefixes of the series that exist, if *prefix* has no snapshot."""


class SaveResult(Struct, frozen=True):
    """What a save made. ``dry_run`` results describe what it would make, with sizes and times 0."""

    tag: str
    replaced: bool
    kind: Kind
    vmstate: str | None
    """The node that holds the VM state; None where that is in :attr:`file`."""
    devices: tuple[str, ...]
    excluded: tuple[str, ...]
    carried: tuple[str, ...]
    vm_state_size: int
    date: datetime
    vm_clock_ns: int
    pause_ms: float
    """Milliseconds from QEMU's STOP to its RESUME; 0 if the guest was not running."""
    duration_ms: float
    runstate: RunState
    warnings: tuple[Finding, ...] = ()
    dry_run: bool = False
    labels: Labels = msgspec.field(default_factory=dict)
    file: StateFile | None = None
    """Of a live save."""
    description: str = ""
    pruned: PruneResult | None = None
    """What was pruned after the save."""


class LoadResult(Struct, frozen=True):
    """What a load put back."""

    tag: str
    vmstate: str | None
    """The node that held the VM state; None where that was in :attr:`file`."""
    devices: tuple[str, ...]
    excluded: tuple[str, ...]
    vm_state_size: int
    date: datetime
    vm_clock_ns: int
    duration_ms: float
    runstate: RunState
    labels: Labels = msgspec.field(default_factory=dict)
    file: StateFile | None = None
    """Of a live save."""
    method: Literal["delta", "full"] = "full"
    """"delta": QEMU loaded only the RAM that differed from the snapshot, and all else; "full": everything."""
    why_full: str = ""
    """Why everything was loaded; "" after a delta load."""
    ram_bytes: int | None = None
    """Bytes of RAM that differed; None after a full load."""
    found_by: Literal["soft-dirty", "comparison"] | None = None
    """How these were found: only what was written since an earlier load was compared, or all of RAM; None after a full
    load."""
    differing_pages: int | None = None
    """Pages of 4 KiB that differ from the snapshot after the load, because a device of QEMU wrote them while it was
    loaded; None if they were not compared."""
    saved: SaveResult | None = None
    """The save before the load, of what the load has discarded."""
    clock_behind_s: float | None = None
    """Seconds that the guest's clock is behind, because it goes on from the time of the save; 0 if it was set through
    the guest agent; None if the guest does not run."""


class GuestState(Struct, frozen=True):
    """The guest after a pause or a resume."""

    runstate: RunState
    before: RunState
    """Its run state before."""


class DeleteResult(Struct, frozen=True):
    """What a delete removed: for each tag the node-names that held it; no names if none did."""

    deleted: dict[str, tuple[str, ...]]
    labels: Labels = msgspec.field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """For each tag the paths of the state files that were deleted with it."""


class Verified(Struct, frozen=True):
    """What a verification found of one snapshot."""

    tag: str
    ok: bool | None
    """None if nothing is wrong, but not everything could be checked."""
    problems: tuple[str, ...] = ()
    """What is damaged, a clause each."""
    unchecked: tuple[str, ...] = ()
    """What could not be checked, a clause each."""
    compared: int = 0
    """The number of checksums that were compared, one for each image and one for a state file."""
    recorded: int = 0
    """The number of checksums that were taken for the first time."""


class VerifyResult(Struct, frozen=True):
    """What a verification found."""

    snapshots: tuple[Verified, ...]
    read_data: bool = False
    """All data were read, not only the VM states and the tables."""


class Recovered(Struct, frozen=True):
    """What was done about a run that died."""

    operation: str
    """"save", "load", "delete" (also of a prune), "note", "export", "pause" or "resume"; "" if its claim
    could not be read."""
    tags: tuple[str, ...]
    pid: int
    """The id of its process, which has ended; 0 if unknown."""
    began: str
    """ISO 8601."""
    actions: tuple[str, ...]
    """What was done, a sentence each; empty if nothing was left to do."""


class Unfinished(Struct, frozen=True):
    """A run that goes on, or a dead one that nobody has cleaned up after yet."""

    operation: str
    tags: tuple[str, ...]
    pid: int
    began: str
    is_alive: bool | None
    """None if unknown: the run belongs to another machine, container or version."""


class Status(Struct, frozen=True):
    """The guest, and what earlier runs of qsnap left behind on it."""

    version: str
    name: str
    runstate: RunState
    monitor: str
    transport: str
    snapshots: int
    vmstate: str | None
    devices: tuple[Device, ...]
    leftover_jobs: tuple[Job, ...]
    run: Unfinished | None = None
    """The run that holds the claim on this VM."""
    is_half_restored: bool = False
    """A load failed midway."""
    trouble: str = ""
    """Why a guest could not go on from a snapshot made now; "" if it could."""
    in_backing: tuple[InBacking, ...] = ()
    """Tags out of reach below an overlay; not counted in :attr:`snapshots`."""


class ExportResult(Struct, frozen=True):
    """What an export made."""

    tag: str
    directory: str
    """The path of the directory."""
    size: int
    """Bytes that it takes on the disk."""
    vm_state_size: int
    date: datetime
    machine: str
    """The machine type of the VM state."""
    qemu_version: str
    disks: tuple[str, ...]
    """The names that people use for the disks and media that were copied."""
    duration_ms: float
    warnings: tuple[Finding, ...] = ()


class BootResult(Struct, frozen=True):
    """A guest that was started from an export."""

    tag: str
    pid: int
    directory: str
    """Its working directory, with its overlays, sockets and logs."""
    is_temporary: bool
    """The working directory is removed when QEMU ends."""
    monitor: str
    """The path of its QMP socket."""
    consoles: tuple[str, ...]
    """The paths of the sockets of its serial ports."""
    qemu_version: str
    runstate: RunState
    duration_ms: float


class DrillResult(Struct, frozen=True):
    """A restore drill that the guest has passed: it was exported, it was started, its guest ran, and it was ended."""

    tag: str
    qemu_version: str
    sign: str
    """By what it was seen that the guest runs, a clause."""
    until: str
    """The text that was awaited on a serial port; "" if none was."""
    vcpus: int
    export_ms: float
    boot_ms: float
    run_ms: float
    """Milliseconds from the start of the vCPUs until it was seen."""
    duration_ms: float
    warnings: tuple[Finding, ...] = ()
