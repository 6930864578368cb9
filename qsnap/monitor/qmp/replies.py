"""QMP replies as QEMU sends them, typed, and what they mean in qsnap's words.

Only the fields that are used; unknown ones are passed over, as QMP may add them at any time. Names follow
qapi/block-core.json, job.json, migration.json and run-state.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from qsnap.model.qemu import (
    BlockBackend,
    BlockGraph,
    BlockJob,
    BlockNode,
    Job,
    NodeSnapshot,
    Peripheral,
    QemuVersion,
    SnapshotTables,
)
from qsnap.monitor.names import STATE_NODE

#: The types of jobs that copy disks (qapi/job.json: JobType).
BLOCK_JOBS = frozenset({"mirror", "commit", "stream", "backup"})
#: QAPI's int and size, as far as they mean something here.
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
#: Up to the year 9998: in any time zone there is a date for it.
Seconds = Annotated[int, msgspec.Meta(ge=0, lt=253370764800)]
#: An enum's word: it is shown as it is.
Word = Annotated[str, msgspec.Meta(pattern="^[a-z0-9-]{1,40}$")]


class Wire(msgspec.Struct, frozen=True, rename="kebab"):
    """Base of the replies: QAPI writes names with hyphens."""


class SnapshotInfo(Wire, frozen=True):
    id: str
    name: str
    vm_state_size: Number
    date_sec: Seconds
    date_nsec: Number
    vm_clock_sec: Number
    vm_clock_nsec: Number


class FormatSpecific(Wire, frozen=True):
    type: str
    data: dict[str, object] | None = None


class ImageInfo(Wire, frozen=True):
    filename: str = ""
    virtual_size: Size = 0
    snapshots: list[SnapshotInfo] = []
    format_specific: FormatSpecific | None = None


class NodeChild(Wire, frozen=True):
    child: str
    node_name: str


class DirtyBitmap(Wire, frozen=True):
    name: str = ""


class BlockDeviceInfo(Wire, frozen=True):
    drv: str
    ro: bool
    file: str
    image: ImageInfo
    node_name: str = ""
    active: bool = True
    dirty_bitmaps: list[DirtyBitmap] = []
    encrypted: bool = False
    children: list[NodeChild] | None = None


class Inserted(Wire, frozen=True):
    node_name: str = ""


class BlockInfo(Wire, frozen=True):
    device: str
    removable: bool
    qdev: str = ""
    inserted: Inserted | None = None


class GraphNode(Wire, frozen=True):
    id: int
    type: str
    name: str


class GraphEdge(Wire, frozen=True):
    parent: int
    child: int
    name: str


class XDbgBlockGraph(Wire, frozen=True):
    nodes: list[GraphNode]
    edges: list[GraphEdge]

    @property
    def has_jobs(self) -> bool:
        """Whether there are block jobs, concluded ones included."""
        return any(node.type == "block-job" for node in self.nodes)


class StatusInfo(Wire, frozen=True):
    status: Word


class Timestamp(Wire, frozen=True):
    seconds: Seconds
    microseconds: Seconds


class NameInfo(Wire, frozen=True):
    name: str = ""


class MigrationRam(Wire, frozen=True):
    total: Size = 0
    remaining: Size = 0
    normal: Size = 0
    duplicate: Size = 0


class MigrationInfo(Wire, frozen=True):
    status: Word | None = None
    blocked_reasons: list[str] = []
    ram: MigrationRam | None = None
    error_desc: str = ""


class MigrateParameters(Wire, frozen=True):
    max_bandwidth: Size = 0
    downtime_limit: Size = 0
    tls_creds: str = ""
    mode: str = "normal"


class CapabilityStatus(Wire, frozen=True):
    capability: str
    state: bool


class AddedFile(Wire, frozen=True):
    fdset_id: Number


class FileOfSet(Wire, frozen=True):
    opaque: str = ""


class FileSet(Wire, frozen=True):
    fdset_id: Number
    fds: list[FileOfSet]


class NodeName(Wire, frozen=True):
    node_name: str = ""


class Memdev(Wire, frozen=True):
    size: Size = 0
    share: bool = True
    id: str = ""


class MemoryInfo(Wire, frozen=True):
    base_memory: Size
    plugged_memory: Size = 0


class VersionTriple(Wire, frozen=True):
    major: int
    minor: int
    micro: int


class VersionInfo(Wire, frozen=True):
    qemu: VersionTriple

    @property
    def version(self) -> QemuVersion:
        return QemuVersion(self.qemu.major, self.qemu.minor, self.qemu.micro)


class VersionReply(Wire, frozen=True):
    """The whole message that answers query-version."""

    result: VersionInfo = msgspec.field(name="return")


class ObjectPropertyInfo(Wire, frozen=True):
    name: str
    type: str


class JobInfo(Wire, frozen=True):
    id: str
    type: str
    status: Word
    error: str | None = None

    def model(self) -> Job:
        return Job(id=self.id, type=self.type, status=self.status, error=self.error)


def node_snapshot(info: SnapshotInfo) -> NodeSnapshot:
    """A snapshot table's row; QEMU gives the date in UTC."""
    return NodeSnapshot(
        tag=info.name,
        id=info.id,
        vm_state_size=info.vm_state_size,
        date=datetime.fromtimestamp(info.date_sec, UTC)
        + timedelta(microseconds=info.date_nsec % 1_000_000_000 // 1000),
        vm_clock_ns=info.vm_clock_sec * 1_000_000_000 + info.vm_clock_nsec,
    )


def image_path(filename: str) -> str:
    """The path inside what QEMU shows as a file name: ``json:{…}`` where options do not fit into a name."""
    if not filename.startswith("json:"):
        return filename.removeprefix("file:")
    try:
        options = json.loads(filename.removeprefix("json:"))
        while isinstance(options.get("file"), dict):
            options = options["file"]
        return str(options.get("filename", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""


def block_node(info: BlockDeviceInfo, children: Sequence[tuple[str, str]]) -> BlockNode:
    """A node with its edges."""
    details = (info.image.format_specific and info.image.format_specific.data) or {}
    refcount_bits = details.get("refcount-bits")
    return BlockNode(
        node_name=info.node_name,
        driver=info.drv,
        read_only=info.ro,
        active=info.active,
        filename=image_path(info.file or info.image.filename),
        virtual_size=info.image.virtual_size,
        encrypted=info.encrypted,
        external_data_file=bool(details.get("data-file")),
        refcount_bits=refcount_bits if isinstance(refcount_bits, int) else None,
        dirty_bitmaps=tuple(bitmap.name for bitmap in info.dirty_bitmaps),
        snapshots=_snapshots(info),
        children=tuple(children),
    )


def snapshot_tables(infos: Iterable[BlockDeviceInfo]) -> SnapshotTables:
    """What query-named-block-nodes says of snapshots."""
    return {info.node_name: _snapshots(info) for info in infos}


def _snapshots(info: BlockDeviceInfo) -> tuple[NodeSnapshot, ...]:
    return tuple(map(node_snapshot, info.image.snapshots))


def _in_order_of_creation(graph: XDbgBlockGraph, rows: Mapping[str, BlockBackend]) -> list[GraphNode]:
    """The graph's block backends as QEMU's ``blk_all`` has them.

    query-block is in that order; the graph is in the reverse one (seen on 5.2 to 11.1), unless that changes.
    """
    backends = [node for node in graph.nodes if node.type == "block-backend"]
    place = {name: number for number, name in enumerate(rows)}
    known = [place[node.name] for node in backends if node.name in place]
    return backends if len(known) > 1 and known == sorted(known) else backends[::-1]


def block_graph(
    devices: Iterable[BlockInfo],
    infos: Sequence[BlockDeviceInfo],
    graph: XDbgBlockGraph | None,
    qdev_types: Mapping[str, str],
    jobs: Iterable[JobInfo] = (),
    peripherals: Sequence[Peripheral] = (),
) -> BlockGraph:
    """query-block, query-named-block-nodes, x-debug-query-block-graph and the block jobs of query-jobs, joined.

    The third alone knows all users of a node in QEMU's order: query-block leaves out exports and jobs. Where
    it is missing, the children that QEMU tells since 10.1 stand in for its edges.

    :param infos: newest first, as QEMU gives them.
    :param qdev_types: device model by query-block's ``qdev``.
    """
    rows = [
        BlockBackend(
            name=row.device,
            qdev=row.qdev,
            qdev_type=qdev_types.get(row.qdev, ""),
            removable=row.removable,
            root=row.inserted.node_name if row.inserted else None,
        )
        for row in devices
    ]
    children: dict[str, list[tuple[str, str]]] = {}
    job_nodes: dict[str, list[tuple[str, str]]] = {}
    if graph is None:
        for info in infos:
            children[info.node_name] = [(c.child, c.node_name) for c in info.children or ()]
        with_parents = {child for edges in children.values() for _, child in edges}
        backends = rows
    else:
        named = {node.id: node for node in graph.nodes}
        roots: dict[int, str] = {}
        for edge in graph.edges:
            parent, child = named[edge.parent], named[edge.child]
            if parent.type == "block-driver":
                children.setdefault(parent.name, []).append((edge.name, child.name))
            elif parent.type == "block-job":
                job_nodes.setdefault(parent.name, []).append((edge.name, child.name))
            else:
                roots.setdefault(edge.parent, child.name)
        with_parents = {named[edge.child].name for edge in graph.edges}
        by_name = {row.name or row.qdev: row for row in rows}
        backends = [
            msgspec.structs.replace(by_name.get(node.name, BlockBackend()), root=roots.get(node.id))
            for node in _in_order_of_creation(graph, by_name)
        ]
    return BlockGraph(
        nodes={
            info.node_name: block_node(info, children.get(info.node_name, ()))
            for info in reversed(infos)
            if info.node_name and not info.node_name.startswith(STATE_NODE)
        },
        backends=tuple(backends),
        with_parents=frozenset(with_parents),
        has_edges=graph is not None or any(info.children is not None for info in infos),
        jobs=tuple(
            BlockJob(id=job.id, type=job.type, status=job.status, nodes=tuple(job_nodes.get(job.id, ())))
            for job in jobs
            if job.type in BLOCK_JOBS and not job.model().is_concluded
        ),
        peripherals=tuple(peripherals),
    )
