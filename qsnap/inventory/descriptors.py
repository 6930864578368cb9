"""The descriptor by which QEMU has a node's image open: it shows where the image is now, whatever its name was then.

QEMU keeps the name that an image had when it was opened. So the name is wrong if the image was renamed since, or if
it is relative to a directory that QEMU has left (with ``-daemonize`` it works in ``/``); or it is not a path
("/dev/fdset/1"). What is found by name is taken. Else the image is among QEMU's other descriptors: it is the only one
that holds a qcow2 image; of several the only one with the snapshots that QEMU tells of; of several such the only one
with that file name, or without that of another node; or it cannot be told.

Facts: proc(5), /proc/PID/fd; docs/interop/qcow2.txt of QEMU for the table of snapshots.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qsnap.host import files, processes
from qsnap.inventory import devices as rules
from qsnap.inventory import qcow2
from qsnap.model.qemu import BlockGraph, BlockNode

_Row = tuple[str, str, int, bool]


def ways(pid: int | None, graph: BlockGraph, node: str) -> Sequence[Path]:
    """Paths by which this process can stat the image file of a node; none if it cannot be seen or identified.

    :param pid: the QEMU process; None if it is not on this machine.
    :param node: the image's node-name.
    """
    file = rules.image_file(graph, node)
    if pid is None or file is None:
        return ()
    return [*processes.visible_files(pid, file.filename)] or _by_contents(pid, graph, graph.nodes[node], file)


def way(pid: int | None, graph: BlockGraph, node: str) -> Path | None:
    """The first of them."""
    return next(iter(ways(pid, graph, node)), None)


def block_device(pid: int | None, graph: BlockGraph, node: str) -> Path | None:
    """A path to the block device of this machine that stores a node's image; None if it is stored otherwise."""
    device = rules.protocol(graph, node)
    if pid is None or device is None or device.driver != "host_device":
        return None
    return next(processes.visible_files(pid, device.filename), None)


def _by_contents(pid: int, graph: BlockGraph, node: BlockNode, file: BlockNode) -> Sequence[Path]:
    try:
        descriptors = sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name))
    except OSError:
        return ()
    others = {other.filename for other in graph.nodes.values() if other.driver == file.driver and other is not file}
    taken = {_identity(way) for name in others - {file.filename} for way in processes.visible_files(pid, name)}
    left = {identity: way for way in descriptors if (identity := _identity(way)) and identity not in taken}
    tables = {way: table for way in left.values() if (table := _snapshots(way)) is not None}
    wanted = [(row.id, row.tag, row.vm_clock_ns // 1_000_000, row.vm_state_size > 0) for row in node.snapshots]
    alike = [way for way, table in tables.items() if table == wanted] or [*tables]
    same_name = [way for way in alike if _base(way) == Path(file.filename).name]
    others_names = {Path(other).name for other in others}
    nobody_s_name = [way for way in alike if _base(way) not in others_names]
    for chosen in [*tables], alike, same_name, nobody_s_name:
        if len(chosen) == 1:
            return [way for way in descriptors if _identity(way) == _identity(chosen[0])]
    return ()


def _base(descriptor: Path) -> str:
    with suppress(OSError):
        return descriptor.readlink().name
    return ""


def _identity(descriptor: Path) -> files.Identity | None:
    """The identity of a regular file; None for another kind, and for a deleted file."""
    try:
        info = descriptor.stat()
    except OSError:
        return None
    return files.identity_of(info) if stat.S_ISREG(info.st_mode) and info.st_nlink else None


def _snapshots(image: Path) -> Sequence[_Row] | None:
    """For each snapshot of a qcow2 image its ID, tag, clock in ms, and whether it has a VM state.

    None if it is not a qcow2 image, or may not be read.
    """
    with suppress(OSError, qcow2.Unreadable):
        file = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            rows = qcow2.rows(file, qcow2.header(file))
            return [(*row.name[:2], row.vm_clock_ns // 1_000_000, row.size > 0) for row in rows]
        finally:
            os.close(file)
    return None
