"""Snapshots of a VM that is off, by its images: what there is, device by device, whether it is whole, and deletion.

It goes by the same rules as with a VM that runs: the images are its devices, in the order in which they are given. This
process opens them, as QEMU would; ``qemu-img`` deletes, and refuses if a QEMU has an image open.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from qsnap.errors import BadUsage, NotSupported, PrecheckRefused, QsnapError
from qsnap.host import files
from qsnap.inventory import qcow2
from qsnap.inventory.inventory import Inventory
from qsnap.inventory.lineage import forget, lineage
from qsnap.inventory.state_store import StateStore
from qsnap.model.checks import Finding
from qsnap.model.qemu import BlockBackend, BlockGraph, BlockNode, NodeSnapshot
from qsnap.model.results import DeleteResult, VerifyResult
from qsnap.model.snapshots import Snapshot, Tree
from qsnap.tags import is_of_series, looks_like_id

if TYPE_CHECKING:
    from qsnap.monitor import Monitor
    from qsnap.operations.progress import Watcher


class Images:
    """The images of a VM that is off; the methods are those of :class:`qsnap.VM`.

    :raise BadUsage: one is not there, may not be read, or is not qcow2, or its table of snapshots is damaged.
    """

    def __init__(self, paths: Sequence[str], state_dir: str | None = None) -> None:
        self._paths = [Path(os.path.realpath(path)) for path in dict.fromkeys(paths)]
        self._state_dir = None if state_dir is None else Path(state_dir)
        self._files = []
        for path in self._paths:
            try:
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
                list(qcow2.rows(self._files[-1], qcow2.header(self._files[-1])))
            except OSError as error:
                raise BadUsage(f"{path} cannot be read: {error.strerror}") from error
            except qcow2.Unreadable as error:
                raise BadUsage(f"{path}: {error}") from error

    def close(self) -> None:
        """Close the images."""
        for file in self._files:
            os.close(file)

    async def tree(self) -> Tree:
        """See :meth:`qsnap.VM.tree`."""
        inventory = self._look()
        known = lineage(inventory, ())
        return Tree(snapshots=known.added_to(inventory.notes.added_to(inventory.snapshots)), position=known.position)

    async def show(self, tag: str) -> tuple[Snapshot, dict[str, tuple[NodeSnapshot, ...]]]:
        """See :meth:`qsnap.VM.show`."""
        inventory = self._look()
        snapshot = inventory.find(tag)
        if snapshot is None:
            raise inventory.not_found(tag)
        (snapshot,) = inventory.notes.added_to([snapshot])
        return snapshot, {name: inventory.graph.nodes[name].tagged(snapshot.disk_tag) for name in snapshot.devices}

    async def verify(
        self, *tags: str, prefix: str | None = None, read_data: bool = False, watch: Watcher | None = None
    ) -> VerifyResult:
        """See :meth:`qsnap.VM.verify`. Checksums are compared, and not written down."""
        from qsnap.operations.verify import verify
        from qsnap.runs.run import Run

        inventory = self._look()
        if missing := [tag for tag in tags if inventory.find(tag) is None]:
            raise inventory.not_found(missing[0])
        chosen = [
            one
            for one in inventory.notes.added_to(inventory.snapshots)
            if (is_of_series(one.tag, prefix) if prefix is not None else not tags or one.tag in tags)
        ]
        # Of its monitor a verification takes nothing but the process that has the images open: this one
        run = Run(cast("Monitor", SimpleNamespace(pid=os.getpid())), inventory.store)
        result, _ = await verify(run, chosen, inventory, read_data=read_data, watch=watch)
        return result

    async def delete(self, *tags: str, missing_ok: bool = False, alone: bool = False) -> DeleteResult:
        """See :meth:`qsnap.VM.delete`. All tags are looked up before the first one is deleted.

        :raise PrecheckRefused: one is protected; or was saved together with other VMs, and not *alone*.
        :raise NotSupported: qemu-img is not installed.
        :raise QsnapError: an image is in use, or qemu-img reports an error.
        """
        inventory = self._look()
        deleted: dict[str, tuple[str, ...]] = {}
        gone: dict[str, tuple[str, ...]] = {}
        held = {tag: inventory.holding(tag) for tag in dict.fromkeys(tags)}
        for tag, holding in held.items():
            if not holding.exists and not missing_ok:
                raise inventory.not_found(tag)
            if refusals := [*_refusals(inventory, tag, alone=alone)]:
                raise PrecheckRefused("nothing was deleted", refusals, "the images were not touched")
            if any(map(looks_like_id, holding.tags)):
                raise QsnapError(f"{tag!r} could be the ID of another snapshot for qemu-img; nothing was deleted")
        for tag, holding in held.items():
            for disk_tag in holding.tags:
                for node in holding.nodes:
                    if inventory.graph.nodes[node].tagged(disk_tag):
                        await asyncio.to_thread(self._delete, disk_tag, self._path_of(inventory, node))
            for path in holding.files:
                files.remove(Path(path))
            deleted[tag] = holding.nodes
            gone |= {tag: holding.files} if holding.files else {}
        after = self._look()
        with suppress(QsnapError):
            after.notes.forget(after.snapshots)
        forget(after)
        return DeleteResult(deleted=deleted, files=gone)

    @staticmethod
    def _delete(tag: str, path: Path) -> None:
        try:
            done = subprocess.run(
                ["qemu-img", "snapshot", "-d", tag, "--", path], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise NotSupported("qemu-img is not installed (Debian: apt install qemu-utils)") from None
        if done.returncode:
            in_use = (
                "it is in use: a QEMU has it open. Name the VM instead of its images" if "lock" in done.stderr else ""
            )
            raise QsnapError(f"{tag!r} was not deleted from {path}: {in_use or done.stderr.strip()}")

    @staticmethod
    def _path_of(inventory: Inventory, node: str) -> Path:
        return Path(inventory.graph.nodes[f"{node} file"].filename)

    def _look(self) -> Inventory:
        """The images, as they are now."""
        nodes: dict[str, BlockNode] = {}
        backends = []
        names = [path.name for path in self._paths]
        for path, file in zip(self._paths, self._files, strict=True):
            name = path.name if names.count(path.name) == 1 else str(path)
            head = qcow2.header(file)
            below = f"{name} file"
            nodes[name] = BlockNode(
                node_name=name, driver="qcow2", filename=str(path), virtual_size=head.disk_size,
                encrypted=head.is_encrypted, refcount_bits=head.refcount_bits, children=(("file", below),),
                snapshots=tuple(map(_row, qcow2.rows(file, head))),
            )  # fmt: skip
            nodes[below] = BlockNode(node_name=below, driver="file", filename=str(path))
            backends.append(BlockBackend(name=name, root=name))
        graph = BlockGraph(nodes=nodes, backends=tuple(backends), with_parents=frozenset(nodes))
        return Inventory(graph, StateStore(os.getpid(), self._state_dir))


def _refusals(inventory: Inventory, tag: str, *, alone: bool) -> Iterator[Finding]:
    """What speaks against the deletion of *tag*."""
    for one in inventory.notes.added_to(inventory.under(tag)):
        if one.protected:
            cure = f"start the VM, and: qsnap unprotect {shlex.quote(tag)}"
            yield Finding.refusal("protected", f"snapshot {tag!r} is protected", cure)
        elif one.together and not alone:
            yield Finding.refusal(
                "part-of-group",
                f"snapshot {tag!r} was saved together with {', '.join(one.together.vms)}",
                "start these VMs, and delete it with --together; or --no-together, for this VM alone",
            )


def _row(row: qcow2.Row) -> NodeSnapshot:
    identity, tag, seconds = row.name
    return NodeSnapshot(
        tag=tag, id=identity, vm_state_size=row.size, date=datetime.fromtimestamp(seconds + row.date_ns / 1e9, UTC),
        vm_clock_ns=row.vm_clock_ns,
    )  # fmt: skip
