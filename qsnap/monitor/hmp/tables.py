"""What the human monitor's tables say, in qsnap's words. Pure.

Formats as QEMU prints them (block/qapi.c: bdrv_snapshot_dump and bdrv_node_info_dump; block/monitor/
block-hmp-cmds.c: print_block_info; migration/migration-hmp-cmds.c), held against 5.2, 7.2, 10.0 and 11.1.
They are made for people: a size has three digits, a time no zone, and what lies above an image is told by
its ``json:{…}`` file name alone. A table that does not have the form it should have is an error: nothing in
it is guessed.

Snapshots are read from ``info block -n -v``, which prints the snapshot table of every image. ``info snapshots`` prints
the same columns, but of all disks together, and nothing of backing images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from qsnap.errors import MonitorError
from qsnap.model.qemu import (
    BlockBackend,
    BlockGraph,
    BlockJob,
    BlockNode,
    Migration,
    NodeSnapshot,
    Peripheral,
    QemuVersion,
    RunState,
    SnapshotTables,
)
from qsnap.monitor.qmp.replies import image_path

#: Drivers that open a file or a server themselves; all others stand on another node.
_PROTOCOLS = frozenset(
    {"file", "host_device", "host_cdrom", "nbd", "rbd", "ssh", "http", "https", "ftp", "ftps", "iscsi", "nfs",
     "gluster", "null-co", "null-aio", "nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user",
     "virtio-blk-vhost-vdpa", "io_uring", "vvfat", "sheepdog"}
)  # fmt: skip

#: Filters that block jobs put above a disk, and how each calls the child that it stands on. Each is shown with the file
#: name of that child.
_JOB_FILTERS = {"mirror_top": "backing", "commit_top": "backing", "backup-top": "backing", "copy-before-write": "file"}


class TableLayout(NamedTuple):
    """The widths of a snapshot table's columns, in bytes."""

    id_width: int
    tag_width: int
    size_width: int


def table_layout(header: str, version: QemuVersion) -> TableLayout | None:
    """The layout that *header* belongs to; None where it is none. 5.2 and 6.0 differ in nothing that it shows."""
    match header.split():
        case ["ID", "TAG", "VM", "SIZE", "DATE", "VM", "CLOCK", "ICOUNT"]:
            return TableLayout(9, 16, 8) if version >= (6, 0) else TableLayout(9, 17, 7)
        case ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]:
            return TableLayout(7, 16, 8)
        case _:
            return None


#: Before 9.0, nothing parts the date from a VM clock of 100 hours or more.
_ROW_END = re.compile(
    rb"(?P<size>(?P<number>\d+(?:\.\d+)?(?:e\+\d+)?) (?P<unit>[KMGTPE]i)?B) +(?P<date>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) *"
    rb"(?P<h>\d+):(?P<m>\d\d):(?P<s>\d\d)\.(?P<ms>\d{3}) *(?:\d+|--)? *$"
)
_UNITS = {None: 0, b"Ki": 10, b"Mi": 20, b"Gi": 30, b"Ti": 40, b"Pi": 50, b"Ei": 60}


def snapshot_row(line: str, layout: TableLayout) -> NodeSnapshot:
    """One row of a snapshot table: found from its end, as a tag may hold anything but control characters.

    Blanks at the end of a tag that does not fill its column are not told from the column's own.

    :raise MonitorError: it is not a row.
    """
    data = line.encode(errors="surrogateescape")
    identity = data.partition(b" ")[0]
    end = _ROW_END.search(data)
    start = max(layout.id_width, len(identity)) + 1
    if end is None or end.start() <= start or not re.fullmatch(rb"\d+|--", identity):
        raise MonitorError(
            f"the snapshot table has a row that cannot be read: {line!r}. A tag with a line break in it does that; "
            "by QMP it can be listed and deleted"
        )
    size_width = max(layout.size_width, len(end["size"]))
    tag = data[start : end.end("size") - size_width - 1]
    if len(tag) <= layout.tag_width:
        tag = tag.rstrip(b" ")
    seconds = (int(end["h"]) * 60 + int(end["m"])) * 60 + int(end["s"])
    return NodeSnapshot(
        tag=tag.decode(errors="replace"),
        id=identity.decode(),
        vm_state_size=int(float(end["number"]) * (1 << _UNITS[end["unit"]])),
        date=datetime.strptime(end["date"].decode(), "%Y-%m-%d %H:%M:%S").astimezone(),
        vm_clock_ns=(seconds * 1000 + int(end["ms"])) * 1_000_000,
    )


class _Entry(NamedTuple):
    """A block of ``info block``: its header, the indented lines below, and the lines about its own image."""

    name: str
    root: str | None
    filename: str
    driver: str
    flags: frozenset[str]
    fields: Mapping[str, str]
    image: Sequence[str]


_HEADER = re.compile(r"(?P<name>\S+?)(?: \((?P<root>[^\s()]+)\))?: (?:\[not inserted\]|(?P<rest>.+))")
_INSERTED = re.compile(r"(?P<filename>.*) \((?P<driver>[\w-]+)(?P<flags>(?:, [\w-]+)*)\)")


def _entries(text: str) -> Iterator[_Entry]:
    """The entries of ``info block`` or ``info block -n -v``."""
    lines = text.splitlines()
    # A header stands at the beginning or behind a blank line, and so does "Images:".
    starts = [i for i, line in enumerate(lines) if line and line != "Images:" and (i == 0 or not lines[i - 1])]
    for start, end in pairwise((*starts, len(lines))):
        header = _HEADER.fullmatch(lines[start])
        inserted = _INSERTED.fullmatch(header["rest"]) if header and header["rest"] else None
        if header is None or (header["rest"] and inserted is None):
            raise MonitorError(f"info block has a line that cannot be read: {lines[start]!r}")
        body = lines[start + 1 : end]
        images = body.index("Images:") if "Images:" in body else len(body)
        fields = (line.strip().partition(":")[::2] for line in body[:images] if line.startswith("    "))
        yield _Entry(
            name=header["name"],
            root=header["root"],
            filename=inserted["filename"] if inserted else "",
            driver=inserted["driver"] if inserted else "",
            flags=frozenset(filter(None, inserted["flags"].split(", "))) if inserted else frozenset(),
            fields={key: value.strip() for key, value in fields},
            image=_own_image(body[images + 1 :]),
        )


def _own_image(lines: Sequence[str]) -> Sequence[str]:
    """The lines of the first image; those of its backing chain follow it."""
    second = next((i for i, line in enumerate(lines) if i and line.startswith("image: ")), len(lines))
    return lines[:second]


def _rows(image: Sequence[str], version: QemuVersion) -> Iterator[NodeSnapshot]:
    if "Snapshot list:" not in image:
        return
    table = image[image.index("Snapshot list:") + 1 :]
    layout = table_layout(table[0], version) if table else None
    if layout is None:
        raise MonitorError(f"the snapshot table has a header that is not known: {table[:1]!r}")
    for line in table[1:]:
        if not line or re.fullmatch(r"[A-Z][a-z ]+:", line):  # the next part
            return
        yield snapshot_row(line, layout)


def block_graph(
    backends: str,
    nodes: str,
    qdev_types: Mapping[str, str],
    version: QemuVersion,
    jobs: str = "No active jobs\n",
    peripherals: Sequence[Peripheral] = (),
) -> BlockGraph:
    """``info block``, ``info block -n -v`` and ``info block-jobs``, joined.

    Which node stands on which is not told; it follows from the file names. Exports are not shown at all, and of jobs
    not what they work on: of what nobody but them uses only a writable image is found, as an unattached node.

    :param qdev_types: device model by what stands behind ``Attached to:``.
    """
    entries = list(_entries(nodes))[::-1]
    edges = {entry.name: tuple(_edges(entry, entries)) for entry in entries}
    users = [_backend(entry, qdev_types) for entry in _entries(backends)]
    parented = {child for children in edges.values() for _, child in children}
    parented |= {user.root for user in users if user.root}
    return BlockGraph(
        nodes={entry.name: _node(entry, edges[entry.name], version) for entry in entries},
        backends=tuple(users),
        with_parents=frozenset(parented),
        chooses_devices=False,
        jobs=tuple(block_jobs(jobs)),
        peripherals=tuple(peripherals),
    )


def block_jobs(text: str) -> Iterator[BlockJob]:
    """``info block-jobs``. It does not tell the status: one that has concluded, and was not dismissed, is there too.

    :raise MonitorError: it has a line that cannot be read.
    """
    for line in text.splitlines():
        job = re.match(r"(?:Type (?P<type>\S+), device|Streaming device) (?P<id>\S+): Completed ", line)
        if job is not None:
            yield BlockJob(id=job["id"], type=job["type"] or "stream", status="")
        elif line not in ("No active jobs", ""):
            raise MonitorError(f"info block-jobs has a line that cannot be read: {line!r}")


def attached_to(backends: str) -> tuple[str, ...]:
    """The devices of ``info block``, each by its id or its path in the object tree."""
    attached = (entry.fields.get("Attached to", "") for entry in _entries(backends))
    return tuple(filter(None, attached))


def _backend(entry: _Entry, qdev_types: Mapping[str, str]) -> BlockBackend:
    qdev = entry.fields.get("Attached to", "")
    # Without a name of its own, a user is shown by its node, or where that is missing by its device.
    is_anonymous = not entry.root and (bool(entry.driver) or entry.name == qdev)
    return BlockBackend(
        name="" if is_anonymous else entry.name,
        qdev=qdev,
        qdev_type=qdev_types.get(qdev, ""),
        removable="Removable device" in entry.fields,
        root=(entry.root or entry.name) if entry.driver else None,
    )


def _node(entry: _Entry, children: tuple[tuple[str, str], ...], version: QemuVersion) -> BlockNode:
    details = dict(line.strip().partition(": ")[::2] for line in entry.image if line.startswith("    "))
    bits = details.get("refcount bits", "")
    return BlockNode(
        node_name=entry.name,
        driver=entry.driver,
        read_only="read-only" in entry.flags,
        active="inactive" not in entry.flags,
        filename=image_path(entry.filename),
        encrypted="encrypted" in entry.flags,
        external_data_file="data file" in details,
        refcount_bits=int(bits) if bits.isdigit() else None,
        dirty_bitmaps=tuple(_bitmaps(entry.image)),
        snapshots=tuple(_rows(entry.image, version)),
        children=children,
    )


def snapshot_tables(nodes: str, version: QemuVersion) -> SnapshotTables:
    """What ``info block -n -v`` says of snapshots."""
    return {entry.name: tuple(_rows(entry.image, version)) for entry in _entries(nodes)}


def _bitmaps(image: Sequence[str]) -> Iterator[str]:
    """The names of the bitmaps that are stored in an image; HMP shows no others.

    QEMU prints the members of each in the order of their names (block/qapi.c: dump_qdict).
    """
    begun = False
    for line in image:
        begun = begun or bool(re.fullmatch(r" {8}\[\d+\]:", line))
        if begun and (name := re.fullmatch(r" +name: (.*)", line)):
            yield name[1]


def _edges(entry: _Entry, entries: Sequence[_Entry]) -> Iterator[tuple[str, str]]:
    """The children of a node: the nodes that are what its file name says it stands on."""
    if edge := _JOB_FILTERS.get(entry.driver):
        below = (e for e in entries if e.filename == entry.filename and e.driver not in {*_JOB_FILTERS, *_PROTOCOLS})
        if (child := next(below, None)) is not None:
            yield edge, child.name
        return
    for edge, wanted in _parts(entry.driver, entry.filename):
        child = next((other for other in entries if _stack(other) == wanted), None)
        if child is not None:
            yield edge, child.name
    if backing := entry.fields.get("Backing file"):
        filename = re.sub(r" \(chain depth: \d+\)$", "", backing)
        candidates = (e for e in entries if e.filename == filename and e.driver not in _PROTOCOLS)
        if (child := next(candidates, None)) is not None:
            yield "backing", child.name


def _stack(entry: _Entry) -> str:
    """What a node is and what it stands on, in one line: ``raw(file=qcow2(file=/a.qcow2))``."""
    return _described(_options(entry.driver, entry.filename))


def _parts(driver: str, filename: str) -> Iterator[tuple[str, str]]:
    """(name of the edge, description) of each child that *filename* tells of, but the backing one."""
    for edge, options in _child_options(_options(driver, filename)):
        if edge != "backing":
            yield edge, _described(options)


def _options(driver: str, filename: str) -> dict[str, object]:
    """A file name as the options that it stands for."""
    if filename.startswith("json:"):
        try:
            options = json.loads(filename.removeprefix("json:"))
        except (ValueError, RecursionError):  # QEMU cuts it at 4096 bytes
            options = None
        if isinstance(options, dict):
            return options
    if driver in _PROTOCOLS:
        return {"driver": driver, "filename": filename}
    return {"driver": driver, "file": {"driver": "file", "filename": filename}}


def _child_options(options: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    for key, value in options.items():
        values = enumerate(value) if isinstance(value, list) else [("", value)]
        for number, child in values:
            if isinstance(child, dict) and "driver" in child:
                yield f"{key}.{number}".rstrip("."), child


def _described(options: Mapping[str, object]) -> str:
    children = sorted((edge, _described(child)) for edge, child in _child_options(options) if edge != "backing")
    if not children:
        return str(options.get("filename", sorted(map(str, options.items()))))
    return f"{options['driver']}({', '.join(f'{edge}={child}' for edge, child in children)})"


def runstate(text: str) -> RunState:
    """``VM status: paused (restore-vm)``."""
    match = re.match(r"VM status: (running|paused)(?: \(single step mode\))?(?: \((?P<why>[\w-]+)\))?\s*$", text)
    if match is None:
        raise MonitorError(f"info status says what cannot be read: {text!r}")
    return RunState(match["why"] or match[1])


def migration(info: str, capabilities: str) -> Migration:
    """``info migrate``, which tells the error of a migration that failed only, and ``info migrate_capabilities``."""
    status = re.search(r"^(?:Migration status|Status): *\t*([\w-]+)(?: \((.*)\))?", info, re.MULTILINE)
    blocked = re.search(r"^Outgoing migration blocked:\n((?:  .+\n?)+)", info, re.MULTILINE)
    return Migration(
        status=status[1] if status else None,
        blocked_reasons=tuple(line.strip() for line in blocked[1].splitlines()) if blocked else (),
        capabilities=frozenset(re.findall(r"^([\w-]+): on$", capabilities, re.MULTILINE)),
        error=None if status and status[1] == "cancelled" else (status and status[2]) or "",
    )


def memory_size(text: str) -> int:
    """Bytes of ``info memory_size_summary``."""
    sizes = re.findall(r"^(?:base|plugged) memory: (\d+)$", text, re.MULTILINE)
    if not sizes:
        raise MonitorError(f"info memory_size_summary says what cannot be read: {text!r}")
    return sum(map(int, sizes))


def objects(text: str) -> dict[str, str]:
    """The names in ``qom-list``, and their types."""
    rows = (line.rpartition(" (") for line in text.splitlines())
    return {name: kind.removesuffix(")") for name, _, kind in rows}


def outside_networks(text: str) -> tuple[str, ...]:
    """The netdevs of ``info network`` that have guest memory written from outside QEMU (vhost-user, vDPA)."""
    rows = re.findall(r"^[ \\]*(\S+): index=\d+,type=(.*)$", text, re.MULTILINE)
    return tuple(name for name, kind in rows if re.search(r"(^|,)vhost-(user|vdpa)", kind))
