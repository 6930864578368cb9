"""What QEMU reports, typed. No I/O here.

Sizes are bytes, dates are aware datetimes, and times that QEMU counts in nanoseconds say so in their name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

#: query-migrate's words for a migration that is not under way (qapi/migration.json: MigrationStatus).
MIGRATION_IDLE = frozenset({None, "none", "completed", "failed", "cancelled"})


class RunState(StrEnum):
    """The guest's run state, in QEMU's words (qapi/run-state.json). An unknown one is kept as it is."""

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


#: See :meth:`Migration.spoils_loads`; versions between 7.2 and 10.0 were not tried.
_ERRORS_SPOIL_LOADS_SINCE = QemuVersion(9, 0, 0)


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the types below: immutable, named arguments only."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, with devices by the names that people use."""
        plain: dict[str, Any] = named(msgspec.to_builtins(self))
        return plain


#: The keys of node-names in documents; what stands beside them as ``labels`` has the names that people use.
_NODES = ("vmstate", "devices", "missing", "excluded", "carried", "deleted", "rows")


def named(document: Any) -> Any:  # noqa: ANN401 (any document)
    """A document with the node-names that QEMU made up ("#block123") replaced, as far as its ``labels`` tell.

    Such a name is another one after each start of QEMU. ``labels`` keeps it beside.
    """
    if isinstance(document, list | tuple):
        return [named(one) for one in document]
    if not isinstance(document, dict):
        return document
    labels: dict[str, str] = document.get("labels") or {}
    return {
        key: _renamed(value, labels) if key in _NODES and labels else value if key == "labels" else named(value)
        for key, value in document.items()
    }


def _renamed(value: Any, labels: Mapping[str, str]) -> Any:  # noqa: ANN401 (a value of a document)
    match value:
        case str():
            return labels.get(value, value)
        case list() | tuple():
            return [_renamed(one, labels) for one in value]
        case dict():
            return {labels.get(key, key): _renamed(one, labels) for key, one in value.items()}
        case _:
            return value


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
    """False: the image is inactive because of a migration (QEMU 10.0 and later report it)."""
    filename: str = ""
    virtual_size: int = 0
    """Bytes, as its parents see it; 0 if QEMU does not report it."""
    encrypted: bool = False
    """The image itself is encrypted (a qcow2 of format luks or aes), whatever lies below it."""
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

        QEMU names it vl.XXXXXX, in $TMPDIR or /var/tmp (block.c: create_tmp_file); nothing else identifies it.
        """
        has_backing = any(name == "backing" for name, _ in self.children)
        return has_backing and bool(re.search(r"(^|/)vl\.\w{6}$", self.filename))

    def tagged(self, tag: str) -> tuple[NodeSnapshot, ...]:
        """This node's snapshots of that tag: one image can hold the same tag more than once."""
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
        """The name that users and options use: its id, or its path if it has none."""
        return self.device_id or self.path


class BlockBackend(Struct, frozen=True):
    """A user of a block node: a guest device, an export, a block job."""

    name: str = ""
    """The -drive id; "" for a -blockdev disk and for exports and jobs."""
    qdev: str = ""
    """The guest device: its id or its path in the object tree; "" if it is not a guest device."""
    qdev_type: str = ""
    """The device model, such as ``cfi.pflash01``; "" if qsnap did not query it."""
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
        """Whether the job only waits for job-dismiss."""
        return self.status == "concluded"


class BlockJob(Job, frozen=True):
    """A job that copies disks: mirror, commit, stream or backup, that has not concluded."""

    nodes: tuple[tuple[str, str], ...] = ()
    """(name of the edge, node-name) of each node that it works on: "main node", "source", "target", …; none if the
    monitor does not report them."""

    @property
    def targets(self) -> frozenset[str]:
        """The node-names that it writes to."""
        return frozenset(node for edge, node in self.nodes if edge in ("target", "base"))


class BlockGraph(Struct, frozen=True):
    """All block nodes and their users, in QEMU's own order; and the guest's devices, because others may hold data too.

    :ivar nodes: by node-name, oldest first.
    :ivar backends: in the order of QEMU's ``blk_all``, which is the order of their creation.
    :ivar with_parents: the node-names that another node, a device, an export or a job uses.
    :ivar has_edges: False if QEMU does not report how nodes are connected.
    :ivar chooses_devices: False if QEMU itself takes all devices (HMP): none can be left out, or carried.
    :ivar jobs: the jobs that copy disks now.
    :ivar peripherals: the devices that the user has given the guest, of whatever kind.
    """

    nodes: dict[str, BlockNode]
    backends: tuple[BlockBackend, ...]
    with_parents: frozenset[str] = frozenset()
    has_edges: bool = True
    chooses_devices: bool = True
    jobs: tuple[BlockJob, ...] = ()
    peripherals: tuple[Peripheral, ...] = ()

    @property
    def tables(self) -> SnapshotTables:
        """The snapshot tables of all nodes."""
        return {name: node.snapshots for name, node in self.nodes.items()}

    def with_tables(self, tables: SnapshotTables) -> BlockGraph:
        """This graph with snapshot tables that were read later; a node without a table then holds no snapshots."""
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
    """The error that QEMU keeps of a migration that failed, or that was cancelled while it was set up; None if the
    monitor does not report it."""

    def spoils_loads(self, version: QemuVersion) -> bool:
        """Whether QEMU keeps that error, or may keep it, so that it fails in the middle of any load, with the disks
        reverted already (seen in 10.0 and 11.1; 7.2 loads)."""
        return self.error != "" and version >= _ERRORS_SPOIL_LOADS_SINCE
