"""What each command answers: results for scripts (``--json``) and for the library. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from qsnap.model.checks import Device, Finding, Labels
from qsnap.model.qemu import Job, RunState, Struct
from qsnap.model.snapshots import InBacking, Kind, StateFile


class PruneDecision(Struct, frozen=True):
    """What becomes of a snapshot of a series."""

    tag: str
    kind: Kind
    date: datetime
    vm_state_size: int
    reasons: tuple[str, ...]
    """Why it is kept; none: it is not."""


class PruneResult(Struct, frozen=True):
    """What a prune has kept and removed, each the newest first. ``dry_run``: what one would."""

    prefix: str
    keep: tuple[PruneDecision, ...]
    remove: tuple[PruneDecision, ...]
    dry_run: bool = False
    other_series: tuple[str, ...] = ()
    """The prefixes of the series that exist, if *prefix* has no snapshot."""


class SaveResult(Struct, frozen=True):
    """What a save has made. ``dry_run`` results describe what one would make, with sizes and times 0."""

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
    """Milliseconds from QEMU's STOP to its RESUME; 0 where the guest was not running."""
    duration_ms: float
    runstate: RunState
    warnings: tuple[Finding, ...] = ()
    dry_run: bool = False
    labels: Labels = msgspec.field(default_factory=dict)
    file: StateFile | None = None
    """Of a live save."""
    description: str = ""
    pruned: PruneResult | None = None
    """What was pruned after it."""


class LoadResult(Struct, frozen=True):
    """What a load has put back."""

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
    """"delta": QEMU has loaded what of RAM differed from the snapshot, and all else; "full": everything."""
    why_full: str = ""
    """Why everything was loaded; "" where only what differed was."""
    ram_bytes: int | None = None
    """Bytes of RAM that differed; None where everything was loaded."""
    differing_pages: int | None = None
    """Pages of 4 KiB that differ from the snapshot after the load, as a device of QEMU's has written them while it was
    loaded; None where they were not compared."""


class DeleteResult(Struct, frozen=True):
    """What a delete has removed: for each tag the node-names that held it; no names where none did."""

    deleted: dict[str, tuple[str, ...]]
    labels: Labels = msgspec.field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """For each tag the paths of the state files that went with it."""


class Recovered(Struct, frozen=True):
    """What was done about a run that died."""

    operation: str
    """"save", "load", "delete" (also of a prune) or "note"; "" if its claim could not be read, so nothing is known."""
    tags: tuple[str, ...]
    pid: int
    """Its process, which is no more; 0 where it is not known."""
    began: str
    """ISO 8601."""
    actions: tuple[str, ...]
    """What was done, a sentence each; none where nothing was left to do."""


class Unfinished(Struct, frozen=True):
    """A run that goes on, or that died and has not been cleaned up after yet."""

    operation: str
    tags: tuple[str, ...]
    pid: int
    began: str
    is_alive: bool | None
    """None where it cannot be told: it is of another machine, container or version."""


class Status(Struct, frozen=True):
    """The guest, and what of ours is left behind on it."""

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
    """Whose claim on this VM there is."""
    is_half_restored: bool = False
    """A load has failed midway."""
    trouble: str = ""
    """Why a snapshot of the guest as it is now would be of little use to go on from; "" where it is of use."""
    in_backing: tuple[InBacking, ...] = ()
    """What is out of reach below an overlay; not counted in :attr:`snapshots`."""
