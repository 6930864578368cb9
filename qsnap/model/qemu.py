"""What QEMU tells us and what qsnap says about it, typed. No I/O here.

Sizes are bytes, dates are aware datetimes, and times that QEMU counts in nanoseconds say so in their name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, NamedTuple

import msgspec

#: A tag's greatest length in bytes of UTF-8: QEMUSnapshotInfo.name is char[256] (block/snapshot.h).
MAX_TAG_BYTES = 255


#: query-migrate's words for a migration that is not under way (qapi/migration.json: MigrationStatus).
MIGRATION_IDLE = frozenset({None, "none", "completed", "failed", "cancelled"})


class RunState(StrEnum):
    """The guest's run state, in QEMU's words (qapi/run-state.json). One that is not known is kept as it is."""

    RUNNING = "running"
    PAUSED = "paused"
    PRELAUNCH = "prelaunch"
    PRECONFIG = "preconfig"
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    FINISH_MIGRATE = "finish-migrate"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    COLO = "colo"
    SUSPENDED = "suspended"
    SHUTDOWN = "shutdown"
    IO_ERROR = "io-error"
    INTERNAL_ERROR = "internal-error"
    GUEST_PANICKED = "guest-panicked"
    WATCHDOG = "watchdog"

    @classmethod
    def _missing_(cls, value: object) -> RunState:
        member = str.__new__(cls, value)
        member._name_ = member._value_ = str(value)
        return member


class QemuVersion(NamedTuple):
    """QEMU's version, from the monitor's greeting."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


#: See :meth:`Migration.spoils_loads`; between 7.2 and 10.0 it was not looked for.
_ERRORS_SPOIL_LOADS_SINCE = QemuVersion(9, 0, 0)


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the types below: immutable, named arguments only."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


class NodeSnapshot(Struct, frozen=True):
    """One internal snapshot of one block node: a row of that image's snapshot table."""

    tag: str
    id: str
    vm_state_size: int
    """Bytes of VM state in this image; 0 on all nodes but the vmstate one."""
    date: datetime
    vm_clock_ns: int


#: The rows of each node's snapshot table, by node-name.
SnapshotTables = Mapping[str, tuple[NodeSnapshot, ...]]


class BlockNode(Struct, frozen=True):
    """A block node, as query-named-block-nodes and the block graph have it."""

    node_name: str
    driver: str
    read_only: bool = False
    active: bool = True
    """False: an image that is inactive because of a migration (QEMU 10.0 and later tell)."""
    filename: str = ""
    virtual_size: int = 0
    """Bytes, as those above see it; 0 where QEMU does not tell."""
    encrypted: bool = False
    """The image itself is (a qcow2 of format luks or aes), whatever lies below it."""
    external_data_file: bool = False
    refcount_bits: int | None = None
    dirty_bitmaps: tuple[str, ...] = ()
    """The name of each; "" for one that belongs to a block job or a filter."""
    snapshots: tuple[NodeSnapshot, ...] = ()
    children: tuple[tuple[str, str], ...] = ()
    """(name of the edge, node-name) of each child: "file", "backing", "data-file", …"""

    @property
    def is_temporary(self) -> bool:
        """Whether this is the overlay of ``snapshot=on``, which QEMU deletes when it ends.

        QEMU names it vl.XXXXXX, in $TMPDIR or /var/tmp (block.c: create_tmp_file), and tells no other way.
        """
        has_backing = any(name == "backing" for name, _ in self.children)
        return has_backing and bool(re.search(r"(^|/)vl\.\w{6}$", self.filename))

    def tagged(self, tag: str) -> tuple[NodeSnapshot, ...]:
        """This node's snapshots of that tag: in one image the same tag can stand more than once."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.tag == tag)


def device_id(path: str) -> str:
    """A device's id, out of ``id`` or ``/machine/peripheral/id/virtio-backend``; "" without one."""
    parts = [part for part in path.split("/") if part not in ("virtio-backend", "")]
    return "" if not parts or "peripheral-anon" in parts else parts[-1]


class Peripheral(Struct, frozen=True):
    """A device that the user has given the guest, with -device or device_add."""

    path: str
    """In the object tree: ``/machine/peripheral/ID``, or ``/machine/peripheral-anon/device[N]``."""
    model: str
    """Its QOM type, such as ``virtio-blk-pci``."""

    @property
    def device_id(self) -> str:
        """Its id; "" without one."""
        return device_id(self.path)

    @property
    def label(self) -> str:
        """What a user calls it, and an option takes: its id, or its path where it has none."""
        return self.device_id or self.path


class BlockBackend(Struct, frozen=True):
    """A user of a block node: a guest device, an export, a block job."""

    name: str = ""
    """The -drive id; "" for a -blockdev disk and for exports and jobs."""
    qdev: str = ""
    """The guest device: its id or its path in the object tree; "" where it is no guest device."""
    qdev_type: str = ""
    """The device model, such as ``cfi.pflash01``; "" where it was not asked for."""
    removable: bool = False
    root: str | None = None
    """The node-name; None in an empty drive."""

    @property
    def label(self) -> str:
        """The shortest name that a user gave it."""
        if self.name:
            return self.name
        return self.device_id

    @property
    def device_id(self) -> str:
        """The guest device's id; "" without one."""
        return device_id(self.qdev)


class Job(Struct, frozen=True):
    """A row of query-jobs."""

    id: str
    type: str
    status: str
    error: str | None = None

    @property
    def is_concluded(self) -> bool:
        """Whether it only waits for job-dismiss."""
        return self.status == "concluded"


class BlockJob(Job, frozen=True):
    """A job that copies disks: mirror, commit, stream or backup, that has not concluded."""

    nodes: tuple[tuple[str, str], ...] = ()
    """(name of the edge, node-name) of each node that it works on: "main node", "source", "target", …; none where the
    monitor does not tell."""

    @property
    def targets(self) -> frozenset[str]:
        """The node-names that it writes to."""
        return frozenset(node for edge, node in self.nodes if edge in ("target", "base"))


class BlockGraph(Struct, frozen=True):
    """All block nodes and their users, in QEMU's own order; and the guest's devices, among which others may hold data.

    :ivar nodes: by node-name, oldest first.
    :ivar backends: in the order of QEMU's ``blk_all``, which is the order of their creation.
    :ivar with_parents: the node-names that another node, a device, an export or a job uses.
    :ivar has_edges: False where QEMU does not tell how nodes are connected.
    :ivar chooses_devices: False where QEMU itself takes all devices (HMP): none can be left out, or carried.
    :ivar jobs: what it is busy with.
    :ivar peripherals: the devices that the user has given the guest, of whatever kind.
    """

    nodes: dict[str, BlockNode]
    backends: tuple[BlockBackend, ...]
    with_parents: frozenset[str] = frozenset()
    has_edges: bool = True
    chooses_devices: bool = True
    jobs: tuple[BlockJob, ...] = ()
    peripherals: tuple[Peripheral, ...] = ()

    def with_tables(self, tables: SnapshotTables) -> BlockGraph:
        """This graph with the snapshot tables of a later moment; a node that is gone by then holds nothing."""
        nodes = {
            name: msgspec.structs.replace(node, snapshots=tables.get(name, ())) for name, node in self.nodes.items()
        }
        return msgspec.structs.replace(self, nodes=nodes)


class Migration(Struct, frozen=True):
    """What query-migrate and query-migrate-capabilities say."""

    status: str | None = None
    blocked_reasons: tuple[str, ...] = ()
    capabilities: frozenset[str] = frozenset()
    error: str | None = ""
    """What QEMU notes of a migration that failed, or that was cancelled while it was set up; None where the monitor
    does not tell."""

    def spoils_loads(self, version: QemuVersion) -> bool:
        """Whether that error is there, or may be, and QEMU fails for it in the middle of any load, with the disks
        reverted already (seen in 10.0 and 11.1; 7.2 loads)."""
        return self.error != "" and version >= _ERRORS_SPOIL_LOADS_SINCE


class Role(StrEnum):
    """What a device is for the guest."""

    DISK = "disk"
    CDROM = "cdrom"
    FLOPPY = "floppy"
    PFLASH = "pflash"
    EXPORT = "export or job"
    NODE = "unattached node"
    OUTSIDE = "outside QEMU"
    """It keeps its contents where the block layer does not see them: see :mod:`qsnap.model.outside`."""


#: What people call a node: the user's name for the device of each name that QEMU made up ("#block123"), or of a path.
Labels = dict[str, str]


class Verdict(StrEnum):
    """What a save does with a device."""

    SAVED = "saved"
    """It gets a snapshot."""
    CARRIED = "carried"
    """It cannot have a snapshot, and its contents travel inside the VM state."""
    IGNORED = "ignored"
    """Empty or read-only: there is nothing to save."""
    EXCLUDED = "excluded"
    """Left out because the user said so."""
    REFUSED = "refused"
    """Writable and unable to snapshot."""


class Device(Struct, frozen=True):
    """A block device of the guest, and what becomes of it in a save."""

    node: str | None
    """The node-name; None in an empty drive. Of a device outside the block layer its path in the object tree."""
    device: str
    driver: str
    role: Role
    verdict: Verdict
    why: str = ""
    cure: str = ""
    image: str | None = None
    """The node that takes the snapshot: this one, or the one below its filters; None where none can."""


class Severity(StrEnum):
    """What a finding does: refuse the operation, or warn and go on."""

    REFUSE = "refuse"
    WARN = "warn"


class Finding(Struct, frozen=True):
    """Something that a pre-check has to say. ``code`` is for scripts; ``message`` and ``cure`` for people."""

    code: str
    severity: Severity
    message: str
    cure: str = ""
    node: str | None = None

    @classmethod
    def refusal(cls, code: str, message: str, cure: str = "", node: str | None = None) -> Finding:
        """One that refuses the operation."""
        return cls(code=code, severity=Severity.REFUSE, message=message, cure=cure, node=node)

    @classmethod
    def warning(cls, code: str, message: str, cure: str = "", node: str | None = None) -> Finding:
        """One that only warns."""
        return cls(code=code, severity=Severity.WARN, message=message, cure=cure, node=node)

    @property
    def refuses(self) -> bool:
        """Whether it stands in the way, rather than only warns."""
        return self.severity is Severity.REFUSE


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
    labels: Labels = {}
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


class CheckReport(Struct, frozen=True):
    """The answer of the pre-checks."""

    ok: bool
    runstate: RunState
    vmstate: str | None
    devices: tuple[Device, ...]
    findings: tuple[Finding, ...]

    @property
    def saved(self) -> tuple[str, ...]:
        """The node-names that a save takes a snapshot of, in QEMU's order; an image with two users once."""
        return tuple(dict.fromkeys(d.image for d in self.devices if d.verdict is Verdict.SAVED and d.image))

    @property
    def roots(self) -> tuple[str, ...]:
        """For each of :attr:`saved` the topmost node of a device: what a snapshot without a job is asked of."""
        above = {d.image: d.node for d in reversed(self.devices) if d.verdict is Verdict.SAVED and d.image and d.node}
        return tuple(above[image] for image in self.saved)

    @property
    def excluded(self) -> tuple[str, ...]:
        """The node-names that are left out because the user said so."""
        left_out = (d.image or d.node for d in self.devices if d.verdict is Verdict.EXCLUDED)
        return tuple(name for name in left_out if name)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that do not refuse."""
        return tuple(finding for finding in self.findings if not finding.refuses)


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
    labels: Labels = {}
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
    labels: Labels = {}
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
    labels: Labels = {}
    files: dict[str, tuple[str, ...]] = {}
    """For each tag the paths of the state files that went with it."""


class Recovered(Struct, frozen=True):
    """What was done about a run that died."""

    operation: str
    """"save", "load" or "delete"; "" where its claim could not be read, and nothing is known of it."""
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


def tag_problem(tag: str) -> str | None:
    """Why QEMU or a terminal would make something else of this tag; None for a good one.

    QEMU takes an empty tag, cuts a long one without a word, and HMP is wrecked by control characters.
    """
    if not tag:
        return "the tag is empty"
    try:
        size = len(tag.encode())
    except UnicodeEncodeError:
        return "the tag is not valid UTF-8"
    if size > MAX_TAG_BYTES:
        return f"the tag has {size} bytes, and QEMU keeps {MAX_TAG_BYTES}"
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in tag):
        return "the tag holds control characters"
    return None


def series_tag(prefix: str, now: datetime) -> str:
    """The name of a snapshot of a series, from the local time *now*."""
    return f"{prefix}-{now:%Y%m%dT%H%M%S}"


def series_of(tag: str) -> str | None:
    """The prefix of the series of which a tag is; None for one that is of none."""
    match = re.fullmatch(r"(.+)-[0-9]{8}T[0-9]{6}", tag)
    return match[1] if match else None


def is_of_series(tag: str, prefix: str) -> bool:
    """Whether :func:`series_tag` has made that name; a name made by hand is of no series."""
    return bool(re.fullmatch(rf"{re.escape(prefix)}-[0-9]{{8}}T[0-9]{{6}}", tag))


def automatic_tag(now: datetime) -> str:
    """The name of a snapshot that was given none: do_savevm's, from the local time *now*."""
    return now.strftime("vm-%Y%m%d%H%M%S")
